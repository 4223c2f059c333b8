"""Forgetting a class of a trained run, as a user does: forgotten, attacked, compared."""

import dataclasses
import json
import shutil
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import tyro

from jaxdiff.data import PROMPT_WORDS
from jaxdiff.denoiser import Denoiser
from jaxdiff.distillation import Jump
from jaxdiff.flow_map import FlowMap
from jaxdiff.training import (
    CheckpointStore,
    init_train_state,
    load_run,
    make_train_step,
    save_model,
)
from train import benchmark_unlearning, benchmark_words, sample, unlearn
from train.core import lines
from train.core.config import EvaluationConfig, NetworkConfig, save_config
from train.core.data import DataInfo, build_sources
from train.pretraining.recipe import Config, build_player
from train.unlearn import Options, configured
from train.unlearning.data import check_forget, joined, split
from train.unlearning.measure import steps_to_half
from train.unlearning.recipe import METHODS, Parts

TINY = {"num_samples": 32, "batch_size": 16, "sampling_steps": 2, "trajectory_steps": 2}


def small_run(run_dir, patch_size=2, **data):
    """Digits by the smallest of networks, which has learned nothing."""
    config = Config(
        run_dir=str(run_dir),
        # Traced quickly.
        network=NetworkConfig(kind="dit", channels=16, depth=1, patch_size=patch_size),
        evaluation=EvaluationConfig(classifier_steps=20),
    )
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **data))
    info = DataInfo.of(build_sources(config.data)[0])
    players = {"model": build_player(config, info)}
    save_model(config.run_dir, players, **dataclasses.asdict(info))
    state = init_train_state(players, jax.random.key(0))
    CheckpointStore(Path(config.run_dir) / "checkpoints").save(state.unpack(), step=1)
    save_config(config)
    return config.run_dir


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("digits") / "run")


def parts_of(base, **changes):
    config = configured(Options(base, forget=(3, 5), **TINY, **changes))
    source, _ = build_sources(config.data)
    kept, forget = split(source, config.unlearn.forget)
    return Parts(config, load_run(base).model, DataInfo.of(source), kept, forget), kept, forget


def test_what_is_kept_and_what_is_forgotten(digits):
    parts, kept, forget = parts_of(digits, method="kept-only")
    both = joined(kept, forget)
    assert len(both) == len(kept) and set(np.unique(both.labels)) == set(range(10))
    batch = both[np.arange(len(both))]
    assert not np.isin(batch["cond"], (3, 5)).any()
    assert set(np.unique(batch["forget"]["cond"])) == {3, 5}
    one = both[7]
    np.testing.assert_array_equal(one["forget"]["x"], forget[7]["x"])
    np.testing.assert_array_equal(parts.classes, [0, 1, 2, 4, 6, 7, 8, 9])


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.kind != "edit"])
def test_every_method_makes_players_of_a_run(digits, method):
    """As far as a program of their step; what is sampled is what was trained."""
    parts, kept, forget = parts_of(digits, method=method, steps=2)
    chosen = METHODS[method]
    players = chosen.build(parts)
    assert isinstance(players[chosen.sampled].model, Denoiser | FlowMap)
    constants = {"teacher": parts.base}
    if method == "amnesia":
        constants["fisher"] = jax.tree.map(np.ones_like, parts.base.network)
    if method == "repulsion":
        constants["adapted"] = parts.base
    batch = joined(kept, forget)[np.arange(16)]
    state = init_train_state(players, jax.random.key(0))
    assert make_train_step(players).flops(state, batch, constants) > 0


def test_a_class_is_forgotten_gone_on_with_attacked_and_sampled(digits, tmp_path, capsys):
    options = Options(
        digits, run_dir=str(tmp_path / "run"), method="relabelled", forget=(3,), steps=4,
        checkpoint_every=2, attack_updates=2, **TINY,
    )  # fmt: skip
    found = unlearn.main(options)
    assert list(found) == ["before", "relabelled"]
    row = found["relabelled"]
    for name in ("forgotten", "forgotten at 7.5", "unasked", "accuracy", "neighbour", "inverted"):
        assert 0 <= row[name] <= 1, name
    assert list(row["relearned"]) == ["0", "1", "2"]
    assert row["frechet"] > 0 and len(row["frechet_resampled"]) == 50
    assert "| relabelled |" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "forgotten.json").read_text())["before"]
    whole = load_run(tmp_path / "run").model.network
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    unlearn.unlearn(configured(options))
    chex.assert_trees_all_equal(load_run(tmp_path / "run").model.network, whole)
    sample.main(sample.Options(str(tmp_path / "run"), num_samples=4))


def test_a_benchmark_goes_on_and_says_what_was_found(digits, tmp_path):
    without = small_run(tmp_path / "without", exclude_class=(3,))
    out = tmp_path / "results" / "digits.jsonl"
    plan = benchmark_unlearning.Benchmark(
        (digits,), (without,), out, ("renamed",), attack_updates=0, steps=2,
        **{name: TINY[name] for name in ("num_samples", "batch_size", "sampling_steps")},
    )  # fmt: skip
    benchmark_unlearning.main(plan)
    rows = lines.read(out)
    assert [row["name"] for row in rows] == ["retrained", "before", "renamed"]
    assert rows[0]["law"] == pytest.approx(0, abs=1e-3) and rows[1]["law"] >= 0
    more = dataclasses.replace(plan, methods=("renamed", "score-forgetting, alpha 1"))
    benchmark_unlearning.main(more)
    assert lines.read(out)[:3] == rows and len(lines.read(out)) == 4
    benchmark_unlearning.main(dataclasses.replace(plan, table=True))
    text = out.with_suffix(".md").read_text()
    assert "| renamed |" in text and "| retrained |" in text and out.with_suffix(".png").exists()
    assert (out.with_suffix("") / "run" / "renamed.png").exists()
    for changes, said in (
        ({"steps": 3}, "`out` must be a file of the same settings"),
        ({"methods": ("salum",)}, "`methods` must be among"),
        ({"retrained": (digits,)}, "that never saw the classes"),
    ):
        with pytest.raises(ValueError, match=said):
            benchmark_unlearning.main(dataclasses.replace(plan, **changes))


def test_an_edit_is_kept_as_a_run_and_made_again(digits, tmp_path):
    options = Options(
        digits, run_dir=str(tmp_path / "run"), method="renamed", override=8, attack_updates=0,
        **TINY,
    )  # fmt: skip
    for _ in range(2):
        unlearn.unlearn(configured(options))
    table = lambda path: load_run(path).model.network.embedding.classes.embedding[...]
    new, old = table(tmp_path / "run"), table(digits)
    np.testing.assert_array_equal(new[0], old[8])
    np.testing.assert_array_equal(new[1:], old[1:])


def test_steps_and_ranks_in_closed_form():
    assert steps_to_half({0: 0.6}) == 0 and steps_to_half({0: 0.1, 5: 0.4}) == np.inf
    assert steps_to_half({0: 0.0, 1: 0.5, 2: 1.0}) == pytest.approx(1)
    assert steps_to_half({0: 0.0, 3: 1.0}) == pytest.approx(1)  # between 1 and 4 in the logarithm
    kendall = benchmark_unlearning.kendall
    assert kendall([1, 2, 3], [2, 4, 9]) == 1 and kendall([1, 2, 3], [3, 2, 1]) == -1
    assert kendall([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    assert kendall([1, np.inf, np.inf], [1, 2, 2]) == 1


def test_what_cannot_be_forgotten_is_refused_before_any_work(digits, tmp_path):
    for changes, said in (
        ({"forget": (3,), "override": 3}, "`unlearn.override` must be a class that is kept"),
        ({"forget": (12,)}, r"`forget` must be different classes among \[0, 1"),
        ({"forget": ()}, "`forget` must be different classes among"),
        ({"forget": tuple(range(10))}, "`forget` must leave a class"),
        ({"override": 11}, "`unlearn.override` must be a class of the data"),
        ({"generator": "runs/x"}, "`unlearn.generator` is for score-forgetting"),
        ({"method": "erased", "override": 1}, "`unlearn.override` is for all-but-one"),
        ({"scale": 2.0}, "`unlearn.scale` is for erased, .*; 'salun' has none, got 2.0"),
        ({"method": "renamed", "parameters": ("classes",)}, "`unlearn.parameters` is for methods"),
        ({"trajectory_steps": 0}, "`unlearn.trajectory_steps` must be at least 1"),
        ({"parameters": ("nowhere",)}, "`patterns` must be found in the paths"),
    ):
        with pytest.raises(ValueError, match=said):
            unlearn.main(Options(digits, run_dir=str(tmp_path / "run"), **{**TINY, **changes}))
        assert not (tmp_path / "run").exists()
    parts, kept, forget = parts_of(digits, method="salun")
    with pytest.raises(ValueError, match="`base` must be a run of train.pretrain, .* got Jump"):
        Parts(parts.config, Jump(parts.base), parts.info, kept, forget)
    toy, _ = build_sources(dataclasses.replace(configured(Options(digits)).data, name="two_moons"))
    with pytest.raises(ValueError, match="`base` must be a run on data of classes"):
        check_forget(toy, (0,))


def test_words_are_forgotten_at_every_place_and_searched_for(tmp_path):
    """By edits, by learning, at the door; a model of nothing shows what it shows before."""
    run_dir = small_run(tmp_path / "run", patch_size=8, name="prompts")
    out = tmp_path / "words.jsonl"
    few = ["--steps", "1", "--num-samples", "16", "--sampling-steps", "2", "--attack-steps", "2"]
    arguments = [run_dir, "--out", str(out), "--forget", "red", *few]
    chosen = ["renamed", "ESD-x, defended"]
    assert benchmark_words.cli([*arguments, "--methods", *chosen]) == 0
    rows = lines.read(out)
    assert [row["name"] for row in rows] == ["before", *chosen]
    before = rows[0]
    for row in rows:
        shares = [row[name] for name in benchmark_words.TITLES]
        assert all(0 <= share <= 1 for share in shares)
        assert len(row["found"]) == 2 and not set(row["found"]) - set(PROMPT_WORDS)
        assert (tmp_path / "words" / "run" / f"{row['name']}.png").exists()
    # An edit of one word changes nothing that does not say it.
    for edited in rows[1:2]:
        assert all(edited[figure] == before[figure] for figure in ("others", "unasked"))
    assert benchmark_words.cli([*arguments, "--methods", "renamed"]) == 0  # done already
    assert len(lines.read(out)) == len(rows)
    assert benchmark_words.cli(["--out", str(out), "--table"]) == 0
    assert "| renamed |" in out.with_suffix(".md").read_text()
    for wrong, message in (
        (["--forget", "purple"], "must be a word of the captions"),
        (["--forget", "three"], "must be a word that samples show for certain"),
        (["--methods", "none"], "`methods` must be among"),
    ):
        other = [run_dir, "--out", str(tmp_path / "other.jsonl"), *few, *wrong]
        with pytest.raises(ValueError, match=message):
            benchmark_words.main(tyro.cli(benchmark_words.Benchmark, args=other))

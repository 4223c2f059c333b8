"""Distilling a trained run, as a user does: distilled, gone on with, sampled, compared, studied."""

import dataclasses
import json
import shutil
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from jaxdiff import networks, processes
from jaxdiff.denoiser import Denoiser, NetworkDenoiser
from jaxdiff.distillation import Jump
from jaxdiff.flow_map import FlowMap
from jaxdiff.training import (
    CheckpointStore,
    init_train_state,
    load_run,
    make_train_step,
    save_model,
)
from train import distill, evaluate, pretrain
from train.core import lines, sampling
from train.core.config import EvaluationConfig, NetworkConfig, save_config
from train.core.data import DataInfo, build_sources
from train.distill import Options, configured
from train.distilling import study
from train.distilling.recipe import METHODS, Parts
from train.pretraining.recipe import PRESETS, Config, build_player

TINY = {"num_samples": 64, "full_steps": 4, "batch_size": 32}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Points in the plane: a run too short to be good."""
    run_dir = str(tmp_path_factory.mktemp("toy") / "run")
    config = dataclasses.replace(
        PRESETS["toy2d"][1], run_dir=run_dir, steps=300, batch_size=128, time_factor=10.0,
        network=NetworkConfig(kind="mlp", channels=32, depth=1),
        evaluation=EvaluationConfig(num_samples=64, batch_size=64, sampling_steps=3),
    )  # fmt: skip
    pretrain.main(config)
    return run_dir


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Digits by the smallest of networks, which has learned nothing."""
    config = Config(
        run_dir=str(tmp_path_factory.mktemp("digits") / "run"),
        network=NetworkConfig(kind="dit", channels=16, depth=1),  # traced quickly
    )
    info = DataInfo.of(build_sources(config.data)[0])
    players = {"model": build_player(config, info)}
    save_model(config.run_dir, players, **dataclasses.asdict(info))
    state = init_train_state(players, jax.random.key(0))
    CheckpointStore(Path(config.run_dir) / "checkpoints").save(state.unpack(), step=1)
    save_config(config)
    return config.run_dir


def test_a_student_is_nearer_to_the_data_than_its_start_and_sampled_like_any_run(
    toy, tmp_path, capsys
):
    run_dir = tmp_path / "student"
    options = Options(
        toy, run_dir=str(run_dir), steps=300, learning_rate=1e-3,
        **TINY | {"num_samples": 512, "batch_size": 128, "full_steps": 20},
    )  # fmt: skip
    found = distill.main(options)
    one, start = found["consistency, 1"], found["ddim, 1"]
    assert one["nfe"] == start["nfe"] == 1 and found["consistency, 4"]["nfe"] == 4
    assert one["frechet"] < 0.75 * start["frechet"]
    assert found["consistency, 4"]["frechet"] < start["frechet"]
    assert "of the way from ddim, 1 to ddim, 20." in capsys.readouterr().out
    assert json.loads((run_dir / "comparison.json").read_text()) == found
    loaded = load_run(run_dir)
    assert loaded.step == 300 and type(loaded.model) is Jump
    figures = evaluate.main(evaluate.Options(str(run_dir), num_samples=64, metrics=("frechet",)))
    assert figures["nfe"] == 1
    # The same command is done, and measures again.
    again = distill.main(options)
    assert {n: r["frechet"] for n, r in again.items()} == {
        n: r["frechet"] for n, r in found.items()
    }


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_players_of_a_run(digits, method):
    """Of images of classes, as far as a program of their step; what is sampled is a student."""
    config = configured(
        Options(digits, method=method, steps=32, grid_steps=4, pairs=32, batch_size=16)
    )
    config.check()
    source, _ = build_sources(config.data)
    parts = Parts(config, load_run(digits).model, DataInfo.of(source))
    chosen = config.method
    players, teacher = chosen.build(parts), chosen.teacher(parts)
    assert isinstance(players[chosen.sampled].model, Denoiser | FlowMap)
    if config.scales:
        assert sampling.is_told(players[chosen.sampled].model, parts.info) and chosen.told
    batch = source[np.arange(16)]
    if chosen.pairs:
        batch = {**batch, "noise": np.zeros_like(batch["x"])}
    state = init_train_state(players, jax.random.key(0))
    constants = {} if "teacher" in players else {"teacher": teacher}
    assert make_train_step(players).flops(state, batch, constants) > 0


def test_a_student_of_every_scale_is_distilled_again(digits):
    """The second stage of guided distillation; nothing else takes such a base."""
    config = configured(Options(digits, method="progressive", scales=(1.0, 3.0), steps=32))
    source, _ = build_sources(config.data)
    base, info = load_run(digits).model, DataInfo.of(source)
    with pytest.raises(ValueError, match="`base` must be told the scale of guidance for 'progre"):
        Parts(config, base, info)
    with pytest.raises(ValueError, match="`base` must be a run of train.pretrain, .* got Jump"):
        Parts(config, Jump(base), info)
    told = dataclasses.replace(base, network=networks.with_scalars(base.network, "scale"))
    players = config.method.build(Parts(config, told, info))
    assert sampling.is_told(players["student"].model, info)
    state, batch = init_train_state(players, jax.random.key(0)), source[np.arange(16)]
    assert make_train_step(players).flops(state, batch, {}) > 0
    for changes in ({"method": "consistency"}, {"method": "progressive"}):
        other = configured(Options(digits, **changes))
        with pytest.raises(ValueError, match="`base` is told the scale of guidance"):
            Parts(other, told, info)


@pytest.mark.parametrize("method", ["progressive", "reflow", "dmd2"])
def test_methods_of_every_kind_run_and_go_on(toy, tmp_path, method):
    """A teacher that follows, pairs that are kept, and three players."""
    options = Options(
        toy, run_dir=str(tmp_path), method=method, steps=6, pairs=32, checkpoint_every=3,
        **TINY | {"batch_size": 16, "num_samples": 32},
    )  # fmt: skip
    student, *_ = distill.distil(configured(options))
    chex.assert_tree_all_finite(student)
    whole = load_run(tmp_path).model.network
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    kept = (tmp_path / "pairs.npz").stat().st_mtime_ns if method == "reflow" else None
    distill.distil(configured(options))
    chex.assert_trees_all_equal(load_run(tmp_path).model.network, whole)
    assert kept is None or (tmp_path / "pairs.npz").stat().st_mtime_ns == kept


def test_a_study_goes_on_and_says_what_was_found(toy, tmp_path, capsys):
    out = tmp_path / "results" / "toy.jsonl"
    plan = study.Study(
        (toy,), out, ("consistency",), steps=45, batch_size=32, num_samples=64, full_steps=4
    )
    study.main(plan)
    rows = lines.read(out)
    names = [row["name"] for row in rows]
    assert names[:3] == ["consistency, 1", "consistency, 2", "consistency, 4"]
    assert "ddim, 4" in names and len(set(names)) == len(names) and rows[0]["teraflops"] > 0
    study.main(dataclasses.replace(plan, methods=("consistency", "consistency-training")))
    more = lines.read(out)
    assert more[: len(rows)] == rows and len(more) == len(rows) + 3
    study.main(dataclasses.replace(plan, table=True))
    text = out.with_suffix(".md").read_text()
    assert text.count("\n| consistency") == 2 and "| ddim, 4 |" in text
    assert out.with_suffix(".png").exists()
    with pytest.raises(ValueError, match="`out` must be a file of the same settings"):
        study.main(dataclasses.replace(plan, steps=6))
    with pytest.raises(ValueError, match="`methods` must be among"):
        study.main(dataclasses.replace(plan, methods=("consistancy",)))


def test_a_condition_of_the_data_is_not_a_scale_of_guidance():
    network = networks.MLP(2, hidden=8, num_blocks=1, scalars=("scale",), rngs=nnx.Rngs(0))
    student = NetworkDenoiser(network, processes.VP())
    assert sampling.is_told(student, DataInfo((2,)))
    assert not sampling.is_told(student, DataInfo((2,), cond={"scale": ()}))


def test_pairs_of_other_settings_are_refused(toy, tmp_path):
    """Also where nothing but pairs was made so far."""
    options = Options(toy, run_dir=str(tmp_path), method="reflow", steps=2, pairs=32, **TINY)
    config = configured(options)
    save_config(config)
    with pytest.raises(ValueError, match=r"distill\.pairs: 32 there, 64 here"):
        distill.distil(configured(dataclasses.replace(options, pairs=64)))


def test_what_cannot_be_distilled_is_refused_before_any_work(toy):
    for changes, said in (
        ({"scales": (1.0, 3.0), "method": "consistency-training"}, "`distill.scales` is for"),
        ({"scales": (3.0, 1.0)}, "`distill.scales` must be none or two in order"),
        ({"grid_steps": 0}, "`distill.grid_steps` must be at least 1"),
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"steps": 5, "method": "progressive"}, "`steps` must be at least 6, one a round, got 5"),
        ({"guidance_scale": 2.0}, "guidance scale 2 needs data with conditions"),
        ({"method": "esd"}, "`distill.method` esd with guidance scale 1 needs data with"),
        ({"method": "continuous-consistency"}, "must be a run with --process cosine or trigflow"),
    ):
        with pytest.raises(ValueError, match=said):
            distill.main(Options(toy, run_dir="unused", **changes))

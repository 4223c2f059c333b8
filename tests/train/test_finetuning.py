"""Tuning a trained run by MMD, as a user does: tuned, gone on with, sampled, compared, ablated."""

import dataclasses
import json

import numpy as np
import pytest

from jaxdiff import data
from jaxdiff.finetuning import load_adapter
from jaxdiff.training import load_run
from train import evaluate, finetune_mmd, pretrain, sample
from train.core import lines, measure
from train.core.comparison import difference
from train.core.config import EvaluationConfig, NetworkConfig
from train.core.data import DataInfo
from train.finetune_mmd import Options, configured
from train.finetuning import study
from train.pretraining.recipe import PRESETS, Config

TINY = {"num_samples": 64, "full_steps": 4, "sample_every": 0, "batch_size": 32}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Points in the plane: a run too short to be good."""
    run_dir = str(tmp_path_factory.mktemp("toy") / "run")
    config = dataclasses.replace(
        PRESETS["toy2d"][1], run_dir=run_dir, steps=150, batch_size=64,
        network=NetworkConfig(kind="mlp", channels=16, depth=1),
        evaluation=EvaluationConfig(num_samples=64, batch_size=64, sampling_steps=3),
    )  # fmt: skip
    pretrain.main(config)
    return run_dir


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Digits by the smallest of networks."""
    run_dir = str(tmp_path_factory.mktemp("digits") / "run")
    pretrain.main(
        Config(
            run_dir=run_dir,
            steps=4,
            warmup_steps=1,
            batch_size=16,
            network=NetworkConfig(channels=8, channel_mults=(1,), attention_resolutions=()),
            evaluation=EvaluationConfig(num_samples=16, sampling_steps=2, classifier_steps=2),
        )  # fmt: skip
    )
    return run_dir


def test_a_tuned_sampler_is_nearer_to_the_data(toy, tmp_path, capsys):
    run_dir = tmp_path / "tuned"
    options = Options(
        toy, run_dir=str(run_dir), sampling_steps=3, steps=60, learning_rate=3e-3,
        **TINY | {"num_samples": 512, "batch_size": 128},
    )  # fmt: skip
    found = finetune_mmd.main(options)
    tuned, before = found["tuned ddim, 3"], found["ddim, 3"]
    assert tuned["nfe"] == before["nfe"] == 3 and found["ddim, 4"]["nfe"] == 4
    assert tuned["frechet"] < 0.75 * before["frechet"] and tuned["kid"] < before["kid"]
    printed = capsys.readouterr().out
    share = measure.gap_closed(tuned, before, found["ddim, 4"])
    said = (
        "is no nearer to the data"
        if share is None
        else f"is {share:.0%} of the way from ddim, 3 to ddim, 4."
    )
    assert said in printed
    assert json.loads((run_dir / "comparison.json").read_text()) == found
    written = (run_dir / "comparison.md").read_text()
    assert "| tuned ddim, 3 | 3 |" in written
    # The same noise and reference: the error of a difference is far below those of the distances.
    gain, error = difference(before, tuned)
    assert f"| {gain:.3f} +- {error:.3f} |" in written and gain > 3 * error
    assert error < 0.5 * before["frechet_standard_error"]
    assert load_run(run_dir).step == 60  # a run like any other


def test_an_adapter_is_tuned_saved_and_sampled(digits, tmp_path, capsys):
    run_dir = tmp_path / "lora"
    options = Options(
        digits, run_dir=str(run_dir), sampling_steps=2, steps=2, rank=2, **TINY,
    )  # fmt: skip
    found = finetune_mmd.main(options)
    assert set(found["ddim, 2"]) >= {"frechet", "kid", "accuracy", "density", "coverage"}
    assert (run_dir / "comparison" / "tuned-ddim-2.png").exists()
    adapter = load_adapter(run_dir / "adapter.npz")
    assert any(np.abs(low.up).max() > 0 for low in adapter.kernels.values())
    # Classifiers are kept with the base: one for the loss, another that measures.
    names = {path.parent.name for path in tmp_path.parent.glob("digits*/run/*/2")}
    assert names == {"classifier", "features"}
    out, plain = tmp_path / "samples", tmp_path / "plain"
    drawn = sample.Options(digits, num_samples=8, sampling_steps=2, out=str(plain))
    sample.main(drawn)
    file = str(run_dir / "adapter.npz")
    sample.main(dataclasses.replace(drawn, adapter=file, out=str(out)))
    x, y = (np.load(path / "samples.npz")["x"] for path in (out, plain))
    assert np.abs(x - y).max() > 0


def test_images_of_any_origin_are_measured(digits, tmp_path, capsys):
    source = data.digits("test")
    rows = np.arange(40)
    np.savez(tmp_path / "mine.npz", **{k: np.asarray(v) for k, v in source[rows].items()})
    images = tmp_path / "folder"
    data.save_images(
        images, source[rows]["x"], source[rows]["cond"], class_names=source.class_names
    )
    names = ("frechet", "kid", "precision", "recall", "density", "coverage", "vendi")
    names += ("classifier_score", "copied", "c2st", "frechet_limit", "accuracy", "spatial_frechet")
    options = evaluate.Options(digits, metrics=names, num_samples=40)
    few = ("accuracy", "coverage", "classifier_score")  # PNG rounds to eight bits
    mine = evaluate.main(dataclasses.replace(options, samples=str(tmp_path / "mine.npz")))
    other = dataclasses.replace(options, samples=str(images), metrics=few)
    figures = [mine, evaluate.main(other)]
    for name in names:
        assert np.isfinite(mine[name]) and f"{name}_floor" in mine
    for name in few:
        assert figures[1][name] == pytest.approx(mine[name], rel=0.05, abs=0.03)
    assert figures[0]["nfe"] is None and "frechet_standard_error" in figures[0]
    np.savez(tmp_path / "large.npz", x=np.zeros((4, 9, 9, 1), np.uint8))
    with pytest.raises(ValueError, match=r"shape of the run's data, \(8, 8, 1\), got \(9, 9, 1\)"):
        evaluate.main(dataclasses.replace(options, samples=str(tmp_path / "large.npz")))
    # Folders are classes by their names, and not by their ranks.
    few = source[np.flatnonzero(source.labels >= 3)[:20]]
    data.save_images(tmp_path / "some", few["x"], few["cond"], class_names=source.class_names)
    found = evaluate.read_samples(str(tmp_path / "some"), DataInfo.of(source))
    assert sorted(found["cond"]) == sorted(few["cond"])
    data.save_images(tmp_path / "strange", few["x"], 0 * few["cond"], class_names=["cat"])
    with pytest.raises(ValueError, match="folders named as the classes.*got 'cat'"):
        evaluate.read_samples(str(tmp_path / "strange"), DataInfo.of(source))
    np.savez(tmp_path / "plain.npz", x=np.zeros((4, 8, 8, 1), np.uint8))
    with pytest.raises(ValueError, match="`samples` must say which class"):
        evaluate.main(dataclasses.replace(options, samples=str(tmp_path / "plain.npz")))


def test_inception_sees_images_alone(toy):
    with pytest.raises(ValueError, match="`inception` sees images, grey or in colour, got data of"):
        evaluate.main(evaluate.Options(toy, inception="weights.pth"))


def test_what_does_not_go_with_the_data_is_refused(toy):
    for changes, message in (
        ({"features": "classifier"}, "`mmd.features` classifier needs images of classes"),
        (
            {"by_class": True, "reference": 0},
            "`mmd.by_class` needs data whose condition is a class",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            finetune_mmd.tune(configured(Options(toy, **changes)))


def test_an_ablation_goes_on_where_it_was(toy, tmp_path, monkeypatch):
    out = tmp_path / "study.jsonl"
    monkeypatch.setattr(study, "STEPS", (2, 5))
    monkeypatch.setattr(study, "SOLVERS", ("ddim", "unipc"))
    options = study.Study(
        (toy,), out, variants=("kernel of degree 3",), steps=2, batch_size=16, num_samples=64,
        full_steps=6,
    )  # fmt: skip
    study.main(options)
    rows = lines.read(out)
    assert [row["name"] for row in rows] == [
        "ddim, 2", "ddim, 5", "unipc, 2", "unipc, 5", "ddim, 6", "kernel of degree 3",
    ]  # fmt: skip
    study.main(dataclasses.replace(options, variants=("kernel of degree 3", "last step")))
    assert lines.read(out)[:-1] == rows and lines.read(out)[-1]["name"] == "last step"
    # Of other settings a tuning goes elsewhere, and does not meet this one.
    folders = {
        study.options_of(dataclasses.replace(options, steps=n), options.bases[0], "default").run_dir
        for n in (2, 3)
    }
    assert len(folders) == 2
    study.main(dataclasses.replace(options, table=True))
    table = out.with_suffix(".md").read_text().splitlines()
    assert len(table) == 9 and table[-1].startswith("| last step | 5 |")
    assert out.with_suffix(".png").stat().st_size > 5000
    with pytest.raises(ValueError, match="`variants` must be among"):
        study.main(dataclasses.replace(options, variants=("nothing",)))
    # Means over seeds, and their errors; gaps are closed seed by seed.
    rows = [row | {"frechet": 0.0} if row["name"] == "ddim, 6" else row for row in rows]
    other = [{**row, "seed": 1, "frechet": 2 * row["frechet"]} for row in rows]
    text = study.summary([*rows, *other], "ddim, 6")
    mean = 1.5 * rows[0]["frechet"]
    assert f"| ddim, 2 | 2 | {mean:.3f} +- {mean / 3:.3f} |" in text
    named = {row["name"]: row for row in rows}
    share = measure.gap_closed(
        *(named[name] for name in ("kernel of degree 3", "ddim, 5", "ddim, 6"))
    )
    assert share is not None and f"{share:.0%} +- 0%" in text
    best = min((named[f"{solver}, 5"] for solver in ("ddim", "unipc")), key=lambda r: r["frechet"])
    gain = best["frechet"] - named["kernel of degree 3"]["frechet"]
    assert f"| {1.5 * gain:.3f} +- {abs(gain) / 2:.3f} |" in text
    error = difference(best, named["kernel of degree 3"])[1]
    assert f"| {gain:.3f} +- {error:.3f} |" in study.summary(rows, "ddim, 6")
    assert measure.gap_closed(named["ddim, 5"], named["ddim, 6"], named["ddim, 5"]) is None
    # Nothing is mixed up: other settings, a seed twice, and no results at all are refused.
    with pytest.raises(ValueError, match="`out` must be a file of the same settings"):
        study.main(dataclasses.replace(options, steps=3))
    with pytest.raises(ValueError, match="`bases` must have names and seeds of their own"):
        study.main(dataclasses.replace(options, bases=(toy, toy)))
    with pytest.raises(ValueError, match="which has none"):
        study.main(dataclasses.replace(options, out=tmp_path / "none.jsonl", table=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"last_k": 6}, "`mmd.last_k` must be at most `mmd.sampling_steps`, 5, got 6"),
        ({"micro_batch": 48}, "`mmd.micro_batch` must divide `batch_size`, 128, got 48"),
        ({"rank": -1}, "`mmd.rank` must be at least 0"),
        ({"sampling_steps": 0}, "must be at least 1, got 0"),
        ({"by_class": True, "statistic": "v", "reference": 0}, "goes with `mmd.statistic` u"),
        ({"by_class": True}, "and `mmd.reference` 0, got u and 4096"),
        ({"reference": -1}, "`mmd.reference` must be at least 0"),
    ],
)
def test_numbers_that_make_no_run_are_refused(toy, changes, message):
    config = configured(Options(toy, **changes))
    with pytest.raises(ValueError, match=message):
        config.check()

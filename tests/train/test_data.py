"""What is trained and measured is what was asked: splits, pixels, conditions, pictures."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxdiff
from jaxdiff import data, oracles, predictions, processes
from jaxdiff.training import load_run
from train import evaluate, pretrain, sample
from train.core import building, evaluation, figures, sampling
from train.core.config import EvaluationConfig, NetworkConfig
from train.core.data import DataConfig, DataInfo, build_sources
from train.pretraining.recipe import PRESETS, Config, build_prediction

RNG = np.random.default_rng(0)


def folder_of(root, counts, size=(8, 8)):
    """Class folders whose images are of one grey each, in an order."""
    for c, count in enumerate(counts):
        (root / f"class{c}").mkdir(parents=True)
        for i in range(count):
            pixels = np.full(size, 25 * c + i % 20, np.uint8)
            Image.fromarray(pixels).save(root / f"class{c}" / f"{i:03d}.png")
    return root


def test_every_class_is_trained_and_held_out(tmp_path):
    root = str(folder_of(tmp_path / "images", [20] * 10))
    for fraction, wanted in ((0.1, 2), (0.2, 4)):
        train, test = build_sources(DataConfig("folder", root, test_fraction=fraction))
        assert np.bincount(train.cond).tolist() == [20 - wanted] * 10
        assert np.bincount(test.cond).tolist() == [wanted] * 10
        assert test.class_names == tuple(f"class{c}" for c in range(10))
    again = build_sources(DataConfig("folder", root, lazy=True, test_fraction=0.2))[1]
    np.testing.assert_array_equal(again[np.arange(40)]["x"], test[np.arange(40)]["x"])
    folder_of(tmp_path / "few", [5, 1])
    with pytest.raises(ValueError, match=r"got 1 of class 1 \(class1\)"):
        build_sources(DataConfig("folder", str(tmp_path / "few")))
    left, out = build_sources(DataConfig("folder", root, exclude_class=(3, 5)))
    assert left.num_classes == 10 and not np.isin(left.cond, (3, 5)).any()
    assert DataInfo.of(left).classes == (0, 1, 2, 4, 6, 7, 8, 9) == DataInfo.of(out).classes


def test_a_split_of_ones_own_is_kept(tmp_path):
    for part, counts in (("train", [3, 4]), ("test", [1, 2])):
        folder_of(tmp_path / "images" / part, counts)
    train, test = build_sources(DataConfig("folder", str(tmp_path / "images")))
    assert (len(train), len(test)) == (7, 3) and train.class_names == ("class0", "class1")
    folder_of(tmp_path / "images" / "test" / "class0" / "x", [1])
    (tmp_path / "images" / "test" / "class1").rename(tmp_path / "images" / "test" / "other")
    with pytest.raises(ValueError, match=r"classes of the training set, .*'other'"):
        build_sources(DataConfig("folder", str(tmp_path / "images")))
    np.savez(tmp_path / "d.npz", x=np.zeros((5, 2)), x_test=np.ones((2, 2)))
    assert [len(s) for s in build_sources(DataConfig("npz", str(tmp_path / "d.npz")))] == [5, 2]


def test_clipping_is_last_and_of_pixels_alone():
    """Guidance leaves [-1, 1] before it; latents are not pixels."""

    class Bright(jaxdiff.Denoiser):
        process: processes.GaussianProcess

        def __call__(self, x, t, cond=None, *, key=None):
            return jnp.full_like(x, jnp.where(cond == 2, 0.45, 0.9))

    bright = Bright(processes.Cosine())
    images = data.array_source(np.zeros((4, 8, 8, 1), np.uint8), [0, 1, 0, 1])
    key, cond = jax.random.key(0), jnp.zeros(2, jnp.int32)
    for scale in (1.0, 1.5, 7.5):
        model = sampling.guided(bright, DataInfo.of(images), scale)
        x = jaxdiff.sample(key, model, (8, 8, 1), 2, cond=cond, times=4).x
        np.testing.assert_allclose(x, min(1, 0.45 + 0.45 * scale), rtol=1e-5)
    latents = data.array_source(3 * RNG.normal(size=(40, 4, 4, 2)))
    exact = oracles.gaussian(processes.Cosine(), jnp.zeros((4, 4, 2)), 9 * jnp.eye(32))
    model = sampling.guided(exact, DataInfo.of(latents), 1.0)
    assert model is exact
    assert DataInfo.of(data.digits()).pixels and not DataInfo.of(latents).pixels


@pytest.mark.parametrize("shape", [(1,), (2,), (3,), (16,), *((8, 6, c) for c in (1, 2, 3, 4, 16))])
@pytest.mark.parametrize("pixels", [True, False])
def test_anything_has_a_picture(tmp_path, shape, pixels):
    info, values = DataInfo(shape, pixels=pixels), RNG.normal(size=(7, *shape))
    settings = EvaluationConfig()
    for reference in (RNG.normal(size=(9, *shape)), None):
        evaluation.picture(tmp_path / "p.png", values, None, reference, settings, info)
        with Image.open(tmp_path / "p.png") as found:
            assert min(found.size) > 20 and np.asarray(found.convert("L")).std() > 5


def test_classes_by_name_and_none_have_pictures(tmp_path):
    """A class that is called "1" is that one; the label of none has a row, or a grid, too."""
    info = DataInfo((4, 4, 1), 3, ("1", "2", "3"), (0, 1, 2), pixels=True)

    def asked(*labels):
        return sample.conditions(sample.Options("", num_samples=4, labels=labels), info).tolist()

    assert asked("1", "2") == [0, 1, 0, 1]
    assert asked("0") == [0] * 4 and asked("3") == [2] * 4
    bare = DataInfo((4, 4, 1), 3, None, (0, 1, 2), pixels=True)
    options = sample.Options("", num_samples=4, labels=("3",))
    assert sample.conditions(options, bare).tolist() == [3] * 4
    for labels in ([3, 3, 3, 3], [0, 3, 0, 3], [2, 2, 2, 0]):
        x, cond = RNG.uniform(-1, 1, (4, 4, 4, 1)), jnp.asarray(labels)
        evaluation.picture(tmp_path / "p.png", x, cond, x, EvaluationConfig(), info)
        assert (tmp_path / "p.png").stat().st_size > 500
    with pytest.raises(ValueError, match="the run has no captions"):
        sample.conditions(sample.Options("", prompts=("",)), info)
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(ValueError, match="`cond` must be an npz file"):
        sample.conditions(sample.Options("", cond=str(tmp_path / "bad.npz")), info)
    with pytest.raises(ValueError, match="must be an .npz file"):
        build_sources(DataConfig("npz", str(tmp_path / "bad.npz")))


def test_a_grid_shows_images_in_their_places(tmp_path):
    images = np.linspace(-1, 1, 6).reshape(6, 1, 1, 1) * np.ones((6, 16, 16, 1))
    figures.image_grid(images, tmp_path / "g.png", columns=3, titles=["first", "second"])
    with Image.open(tmp_path / "g.png") as found:
        grey = np.asarray(found.convert("L")).astype(float)
    levels = [value for value in np.round(np.linspace(0, 255, 6)) if (grey == value).sum() > 500]
    assert levels == [0, 51, 102, 153, 204, 255]


def test_conditions_reach_from_a_file_to_samples(tmp_path, capsys):
    """Vectors, scalars and classes together; and a vector by itself."""
    x, text, age = RNG.normal(size=(60, 2)), RNG.normal(size=(60, 3)), RNG.normal(size=60)
    label = np.arange(60) % 2
    several = {"cond/label": label, "cond/age": age}
    base = dataclasses.replace(
        PRESETS["toy2d"][1],
        network=NetworkConfig("mlp", channels=8, depth=1),
        evaluation=EvaluationConfig(num_samples=8, sampling_steps=2, guidance_scale=2.0),
        steps=2,
        batch_size=16,
    )
    for name, arrays in (("several", several), ("vector", {"cond": text})):
        np.savez(tmp_path / f"{name}.npz", x=x, **arrays)
        run_dir = str(tmp_path / name)
        source = DataConfig("npz", str(tmp_path / f"{name}.npz"))
        pretrain.main(dataclasses.replace(base, run_dir=run_dir, data=source))
        (tmp_path / f"{name}.npz").unlink()  # sampling needs no data
        info = DataInfo.from_json(load_run(run_dir).info)
        with pytest.raises(ValueError, match="`cond` must say what to sample"):
            sample.main(sample.Options(run_dir))
        rows = {key: value[:3] for key, value in arrays.items()}
        np.savez(tmp_path / "wanted.npz", **rows)
        options = sample.Options(run_dir, num_samples=8, cond=str(tmp_path / "wanted.npz"))
        sample.main(options)
        with np.load(tmp_path / name / "samples-0" / "samples.npz") as found:
            assert found["x"].shape == (8, 2) and np.isfinite(found["x"]).all()
            for key, value in rows.items():
                np.testing.assert_allclose(found[key], value[np.arange(8) % 3], rtol=1e-6)
        if name == "several":
            assert info.cond == {"age": ()} and info.null_cond == 2
            np.savez(tmp_path / "wanted.npz", **{"cond/age": age[:3]})
            with pytest.raises(ValueError, match=r"conditions \['age', 'label'\], got \['age'\]"):
                sample.main(options)
        else:
            assert info.cond == {"label": (3,)} and info.null_cond == 0.0
    capsys.readouterr()


def test_samples_are_written_as_images_by_class(tmp_path, capsys):
    """From a folder to samples whose names and sizes are the folder's, without it."""
    root = folder_of(tmp_path / "images", [6, 6], size=(8, 12))
    config = dataclasses.replace(
        PRESETS["digits"][1],
        run_dir=str(tmp_path / "run"),
        data=DataConfig("folder", str(root)),
        network=NetworkConfig("dit", channels=16, depth=1),
        evaluation=EvaluationConfig(num_samples=8, sampling_steps=2, classifier_steps=0),
        steps=4,
        batch_size=8,
        sample_every=2,
    )
    pretrain.main(config)
    numbers = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert "accuracy" not in numbers and numbers["nfe"] == 4
    lines = [json.loads(r) for r in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    held_out = [r["held_out_loss"] for r in lines if "held_out_loss" in r]
    assert len(held_out) == 2 and np.isfinite(held_out).all()
    assert sorted(p.name for p in (tmp_path / "run" / "samples").iterdir()) == [
        "00000002.png",
        "00000004.png",
    ]
    (tmp_path / "run").rename(tmp_path / "moved")
    for part in root.glob("*/*"):
        part.unlink()
    run_dir = str(tmp_path / "moved")
    sample.main(sample.Options(run_dir, num_samples=6, labels=("class1", "0"), solver="heun"))
    assert "3 evaluations" not in capsys.readouterr().out
    out = tmp_path / "moved" / "samples-0"
    with np.load(out / "samples.npz") as file:
        stored = dict(file)
    assert stored["cond"].tolist() == [1, 0] * 3 and np.abs(stored["x"]).max() <= 1
    read = data.image_folder(out / "images")
    assert read.class_names == ("class0", "class1") and read.event_shape == (8, 12, 1)
    np.testing.assert_allclose(read[0]["x"], stored["x"][1], atol=1 / 127)
    for wrong in ("class7", "3", "-1"):
        with pytest.raises(ValueError, match=f"`labels` must be among .* got '{wrong}'"):
            sample.main(sample.Options(run_dir, labels=(wrong,)))


def test_options_of_solvers_and_grids():
    process = processes.VP()
    settings = EvaluationConfig(solver="dpmpp_2m", order=3, eta=0.5, times="karras")
    solver = sampling.build_solver(settings)
    assert (solver.order, solver.eta) == (3, 0.5)
    times = sampling.build_times(settings, process)
    np.testing.assert_allclose(times, jaxdiff.solvers.karras_times(process, 25))
    for name in sampling.SOLVERS:
        sampling.build_solver(EvaluationConfig(solver=name))
    for changes, name in (({"churn": 1.0}, "churn"), ({"solver": "euler", "eta": 0.1}, "eta")):
        with pytest.raises(ValueError, match=f"`{name}` is no option of the solver"):
            sampling.build_solver(EvaluationConfig(**changes))


def test_networks_take_the_conditions_of_the_data():
    info = DataInfo((8, 8, 1), 3, cond={"tokens": (5, 6), "token_mask": (5,), "age": ()})
    assert building.condition_arguments(info) == {
        "num_classes": 3,
        "token_size": 6,
        "scalars": ["age"],
    }
    assert info.null_cond == {"label": 3, "tokens": 0.0}
    with pytest.raises(ValueError, match=r"The condition 'pose' has shape \(4,\)"):
        building.condition_arguments(DataInfo((2,), cond={"pose": (4,)}))
    assert predictions.V() == build_prediction(Config())


def test_captions_are_trained_sampled_and_measured(tmp_path, capsys):
    preset = PRESETS["prompts"][1]
    config = dataclasses.replace(
        preset,
        run_dir=str(tmp_path),
        network=NetworkConfig("dit", channels=16, depth=1, patch_size=8),
        evaluation=dataclasses.replace(preset.evaluation, num_samples=16, sampling_steps=2),
        steps=2,
        batch_size=16,
    )
    pretrain.main(config)
    numbers = json.loads((tmp_path / "evaluation.json").read_text())
    assert all(0 <= numbers[name] <= 1 for name in ("size", "colour", "place"))
    # Real images show what their captions say; this is measured, too.
    assert all(numbers[f"{name}_floor"] == 1 for name in ("size", "colour", "place"))
    assert 0 <= numbers["digit"] <= 1 and numbers["digit_floor"] > 0.8
    assert "colour as the caption says" in capsys.readouterr().out
    options = sample.Options(str(tmp_path), num_samples=4, prompts=("large red three", "left"))
    sample.main(options)
    with np.load(tmp_path / "samples-0" / "samples.npz") as found:
        tokens = found["cond/tokens"]
    words = [*data.PROMPT_WORDS, "-"]
    said = [" ".join(words[token] for token in row) for row in tokens]
    assert said == ["large red three -", "left - - -"] * 2
    for wrong, message in (
        ("pink", "must be of the words .* got 'pink'"),
        ("red " * 5, "at most 4"),
    ):
        with pytest.raises(ValueError, match=message):
            sample.main(dataclasses.replace(options, prompts=(wrong,)))


def test_metrics_are_any_functions_of_samples_and_reference(tmp_path, capsys):
    """Of any source; a number, or one with its standard error; and what real data reach."""

    def mean_distance(samples, reference):
        return np.linalg.norm(samples["x"].mean(0) - reference["x"].mean(0))

    def spread(samples, reference):
        return samples["x"].std(), 0.5

    config = dataclasses.replace(
        PRESETS["toy2d"][1],
        run_dir=str(tmp_path),
        data=DataConfig("rings"),
        network=NetworkConfig("mlp", channels=8, depth=1),
        evaluation=EvaluationConfig(
            num_samples=64, sampling_steps=2, metrics=("mmd2",), ema_width=0.08
        ),
        ema="power",
        steps=4,
        batch_size=16,
        checkpoint_every=2,
    )
    pretrain.main(config)
    numbers = json.loads((tmp_path / "evaluation.json").read_text())
    assert {"mmd2", "mmd2_floor"} <= set(numbers) and "sliced_wasserstein" not in numbers
    x = data.rings(jax.random.key(3), 200)
    found = evaluation.measure(
        {"mean_distance": mean_distance, "spread": spread, "mmd2": evaluation.mmd2},
        {"x": np.asarray(x)},
        {"x": np.asarray(x + 1)},
        {"x": np.asarray(x + 1.1)},
    )
    assert found["mean_distance"] == pytest.approx(2**0.5, rel=1e-5)
    assert found["mmd2"] > 0.1 > 10 * abs(found["mmd2_floor"])
    assert found["spread_floor"] == pytest.approx(float(x.std()), rel=1e-5)
    assert found["spread_standard_error"] == 0.5
    # Again, of another average; and what cannot be taken of points is refused.
    options = evaluate.Options(str(tmp_path), average=1, num_samples=32, name="second")
    assert set(evaluate.main(options)) > {"mmd2", "mmd2_floor", "nfe"}
    for changes, message in (
        ({"metrics": ("accuracy",)}, r"`evaluation.metrics` must be among .* got 'accuracy'"),
        ({"average": 2}, "`evaluation.average` must be below 2"),
        ({"ema_width": 0.5}, "must lie in"),
        ({"ema_width": 0.07, "average": 1}, "`evaluation.ema_width` must be left out"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate.main(dataclasses.replace(options, **{"average": None, **changes}))
    capsys.readouterr()

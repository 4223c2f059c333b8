"""Guiding a trained run by many methods, as a user does: classifiers, a sweep, its table."""

import dataclasses
import inspect
import json
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxdiff
from jaxdiff import guidance, networks, processes, solvers
from jaxdiff.training import load_run
from train import classifier, guide, pretrain
from train.core import lines
from train.core.config import EvaluationConfig, NetworkConfig
from train.core.data import DataConfig, DataInfo
from train.guiding import draw, measure, recipe
from train.guiding.classifiers import Guides
from train.guiding.recipe import METHODS, Bayes, Parts
from train.pretraining.recipe import PRESETS

CENTRES = np.array([[-1.0, 0.0], [1.0, 0.5], [0.0, -1.2]])
TINY = {"num_samples": 48, "sampling_steps": 3, "batch_size": 32, "scales": (1.0, 3.0)}


def configured(run_dir, **changes):
    return dataclasses.replace(
        PRESETS["toy2d"][1], run_dir=str(run_dir), steps=60, batch_size=64, warmup_steps=10,
        checkpoint_every=20,
        network=NetworkConfig(kind="mlp", channels=16, depth=1),
        evaluation=EvaluationConfig(
            num_samples=32, batch_size=32, sampling_steps=3, classifier_steps=80
        ),
        **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    """Points in three classes: a run too short to be good."""
    folder = tmp_path_factory.mktemp("points")
    rng, labels = np.random.default_rng(0), np.arange(600) % 3
    x = CENTRES[labels] + 0.25 * rng.standard_normal((600, 2))
    np.savez(folder / "points.npz", x=x.astype(np.float32), cond=labels.astype(np.int32))
    data = DataConfig("npz", path=str(folder / "points.npz"))
    pretrain.main(configured(folder / "run", data=data))
    return folder / "run"


@pytest.fixture(scope="module")
def moons(tmp_path_factory):
    """Points without classes."""
    run_dir = tmp_path_factory.mktemp("moons") / "run"
    pretrain.main(configured(run_dir))
    return run_dir


def test_classifiers_are_trained_once_and_do_not_measure(points, capsys):
    found = classifier.main(classifier.Options(str(points)))
    assert found["clean"] > 0.9 and found["noisy, sigma / alpha = 0.1"] > 0.9
    assert found["noisy, sigma / alpha = 10"] < 0.7
    assert "clean: " in capsys.readouterr().out
    files = sorted((points / "guides").rglob("manifest.json"))
    assert [path.parent.parent.parent.name for path in files] == ["clean", "noisy"]
    before = [path.stat().st_mtime_ns for path in files]
    assert classifier.main(classifier.Options(str(points))) == found
    assert [path.stat().st_mtime_ns for path in files] == before
    capsys.readouterr()
    classifier.main(classifier.Options(str(points), steps=20))
    assert "has classifiers of [80] steps; those of 20 are trained now." in capsys.readouterr().out
    shutil.rmtree(points / "guides" / "noisy" / "20")
    shutil.rmtree(points / "guides" / "clean" / "20")
    assert classifier.cli([str(points), "--steps", "0"]) == 1
    assert "`steps` of classifiers must be at least 1" in capsys.readouterr().err


def test_a_sweep_is_one_program_a_method_and_goes_on(points, monkeypatch, capsys):
    """Rows are what `sample` gives from the same noise, whatever the batch and the company."""
    traces, seen = [], {}
    cfg = METHODS["cfg"]
    counted = dataclasses.replace(cfg, build=lambda p, s: (traces.append(1), cfg.build(p, s))[1])
    monkeypatch.setitem(METHODS, "cfg", counted)
    drawn = measure.Program.__call__

    def kept(program, key, count, classes):
        out = drawn(program, key, count, classes)
        return seen.setdefault((program.method.kind, len(program.scales)), (key, classes, out))[2]

    monkeypatch.setattr(measure.Program, "__call__", kept)
    options = guide.Options(str(points), methods=("cfg",), equal_cost=False, **TINY)
    rows = guide.main(options)
    assert len(traces) == 1  # of two scales, in two batches
    assert [row["scale"] for row in rows] == [1.0, 3.0] and rows[0]["nfe"] == 6
    key, classes, out = seen[cfg.kind, 2]
    np.testing.assert_array_equal(classes[:8], [0, 0, 0, 0, 1, 1, 1, 1])
    model = load_run(points).model
    times = solvers.bounded_times(model.process, model.process.times(3, 0.0))
    for denoiser, x in (
        (model, out.x[0]),
        (guidance.ClassifierFree(model, 3, 3.0), out.x[1]),
    ):
        whole = jaxdiff.sample(key, denoiser, (2,), 48, cond=jnp.asarray(classes), times=times)
        np.testing.assert_allclose(x, whole.x, atol=2e-5)
    # More methods, then more seeds; nothing is done again, and the costs of each are told.
    monkeypatch.setattr(measure.Program, "__call__", drawn)
    more = dataclasses.replace(
        options, methods=("unguided", "cfg", "classifier", "dps"), equal_cost=True
    )
    found = guide.main(more)
    assert found[:2] == rows and len(traces) == 2
    named = {(row["method"], row["steps"], row["scale"]): row for row in found}
    assert len(named) == len(found) == 9
    costs = ("nfe", "backward", "gradients")
    for method, expected in (
        ("unguided", (3, 0, 0)), ("classifier", (3, 0, 3)), ("dps", (3, 3, 3)), ("cfg", (6, 0, 0)),
    ):  # fmt: skip
        assert tuple(named[method, 3, 1.0][cost] for cost in costs) == expected
    assert named["cfg", 2, 3.0]["nfe"] == 4  # three evaluations, nearly
    assert named["unguided", 3, 1.0]["frechet"] == pytest.approx(rows[0]["frechet"], rel=1e-3)
    assert named["classifier", 3, 3.0]["accuracy"] >= named["classifier", 3, 1.0]["accuracy"]
    assert all(row["bytes"] > 0 and row["time"] > 0 for row in found)
    folder = points / "guide"
    text = (folder / "table.md").read_text()
    assert "| cfg, 2 steps | 3 |" in text and "| real training data |" in text
    gap = named["dps", 3, 3.0]["frechet"] - named["cfg", 2, 3.0]["frechet"]
    assert f"| {gap:+.3f} +- " in text
    pictures = {path.name for path in folder.rglob("*.png")}
    assert pictures == {"curves.png", "cfg.png", "classifier.png", "dps.png"}
    (folder / "strips" / "cfg.png").unlink()
    assert guide.main(options) == found  # the picture alone
    assert (folder / "strips" / "cfg.png").exists()
    again = guide.main(dataclasses.replace(options, seeds=(0, 1)))
    assert again[: len(found)] == found and {row["seed"] for row in again[len(found) :]} == {1}
    expected = (
        "`name` must be a file of the same settings, num_samples = 64, got .* of num_samples = 48"
    )
    with pytest.raises(ValueError, match=expected + r"\. Name another by --name"):
        guide.main(dataclasses.replace(options, num_samples=64))


def test_populations_are_of_one_class_whatever_their_number():
    """What fills the last batch is of the last class."""
    asked = []
    program = object.__new__(measure.Program)
    program.size, program.info = 8, DataInfo((2,), 3, classes=(0, 1, 2))
    classes = measure.blocks((0, 1, 2), 18)
    program._cond = lambda rows: asked.append(rows)
    program.run = lambda *_: (np.zeros((1, 8, 2)), np.zeros((1, 8)))
    program.arrays = program.times = program.bytes = None
    program.scales = np.ones(1)
    assert program(None, 18, classes).x.shape == (1, 18, 2)
    found = np.concatenate(asked).reshape(-1, recipe.PARTICLES)
    np.testing.assert_array_equal(found[:, 0], [0, 1, 2, 0, 1, 1])
    np.testing.assert_array_equal(found, np.broadcast_to(found[:, :1], found.shape))


def test_a_run_without_classes(moons, capsys):
    """What needs none is swept, what needs more is named."""
    rows = guide.main(guide.Options(str(moons), **TINY | {"scales": (1.0, 2.0)}))
    assert [row["method"] for row in rows] == [
        "unguided", *(name for name in ("autoguidance", "tsg", "particle") for _ in range(2))
    ]  # fmt: skip
    assert rows[0]["settings"]["weaker"] == 20  # of 20, 40 and 60, near a half and not the last
    for row in rows[1::2]:  # scale 1 is off
        assert row["frechet"] == pytest.approx(rows[0]["frechet"], rel=1e-3)
    text = (moons / "guide" / "table.md").read_text()
    assert "for want of classes: cfg, interval, " in text
    assert "for want of attention: pag, seg, sag." in text
    assert "accuracy" not in text


@pytest.mark.parametrize(
    ("where", "arguments", "expected"),
    [
        ("moons", ["--methods", "cfg"], "'cfg' needs classes, and the run in"),
        ("undropped", ["--methods", "cfg"], "'cfg' needs label dropout in training"),
        ("points", ["--methods", "pag"], "'pag' needs attention"),
        ("points", ["--methods", "cgf"], "`methods` must be among ['unguided', 'cfg',"),
        ("points", ["--num-samples", "3"], "`num_samples` must be at least 16"),
        ("points", ["--weaker", "1"], "`weaker` must lie in (0, 1)"),
        ("points", ["--scales", "2", "2"], "`scales` must be different numbers, one at least"),
        ("points", ["--scales", "-1"], "`scales` and `seeds` must not be negative"),
    ],
)
def test_what_cannot_be_is_one_clear_error(
    points, moons, tmp_path, capsys, where, arguments, expected
):
    undropped = tmp_path / "run"
    shutil.copytree(points, undropped, ignore=shutil.ignore_patterns("guide*"))
    path = undropped / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"label_dropout": 0.0}))
    run_dir = {"points": points, "moons": moons, "undropped": undropped}[where]
    assert guide.cli([str(run_dir), "--name", "none", *arguments]) == 1
    printed = capsys.readouterr().err
    assert expected in printed and "Traceback" not in printed
    assert not (run_dir / "none").exists()


def test_classifiers_need_classes(moons, capsys):
    assert classifier.cli([str(moons)]) == 1
    assert "`run_dir` must be a run on data of classes" in capsys.readouterr().err


def test_no_method_of_the_library_is_missing():
    """Every map and wrapper is a method, or the module says why it is none."""
    source = inspect.getsource(recipe)
    kinds = (jaxdiff.Denoiser, solvers.DiffusionSolver)
    names = [
        name for name, value in vars(guidance).items()
        if inspect.isclass(value) and issubclass(value, kinds) and not inspect.isabstract(value)
    ]  # fmt: skip
    assert len(names) > 25
    for name in names:
        used = f"guidance.{name}(" in source
        assert used != (f"`{name}`" in recipe.__doc__ and name != "ClassifierFree"), name


@pytest.fixture(scope="module")
def parts():
    """Everything that a run may have, of the smallest networks: of vectors, and of images."""
    has = frozenset(need for method in METHODS.values() for need in method.needs)
    make = lambda **sizes: networks.MLP(2, hidden=4, num_blocks=1, **sizes, rngs=nnx.Rngs(0))
    model = jaxdiff.NetworkDenoiser(make(num_classes=3), processes.Cosine())
    noisy = guidance.NoisyClassifier(make(out_features=3), model.process)
    of_vectors = Parts(model, model, Guides(noisy, make(out_features=3)), 3, (), has)
    sizes = {"in_channels": 1, "image_size": 4, "channel_mults": (1,), "num_res_blocks": 1}
    network = networks.UNet(8, **sizes, attention_resolutions=(4,), num_classes=3, rngs=nnx.Rngs(0))
    model = jaxdiff.NetworkDenoiser(network, processes.Cosine())
    of_images = Parts(model, None, None, 3, ("mid.attn",), has)
    return {(2,): of_vectors, (4, 4, 1): of_images}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_samples(parts, name):
    """At two scales in one program; by shapes alone."""
    method = METHODS[name]
    shape = (4, 4, 1) if recipe.ATTENTION in method.needs else (2,)
    arrays, static = eqx.partition(parts[shape], eqx.is_array)

    def sampled(arrays, scale):
        parts = eqx.combine(arrays, static)
        denoiser = jaxdiff.Clipped(method.build(parts, scale), straight_through=True)
        return jaxdiff.sample(
            jax.random.key(0), denoiser, shape, 4, times=jnp.asarray([0.9, 0.5, 0.0]),
            cond=method.cond(jnp.arange(4) % 3, 3), solver=method.solver(parts, scale),
        )  # fmt: skip

    scales = jax.ShapeDtypeStruct((2,), jnp.float32)
    out = jax.eval_shape(lambda a, s: jax.vmap(lambda s: sampled(a, s))(s), arrays, scales)
    assert out.x.shape == (2, 4, *shape) and out.nfe.shape == (2, 4)


def test_the_strength_of_bayes_rule_is_that_of_a_map(x64):
    """A step of DDIM with it is one of `LossGuidance` without draws, of any function."""
    laws = jaxdiff.oracles.gaussian(processes.VP(), jnp.zeros(2), jnp.diag(jnp.asarray([1.0, 0.3])))
    log_prob = jax.tree_util.Partial(lambda x0, y: -jnp.sum((x0 - y) ** 2) / 2)
    energy = jax.tree_util.Partial(lambda x0, y: jnp.sum((x0 - y) ** 2) / 2)
    x, cond = jnp.asarray([[0.4, -1.0]]), {"y": jnp.ones((1, 2))}
    scale = jnp.asarray(1.7)

    @jax.jit
    def run():
        one = lambda denoiser, solver: (
            jaxdiff.denoise(
                jax.random.key(0), denoiser, x, cond=cond, solver=solver,
                times=jnp.asarray([0.8, 0.5, 0.0]),
            ).x
        )  # fmt: skip
        mapped = guidance.Universal(laws, log_prob, scale)
        return [
            one(mapped, solvers.DDIM()),
            one(laws, guidance.TrainingFree(log_prob=log_prob, rho=Bayes(scale))),
            one(laws, guidance.FreeDoM(energy=energy, rho=Bayes(scale, carried=True))),
        ]

    mapped, free, energetic = run()
    np.testing.assert_allclose(free, mapped, rtol=1e-9)
    np.testing.assert_allclose(energetic, mapped, rtol=1e-9)


def test_steps_of_equal_cost_and_the_picture_of_images(tmp_path):
    spent = [("adaptive", 10, 13), ("svdd", 10, 50), ("adaptive", 10, 16), ("cfg", 5, 10)]
    rows = [{"method": name, "steps": steps, "nfe": nfe} for name, steps, nfe in spent]
    assert draw.equal_steps(rows, 10) == {"adaptive": 7, "svdd": 25}
    x = np.zeros((2, 8, 4, 4, 1), np.float32)
    info = DataInfo((4, 4, 1), 2, ("a", "b"), (0, 1), pixels=True)
    draw.strip(x, np.repeat([0, 1], 4), (1.0, 2.0), info, tmp_path / "strip.png")
    assert (tmp_path / "strip.png").stat().st_size > 500
    lines.add(tmp_path / "rows.jsonl", *rows)
    assert lines.read(tmp_path / "rows.jsonl") == rows

"""The report on the geometry of a run: files, figures that have a truth, and misuse."""

import csv
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff
from jaxdiff.geometry import TapFeature, power_spectral_density
from jaxdiff.solvers import FixedPointInversion
from jaxdiff.training import CheckpointStore, init_train_state, load_run, save_model
from train import analyze
from train.core import figures
from train.core.config import NetworkConfig, load_config, save_config
from train.core.data import DataInfo, build_source
from train.geometry import draw
from train.geometry import recipe as geometry_recipe
from train.pretraining.recipe import PRESETS, Config, build_player

FIGURES = (
    *("spectra", "directions", "distances_times", "distances_samples", "conditions", "edits"),
    *("transport", "transport_cosines", "inversion", "structure", "curves"),
)
SMALL = {
    "tap": "block.0",
    "num_samples": 3,
    "times": (0.25, 1.0),
    "inversion_steps": 8,
    "inversion_iterations": 6,
    "num_values": 12,
    "rank": 4,
    "block": 32,
    "num_labels": 3,
    "label_samples": 2,
    "edit_times": (0.5,),
    "edit_samples": 2,
    "num_directions": 2,
    "num_edit_steps": 3,
    "structure_samples": 2,
    "trace_probes": 2,
    "num_probes": 4,
    "num_train": 200,
    "num_pairs": 2,
    "curve_times": (0.5,),
    "curve_steps": 3,
    "geodesic_iterations": 2,
}


def make_run(run_dir, config):
    """A run directory whose weights have left their start, where outputs are zero."""
    config = dataclasses.replace(config, run_dir=str(run_dir))
    info = DataInfo.of(build_source(config.data))
    players = {"model": build_player(config, info)}
    save_model(run_dir, players, **dataclasses.asdict(info))
    state = init_train_state(players, jax.random.key(0))

    def move(leaf):
        if not (jnp.ndim(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)):
            return leaf  # numbers of the process stay
        rng = np.random.default_rng(leaf.size)
        return leaf + 0.1 * rng.normal(size=leaf.shape).astype(leaf.dtype)

    CheckpointStore(Path(run_dir) / "checkpoints").save(jax.tree.map(move, state.unpack()), step=1)
    save_config(config)
    return run_dir


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    network = NetworkConfig(kind="dit", channels=16, depth=1)  # compiles quickly
    preset = PRESETS["digits"][1]
    return make_run(tmp_path_factory.mktemp("digits"), dataclasses.replace(preset, network=network))


@pytest.fixture(scope="module")
def folder(digits):
    analyze.main(analyze.Options(str(digits), **SMALL))
    return digits / "geometry"


def read(path):
    """Columns of a CSV, as numbers where they are."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    for name, values in columns.items():
        try:
            columns[name] = np.asarray(values, float)
        except ValueError:
            columns[name] = np.asarray(values)
    return columns


def chosen(table, **wanted):
    keep = np.ones(len(next(iter(table.values()))), bool)
    for name, value in wanted.items():
        column = table[name]
        keep &= np.isclose(column, value) if column.dtype == float else column == value
    return {name: column[keep] for name, column in table.items()}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_has_its_numbers_beside_it(folder, name):
    assert (folder / f"{name}.png").stat().st_size > 5000
    columns = read(folder / f"{name}.csv")
    numbers = [column for column in columns.values() if column.dtype == float]
    assert len(numbers) >= 2 and len(numbers[0]) > 1
    for column in numbers:
        assert np.isfinite(column).all()
    text = (folder / "report.md").read_text()
    assert f"({name}.png)" in text and f"({name}.csv)" in text


def test_the_report_holds_all_that_gives_its_numbers(folder):
    text = (folder / "report.md").read_text()
    for line in ('"seed": 0', '"rank": 4', '"preset": "digits"', "Averaged weights of step 0"):
        assert line in text
    assert not list(folder.glob("*.tmp*"))


def example(digits):
    """The first example that is analysed, by the documented choice, and the model."""
    denoiser = load_run(digits).model
    held_out = build_source(load_config(digits, Config).data, "test")
    index = np.random.default_rng(0).permutation(len(held_out))[0]
    grid = denoiser.process.times(8, denoiser.process.t_min)[::-1]
    return denoiser, jnp.asarray(held_out[index]["x"]), grid


def test_spectra_are_those_of_the_dense_jacobian_of_the_inverted_example(digits, folder):
    denoiser, x0, grid = example(digits)
    label = jnp.asarray(10)
    x = jaxdiff.invert(
        denoiser, x0[None], cond=label[None], solver=FixedPointInversion(6), times=grid[:3]
    ).x[0]
    t = grid[2]
    table = read(folder / "spectra.csv")
    times = np.unique(table["t"])
    np.testing.assert_allclose(times, np.asarray(grid)[[2, 4, 8]], rtol=1e-5)
    for name, f in (
        ("dh/dx", TapFeature(denoiser, t, label, "block.0")),
        ("alpha dx0_hat/dx", lambda x: denoiser.process.alpha(t) * denoiser(x, t, label)),
    ):
        dense = np.asarray(jax.jacfwd(f)(x), np.float64).reshape(-1, x.size)
        values = np.linalg.svd(dense, compute_uv=False)[:12]
        rows = chosen(table, map=name, t=times[0], sample=0)
        np.testing.assert_allclose(rows["value"], values, rtol=2e-3, atol=1e-4 * values[0])
        np.testing.assert_allclose(rows["cumulative_energy"][-1], 1, rtol=1e-6)


def test_directions_are_measured_as_by_the_library(folder):
    rows = chosen(read(folder / "directions.csv"), kind="right singular vectors")
    densities = np.stack([rows[name] for name in rows if name.startswith("psd")], 1)
    assert densities.shape == (3 * 3 * 4, power_spectral_density(jnp.ones((8, 8, 1))).size)
    np.testing.assert_allclose(densities.sum(1), 1, rtol=1e-5)
    white = chosen(read(folder / "directions.csv"), kind="white noise")
    radius = np.hypot(np.fft.fftfreq(8)[:, None], np.fft.fftfreq(8))
    np.testing.assert_allclose(white["mean_frequency"], radius.mean(), atol=3e-3)
    np.testing.assert_allclose(white["low_frequency_fraction"], (radius < 0.2).mean(), atol=5e-3)


@pytest.mark.parametrize("space", ["H", "X"])
def test_distances_are_symmetric_and_vanish_on_the_diagonal(folder, space):
    rows = chosen(read(folder / "distances_samples.csv"), space=space)
    matrices = rows["distance"].reshape(3, 3, 3)
    np.testing.assert_array_equal(matrices, matrices.swapaxes(1, 2))
    assert (matrices.diagonal(0, 1, 2) == 0).all()
    assert (matrices[:, ~np.eye(3, dtype=bool)] > 1e-3).all()
    assert matrices.max() <= np.pi  # four angles of at most pi/2
    means = chosen(read(folder / "distances_times.csv"), space=space)["mean"].reshape(3, 3)
    np.testing.assert_array_equal(means, means.T)
    assert (means.diagonal() == 0).all() and means[0, 2] > 1e-3


def test_edits_of_either_kind_go_equally_far(folder):
    table = read(folder / "edits.csv")
    guided, straight = (chosen(table, method=name) for name in ("guidance", "straight"))
    assert len(guided["t"]) == 2 * 2 * 2 * 2  # examples, directions, signs, parts of the way
    np.testing.assert_allclose(guided["distance"], straight["distance"], rtol=1e-4)
    whole, half = (chosen(guided, part=part)["distance"] for part in (1, 0.5))
    assert (whole > half).all() and (half > 0).all()
    assert (table["image_change"] > 0).all() and (table["noise_energy"] > 0).all()


def test_geodesics_are_no_longer_than_the_arcs_they_start_from(folder):
    table = read(folder / "curves.csv")
    lengths = {kind: chosen(table, curve=kind)["length"] for kind in ("line", "arc", "geodesic")}
    assert (lengths["geodesic"] <= lengths["arc"] * (1 + 1e-3)).all()
    assert ((table["curvedness"] >= 0) & (table["curvedness"] <= 1)).all()


def test_tables_are_tidy():
    columns = figures.tidy({"a": [1, 2], "b": ["x", "y", "z"]}, {"v": np.arange(6).reshape(2, 3)})
    assert list(columns["a"]) == [1, 1, 1, 2, 2, 2]
    assert list(columns["b"]) == ["x", "y", "z"] * 2 and list(columns["v"]) == list(range(6))
    both = figures.stacked({"p": {"v": [1]}, "q": {"v": [2, 3]}}, "kind")
    assert both == {"kind": ["p", "q", "q"], "v": [1, 2, 3]}


def test_a_mosaic_keeps_images_in_their_places():
    images = np.linspace(-1, 1, 6).reshape(2, 3, 1, 1, 1) * np.ones((2, 3, 4, 4, 1))
    picture = draw.mosaic(images)
    assert picture.shape == (9, 14)
    np.testing.assert_allclose(picture[6, [1, 6, 11]], [0.6, 0.8, 1.0], rtol=1e-6)
    assert (picture[4] == 1).all() and (picture[:, 4] == 1).all()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tap": "nonsense"}, r"`tap` must be one of the network's taps, .*'block.0'.*'nonsense'"),
        ({"times": (0.5, 1.5)}, r"`times` must lie in \(0, 1\]"),
        ({"edit_times": (0.0,)}, r"`edit_times` must lie in \(0, 1\]"),
        ({"num_samples": 1}, "at least 2"),
        ({"num_edit_steps": 0}, "`num_edit_steps` must be at least 1, got 0"),
        ({"cut": float("nan")}, "`cut` must be positive"),
        ({"times": (float("nan"),)}, r"`times` must lie in \(0, 1\]"),
        ({"rank": 0}, "`rank` must lie between 1 and `num_values`"),
        ({"num_samples": 10**6}, "held-out examples"),
        ({"rank": 13}, "`rank` must lie between 1 and `num_values`, 12"),
        ({"num_directions": 5}, "`num_directions` must lie between 1 and `rank`"),
        ({"edit_samples": 4}, "`edit_samples` must lie between 2 and `num_samples`"),
    ],
)
def test_bad_options_get_one_clear_error(digits, changes, expected):
    with pytest.raises(ValueError, match=expected):
        analyze.main(analyze.Options(str(digits), **{**SMALL, **changes}))


def test_a_run_without_images_is_refused(tmp_path):
    network = NetworkConfig(kind="mlp", channels=8, depth=1)
    config = dataclasses.replace(PRESETS["toy2d"][1], network=network)
    with pytest.raises(ValueError, match=r"model of images.*shape \(2,\)"):
        analyze.main(analyze.Options(str(make_run(tmp_path, config))))


def test_a_preset_may_be_named():
    assert geometry_recipe.resolved(analyze.Options("", preset="cifar10"), 64).inversion_steps == 50


def test_presets_make_every_choice():
    for preset in geometry_recipe.PRESETS.values():
        left = {name for name, value in dataclasses.asdict(preset).items() if value is None}
        assert left == {"preset", "out", "data_path"}

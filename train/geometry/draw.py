"""Figures of `train.analyze`: each a PNG, the plotted numbers as CSV, and rows for the table."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from train.core.figures import save_figure, stacked, tidy, write_csv
from train.geometry.measure import TRANSPORTS, Curves, Distances, Edits, Frequencies, Structure

Row = tuple[str, str, str]
SPACES = {"H": "tangent space in H (left)", "X": "latent basis in X (right)"}


def _mean_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error over the last axis; NaN is left out."""
    count = np.maximum(np.sum(np.isfinite(values), -1), 2)
    mean = np.nanmean(values, -1)
    spread = np.sum(np.nan_to_num(values - mean[..., None]) ** 2, -1) / (count - 1)
    return mean, np.sqrt(spread / count)


def _number(values: np.ndarray, form: str = "{:.3f}") -> str:
    """Mean and standard error over samples, as text."""
    mean, error = _mean_error(np.asarray(values, float).ravel())
    return f"{form} +- {form}".format(float(mean), float(error))


def _shown(times: Sequence[float]) -> tuple[int, ...]:
    """Indices of the first, middle and last time."""
    return tuple(sorted({0, len(times) // 2, len(times) - 1}))


def _colors(times: Sequence[float]) -> np.ndarray:
    return plt.cm.viridis(np.linspace(0, 0.9, len(times)))


def _finish(figure: plt.Figure, folder: Path, name: str, columns: dict[str, Sequence]) -> None:
    write_csv(folder / f"{name}.csv", columns)
    save_figure(figure, folder / f"{name}.png")


def spectra(folder: Path, times: np.ndarray, values: dict[str, np.ndarray]) -> list[Row]:
    """Singular values and their cumulative energy.

    Args:
        folder: where.
        times: `(T,)`.
        values: map -> singular values, `(T, N, r)`.
    """
    size = (11, 4 * len(values))
    figure, axes = plt.subplots(len(values), 2, figsize=size, squeeze=False, layout="constrained")
    tables = {}
    for (name, sigma), (left, right) in zip(values.items(), axes, strict=True):
        energy = np.cumsum(sigma**2, -1) / np.sum(sigma**2, -1, keepdims=True)
        index = np.arange(1, sigma.shape[-1] + 1)
        coordinates = {"t": times, "sample": range(sigma.shape[1]), "index": index}
        tables[name] = tidy(coordinates, {"value": sigma, "cumulative_energy": energy})
        for axis, curve in ((left, sigma), (right, energy)):
            for t, color, one in zip(times, _colors(times), curve, strict=True):
                mean, spread = one.mean(0), one.std(0)
                axis.plot(index, mean, color=color, label=f"t = {t:.2g}", lw=1.4)
                axis.fill_between(index, mean - spread, mean + spread, color=color, alpha=0.12)
        left.set(xlabel="index", ylabel="singular value", title=name, yscale="log")
        # Values at the level of rounding would stretch the axis.
        left.set_ylim(bottom=max(sigma.min(), 1e-4 * sigma.max()) / 1.3)
        right.set(xlabel="index", ylabel="share of the energy shown", title=name, ylim=(0, 1.02))
        right.legend(frameon=False, fontsize=8, ncols=2)
    _finish(figure, folder, "spectra", stacked(tables, "map"))
    rows = []
    for name, sigma in values.items():
        energy = np.cumsum(sigma**2, -1) / np.sum(sigma**2, -1, keepdims=True)
        half = np.argmax(energy >= 0.5, -1) + 1
        title = f"{name}: directions with half of the energy, t = {times[0]:.2g}"
        rows.append((title, _number(half[0], "{:.1f}"), _later(times, half)))
    return rows


def directions(folder: Path, times, found: Frequencies, cut: float) -> list[Row]:
    """Frequencies of the right singular vectors.

    Args:
        folder: where.
        times: `(T,)`.
        found: what was measured.
        cut: in cycles per pixel.
    """
    ring, density, mean, low, white = found
    count, rank = mean.shape[1:]
    figure, axes = plt.subplots(1, 3, figsize=(16, 4.2), layout="constrained")
    for t, color, one in zip(times, _colors(times), density.mean((1, 2)), strict=True):
        axes[0].plot(ring, one, color=color, marker=".", label=f"t = {t:.2g}")
    axes[0].axhline(1 / len(ring), color="gray", ls=":", label="white noise")
    axes[0].set(xlabel="frequency (cycles per pixel)", ylabel="power spectral density")
    axes[0].legend(frameon=False, fontsize=8, ncols=2)
    titles = ("mean frequency (cycles per pixel)", f"share of energy below {cut:g}")
    for axis, value, level, title in zip(axes[1:], (mean, low), white, titles, strict=True):
        for k, label in ((slice(0, 1), "first direction"), (slice(None), f"mean of {rank}")):
            center, error = _mean_error(value[:, :, k].mean(2))
            axis.errorbar(times, center, error, marker="o", ms=4, capsize=3, label=label)
        axis.axhline(level, color="gray", ls=":", label="white noise")
        axis.set(xlabel="t", ylabel=title)
        axis.legend(frameon=False)
    coordinates = {"t": times, "sample": range(count), "direction": range(1, rank + 1)}
    columns = {"mean_frequency": mean, "low_frequency_fraction": low}
    columns |= {f"psd_{f:.3f}": density[..., k] for k, f in enumerate(ring)}
    table = tidy(coordinates, columns)
    flat = np.ones((len(times), 1, 1))
    levels = {"mean_frequency": white[0] * flat, "low_frequency_fraction": white[1] * flat}
    levels |= {f"psd_{f:.3f}": flat / len(ring) for f in ring}
    baseline = tidy({"t": times, "sample": [0], "direction": [0]}, levels)
    tables = {"right singular vectors": table, "white noise": baseline}
    _finish(figure, folder, "directions", stacked(tables, "kind"))
    titles = ("mean frequency of directions", f"energy of directions below {cut:g}")
    return [
        (f"{title}, t = {times[i]:.2g}", _number(value[i].mean(1)), f"white noise {level:.3f}")
        for title, value, level in zip(titles, (mean, low), white, strict=True)
        for i in _shown(times)
    ]


def _matrix(figure, axis, matrix, ticks, top: float, label: str) -> None:
    image = axis.imshow(matrix, cmap="magma", vmin=0, vmax=top, origin="lower")
    places = np.arange(len(matrix))
    places = places[:: max(1, len(places) // 8)]
    axis.set_xticks(places, [ticks[i] for i in places], rotation=45)
    axis.set_yticks(places, [ticks[i] for i in places])
    figure.colorbar(image, ax=axis, shrink=0.8, label=label)


def distances_times(folder: Path, times, found: Distances) -> list[Row]:
    """Distances between the subspaces of one sample at different times.

    Args:
        folder: where.
        times: `(T,)`.
        found: what was measured.
    """
    random = found.random
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    tables, rows = {}, []
    for (space, matrices), axis in zip(found.times.items(), axes, strict=True):
        mean, error = _mean_error(np.moveaxis(matrices, 0, -1))
        ticks = [f"{t:.2g}" for t in times]
        _matrix(figure, axis, mean, ticks, random[space][0], "geodesic distance")
        axis.set(xlabel="t", ylabel="t'", title=f"{SPACES[space]}; scale up to random ones")
        tables[space] = tidy({"t": times, "t2": times}, {"mean": mean, "standard_error": error})
        value = _number(matrices[:, 0, -1])
        rows.append(
            (f"distance in {space} from lowest to highest t", value, _random(random[space]))
        )
    _finish(figure, folder, "distances_times", stacked(tables, "space"))
    return rows


def _random(level: tuple[float, float]) -> str:
    return f"random subspaces {level[0]:.3f}"


def per_sample(matrices: np.ndarray) -> np.ndarray:
    """Mean distance of each sample to the others, `(*, N, N)` to `(*, N)`."""
    return matrices.sum(-1) / (matrices.shape[-1] - 1)


def distances_samples(folder: Path, times, found: Distances) -> list[Row]:
    """Distances between the subspaces of different samples at each time.

    Args:
        folder: where.
        times: `(T,)`.
        found: what was measured.
    """
    random = found.random
    figure, axes = plt.subplots(2, 4, figsize=(19, 8.5), layout="constrained")
    tables, rows = {}, []
    for (space, matrices), line in zip(found.samples.items(), axes, strict=True):
        mean, error = _mean_error(per_sample(matrices))
        level, deviation = random[space]
        line[0].errorbar(times, mean, error, marker="o", ms=4, capsize=3, label="samples")
        line[0].axhline(level, color="gray", ls=":", label="random subspaces")
        line[0].axhspan(level - deviation, level + deviation, color="gray", alpha=0.2)
        line[0].set(
            xlabel="t", ylabel="mean geodesic distance", title=SPACES[space], ylim=(0, None)
        )
        line[0].legend(frameon=False)
        for axis, i in zip(line[1:], _shown(times), strict=False):
            ticks = list(range(matrices.shape[1]))
            _matrix(figure, axis, matrices[i], ticks, level, "geodesic distance")
            axis.set(xlabel="sample", ylabel="sample", title=f"{space}, t = {times[i]:.2g}")
        samples = range(matrices.shape[1])
        tables[space] = tidy(
            {"t": times, "sample": samples, "sample2": samples}, {"distance": matrices}
        )
        tables[f"{space} of random subspaces"] = tidy(
            {"t": times, "sample": [0], "sample2": [1]},
            {"distance": np.full((len(times), 1, 1), level)},
        )
        for i in _shown(times):
            title = f"distance in {space} between samples, t = {times[i]:.2g}"
            rows.append((title, _number(per_sample(matrices[i])), _random(random[space])))
    _finish(figure, folder, "distances_samples", stacked(tables, "space"))
    return rows


def conditions(folder: Path, times, found: Distances) -> list[Row]:
    """Distances between the subspaces of one noisy example under different labels.

    Args:
        folder: where.
        times: `(T,)`.
        found: what was measured, of labels too.
    """
    random = found.random
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
    tables, rows = {}, []
    for (space, matrices), axis in zip(found.labels.items(), axes, strict=True):
        scales = {
            "labels of one example": per_sample(matrices).mean(-1),
            "samples": per_sample(found.samples[space]),
        }
        for name, values in scales.items():
            mean, error = _mean_error(values)
            axis.errorbar(times, mean, error, marker="o", ms=4, capsize=3, label=f"between {name}")
            tables[f"{space} of {name}"] = {"t": times, "mean": mean, "standard_error": error}
        axis.axhline(random[space][0], color="gray", ls=":", label="random subspaces")
        axis.set(xlabel="t", ylabel="mean geodesic distance", title=SPACES[space], ylim=(0, None))
        axis.legend(frameon=False)
        first, second = scales.values()
        for i in _shown(times):
            title = f"distance in {space} between labels, t = {times[i]:.2g}"
            rows.append((title, _number(first[i]), f"samples {_number(second[i])}"))
    _finish(figure, folder, "conditions", stacked(tables, "between"))
    return rows


def mosaic(images: np.ndarray) -> np.ndarray:
    """Images `(R, C, H, W, channels)` in [-1, 1] as one picture in [0, 1], with white lines."""
    padded = np.pad(
        np.clip((np.asarray(images, np.float32) + 1) / 2, 0, 1),
        ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)),
        constant_values=1,
    )
    rows, columns, height, width, channels = padded.shape
    picture = padded.swapaxes(1, 2).reshape(rows * height, columns * width, channels)[:-1, :-1]
    return picture if channels == 3 else picture.mean(-1)


def _strips(cells: dict[tuple[str, str], np.ndarray]) -> plt.Figure:
    """Mosaics in a grid: (name of the row, name of the column) -> images `(R, C, H, W, ch)`."""
    names = [list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1)]
    rows, columns = next(iter(cells.values())).shape[:2]
    size = (1.2 + 0.6 * columns * len(names[1]), 0.3 + (0.6 * rows + 0.12) * len(names[0]))
    figure, axes = plt.subplots(
        len(names[0]), len(names[1]), figsize=size, squeeze=False, layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.1)
    for row, line in zip(names[0], axes, strict=True):
        for column, axis in zip(names[1], line, strict=True):
            axis.set(xticks=[], yticks=[])
            axis.imshow(mosaic(cells[row, column]), cmap="gray", vmin=0, vmax=1)
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(row, rotation=0, ha="right", va="center", fontsize=8)
    for column, axis in zip(names[1], axes[0], strict=True):
        axis.set_title(column, fontsize=8)
    return figure


def edits(folder: Path, results: dict[float, Edits]) -> list[Row]:
    """Edited images, and what each edit did.

    Args:
        folder: where.
        results: time -> edits.
    """
    cells, tables = {}, {}
    for t, found in results.items():
        tables[t] = found.columns
        for method, images in found.images.items():
            for sample, strip in enumerate(images):
                cells[f"t = {t:.2g}\n{method}", f"example {sample}"] = strip
    columns = stacked(tables, "t")
    _finish(_strips(cells), folder, "edits", columns)
    rows = []
    for t, table in tables.items():
        for title, name in (
            ("change of norm", "norm_change"),
            ("change of noise energy", "noise_energy_change"),
            ("change of image", "image_change"),
        ):
            value, other = (
                _number(np.abs(table[name][table["method"] == method]), "{:.4f}")
                for method in ("guidance", "straight")
            )
            rows.append((f"edits at t = {t:.2g}: {title}", value, f"straight {other}"))
    return rows


def transport(folder: Path, results: dict[float, Edits]) -> list[Row]:
    """Directions of the first example carried to others.

    Args:
        folder: where.
        results: time -> edits.
    """
    cells, tables = {}, {}
    for t, found in results.items():
        targets, count = found.transport.lengths.shape
        coordinates = {"target": range(1, targets + 1), "direction": range(1, count + 1)}
        values = {f"cosine_of_{kind}": found.transport.cosines[kind] for kind in TRANSPORTS}
        tables[t] = tidy(coordinates, values | {"projection_length": found.transport.lengths})
        for kind, strips in found.carried.items():
            row = f"t = {t:.2g}\n{kind.replace('_', ' ')}"
            cells[row, "example 0"] = found.source[None]
            for target, strip in enumerate(strips, 1):
                cells[row, f"to example {target}"] = strip[None]
    columns = stacked(tables, "t")
    _finish(_strips(cells), folder, "transport", columns)
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for kind in TRANSPORTS:
        cosines = np.stack([found.transport.cosines[kind] for found in results.values()])
        mean, error = _mean_error(cosines.mean(-1))
        label = kind.replace("_", " ")
        axis.errorbar(list(results), mean, error, marker="o", ms=4, capsize=3, label=label)
    axis.set(xlabel="t", ylabel="cosine of the move in H with u", ylim=(0, 1.02))
    axis.legend(frameon=False)
    _finish(figure, folder, "transport_cosines", columns)
    rows = []
    for t, found in results.items():
        own, unchanged, carried, best = (
            _number(found.transport.cosines[kind].mean(-1), "{:.2f}") for kind in TRANSPORTS
        )
        other = f"pullback {best}, unchanged {unchanged}, own {own}"
        rows.append((f"cosine of the move at t = {t:.2g}, transport", carried, other))
    return rows


def inversion(folder: Path, x0, errors: dict[str, np.ndarray]) -> list[Row]:
    """Errors of round trips.

    Args:
        folder: where.
        x0: `(N, *event)`.
        errors: method -> `(N, *event)`.
    """
    count = len(x0)
    axes_ = tuple(range(1, x0.ndim))
    largest = {name: np.abs(error).max(axes_) for name, error in errors.items()}
    rms = {name: np.sqrt((error**2).mean(axes_)) for name, error in errors.items()}
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True, layout="constrained")
    for axis, values, title in zip(axes, (largest, rms), ("largest", "RMS"), strict=True):
        for name, value in values.items():
            axis.semilogy(range(count), value, "o", ms=5, label=name)
        axis.set(xlabel="sample", ylabel=f"{title} error over pixels", title="round trip")
        axis.legend(frameon=False)
    tables = {
        name: {"sample": range(count), "largest": largest[name], "rms": rms[name]}
        for name in errors
    }
    _finish(figure, folder, "inversion", stacked(tables, "method"))
    form = "{:.1e}"
    other = f"DDIM {_number(rms['DDIM'], form)}"
    return [("round trip of inversion, RMS error", _number(rms["fixed point"], form), other)]


def structure(folder: Path, times, measured: Structure, size: int) -> list[Row]:
    """The denoiser's Jacobian and the score against t.

    Args:
        folder: where.
        times: `(T,)`.
        measured: what was measured.
        size: of the event.
    """
    found, explained = dict(measured.measures), measured.explained
    count = next(iter(found.values())).shape[1]
    residual = found["fokker_planck_residual"] / found["score_change"]
    found["fokker_planck_relative"] = residual
    dimensions = {name: found[name] for name in found if name.startswith("dimension")}
    ranks = {name: found[name] for name in ("numerical_rank", "participation_ratio")}
    panels = {
        f"rank of the denoiser's Jacobian (of {size})": ranks,
        "intrinsic dimension": dimensions,
        "asymmetry of the denoiser's Jacobian": {"asymmetry": found["asymmetry"]},
        "Fokker-Planck residual, RMS": {
            name: found[name] for name in ("fokker_planck_residual", "score_change")
        },
        "Fokker-Planck residual / |d score / dt|": {"fokker_planck_relative": residual},
    }
    figure, axes = plt.subplots(2, 3, figsize=(17, 8.5), layout="constrained")
    for (title, values), axis in zip(panels.items(), axes.flat, strict=False):
        for name, value in values.items():
            mean, error = _mean_error(value)
            label = name.removeprefix("dimension_").replace("_", " ")
            axis.errorbar(times, mean, error, marker="o", ms=4, capsize=3, label=label)
        axis.set(xlabel="t", title=title, yscale="log" if "residual" in title else "linear")
        axis.legend(frameon=False)
    axes[1, 2].plot(times, 1 - explained, marker="o", ms=4)
    title = "share of the score that a Gaussian does not explain"
    axes[1, 2].set(xlabel="t", title=title, yscale="log")
    columns = tidy(
        {"t": times, "sample": range(count)},
        found | {"explained_variance": np.repeat(explained[:, None], count, 1)},
    )
    _finish(figure, folder, "structure", columns)
    rows = [
        (f"{title}, t = {times[0]:.2g}", _number(found[name][0]), _later(times, found[name]))
        for title, name in (
            ("numerical rank of dD/dx", "numerical_rank"),
            ("effective rank of dD/dx", "participation_ratio"),
            ("dimension by the trace", "dimension_trace"),
            ("asymmetry of dD/dx", "asymmetry"),
            ("relative Fokker-Planck residual", "fokker_planck_relative"),
        )
    ]
    title = f"score explained by a Gaussian, t = {times[0]:.2g}"
    return [*rows, (title, f"{explained[0]:.3f}", _later(times, explained[:, None]))]


def _later(times, values: np.ndarray) -> str:
    shown = _shown(times)[1:]
    return ", ".join(f"{values[i].mean():.3f} at t = {times[i]:.2g}" for i in shown)


def curves(folder: Path, found: Curves) -> list[Row]:
    """Lengths and curvedness of curves between samples.

    Args:
        folder: where.
        found: what was measured.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    tables = {}
    for name, lengths in found.lengths.items():
        values = {"length": lengths, "curvedness": found.curvedness[name]}
        tables[name] = tidy({"t": found.times, "pair": range(lengths.shape[1])}, values)
        for axis, value in zip(axes, values.values(), strict=True):
            mean, error = _mean_error(value)
            axis.errorbar(found.times, mean, error, marker="o", ms=4, capsize=3, label=name)
    for axis, title in zip(axes, ("length in H", "curvedness in H"), strict=True):
        axis.set(xlabel="t", ylabel=title, ylim=(0, None))
        axis.legend(frameon=False)
    _finish(figure, folder, "curves", stacked(tables, "curve"))
    numbers = {kind: _number(values, "{:.2f}") for kind, values in found.lengths.items()}
    line = numbers.pop("line")
    others = ", ".join(f"{kind} {number}" for kind, number in numbers.items())
    return [("length in H of lines between samples", line, others)]

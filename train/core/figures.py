"""Pictures and tables of a run."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 - the backend must be chosen first


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Write a PNG under a temporary name, then rename."""
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120, bbox_inches="tight")
    plt.close(figure)
    temporary.rename(path)


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The logged metrics of a run."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def loss_curve(run_dir: Path) -> None:
    """Write loss.png: the training loss against the step."""
    if not (run_dir / "metrics.jsonl").exists():
        return
    records = [record for record in read_metrics(run_dir) if "loss" in record]
    held_out = [record for record in read_metrics(run_dir) if "held_out_loss" in record]
    figure, axes = plt.subplots(figsize=(6, 3.5))
    steps, values = ([r[name] for r in records] for name in ("step", "loss"))
    axes.plot(steps, values, lw=0.8, alpha=0.5, label="mean over the logging interval")
    if len(values) >= 20:
        width = len(values) // 10
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], smooth, lw=1.8, label=f"mean of {width} intervals")
    if held_out:
        at, found = ([r[name] for r in held_out] for name in ("step", "held_out_loss"))
        axes.plot(at, found, "o-", ms=3, lw=1, label="averaged weights, held-out data")
    # An unbiased squared distance may be negative.
    scale = "log" if min(values) > 0 else "linear"
    axes.set(xlabel="step", ylabel="loss", yscale=scale)
    axes.legend(frameon=False)
    save_figure(figure, run_dir / "loss.png")


def image_grid(
    images: np.ndarray,
    path: Path,
    *,
    columns: int,
    titles: Sequence[str] = (),
    heads: Sequence[str] = (),
    pixels: bool = True,
) -> None:
    """Write images as a grid, row by row, with a title for each row and a head for each column.

    Args:
        images: `(n, H, W, C)`, pixels in [-1, 1], or anything else with any number of channels,
            which are shown side by side, each over its own range.
        path: the PNG file.
        columns: images in a row.
        titles: of the rows.
        heads: of the columns.
        pixels: whether they are pixels.
    """
    images = np.asarray(images, np.float32)
    if pixels and images.shape[-1] in (1, 3):
        shown = np.clip((images + 1) / 2, 0, 1)
    else:
        low, high = images.min((0, 1, 2)), images.max((0, 1, 2))
        scaled = (images - low) / np.where(high > low, high - low, 1)
        shown = np.moveaxis(scaled, 3, 2).reshape(*images.shape[:2], -1, 1)
    count, height, width, channels = shown.shape
    rows, gap = -(-count // columns), max(1, height // 16)
    canvas = np.ones((rows * (height + gap), columns * (width + gap), channels), np.float32)
    for i, image in enumerate(shown):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    size = 0.6 * columns * width / height, 0.6 * rows
    figure, axis = plt.subplots(figsize=size)
    kinds = {"cmap": "gray"} if channels == 1 else {}
    axis.imshow(canvas.squeeze(), vmin=0, vmax=1, interpolation="nearest", **kinds)
    axis.set(
        xticks=[(column + 0.5) * (width + gap) for column in range(len(heads))],
        yticks=[(row + 0.5) * (height + gap) for row in range(len(titles))],
    )
    axis.set_xticklabels(heads)
    axis.set_yticklabels(titles)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.set_frame_on(False)
    save_figure(figure, path)


def scatter(points: np.ndarray, reference: np.ndarray | None, path: Path) -> None:
    """Write samples `(n, d)`, and real points beside them if there are any."""
    parts = {"data": reference, "samples": points}
    scatters({name: values for name, values in parts.items() if values is not None}, path)


def scatters(parts: dict[str, np.ndarray], path: Path, colours: np.ndarray | None = None) -> None:
    """Write several clouds of points `(n, d)`, side by side.

    In the plane as they are; on the line as a histogram; in more dimensions, the two principal
    ones of the first.

    Args:
        parts: the clouds, by their titles.
        path: the PNG file.
        colours: integers `(n,)`, of the points of clouds of that size; None for one colour.
    """
    shown = {name: np.asarray(values, float) for name, values in parts.items()}
    first = next(iter(shown.values()))
    if first.shape[1] > 2:
        centre = first.mean(0)
        directions = np.linalg.svd(first - centre, full_matrices=False)[2][:2]
        shown = {name: (values - centre) @ directions.T for name, values in shown.items()}
    figure, axes = plt.subplots(
        1, len(shown), figsize=(4 * len(shown), 4), sharex=True, sharey=True, squeeze=False
    )
    for axis, (title, values) in zip(axes[0], shown.items(), strict=True):
        if values.shape[1] == 1:
            axis.hist(values[:, 0], bins=60, density=True)
            axis.set(title=title)
        else:
            fits = colours is not None and len(colours) == len(values)
            kinds = {"c": colours, "cmap": "tab10"} if fits else {}
            axis.scatter(*values.T, s=2, alpha=0.4, lw=0, **kinds)
            axis.set(title=title, aspect="equal")
    save_figure(figure, path)


def table(rows: Sequence[tuple[str, str, str]], header: tuple[str, str, str]) -> str:
    """A table of three columns as text."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(3)]

    def line(row):
        return "  ".join(
            cell.ljust(width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()

    return "\n".join([line(header), line(tuple("-" * w for w in widths)), *map(line, rows)])


def write_text(path: Path, text: str) -> None:
    """A text file, there whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """An npz file, there whole or not at all."""
    temporary = path.with_name(f".{path.stem}.tmp.npz")
    np.savez(temporary, **arrays)
    temporary.replace(path)


def write_csv(path: Path, columns: dict[str, Sequence]) -> None:
    """Write columns of equal length under a header row; under a temporary name, then renamed."""
    temporary = path.with_suffix(".tmp.csv")
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in zip(*columns.values(), strict=True):
            writer.writerow([_cell(value) for value in row])
    temporary.rename(path)


def _cell(value) -> str:
    return f"{value:.8g}" if isinstance(value, (float, np.floating)) else str(value)


def tidy(axes: dict[str, Sequence], values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays over common axes as columns: one row for each entry, axes first.

    Args:
        axes: name of each axis and its coordinates.
        values: name of each array; their shape is that of the axes.
    """
    grids = np.meshgrid(*map(np.asarray, axes.values()), indexing="ij")
    columns = {name: grid.ravel() for name, grid in zip(axes, grids, strict=True)}
    return columns | {name: np.asarray(array).ravel() for name, array in values.items()}


def stacked(tables: dict[str, dict[str, np.ndarray]], name: str) -> dict[str, list]:
    """Tables with equal columns, one under another, with a first column that tells them apart."""
    columns = {name: [key for key, table in tables.items() for _ in next(iter(table.values()))]}
    for column in next(iter(tables.values())):
        columns[column] = [value for table in tables.values() for value in table[column]]
    return columns

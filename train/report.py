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
    records = read_metrics(run_dir)
    figure, axes = plt.subplots(figsize=(6, 3.5))
    steps, values = ([r[name] for r in records] for name in ("step", "loss"))
    axes.plot(steps, values, lw=0.8, alpha=0.5, label="mean over the logging interval")
    if len(values) >= 20:
        width = len(values) // 10
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], smooth, lw=1.8, label=f"mean of {width} intervals")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend(frameon=False)
    save_figure(figure, run_dir / "loss.png")


def image_grid(images: np.ndarray, path: Path, *, columns: int, titles: Sequence[str] = ()) -> None:
    """Write images `(n, H, W, C)` in [-1, 1] as a grid, row by row, with a title for each row."""
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(0.6 * columns, 0.6 * rows), squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.axis("off")
    for axis, image in zip(axes.flat, images, strict=False):
        pixels = np.clip((np.asarray(image, np.float32) + 1) / 2, 0, 1)
        axis.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    for row, title in enumerate(titles):
        axes[row, 0].text(
            -0.4, 0.5, title, transform=axes[row, 0].transAxes, va="center", ha="right"
        )
    save_figure(figure, path)


def scatter(points: np.ndarray, reference: np.ndarray, path: Path) -> None:
    """Write samples in the plane `(n, 2)` beside real points."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 4), sharex=True, sharey=True)
    for axis, values, title in zip(axes, (reference, points), ("data", "samples"), strict=True):
        axis.scatter(*np.asarray(values).T, s=2, alpha=0.4, lw=0)
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

"""What a sweep is written as: a table, curves, and one noise under growing scale."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.core import figures
from train.core.comparison import TITLES, difference, mean_of
from train.core.data import DataInfo
from train.guiding.recipe import CLASSIFIERS, METHODS, OTHERS, PARTICLES, RULES, SAMPLERS

Row = Mapping[str, Any]
FIGURES = ("accuracy", "frechet", "kid", "density", "coverage", "recall", "vendi")
# What is right against what is various.
FIDELITY, VARIETY = "density", "recall"
COSTS = {
    "nfe": ("evaluations", "{:.1f}"),
    "backward": ("backward", "{:.0f}"),
    "gradients": ("classifier gradients", "{:.0f}"),
    "time": ("time", "{:.1f}"),
    "bytes": ("MiB, all scales", "{:.0f}"),
}


def key_of(row: Row) -> tuple[str, int, float, int]:
    """What a line is of: method, steps, scale, seed."""
    return row["method"], row["steps"], row["scale"], row["seed"]


def equal_steps(rows: Sequence[Row], steps: int) -> dict[str, int]:
    """Of every method, the steps of plain guidance, two evaluations each, that cost as many."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["steps"] == steps:
            found.setdefault(row["method"], []).append(row["nfe"])
    return {name: max(1, round(float(np.mean(nfe)) / 2)) for name, nfe in found.items()}


def table(rows: Sequence[Row], floors: Row, steps: int, lacks: Mapping[str, str]) -> str:
    """The figures as Markdown: a row for each method, steps and scale, means over seeds.

    Args:
        rows: the lines of the file.
        floors: of real data.
        steps: of the methods; plain guidance has other numbers, too.
        lacks: methods that were not run, and why.
    """
    known = {key_of(row): row for row in rows}
    equal = equal_steps(rows, steps)
    order = list(METHODS)
    groups: dict[tuple[int, int, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((order.index(row["method"]), row["steps"], row["scale"]), []).append(row)
    names = [name for name in FIGURES if name in rows[0]]
    header = ["method", "scale", *(TITLES[name][0] for name in names)]
    header += ["Frechet above CFG of as many evaluations", *(t for t, _ in COSTS.values()), "seeds"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for (index, n, scale), group in sorted(groups.items()):
        method = order[index]
        cells = [method if n == steps else f"{method}, {n} steps", f"{scale:g}"]
        for name in names:
            errors = [row.get(f"{name}_standard_error") for row in group]
            cells.append(mean_of([row[name] for row in group], TITLES[name][1], errors))
        other = [known.get(("cfg", equal[method], scale, row["seed"])) for row in group]
        pairs = [difference(a, b) for a, b in zip(group, other, strict=True) if b and b is not a]
        pairs = pairs if n == steps else []
        cells.append(mean_of([p[0] for p in pairs], "{:+.3f}", [p[1] for p in pairs]))
        for cost, (_, form) in COSTS.items():
            value = float(np.mean([row[cost] for row in group]))
            cells.append(form.format(value / 2**20 if cost == "bytes" else value))
        lines.append("| " + " | ".join([*cells, str(len(group))]) + " |")
    real = [TITLES[name][1].format(floors[f"{name}_floor"]) for name in names]
    lines.append("| real training data | | " + " | ".join(real) + " |" + " |" * (len(COSTS) + 2))
    text = "\n".join(lines)
    own = [f"{name}: {m.own}" for name, m in METHODS.items() if m.own and name in equal]
    if own:
        text += "\n\nOwn numbers of methods, by the scale of the table: " + "; ".join(own) + "."
    for need in dict.fromkeys(lacks.values()):
        names = ", ".join(name for name, lacking in lacks.items() if lacking == need)
        text += f"\n\nNot run, for want of {need}: {names}."
    return text


def curves(rows: Sequence[Row], steps: int, path: Path) -> None:
    """Density of samples against recall of the data, a line for each method over its scales."""
    import matplotlib.pyplot as plt

    lines: dict[str, dict[float, list[tuple[float, float]]]] = {}
    for row in rows:
        if row["steps"] == steps:
            points = lines.setdefault(row["method"], {}).setdefault(row["scale"], [])
            points.append((row[VARIETY], row[FIDELITY]))
    means = {
        name: np.asarray([np.mean(scales[s], 0) for s in sorted(scales)])
        for name, scales in lines.items()
    }
    kinds = [
        kind for kind in (RULES, OTHERS, SAMPLERS, CLASSIFIERS)
        if any(METHODS[name].kind == kind for name in means)
    ]  # fmt: skip
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(4.2 * len(kinds), 5), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, kind in zip(axes[0], kinds, strict=True):
        if "cfg" in means:
            axis.plot(*means["cfg"].T, "o-", color="black", ms=3, label="cfg")
        for name, points in means.items():
            if METHODS[name].kind == kind and name not in ("cfg", "unguided"):
                axis.plot(*points.T, ".-", lw=1, label=name)
        if "unguided" in means:
            axis.plot(*means["unguided"].T, "*", color="red", ms=9, label="unguided")
        axis.set(title=kind, xlabel=VARIETY)
        # Below, where no line is.
        axis.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    axes[0, 0].set(ylabel=FIDELITY)
    figures.save_figure(figure, path)


def strip(
    x: np.ndarray, classes: np.ndarray | None, scales: Sequence[float], info: DataInfo, path: Path
) -> None:
    """One noise a row, under growing scale; of points, a cloud for each scale.

    Args:
        x: `(scales, count, *event)`.
        classes: of the samples, or None.
        scales: in the order of x.
        info: of the data.
        path: the PNG file.
    """
    heads = [f"{scale:g}" for scale in scales]
    if x.ndim != 5:
        flat = {head: cloud.reshape(len(cloud), -1) for head, cloud in zip(heads, x, strict=True)}
        figures.scatters(flat, path, classes)
        return
    rows = np.arange(0, x.shape[1], PARTICLES)[:10]  # one of each population
    images = x[:, rows].swapaxes(0, 1).reshape(-1, *x.shape[2:])
    titles = [] if classes is None else [info.name_of(int(classes[row])) for row in rows]
    figures.image_grid(
        images, path, columns=len(heads), titles=titles, heads=heads, pixels=info.pixels
    )

"""Samplers beside one another, of one noise: figures of features that were not trained on."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdiff import parallel
from jaxdiff.denoiser import Denoiser
from jaxdiff.training import write_json
from train.core import figures
from train.core.comparison import TITLES, difference, held_out_metrics, resampled_frechet
from train.core.config import RunConfig, SamplingConfig
from train.core.data import DataInfo, Source
from train.core.evaluation import measure, picture, references
from train.core.sampling import draw, requested


@dataclasses.dataclass(frozen=True)
class Row:
    """What is compared: a name, a model, and how it is sampled."""

    name: str
    model: Denoiser
    sampling: SamplingConfig


def compare(
    rows: Sequence[Row],
    config: RunConfig,
    source: Source,
    held_out: Source,
    mesh,
    *,
    count: int,
    chosen: Mapping[str, Any],
    folder: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Samples of every row from the same noise and conditions, and their figures.

    Args:
        rows: what is compared.
        config: of the run.
        source: the data trained on.
        held_out: the data that samples are measured against.
        mesh: the devices.
        count: of samples.
        chosen: metrics by name.
        folder: where a picture of each row goes; None for none.

    Returns:
        row -> figure -> value; and "frechet_resampled", see `comparison.resampled`.
    """
    info = DataInfo.of(source)
    cond = requested(held_out, info, count)
    key = jax.random.key(config.seed + 1)
    reference = held_out[references(len(held_out))]
    some = np.random.default_rng(0).permutation(len(source))[: min(count, len(source))]
    real = source[np.sort(some)]
    found = {}
    for row in rows:
        begun = time.perf_counter()
        out, _ = draw(row.sampling, row.model, info, mesh, key, cond, count)
        nfe, x = parallel.fetch((out.nfe, out.x))
        samples = {"x": x} | ({} if cond is None else {"cond": cond})
        found[row.name] = {
            "nfe": int(nfe[0]),
            **measure(chosen, samples, reference, real),
            "frechet_resampled": resampled_frechet(chosen, samples, reference),
            "seconds": time.perf_counter() - begun,
        }
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            name = row.name.replace(" ", "-").replace(",", "")
            picture(folder / f"{name}.png", x, cond, reference["x"], config.evaluation, info)
    return found


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures as Markdown, a row for each sampler and one for real data.

    Its last column is how much farther from the data than the first row each is, by pairs.
    """
    names = [name for name in TITLES if name in next(iter(found.values()))]
    titles = [*(TITLES[name][0] for name in names), "Frechet above the first"]
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    first = next(iter(found.values()))
    for label, numbers in found.items():
        cells = []
        for name in names:
            form = TITLES[name][1]
            cell = form.format(numbers[name])
            error = numbers.get(f"{name}_standard_error")
            cells.append(cell if error is None else f"{cell} +- {form.format(error)}")
        more = "{:.3f} +- {:.3f}".format(*difference(numbers, first))
        lines.append(
            f"| {label} | " + " | ".join([*cells, "" if numbers is first else more]) + " |"
        )
    floors = [
        TITLES[name][1].format(first[f"{name}_floor"]) if f"{name}_floor" in first else "-"
        for name in names
    ]
    lines.append("| real training data | " + " | ".join([*floors, ""]) + " |")
    return "\n".join(lines)


def gap_closed(
    tuned: Mapping[str, Any], before: Mapping[str, Any], full: Mapping[str, Any]
) -> float | None:
    """How much of the way in Frechet distance from one sampler to the full one: 1 is all.

    None where the full one is no nearer to the data: there is no way to go.
    """
    start, end = before["frechet"], full["frechet"]
    return (start - tuned["frechet"]) / (start - end) if start > end else None


def save(found: Mapping[str, Any], path: Path) -> None:
    """As JSON, and beside it as a table."""
    write_json(path, found)
    figures.write_text(path.with_suffix(".md"), table(found) + "\n")


def report(
    rows: Sequence[Row],
    config: RunConfig,
    source: Source,
    held_out: Source,
    mesh,
    *,
    count: int,
    before: str,
) -> dict[str, dict[str, Any]]:
    """Compare, keep comparison.json, .md and pictures in the run's directory, and print the table.

    Args:
        rows: what is compared; the first is the run's own, the last the one that it is to reach.
        config: of the run.
        source: the data trained on.
        held_out: the data that samples are measured against.
        mesh: the devices.
        count: of samples.
        before: the row from which the way is counted.

    Returns:
        As `compare`.
    """
    run_dir = Path(config.run_dir)
    chosen = held_out_metrics(config, source, mesh)
    found = compare(
        rows, config, source, held_out, mesh, count=count, chosen=chosen,
        folder=run_dir / "comparison",
    )  # fmt: skip
    if parallel.is_first():
        save(found, run_dir / "comparison.json")
        first, last = rows[0].name, rows[-1].name
        share = gap_closed(found[first], found[before], found[last])
        if share is None:
            said = f"{last} is no nearer to the data than {before}: no gap to close."
        else:
            said = f"{first} is {share:.0%} of the way from {before} to {last}."
        print(f"\n{table(found)}\n\n{said}")
    return found

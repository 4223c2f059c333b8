"""Look at the latent geometry of a trained run; its directory is all that is needed.

    python -m train.analyze runs/digits
    python -m train.analyze runs/cifar10 --num-samples 16 --times 0.2 0.5 0.9

Held-out examples are carried to noise by deterministic inversion, so that all times of an example
lie on one trajectory; their local bases, distances, edits and more go into a folder with a
report, pictures, and all plotted numbers as CSV.
"""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

# Small factorisations gain nothing from threads of BLAS, and lose much where cores are shared.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxdiff.training import load_run
from train.core import figures
from train.core.config import RunConfig, load_config
from train.core.data import build_sources
from train.core.runner import run
from train.geometry import draw, measure
from train.geometry.recipe import Options, resolved


def main(options: Options) -> list[draw.Row]:
    """Measure, and write the report.

    Returns:
        The table of headline numbers.

    Raises:
        ValueError: for a run without images, an unknown tap, or options that do not fit.
    """
    begun = time.perf_counter()
    config = load_config(options.run_dir, RunConfig)
    found = load_run(options.run_dir)
    if options.data_path is not None:
        moved = dataclasses.replace(config.data, path=options.data_path)
        config = dataclasses.replace(config, data=moved)
    source, held_out = build_sources(config.data)
    if len(source.event_shape) != 3:
        raise ValueError(
            f"`run_dir` must hold a model of images, got {options.run_dir} with data of shape "
            f"{source.event_shape}. Its directions have no frequencies, nor pictures."
        )
    options = resolved(options, int(np.prod(source.event_shape)))
    folder = Path(options.out or Path(options.run_dir) / "geometry")
    folder.mkdir(parents=True, exist_ok=True)
    subject = measure.prepare(options, held_out, found.model)
    rows = draw.inversion(folder, subject.x0, subject.round_trips)

    bases = measure.local_bases(subject)
    times, size = bases.times, subject.x0[0].size
    structure = measure.structure(subject, source, bases)
    values = {"dh/dx": bases.values, "alpha dx0_hat/dx": structure.values}
    rows += draw.spectra(folder, times, values)
    rows += draw.structure(folder, times, structure, size)
    rows += draw.directions(folder, times, measure.frequencies(subject, bases), options.cut)
    distances = measure.distances(subject, bases)
    rows += draw.distances_times(folder, times, distances)
    rows += draw.distances_samples(folder, times, distances)
    if distances.labels:
        rows += draw.conditions(folder, times, distances)
    edits = measure.edits(subject, bases)
    rows += draw.edits(folder, edits)
    rows += draw.transport(folder, edits)
    rows += draw.curves(folder, measure.curves(subject))
    residual = float(jnp.max(bases.plain.residuals / bases.plain.values[..., :1]))
    # The method's own estimate does not count rounding.
    residual = max(residual, float(jnp.finfo(bases.plain.values.dtype).eps))
    rows.append(("largest residual of a triplet, relative", f"{residual:.1e}", ""))
    write_report(folder, subject, found.step, rows)
    print(figures.table(rows, ("measure", "value", "beside")))
    print(f"\n{time.perf_counter() - begun:.0f} s; the report is {folder}/report.md")
    return rows


CAPTIONS = {
    "spectra": "Singular values of dh/dx and of alpha dx0_hat/dx, mean and standard deviation "
    "over examples, and the energy that the first of them hold.",
    "directions": "Frequencies of the right singular vectors of dh/dx; bars are standard errors "
    "over examples.",
    "distances_times": "Geodesic distance between the subspaces of one example at two times, mean "
    "over examples.",
    "distances_samples": "Geodesic distance between the subspaces of different examples at one "
    "time.",
    "conditions": "The same between different labels of one noisy example, beside that between "
    "examples.",
    "edits": "Examples edited at one time and denoised: rows are directions, columns go from one "
    "end over the unedited example to the other. Straight edits are of equal distance.",
    "transport": "The first direction of example 0, carried to others; each strip begins with "
    "the unedited example.",
    "transport_cosines": "How well the carried directions move h as u does: pullback (power 1) is "
    "the best there is, transport (power 0) leaves out the singular values.",
    "inversion": "What a round trip of inversion and sampling changes.",
    "structure": "The denoiser's Jacobian and the score, against t; bars are standard errors over "
    "examples.",
    "curves": "Curves between two inverted examples, seen in H.",
}


def write_report(folder: Path, subject: measure.Subject, step: int, rows: list[draw.Row]) -> None:
    """Write report.md: the table, the figures, and all that gives the numbers."""
    options = subject.options
    lines = [f"# Latent geometry of {options.run_dir}", "", f"Averaged weights of step {step}.", ""]
    lines += ["| measure | value | beside |", "|---|---|---|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines += ["", "Means and standard errors over examples.", ""]
    for name, caption in CAPTIONS.items():
        if (folder / f"{name}.png").exists():
            lines += [f"## {name}", "", f"![{name}]({name}.png)", "", f"{caption} "]
            lines += [f"[Numbers]({name}.csv)", ""]
    settings = json.dumps(dataclasses.asdict(options), indent=2)
    lines += ["## Settings", "", "```json", settings, "```", ""]
    lines += [f"Grid from {subject.grid[0]:g} to {subject.grid[-1]:g}; jax {jax.__version__}."]
    temporary = folder / "report.tmp.md"
    temporary.write_text("\n".join(lines) + "\n")
    temporary.rename(folder / "report.md")


if __name__ == "__main__":
    options = tyro.cli(Options)
    sys.exit(run(lambda: main(options)))

"""`make bench`: measure, save, and compare with what was saved.

    python -m benchmarks
    python -m benchmarks --only train_step sample_call --out new.json
    python -m benchmarks --baseline before.json

Every group is a function that yields `Record`s. Ratios are to hand-written code on the same
network, over rounds that alternate in one process; they compare across machines, the rest does not.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.calls import sample_call
from benchmarks.compiling import compile_times
from benchmarks.distillation import distilling
from benchmarks.geometry import spectra
from benchmarks.gradients import mmd_updates, weight_gradients
from benchmarks.guidance import sweeps
from benchmarks.loading import loader_rate
from benchmarks.measure import Record
from benchmarks.networks import compiler_options
from benchmarks.results import run
from benchmarks.solvers import solver_overhead
from benchmarks.training import train_step

GROUPS = (
    sample_call,
    train_step,
    compile_times,
    loader_rate,
    weight_gradients,
    mmd_updates,
    sweeps,
    distilling,
    spectra,
    solver_overhead,
    compiler_options,
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure, and what becomes of it.

    Attributes:
        only: groups; none for all.
        out: JSON file to write.
        baseline: JSON file, written by `out`, to compare with.
    """

    only: tuple[Literal[*(group.__name__ for group in GROUPS)], ...] = ()
    out: Path | None = None
    baseline: Path | None = None


def measurements(only: tuple[str, ...]) -> Iterator[Record]:
    """The records of the groups, named after them."""
    for group in GROUPS:
        if not only or group.__name__ in only:
            for record in group():
                yield dataclasses.replace(record, name=f"{group.__name__}: {record.name}")


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    run(measurements(options.only), options.out, options.baseline)

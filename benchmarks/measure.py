"""What a measurement is, and how times are taken."""

import dataclasses
import math
import operator
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax

Kind = Literal["ratio", "bytes", "seconds", "rate"]
# Cores that other processes may use in a round that counts.
QUIET = 0.2


@dataclasses.dataclass(frozen=True)
class Record:
    """One measurement.

    Attributes:
        name: what was measured, in the same words from run to run.
        value: the median.
        unit: of the value; empty for ratios.
        low: the lower quartile; the value itself for what is counted and not timed.
        high: the upper quartile.
        kind: what the value is. More is better for rates alone.
    """

    name: str
    value: float
    unit: str
    low: float
    high: float
    kind: Kind

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise ValueError(f"`kind` must be one of {get_args(Kind)}, got {self.kind!r}.")
        if not math.isfinite(self.value) or not self.low <= self.value <= self.high:
            raise ValueError(
                f"`value` of {self.name!r} must be finite and lie between its quartiles, got "
                f"{self.value} and [{self.low}, {self.high}]."
            )

    @classmethod
    def of(cls, name: str, values: Sequence[float], unit: str, kind: Kind) -> "Record":
        """Median and quartiles of repeated measurements, or the one value that there is."""
        single = len(values) == 1
        low, value, high = 3 * list(values) if single else statistics.quantiles(values, n=4)
        return cls(name, value, unit, low, high, kind)

    def __str__(self) -> str:
        value = f"{self.value:.4g} {self.unit}"
        return f"{self.name:82s} {value:>18s}  [{self.low:.4g}, {self.high:.4g}]"


def seconds(fn: Callable[[], Any]) -> float:
    """How long a call takes until its result is there."""
    begun = time.perf_counter()
    jax.block_until_ready(fn())
    return time.perf_counter() - begun


def others() -> float:
    """CPU seconds that other processes have used since the machine started; 0 where unknown."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0
    ticks = [int(value) for value in path.read_text().split()[1:9]]
    # The fourth and fifth are idle time, and waiting for disks.
    used = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return used - own.user - own.system


def alternate(
    *fns: Callable[[], Any], rounds: int = 15, warm: int = 2, pause: float = 0.0
) -> list[tuple[float, ...]]:
    """Seconds of every function in every round, `(function, round)`; each begins in its turn.

    Rounds in which other processes were busy are taken again, up to as many; the calmest count.
    """
    for _ in range(warm):
        for fn in fns:
            jax.block_until_ready(fn())
    table: list[tuple[float, list[float]]] = []
    while len(table) < 2 * rounds and sum(load <= QUIET for load, _ in table) < rounds:
        begun, elsewhere, spent = time.perf_counter(), others(), [0.0] * len(fns)
        for j in range(len(fns)):
            turn = (len(table) + j) % len(fns)
            time.sleep(pause)
            spent[turn] = seconds(fns[turn])
        table.append(((others() - elsewhere) / (time.perf_counter() - begun), spent))
    calmest = sorted(table, key=operator.itemgetter(0))[:rounds]
    return list(zip(*(spent for _, spent in calmest), strict=True))


def paired(name: str, ours: Callable[[], Any], theirs: Callable[[], Any], **options: Any) -> Record:
    """The ratio ours / theirs over alternating rounds."""
    rows = zip(*alternate(ours, theirs, **options), strict=True)
    return Record.of(name, [a / b for a, b in rows], "", "ratio")

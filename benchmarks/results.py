"""Measurements of one run: where they were taken, their file, and their changes since another."""

import dataclasses
import datetime
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from benchmarks.measure import Record, others
from jaxdiff.training import write_json

# Smaller changes are not marked, however sharp the measurement.
THRESHOLD = 0.05
PACKAGES = ("jax", "jaxlib", "flax", "diffrax")
# Which cores this process may use, where the system says.
AFFINITY = getattr(os, "sched_getaffinity", None)


@dataclasses.dataclass(frozen=True)
class Results:
    """What a run measured, and on what.

    Attributes:
        about: versions, the machine, the date.
        records: measurements of different names.
    """

    about: dict[str, Any]
    records: list[Record]

    def save(self, path: str | Path) -> None:
        """Write a JSON file, whole or not at all."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "Results":
        """The results that `save` wrote.

        Raises:
            ValueError: if the file holds anything else.
        """
        try:
            stored = json.loads(Path(path).read_text())
            stored["about"]["device"]
            return cls(stored["about"], [Record(**row) for row in stored["records"]])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"`baseline` must be a file that --out wrote, got {path}, which holds none: "
                f"{type(error).__name__}: {error} Write one with python -m benchmarks --out FILE."
            ) from None

    def same_machine(self, other: "Results") -> bool:
        """Whether absolute numbers compare."""
        return all(
            self.about.get(name) == other.about.get(name)
            for name in ("device", "processor", "cores")
        )


def about() -> dict[str, Any]:
    """What the numbers depend on."""
    git = ("git", "describe", "--always", "--dirty", "--abbrev=12")
    found = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": found.stdout.strip() or None,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
        "device": jax.devices()[0].device_kind,
        "processor": processor(),
        "cores": len(AFFINITY(0)) if AFFINITY else os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def processor() -> str:
    """The model of the CPU."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor())


def run(
    measurements: Iterable[Record], out: str | Path | None, baseline: str | Path | None
) -> Results:
    """Measure and print, then save and compare.

    Raises:
        ValueError: for a baseline that is none, or a directory of `out` that is not there; before
            anything is measured.
    """
    before = None if baseline is None else Results.load(baseline)
    if out is not None and not Path(out).parent.is_dir():
        raise ValueError(f"`out` must lie in a directory that exists, got {out}.")
    begun, elsewhere = time.perf_counter(), others()
    records = []
    for record in measurements:
        print(record, flush=True)
        records.append(record)
    load = (others() - elsewhere) / (time.perf_counter() - begun)
    results = Results({**about(), "cores_used_by_others": round(load, 2)}, records)
    print("\n" + "\n".join(f"{name}: {value}" for name, value in results.about.items()))
    if out is not None:
        results.save(out)
    if before is not None:
        print(f"\nSince {baseline}:\n{compared(before, results)}")
    return results


def verdict(old: Record | None, new: Record, same_machine: bool) -> str:
    """What to say of a change: nothing, if it is small or within the quartiles of either."""
    if old is None:
        return "not in the baseline"
    if new.kind != "ratio" and not same_machine:
        return "another machine"
    within = old.low <= new.value <= old.high or new.low <= old.value <= new.high
    if within or abs(new.value / old.value - 1) <= THRESHOLD:
        return ""
    return "better" if (new.value > old.value) == (new.kind == "rate") else "worse"


def compared(before: Results, after: Results) -> str:
    """A table of old, new and change; ratios compare everywhere, the rest on the same machine."""
    same, known = before.same_machine(after), {record.name: record for record in before.records}
    differ = [
        f"{name}: {before.about.get(name)} -> {value}"
        for name, value in after.about.items()
        if before.about.get(name) != value
    ]
    lines = [*differ, f"{'':82s} {'old':>10s} {'new':>10s} {'change':>8s}"]
    if not same:
        lines.insert(0, "Another device, processor or number of cores: ratios alone compare.")
    for new in after.records:
        old = known.get(new.name)
        said = verdict(old, new, same)
        comparable = old is not None and said != "another machine"
        change = f"{new.value / old.value - 1:+.1%}" if comparable else ""
        was = "" if old is None else f"{old.value:.4g}"
        lines.append(f"{new.name:82s} {was:>10s} {new.value:>10.4g} {change:>8s} {said}".rstrip())
    return "\n".join(lines)

"""Results as JSON lines: what is there already is not done again."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.core import figures
from train.core.config import RunConfig, load_config


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of the file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add(path: Path, *rows: dict[str, Any]) -> None:
    """More lines, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(line) for line in (*read(path), *rows)]
    figures.write_text(path, "\n".join(lines) + "\n")


def check_bases(bases: Sequence[str], rows: list[dict[str, Any]]) -> dict[str, int]:
    """Refuse runs that lines, or seeds, would not tell apart.

    Args:
        bases: directories of the runs, of a seed each.
        rows: the lines of the file, with "base" and "seed".

    Returns:
        The seeds, by the names of the directories.

    Raises:
        ValueError: for runs of one name or seed, or lines of another run of such a name.
    """
    seeds = {Path(base).name: load_config(base, RunConfig).seed for base in bases}
    if not len(set(seeds.values())) == len(seeds) == len(bases):
        raise ValueError(f"`bases` must have names and seeds of their own, got {seeds}.")
    for row in rows:
        if seeds.get(row["base"], row["seed"]) != row["seed"]:
            raise ValueError(f"`out` has lines of another run named {row['base']!r}.")
    return seeds


def check_settings(
    path: Path, rows: list[dict[str, Any]], settings: Mapping[str, Any], option: str = "out"
) -> None:
    """Refuse a file whose lines are of other settings.

    Args:
        path: of the file.
        rows: its lines.
        settings: those wanted.
        option: of the command, which names the file or its folder.

    Raises:
        ValueError: with those that differ.
    """
    for row in rows:
        there = row["settings"]
        names = [n for n in {**settings, **there} if settings.get(n) != there.get(n)]
        if names:
            wanted, got = (
                ", ".join(f"{n} = {values.get(n)!r}" for n in names) for values in (settings, there)
            )
            raise ValueError(
                f"`{option}` must be a file of the same settings, {wanted}, got {path} of {got}. "
                f"Name another by --{option}."
            )

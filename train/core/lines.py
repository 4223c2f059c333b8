"""Results as JSON lines: what is there already is not done again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.core import figures


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of the file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add(path: Path, *rows: dict[str, Any]) -> None:
    """More lines, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(line) for line in (*read(path), *rows)]
    figures.write_text(path, "\n".join(lines) + "\n")


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

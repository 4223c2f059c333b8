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


def check_settings(path: Path, rows: list[dict[str, Any]], settings: Mapping[str, Any]) -> None:
    """Refuse a file whose lines are of other settings.

    Raises:
        ValueError: with both.
    """
    for row in rows:
        if row["settings"] != settings:
            raise ValueError(
                f"`out` must be a file of the same settings, {dict(settings)}, got {path} of "
                f"{row['settings']}. Name another."
            )

"""Records on disk: sets larger than memory, read at random and a batch at a time through Grain."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdiff.data._record_format import INFO, MEND, Info, Layout, shard_file
from jaxdiff.data._sources import check_exists, from_bytes, require


@dataclass(frozen=True, eq=False, repr=False)
class RecordSource:
    """Examples on disk, of which a batch at a time is read; what `records` returns.

    As an `ArraySource`, but that labels alone are held in memory. Any number of threads and, by
    pickling it, of processes may read one.

    Attributes:
        directory: of the files.
        reader: Grain's source of the encoded records.
        layout: how they are encoded.
        shard_size: records of each file but the last.
        indices: (n,) the numbers of the examples' records.
        event_shape: shape of one example.
        labels: the class of every example, int32 (n,), or None without classes.
        num_classes: labels are in [0, num_classes); None without labels.
        class_names: a name for each class, or None.
        words: those of captions, or None.
        pixels: whether examples were born as pixels.
        reductions: what `reduced` does to examples as they are read.
    """

    directory: Path
    reader: Any
    layout: Layout
    shard_size: int
    indices: np.ndarray
    event_shape: tuple[int, ...]
    labels: np.ndarray | None = None
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    words: tuple[str, ...] | None = None
    pixels: bool = False
    reductions: tuple[Callable[[np.ndarray], np.ndarray], ...] = ()

    @property
    def dtype(self) -> np.dtype:
        """Of x as it is stored: uint8 is scaled to [-1, 1] on reading."""
        return np.dtype(self.layout.dtype)

    def take(self, indices: np.ndarray) -> "RecordSource":
        """A source of the examples at these indices, in this order."""
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, indices=self.indices[indices], labels=labels)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.indices)

    def __repr__(self) -> str:
        classes = f", num_classes={self.num_classes}" if self.num_classes else ""
        return f"RecordSource({len(self)} x {self.event_shape} {self.dtype}{classes})"

    def __getitem__(self, index: int | np.ndarray) -> dict[str, Any]:
        """One example, or the stacked examples of an integer array of indices."""
        found = self.indices[index]
        rows = np.atleast_1d(found)
        try:
            records = self.reader.__getitems__(rows) if len(rows) else []
        except RuntimeError:
            raise ValueError(self._damage(rows)) from None
        x, cond = self.layout.decode(records, f"an image of {str(self.directory)!r}")
        for reduction in self.reductions:
            x = reduction(x)
        x = from_bytes(x) if x.dtype == np.uint8 else x
        batch = {"x": x} if cond is None else {"x": x, "cond": cond}
        return jax.tree.map(lambda leaf: leaf[0], batch) if np.ndim(found) == 0 else batch

    def _damage(self, rows: np.ndarray) -> str:
        """Which of these records cannot be read, and why."""
        for row in rows:
            try:
                self.reader[row]
            except RuntimeError as error:
                file = str(shard_file(self.directory, row // self.shard_size))
                return (
                    f"{file!r} must hold whole records, got one, number {row % self.shard_size}, "
                    f"that cannot be read ({error}). {MEND}"
                )
        return f"The records of {str(self.directory)!r} could not be read at first. Try again."


def records(path) -> RecordSource:
    """Examples that `write_records` or `to_records` wrote, read from disk as they are needed.

    Memory holds the labels, eight bytes for the place of each example, and the batches in hand.
    Opening looks at the size of every file; each record has a checksum, tested as it is read.

    Args:
        path: the directory.

    Returns:
        A source of the same examples, bit for bit, in the order in which they were written.

    Raises:
        FileNotFoundError: for a missing directory.
        ValueError: for a directory that is not one of whole records, naming the file.

    Note: a batch is read in one call of Grain's reader, outside Python's lock; the loader's
    `num_threads` prepare so many batches at once, which pays where images are PNG.

    Examples:
        >>> import tempfile
        >>> source = data.array_source(np.zeros((20, 4, 4, 3), np.uint8), np.arange(20) % 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     data.to_records(source, f"{folder}/train")
        ...     data.records(f"{folder}/train")
        RecordSource(20 x (4, 4, 3) uint8, num_classes=2)
    """
    require("grain")
    import grain

    directory = check_exists(path).absolute()
    info = Info.read(directory)
    instructions: list[str] = []
    labels: list[np.ndarray] = []
    for number, size in enumerate(info.file_bytes):
        file = shard_file(directory, number)
        count = min(info.shard_size, info.count - number * info.shard_size)
        _check_size(file, size)
        # With its length, the reader need not open a file before it reads it.
        instructions.append(f"{file}[0:{count}]")
        if info.num_classes is not None:
            labels.append(_labels(file.with_suffix(".npy"), count))
    return RecordSource(
        directory,
        grain.sources.ArrayRecordDataSource(instructions),
        info.layout,
        info.shard_size,
        np.arange(info.count),
        tuple(info.layout.shape),
        np.concatenate(labels) if labels else None,
        info.num_classes,
        None if info.class_names is None else tuple(info.class_names),
        None if info.words is None else tuple(info.words),
        info.pixels,
    )


def _check_size(file: Path, size: int) -> None:
    found = f"{file.stat().st_size} bytes" if file.exists() else "no such file"
    if found != f"{size} bytes":
        raise ValueError(
            f"{str(file)!r} must have the {size} bytes that `{INFO}` tells of, got {found}. {MEND}"
        )


def _labels(file: Path, count: int) -> np.ndarray:
    try:
        labels = np.load(file, allow_pickle=False)
        if labels.shape != (count,) or labels.dtype != np.int32:
            raise ValueError(f"it holds {labels.dtype} of shape {labels.shape}")
        return labels
    except (OSError, ValueError, EOFError, AttributeError) as error:
        raise ValueError(
            f"{str(file)!r} must hold the labels of {count} examples, but cannot be read ({error})."
            f" {MEND}"
        ) from None

"""Sources held in memory: the one class behind every reader, and the checks on what it holds."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np


class Source(Protocol):
    """What `make_loader` reads: a random-access Grain source of examples.

    Any object with these members will do; `ArraySource` is the one the readers return.

    Attributes:
        event_shape: shape of one example, (H, W, C) for images.
        num_classes: labels are in [0, num_classes); None if there are no labels.
    """

    event_shape: tuple[int, ...]
    num_classes: int | None

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
        """{"x": float32 (*event_shape), "cond": int32 scalar, absent when unlabeled}."""


@dataclass(frozen=True, eq=False, repr=False)
class ArraySource:
    """Examples in memory; images stay uint8 and are scaled to [-1, 1] as they are read.

    `source[i]` is one example, `source[indices]` (an integer array) a stacked batch of them.
    Make one with `array_source`, which checks its arguments.

    Attributes:
        x: (n, *event_shape), uint8 (scaled by x / 127.5 - 1 on reading) or float32 (as it is).
        cond: (n,) int32 labels, or None.
        num_classes: labels are in [0, num_classes); None without labels.
    """

    x: np.ndarray
    cond: np.ndarray | None = None
    num_classes: int | None = None

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return self.x.shape[1:]

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.x)

    def __repr__(self) -> str:
        classes = f", num_classes={self.num_classes}" if self.num_classes else ""
        return f"ArraySource({len(self)} x {self.event_shape} {self.x.dtype}{classes})"

    def __getitem__(self, index: int | np.ndarray) -> dict[str, np.ndarray]:
        """One example, or the stacked examples of an integer array of indices."""
        x = self.x[index]
        if x.dtype == np.uint8:
            x = x / np.float32(127.5)
            x -= 1
        return {"x": x} if self.cond is None else {"x": x, "cond": self.cond[index]}


def array_source(x, cond=None, *, num_classes: int | None = None) -> ArraySource:
    """Wrap arrays as a source.

    Args:
        x: (n, *event) examples; uint8 images (n, H, W, C), scaled to [-1, 1] as they are read, or
            floats, kept as they are (in float32).
        cond: (n,) integer labels in [0, num_classes), or None.
        num_classes: number of classes; the largest label + 1 if None.

    Returns:
        The source. Arrays already of the stored dtype are not copied.

    Raises:
        ValueError: for no examples, another dtype, a shape that does not fit, NaN or infinite
            values, or labels that do not match.
    """
    x = np.asarray(x)
    if x.ndim < 2 or len(x) == 0:
        raise ValueError(
            f"`x` must be an array (n, *event) with n > 0, got shape {x.shape}. "
            "Put the examples along the first axis."
        )
    if x.dtype == np.uint8 and x.ndim != 4:
        raise ValueError(
            f"`x` of dtype uint8 must be images (n, H, W, C), got shape {x.shape}. "
            "Add a channel axis with x[..., None], or pass floats."
        )
    if x.dtype != np.uint8:
        x = _finite_float32(x)
    if cond is not None:
        cond, num_classes = _labels(np.asarray(cond), len(x), num_classes)
    elif num_classes is not None:
        raise ValueError(
            f"`num_classes` must be None without labels, got {num_classes}. Pass `cond` as well."
        )
    return ArraySource(x, cond, num_classes)


def check_exists(path, argument: str = "path") -> Path:
    """`path` as a `Path`, or a FileNotFoundError that names the argument."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"`{argument}` must exist, got {str(path)!r}. Check the spelling and the drive."
        )
    return path


def _finite_float32(x: np.ndarray) -> np.ndarray:
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError(
            f"`x` must be uint8 images or floats, got dtype {x.dtype}. Convert it: "
            "x.astype(np.uint8) for pixels in 0..255, or floats scaled to [-1, 1]."
        )
    x = x.astype(np.float32, copy=False)
    bad = np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(1))
    if bad.size:
        raise ValueError(
            f"`x` must be finite in float32, got NaN or infinity in {bad.size} of {len(x)} "
            f"examples, the first at index {bad[0]}. Remove or repair them."
        )
    return x


def _labels(cond: np.ndarray, count: int, num_classes: int | None) -> tuple[np.ndarray, int]:
    if cond.shape != (count,):
        raise ValueError(
            f"`cond` must hold one label per example, shape ({count},), got shape {cond.shape}. "
            "Check that labels and examples come from the same set."
        )
    if not np.issubdtype(cond.dtype, np.integer):
        raise ValueError(
            f"`cond` must hold integer labels, got dtype {cond.dtype}. "
            "Convert class numbers with cond.astype(np.int32)."
        )
    num_classes = int(cond.max()) + 1 if num_classes is None else num_classes
    bad = np.flatnonzero((cond < 0) | (cond >= num_classes))
    if bad.size:
        raise ValueError(
            f"`cond` must be in [0, {max(num_classes, 0)}), got {cond[bad[0]]} at index {bad[0]}. "
            "Number the classes from 0, or pass a larger `num_classes`."
        )
    return cond.astype(np.int32), num_classes

"""Smaller and simpler versions of a data set of images."""

import dataclasses
from typing import TypeVar

import numpy as np

from jaxdiff.data._records import RecordSource
from jaxdiff.data._sources import ArraySource

S = TypeVar("S", ArraySource, RecordSource)


@dataclasses.dataclass(frozen=True)
class _Reduction:
    """Of images (n, H, H, C); see `reduced`."""

    size: int
    gray: bool

    def __call__(self, x: np.ndarray) -> np.ndarray:
        factor = x.shape[1] // self.size
        found = x.reshape(-1, self.size, factor, self.size, factor, x.shape[3])
        found = found.astype(np.float32).mean((2, 4))
        if self.gray:
            found = found @ np.array([[0.299], [0.587], [0.114]], np.float32)
        return np.rint(found).astype(np.uint8) if x.dtype == np.uint8 else found


def reduced(source: S, *, size: int | None = None, gray: bool = False) -> S:
    """Images averaged over blocks of pixels, and over channels.

    Args:
        source: images `(H, H, C)`, in memory, or records, which are reduced as they are read.
        size: the new height and width, which divides the old; None leaves it.
        gray: average the channels (luma weights 0.299, 0.587, 0.114) into one.

    Returns:
        A source of the same labels. uint8 stays uint8, rounded once.

    Raises:
        ValueError: for anything but square images, a `size` that does not divide theirs, or
            `gray` of images without three channels.
    """
    shape = source.event_shape
    if len(shape) != 3 or shape[0] != shape[1]:
        raise ValueError(f"`source` must hold square images (H, H, C), got examples of {shape}.")
    size = shape[0] if size is None else size
    if size < 1 or shape[0] % size:
        raise ValueError(
            f"`size` must divide the height {shape[0]} of the images, got {size}. Use one of "
            f"{[n for n in range(1, shape[0] + 1) if shape[0] % n == 0]}."
        )
    if gray and shape[2] != 3:
        raise ValueError(f"`gray` needs images of three channels, got {shape[2]}. Leave it out.")
    reduce = _Reduction(size, gray)
    if isinstance(source, RecordSource):
        return dataclasses.replace(
            source,
            event_shape=(size, size, 1 if gray else shape[2]),
            reductions=(*source.reductions, reduce),
        )
    # In pieces, because floats take four times the memory of the images.
    pieces = [reduce(source.x[i : i + 4096]) for i in range(0, len(source), 4096)]
    return dataclasses.replace(source, x=np.concatenate(pieces))

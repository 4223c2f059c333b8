"""Smaller and simpler versions of a data set of images."""

import dataclasses

import numpy as np

from jaxdiff.data._sources import ArraySource


def reduced(source: ArraySource, *, size: int | None = None, gray: bool = False) -> ArraySource:
    """Images averaged over blocks of pixels, and over channels.

    Args:
        source: images `(H, H, C)`.
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
    factor = shape[0] // size

    def reduce(x):
        x = x.reshape(-1, size, factor, size, factor, shape[2]).astype(np.float32).mean((2, 4))
        if gray:
            x = x @ np.array([[0.299], [0.587], [0.114]], np.float32)
        return np.rint(x).astype(np.uint8) if source.x.dtype == np.uint8 else x

    # In pieces, because floats take four times the memory of the images.
    pieces = [reduce(source.x[i : i + 4096]) for i in range(0, len(source), 4096)]
    return dataclasses.replace(source, x=np.concatenate(pieces))

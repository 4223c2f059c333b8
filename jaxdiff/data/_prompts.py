"""A small world of images and captions, whose attributes are known exactly."""

from typing import NamedTuple

import numpy as np
from jaxtyping import ArrayLike

from jaxdiff.data._digits import digits
from jaxdiff.data._sources import ArraySource, array_source

SIZES = ("small", "large")
COLOURS = {
    "red": (255, 70, 70),
    "green": (70, 230, 70),
    "blue": (90, 130, 255),
    "white": (255,) * 3,
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLACES = ("left", "right")
PROMPT_WORDS = (*SIZES, *COLOURS, *DIGITS, *PLACES)
_SIDE = 32


def prompts(split: str = "train", *, copies: int = 8, unsaid: float = 0.1) -> ArraySource:
    """Handwritten digits in colours, sizes and places, with captions: "large red three left".

    Every digit of `digits(split)` is drawn `copies` times on a black ground of 32 x 32, each time
    in another size (8 or 16 pixels), colour and place, moved by a few pixels. A caption is four
    words, of size, colour, digit and place; each is left unsaid with probability `unsaid`, so that
    shorter captions are learned too. All choices are drawn once, and the same everywhere.

    Args:
        split: "train" or "test", whose digits are different handwriting.
        copies: drawings of each digit.
        unsaid: probability of leaving out a word.

    Returns:
        A source of uint8 (32, 32, 3) images, whose condition is {"tokens": (n, 4) int32}, indices
        of `PROMPT_WORDS`; len(PROMPT_WORDS) stands for a word that is not said.

    Raises:
        ValueError: for another split, or a number out of range.
    """
    if copies < 1 or not 0 <= unsaid < 1:
        raise ValueError(
            f"`copies` must be at least 1 and `unsaid` in [0, 1), got {copies} and {unsaid}."
        )
    source = digits(split)
    grey, label = (source.x[..., 0] + 1) / 2, np.repeat(np.asarray(source.cond), copies)
    grey, count = np.repeat(grey, copies, axis=0), len(label)
    # Raw bits are the one stream that NumPy promises never to change.
    bits = np.random.Philox(np.random.SeedSequence(["train", "test"].index(split)))
    draws = (bits.random_raw(9 * count).reshape(9, count) >> 11) / 2.0**53

    def choose(row, options):
        return (draws[row] * options).astype(int)

    size, colour, place = choose(0, 2), choose(1, len(COLOURS)), choose(2, 2)
    x = np.zeros((count, _SIDE, _SIDE, 3))
    paint = np.asarray(list(COLOURS.values()))[colour]
    for large in (0, 1):
        rows = np.flatnonzero(size == large)
        drawn = np.kron(grey[rows], np.ones((1, 1 + large, 1 + large)))
        side = drawn.shape[1]
        # Within its half if small; as far to its side as there is room if large.
        room = _SIDE // 2 - side if not large else 1
        left = np.where(place[rows] == 0, 0, _SIDE // 2 if not large else _SIDE - side - room)
        left = left + choose(3, room + 1)[rows]
        top = choose(4, _SIDE - side + 1)[rows]
        for row, image, i, j in zip(rows, drawn, top, left, strict=True):
            x[row, i : i + side, j : j + side] = image[..., None] * paint[row]
    starts = np.cumsum([0, len(SIZES), len(COLOURS), len(DIGITS)])
    said = np.stack([size, colour, label, place], 1) + starts
    tokens = np.where(unsaid > draws[5:9].T, len(PROMPT_WORDS), said).astype(np.int32)
    return array_source(np.rint(x).astype(np.uint8), {"tokens": tokens}, words=PROMPT_WORDS)


class PromptAttributes(NamedTuple):
    """What images of the world of `prompts` show, by indices of the words.

    Attributes:
        size: `(n,)`, of `PROMPT_WORDS`.
        colour: `(n,)`.
        place: `(n,)`.
        digit_pixels: `(n, 8, 8)` in [0, 1], the digit in grey for a classifier of digits.
    """

    size: np.ndarray
    colour: np.ndarray
    place: np.ndarray
    digit_pixels: np.ndarray


def prompt_attributes(x: ArrayLike) -> PromptAttributes:
    """Size, colour and place of what is drawn, measured on pixels; exact on images of the world.

    Args:
        x: `(n, 32, 32, 3)` in [-1, 1].

    Returns:
        The attributes; of an image without anything in it, arbitrary ones.
    """
    light = np.clip((np.asarray(x, np.float64) + 1) / 2, 0, 1)
    bright = light.max(-1)
    there = bright > 0.2
    columns = np.arange(_SIDE) + 0.5
    rows = there.any(2)
    height = _SIDE - rows[:, ::-1].argmax(1) - rows.argmax(1)
    large = (height > 10).astype(int)
    centre = (bright * columns).sum((1, 2)) / np.maximum(bright.sum((1, 2)), 1e-9)
    mean = (light * bright[..., None]).sum((1, 2))
    mean /= np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-9)
    paints = np.asarray(list(COLOURS.values()), float)
    paints /= np.linalg.norm(paints, axis=1, keepdims=True)
    digit = np.zeros((len(light), 8, 8))
    for i, image in enumerate(bright):
        side = 8 * (1 + large[i])
        middle = [(image.sum(1 - axis) * columns).sum() / max(image.sum(), 1e-9) for axis in (0, 1)]
        top, left = (int(np.clip(round(m - side / 2), 0, _SIDE - side)) for m in middle)
        part = image[top : top + side, left : left + side]
        digit[i] = part.reshape(8, side // 8, 8, side // 8).mean((1, 3))
    starts = np.cumsum([0, len(SIZES), len(COLOURS), len(DIGITS)])
    return PromptAttributes(
        large + starts[0],
        (mean @ paints.T).argmax(1) + starts[1],
        (centre > _SIDE / 2).astype(int) + starts[3],
        digit,
    )

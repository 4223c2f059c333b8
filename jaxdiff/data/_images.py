"""Decoding of compressed images to what a viewer shows, with errors that name the image."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import ArrayLike

from jaxdiff.data._sources import require, to_bytes

_ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")


def open_image(data: bytes, name: str) -> Any:
    """The decoded Pillow image of PNG, JPEG, ... bytes, as stored.

    Args:
        data: the encoded image.
        name: what an error calls it.

    Raises:
        ValueError: for bytes that are no image.
    """
    require("PIL")
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return image
    # Pillow's decoders raise SyntaxError for a broken PNG chunk and EOFError for missing frames.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        known = not isinstance(error, Image.UnidentifiedImageError)  # which tells of a buffer
        reason = f" ({error})" if known else ""
        raise ValueError(
            f"{name} must be an encoded image, got {len(data)} bytes that cannot be decoded"
            f"{reason}. Replace it or remove it."
        ) from None


def as_viewed(image: Any, name: str, background: str) -> Any:
    """Grey or RGB of eight bits, as a viewer shows the image.

    Turned as its EXIF tag says; sixteen bits scaled to eight, v / 257; floats in [0, 1] times 255;
    transparency composited on `background`; palettes, CMYK and other colour spaces as RGB.

    Raises:
        ValueError: for numbers of another range, whose white nobody knows.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode in (*_SIXTEEN_BITS, "I", "F"):
        return Image.fromarray(_eight_bits(np.asarray(image), image.mode, name))
    if image.mode in _ALPHA or "transparency" in image.info:
        over = image.convert("RGBA")
        below = Image.new("RGBA", image.size, background)
        grey = image.mode in ("L", "LA", "La")
        return Image.alpha_composite(below, over).convert("L" if grey else "RGB")
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _eight_bits(pixels: np.ndarray, mode: str, name: str) -> np.ndarray:
    white = 1.0 if mode == "F" else 65535.0
    low, high = float(pixels.min()), float(pixels.max())
    if not 0 <= low <= high <= white:
        raise ValueError(
            f"{name} must hold {'floats in [0, 1]' if mode == 'F' else 'integers in [0, 65535]'}, "
            f"got numbers from {low:g} to {high:g}. Scale it, and save it with eight bits."
        )
    return np.rint(pixels.astype(np.float64) * (255 / white)).astype(np.uint8)


def pixels_of(image: Any, name: str) -> np.ndarray:
    """uint8 (H, W, C) of a Pillow image, C = 1 for grey and 3 for colour.

    Raises:
        ValueError: for a mode other than "L" and "RGB".
    """
    if image.mode not in ("L", "RGB"):
        raise ValueError(
            f"{name} must be grey ('L') or colour ('RGB'), got mode {image.mode!r}. "
            "Convert it to one of these."
        )
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def save_images(
    directory: str | Path,
    x: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write images as PNG files, those of a class in a folder of their own.

    What `image_folder` reads again, but for rounding to eight bits.

    Args:
        directory: where; made if it is missing.
        x: `(n, H, W, C)` in [-1, 1], grey or RGB; what is outside is clipped.
        labels: `(n,)` integers, or None: all images in `directory` itself.
        class_names: names of the folders; the numbers of the classes if None.

    Raises:
        ValueError: for anything but finite images of one or three channels, and one label each.
    """
    require("PIL")
    from PIL import Image

    x = np.asarray(x, np.float32)
    if x.ndim != 4 or x.shape[-1] not in (1, 3):
        raise ValueError(f"`x` must be images (n, H, W, C), C = 1 or 3, got shape {x.shape}.")
    if not np.isfinite(x).all():
        raise ValueError("`x` must be finite, got images with NaN or infinite pixels.")
    if labels is not None:
        labels = np.asarray(labels)
        if labels.shape != x.shape[:1] or labels.dtype.kind not in "iu" or (labels < 0).any():
            raise ValueError(
                f"`labels` must be {len(x)} integers from 0, got shape {labels.shape} of "
                f"{labels.dtype}."
            )
    pixels = to_bytes(np.clip(x, -1, 1))
    digits = len(str(len(x) - 1))
    for i, image in enumerate(pixels):
        folder = Path(directory)
        if labels is not None:
            label = int(labels[i])
            names = class_names or ()  # a label beyond them is that of no class
            folder /= (names[label] if label < len(names) else str(label)).replace("/", "_")
        folder.mkdir(parents=True, exist_ok=True)
        squeezed = image[..., 0] if image.shape[-1] == 1 else image
        Image.fromarray(squeezed).save(folder / f"{i:0{digits}d}.png")

"""Decoding of compressed images, with errors that name the image."""

import io
from collections.abc import Callable

import numpy as np


def decode_image(data: bytes, name: str, *, transform: Callable | None = None) -> np.ndarray:
    """Decode PNG, JPEG, ... bytes.

    Args:
        data: the encoded image.
        name: what an error calls it.
        transform: from the decoded Pillow image to the one to keep.

    Returns:
        uint8 (H, W, C), C = 1 for grey and 3 for colour.

    Raises:
        ValueError: for bytes that are no image, and for a mode other than "L" and "RGB".
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    # Pillow's decoders raise SyntaxError for a broken PNG chunk and EOFError for missing frames.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{name} must be an encoded image, got {len(data)} bytes that cannot be decoded "
            f"({error}). Replace it or remove it."
        ) from None
    if transform is not None:
        image = transform(image)
    if image.mode not in ("L", "RGB"):
        raise ValueError(
            f"{name} must be grey ('L') or colour ('RGB'), got mode {image.mode!r}. "
            "Convert it to one of these."
        )
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels

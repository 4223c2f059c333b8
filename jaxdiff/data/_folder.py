"""Folders of images, one sub-folder per class."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from jaxdiff.data._images import decode_image
from jaxdiff.data._sources import ArraySource, array_source, check_exists

_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".webp"})


def image_folder(path, *, size: int | None = None, mode: str | None = None) -> ArraySource:
    """Images in sub-folders; the label is the rank of the sub-folder's name.

    Images that lie in `path` itself, without sub-folders, make an unlabeled source. Every image is
    decoded once, when the source is made, into n * H * W * C bytes; for a set larger than memory
    pass a source of your own to `make_loader`.

    Args:
        path: directory of sub-folders, sorted by name, of PNG, JPEG, WebP, BMP, GIF, TIFF or PNM
            files (searched in depth, sorted by path). Other and hidden files are passed over.
        size: side in pixels; larger or smaller images are cropped to the central square and
            resampled (Lanczos). None: all images must have the same size already.
        mode: "L" (grey) or "RGB", to which every image is converted. None: all images must have
            the same one of these modes already.

    Returns:
        A source of (H, W, C) images, sorted by class, then by path.

    Raises:
        FileNotFoundError: for a missing directory.
        ValueError: for a folder without images, an image that cannot be decoded, or one whose
            size or mode differs from the first's, naming the file.
    """
    if mode not in (None, "L", "RGB"):
        raise ValueError(f"`mode` must be 'L', 'RGB' or None, got {mode!r}.")
    if size is not None and size < 1:
        raise ValueError(f"`size` must be a positive number of pixels or None, got {size!r}.")
    root = check_exists(path)
    classes = sorted(entry for entry in root.glob("[!.]*") if entry.is_dir())
    groups = [_image_files(folder) for folder in classes] or [_image_files(root)]
    files = [file for group in groups for file in group]
    with ThreadPoolExecutor() as pool:
        images = _stack(pool.map(lambda file: _load(file, size, mode), files), files)
    if not classes:
        return array_source(images)
    labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    return array_source(images, labels, num_classes=len(classes))


def _image_files(folder: Path) -> list[Path]:
    found = (file for file in folder.rglob("[!.]*") if file.suffix.lower() in _SUFFIXES)
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise ValueError(
            f"{str(folder)!r} must be a folder of images ({', '.join(sorted(_SUFFIXES))}), found "
            "none. Add images, remove the folder, or correct `path`."
        )
    return files


def _load(file: Path, size: int | None, mode: str | None) -> np.ndarray:
    from PIL import Image, ImageOps

    def transform(image):
        image = image if mode is None else image.convert(mode)
        if size is None:
            return image
        return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)

    return decode_image(file.read_bytes(), repr(str(file)), transform=transform)


def _stack(images, files: list[Path]) -> np.ndarray:
    stacked = np.empty(0, np.uint8)
    for row, image in enumerate(images):
        if row == 0:
            stacked = np.empty((len(files), *image.shape), np.uint8)
        if image.shape != stacked.shape[1:]:
            raise ValueError(
                f"{str(files[row])!r} must have the (height, width, channels) of the first image, "
                f"{stacked.shape[1:]}, got {image.shape}. Pass `size` to resize and `mode` to "
                "convert."
            )
        stacked[row] = image
    return stacked

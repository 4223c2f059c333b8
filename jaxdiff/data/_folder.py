"""Folders of images, one sub-folder per class."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxdiff._checks import check_count
from jaxdiff.data._images import as_viewed, open_image, pixels_of
from jaxdiff.data._sources import ArraySource, array_source, check_exists, from_bytes, require

_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)


@dataclass(frozen=True)
class _Transform:
    """From a file to pixels; see `image_folder`."""

    resize: tuple[int, int] | None
    crop: str
    mode: str | None
    background: str

    def __call__(self, file: Path) -> np.ndarray:
        from PIL import Image, ImageOps

        name = repr(str(file))
        image = as_viewed(open_image(file.read_bytes(), name), name, self.background)
        image = image if self.mode is None else image.convert(self.mode)
        if self.resize is not None:
            size = self.resize[::-1]  # Pillow's (width, height)
            fit = ImageOps.fit if self.crop == "center" else type(image).resize
            image = fit(image, size, Image.Resampling.LANCZOS)
        return pixels_of(image, name)


@dataclass(frozen=True, eq=False, repr=False)
class FolderSource:
    """Images that are decoded when they are read, for sets larger than memory.

    What `image_folder(..., lazy=True)` returns: as an `ArraySource`, without its arrays.

    Attributes:
        files: the images.
        transform: from a file to uint8 (H, W, C).
        event_shape: (H, W, C), of the first image; another that differs is refused as it is read.
        cond: (n,) int32 labels, or None.
        num_classes: labels are in [0, num_classes); None without labels.
        class_names: a name for each class, or None.
        words: None; images have no captions.
        pixels: images are.
    """

    files: tuple[Path, ...]
    transform: _Transform
    event_shape: tuple[int, ...]
    cond: np.ndarray | None = None
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    words: tuple[str, ...] | None = None
    pixels: bool = True

    @property
    def dtype(self) -> np.dtype:
        """Of x as it is decoded."""
        return np.dtype(np.uint8)

    @property
    def labels(self) -> np.ndarray | None:
        """The class of every image, int32 (n,), or None."""
        return self.cond

    def take(self, indices: np.ndarray) -> "FolderSource":
        """A source of the images at these indices, in this order."""
        cond = None if self.cond is None else self.cond[indices]
        return replace(self, files=tuple(self.files[int(i)] for i in indices), cond=cond)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.files)

    def __repr__(self) -> str:
        classes = f", num_classes={self.num_classes}" if self.num_classes else ""
        return f"FolderSource({len(self)} x {self.event_shape}{classes})"

    def __getitem__(self, index: int | np.ndarray) -> dict[str, Any]:
        """One example, or the stacked examples of an integer array of indices."""
        files = [self.files[int(i)] for i in np.atleast_1d(index)]
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(self.transform, files))
        for image, file in zip(images, files, strict=True):
            _check_shape(image, self.event_shape, file)
        x = from_bytes(images[0] if np.ndim(index) == 0 else np.stack(images))
        return {"x": x} if self.cond is None else {"x": x, "cond": self.cond[index]}


def image_folder(
    path,
    *,
    resize: int | tuple[int, int] | None = None,
    crop: Literal["center", "none"] = "center",
    mode: Literal["L", "RGB"] | None = None,
    background: str = "white",
    lazy: bool = False,
) -> ArraySource | FolderSource:
    """Images in sub-folders; the label is the rank of the sub-folder's name.

    Images that lie in `path` itself, without sub-folders, make an unlabeled source. Images are
    what a viewer shows: turned as their EXIF tag says, sixteen bits scaled to eight, transparency
    composited on `background`, palettes and CMYK as RGB.

    Args:
        path: directory of sub-folders, sorted by name, of PNG, JPEG, WebP, BMP, GIF, TIFF or PNM
            files (searched in depth, sorted by path). Other files, and hidden ones or in hidden
            folders (".name", "__MACOSX"), are passed over.
        resize: side in pixels, or (height, width), to which every image is resampled (Lanczos).
            None: all images must have the same size already.
        crop: "center" crops to the aspect ratio of `resize` first, "none" changes it.
        mode: "L" (grey) or "RGB", to which every image is converted. None: all images must have
            the same one of these already.
        background: what shows through transparent pixels; a name or "#rrggbb".
        lazy: decode images as they are read, and not all when the source is made, into
            n * H * W * C bytes. A damaged file is then found when it is read.

    Returns:
        A source of (H, W, C) images, sorted by class, then by path, with the names of the folders
        as `class_names`.

    Raises:
        FileNotFoundError: for a missing directory.
        ValueError: for a folder without images, images beside folders of images, an image that
            cannot be decoded, or one whose size or mode differs from the first's, naming the file.
    """
    require("PIL")
    from PIL import ImageColor

    if mode not in (None, "L", "RGB"):
        raise ValueError(f"`mode` must be 'L', 'RGB' or None, got {mode!r}.")
    if crop not in ("center", "none"):
        raise ValueError(f"`crop` must be 'center' or 'none', got {crop!r}.")
    if resize is not None and np.ndim(resize) == 0:
        resize = check_count("resize", resize)
    size: Any = (resize, resize) if np.ndim(resize or 0) == 0 and resize is not None else resize
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(
            f"`resize` must be a positive side in pixels, (height, width) or None, got {resize!r}."
        )
    try:
        ImageColor.getrgb(background)
    except (ValueError, TypeError, AttributeError):
        raise ValueError(
            f"`background` must be the name of a colour or '#rrggbb', got {background!r}."
        ) from None
    transform = _Transform(size, crop, mode, background)
    root = check_exists(path)
    classes = sorted(entry for entry in root.iterdir() if entry.is_dir() and not _hidden(entry))
    loose = _image_files(root, depth="*")
    if classes and loose:
        raise ValueError(
            f"{str(root)!r} must hold folders of images or images, got {len(classes)} folders and "
            f"{len(loose)} images beside them, the first {loose[0].name!r}. Move these into a "
            "folder of their class."
        )
    groups = [_image_files(folder) for folder in classes] if classes else [loose]
    for folder, group in zip(classes or [root], groups, strict=True):
        if not group:
            raise ValueError(
                f"{str(folder)!r} must be a folder of images ({', '.join(sorted(_SUFFIXES))}), "
                "found none. Add images, remove the folder, or correct `path`."
            )
    files = [file for group in groups for file in group]
    labels, names = None, None
    if classes:
        labels = np.repeat(np.arange(len(groups), dtype=np.int32), [len(g) for g in groups])
        names = tuple(folder.name for folder in classes)
    if lazy:
        shape = transform(files[0]).shape
        return FolderSource(tuple(files), transform, shape, labels, len(classes) or None, names)
    with ThreadPoolExecutor() as pool:
        images = _stack(pool.map(transform, files), files)
    return array_source(images, labels, num_classes=len(classes) or None, class_names=names)


def _hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name == "__MACOSX"


def _image_files(folder: Path, depth: str = "**/*") -> list[Path]:
    def shown(file: Path) -> bool:
        inside = file.relative_to(folder)
        return not any(_hidden(part) for part in (inside, *inside.parents))

    found = (file for file in folder.glob(depth) if file.suffix.lower() in _SUFFIXES)
    return sorted(file for file in found if shown(file) and file.is_file())


def _check_shape(image: np.ndarray, shape: tuple[int, ...], file: Path) -> None:
    if image.shape != shape:
        raise ValueError(
            f"{str(file)!r} must have the (height, width, channels) of the first image, {shape}, "
            f"got {image.shape}. Pass `resize` to resize and `mode` to convert."
        )


def _stack(images, files: list[Path]) -> np.ndarray:
    stacked = np.empty(0, np.uint8)
    for row, image in enumerate(images):
        if row == 0:
            stacked = np.empty((len(files), *image.shape), np.uint8)
        _check_shape(image, stacked.shape[1:], files[row])
        stacked[row] = image
    return stacked

"""CIFAR-10 from Parquet files."""

from pathlib import Path

import numpy as np

from jaxdiff.data._images import open_image, pixels_of
from jaxdiff.data._sources import ArraySource, array_source, check_exists, require

_SHAPE = (32, 32, 3)
_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


def cifar10(path, split: str = "train") -> ArraySource:
    """CIFAR-10 from Parquet files in the layout of the Hugging Face hub: 32x32x3, ten classes.

    Every image is decoded once, when the source is made (about two seconds and 150 MB for 50,000
    images): a broken file is found before training, and reading costs no decoding afterwards.

    Args:
        path: directory that holds `<split>-*.parquet`, with the columns `img` (struct of `bytes`,
            an encoded image, and `path`) and `label` (integer in [0, 10)).
        split: "train" or "test".

    Returns:
        A source of images, `(32, 32, 3)` in [-1, 1], with labels in [0, 10), in the order of the
        files, sorted by name.

    Raises:
        FileNotFoundError: for a missing directory, or one without files of this split.
        ValueError: for another split, a corrupt or empty file, other columns, an image that
            cannot be decoded or is not 32x32 RGB, or a label out of range.

    Reference: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009, chapter 3.
    """
    if split not in ("train", "test"):
        raise ValueError(f"`split` must be 'train' or 'test', got {split!r}.")
    directory = check_exists(path)
    files = sorted(directory.glob(f"{split}-*.parquet"))
    if not files:
        raise FileNotFoundError(
            f"`path` must be a directory with files `{split}-*.parquet`, found none in "
            f"{str(directory)!r}. Point it at the folder that holds them."
        )
    parts = [_read(file) for file in files]
    images = np.concatenate([images for images, _ in parts])
    labels = np.concatenate([labels for _, labels in parts])
    return array_source(images, labels, num_classes=10, class_names=_CLASSES)


def _read(file: Path) -> tuple[np.ndarray, np.ndarray]:
    encoded, labels = _columns(file)
    if not encoded:
        raise ValueError(f"{str(file)!r} must hold images, got no rows. Fetch the file again.")
    images = np.empty((len(encoded), *_SHAPE), np.uint8)
    # One thread: images this small are decoded faster without the contention of several.
    for row, data in enumerate(encoded):
        name = f"image {row} of {str(file)!r}"
        if data is None:
            raise ValueError(f"{name} must be an encoded image, got null. Fetch the file again.")
        image = pixels_of(open_image(data, name), name)
        if image.shape != _SHAPE:
            raise ValueError(
                f"{name} must be RGB of 32x32 pixels, got (height, width, channels) "
                f"{image.shape}. Is this the CIFAR-10 file?"
            )
        images[row] = image
    bad = np.flatnonzero((labels < 0) | (labels >= 10))
    if bad.size:
        raise ValueError(
            f"`label` in {str(file)!r} must be in [0, 10), got {labels[bad[0]]} in row {bad[0]}. "
            "Is this the CIFAR-10 file?"
        )
    return images, labels


def _columns(file: Path) -> tuple[list[bytes | None], np.ndarray]:
    require("pyarrow")
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        # Not memory-mapped, and without partition discovery from folder names.
        table = pq.ParquetFile(file).read()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{str(file)!r} must be a Parquet file, but cannot be read ({error}). "
            "It may be truncated: fetch it again."
        ) from None
    columns = dict(zip(table.schema.names, table.schema.types, strict=True))
    image, label = columns.get("img"), columns.get("label")
    has_bytes = (
        image is not None
        and pa.types.is_struct(image)
        and image.get_field_index("bytes") >= 0
        and pa.types.is_binary(image.field("bytes").type)
    )
    if not has_bytes or label is None or not pa.types.is_integer(label):
        found = ", ".join(f"{name}: {kind}" for name, kind in columns.items())
        raise ValueError(
            f"{str(file)!r} must have the columns `img` (struct with `bytes`) and `label` "
            f"(integer), got {found or 'no columns'}. Rename or convert them."
        )
    if table["label"].null_count:
        raise ValueError(f"`label` in {str(file)!r} must be integers, got null. Remove these rows.")
    return pc.struct_field(table["img"], "bytes").to_pylist(), table["label"].to_numpy()

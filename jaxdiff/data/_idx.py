"""MNIST and its kin: the idx format."""

import gzip
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from jaxdiff.data._sources import ArraySource, array_source, check_exists


def idx(images_path, labels_path=None, *, num_classes: int | None = None) -> ArraySource:
    """Grey images, and labels if given, from idx files, plain or gzipped.

    Args:
        images_path: idx file of unsigned bytes with three axes (n, H, W).
        labels_path: idx file of unsigned bytes with one axis (n,), or None.
        num_classes: number of classes; the largest label + 1 if None.

    Returns:
        A source of (H, W, 1) images.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: for a wrong magic number, a truncated file, or labels that do not match.

    Reference: LeCun, Cortes, Burges, "The MNIST database of handwritten digits", 1998, "The IDX
    file format".
    """
    images = _read(images_path, "images_path", 3)[..., None]
    labels = None if labels_path is None else _read(labels_path, "labels_path", 1)
    if labels is not None and len(labels) != len(images):
        raise ValueError(
            f"`labels_path` must hold one label per image, got {len(labels)} labels for "
            f"{len(images)} images. Pair the files of the same split."
        )
    return array_source(images, labels, num_classes=num_classes)


def mnist(path, split: str = "train") -> ArraySource:
    """MNIST, or a set of its form: 28x28x1, ten classes.

    Args:
        path: directory of the four files `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`,
            `t10k-images-idx3-ubyte` and `t10k-labels-idx1-ubyte`, plain or gzipped (".gz").
        split: "train" or "test" (t10k).

    Returns:
        A source of (28, 28, 1) images in the order of the files.

    Raises:
        FileNotFoundError: for a missing directory or file.
        ValueError: for another split, and all that `idx` rejects.
    """
    if split not in ("train", "test"):
        raise ValueError(f"`split` must be 'train' or 'test', got {split!r}.")
    directory, part = check_exists(path), {"train": "train", "test": "t10k"}[split]
    found = []
    for name in (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"):
        files = [directory / name, directory / f"{name}.gz"]
        there = [file for file in files if file.exists()]
        if not there:
            raise FileNotFoundError(
                f"`path` must be a directory with the file `{name}` or `{name}.gz`, found none in "
                f"{str(directory)!r}. Point it at the folder that holds them."
            )
        found.append(there[0])
    return replace(idx(*found, num_classes=10), class_names=tuple(map(str, range(10))))


def _read(path, argument: str, ndim: int) -> np.ndarray:
    path = check_exists(path, argument)
    data = _bytes(path, argument)
    magic = bytes([0, 0, 8, ndim])
    if data[:4] != magic:
        raise ValueError(
            f"`{argument}` must be an idx file of unsigned bytes with {ndim} axes (magic number "
            f"0x{magic.hex()}), got 0x{data[:4].hex()} in {str(path)!r}. "
            "Are images and labels swapped?"
        )
    start = 4 + 4 * ndim
    shape = struct.unpack(f">{ndim}I", data[4:start]) if len(data) >= start else ()
    if not shape or len(data) - start != np.prod(shape, dtype=object):
        raise ValueError(
            f"`{argument}` must hold as many bytes as its header says, got {len(data)} bytes for "
            f"shape {shape} in {str(path)!r}. It may be truncated: fetch it again."
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _bytes(path: Path, argument: str) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"`{argument}` must be a readable idx file, plain or gzipped, got {str(path)!r} "
            f"({error}). It may be truncated: fetch it again."
        ) from None

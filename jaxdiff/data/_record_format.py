"""How records lie on disk: what an example is, and what a directory says of itself."""

import functools
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxdiff.conditions import LABEL, as_entries
from jaxdiff.data._images import open_image, pixels_of
from jaxdiff.data._sources import ArraySource

INFO = "info.json"
UNFINISHED = "unfinished.json"
VERSION = 1
MEND = "Copy it again, or remove the directory and write it again."
Encoding = Literal["raw", "png"]


@dataclass(frozen=True)
class Layout:
    """How an example is a record: its conditions, whose sizes are fixed, and then x.

    Attributes:
        shape: of x.
        dtype: of x, "uint8" or "float32".
        cond: [dtype, shape] of the condition, a dict of such by name, or None.
        encoding: of x, "raw" for its bytes or "png".
    """

    shape: list[int]
    dtype: str
    cond: Any
    encoding: str

    @classmethod
    def of(cls, block: ArraySource, encoding: Encoding) -> "Layout":
        """That of the examples of a block.

        Raises:
            ValueError: for another encoding, or PNG of what is no image.
        """
        shape, dtype = list(block.event_shape), str(block.x.dtype)
        if encoding not in ("raw", "png"):
            raise ValueError(f"`encoding` must be 'raw' or 'png', got {encoding!r}.")
        if encoding == "png" and (dtype != "uint8" or shape[2] not in (1, 3)):
            raise ValueError(
                "`encoding` 'png' needs uint8 images of one or three channels, got examples of "
                f"{dtype}, shape {tuple(shape)}. Leave it out: 'raw' keeps any array."
            )
        found = {
            name: [str(values.dtype), list(values.shape[1:])]
            for name, values in as_entries(block.cond).items()
        }
        cond = found if isinstance(block.cond, dict) else found.get(LABEL)
        return cls(shape, dtype, cond, encoding)

    @functools.cached_property
    def head(self) -> np.dtype:
        """The conditions of an example."""
        entries = as_entries(self.cond).items()
        return np.dtype([(name, dtype, tuple(shape)) for name, (dtype, shape) in entries])

    @property
    def nbytes(self) -> int:
        """Size of an example whose x is not compressed."""
        return self.head.itemsize + int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def encode(self, block: ArraySource) -> Iterator[bytes]:
        """The records of a block's examples."""
        heads = np.empty(len(block), self.head)
        for name, values in as_entries(block.cond).items():
            heads[name] = values
        for head, x in zip(heads, block.x, strict=True):
            yield head.tobytes() + (_png(x) if self.encoding == "png" else x.tobytes())

    def decode(self, records: list[bytes], name: str) -> tuple[np.ndarray, Any]:
        """x and conditions of records, stacked; `name` is what an error calls an image."""
        size = self.head.itemsize
        bodies = [record[size:] for record in records]
        if self.encoding == "png":
            images = [pixels_of(open_image(body, name), name) for body in bodies]
            x = np.array(images, self.dtype).reshape(len(bodies), *self.shape)
        else:
            # Of a bytearray, because flips are made in place.
            x = np.frombuffer(bytearray().join(bodies), self.dtype)
            x = x.reshape(len(bodies), *self.shape)
        if self.cond is None:
            return x, None
        heads = np.frombuffer(b"".join([record[:size] for record in records]), self.head)
        entries = {name: np.array(heads[name]) for name in as_entries(self.cond)}
        return x, entries if isinstance(self.cond, dict) else entries[LABEL]


def _png(x: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass(frozen=True)
class Info:
    """What `info.json` says of a directory of records.

    Attributes:
        version: of this format.
        source: what tells the source that was written from others; None for a stream.
        layout: of an example.
        shard_size: examples of each file but the last.
        num_classes: labels are in [0, num_classes); None without labels.
        class_names: a name for each class, or None.
        words: those of captions, or None.
        pixels: whether examples were born as pixels.
        count: number of examples.
        file_bytes: size of each file.
    """

    version: int
    source: str | None
    layout: Layout
    shard_size: int
    num_classes: int | None
    class_names: list[str] | None
    words: list[str] | None
    pixels: bool
    count: int = 0
    file_bytes: list[int] = field(default_factory=list)

    @classmethod
    def read(cls, directory: Path) -> "Info":
        """That of a directory.

        Raises:
            ValueError: for a directory that holds no records or those of an interrupted writing,
                a damaged file, or one of a newer version.
        """
        file = directory / INFO
        if not file.exists():
            found, mend = f"no `{INFO}`", "Point it at the folder that holds that file."
            if (directory / UNFINISHED).exists():
                found = "what an interrupted writing left"
                mend = "Write it again; `to_records` and `train.convert` go on where they were."
            raise ValueError(
                f"`path` must be a directory of records, got {found} in {str(directory)!r}. {mend}"
            )
        try:
            value = json.loads(file.read_text())
            if value["version"] > VERSION:
                raise ValueError(f"it is of version {value['version']}, newer than this library")
            return cls(**value | {"layout": Layout(**value["layout"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{str(file)!r} must describe records, but cannot be read ({error}). {MEND}"
            ) from None


def shard_file(directory: Path, number: int) -> Path:
    """A file of records; beside it are the labels of its examples, as .npy."""
    return directory / f"{number:05d}.array_record"

"""Writing records: from a stream of examples, or from any source."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdiff._checks import check_count
from jaxdiff.data._pipeline import fingerprint, gather
from jaxdiff.data._record_format import (
    INFO,
    UNFINISHED,
    VERSION,
    Encoding,
    Info,
    Layout,
    shard_file,
)
from jaxdiff.data._sources import ArraySource, Source, array_source, require, to_bytes

# Examples in memory at once.
_BLOCK = 32
# Each record by itself, as they are read at random; Zstandard at its fastest costs reading little.
_OPTIONS = "group_size:1,zstd:1"


def write_records(
    path,
    examples: Iterable[Mapping[str, Any]],
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    words: Sequence[str] | None = None,
    pixels: bool | None = None,
    encoding: Encoding = "raw",
    shard_bytes: int = 2**30,
) -> None:
    """Write a stream of examples, of which a few are in memory at once, for `records` to read.

    Files have another name until they are whole, and `info.json` is the last: what was interrupted
    is never taken for a set.

    Args:
        path: directory, new or empty.
        examples: of one example each, {"x": uint8 (H, W, C) or float (*event), "cond": as of
            `array_source`, absent without conditions}; all of the same shapes and dtypes.
        num_classes: labels are in [0, num_classes); that of `class_names` if None.
        class_names: a name for each class, in the order of the labels.
        words: of captions, as of `array_source`.
        pixels: whether examples were born as pixels; None for uint8 alone.
        encoding: "raw", or "png" for images: smaller files of photographs, but slower to read.
        shard_bytes: size of a file, before compression.

    Raises:
        ValueError: for a directory that is not empty, no examples, one that is not as the first,
            labels without a number of classes, PNG of what is no image, and all that
            `array_source` rejects.

    Note: raw is the default because reading is what training waits for. One thread of the loader
    yields 26,000 images of 64 x 64 a second, or 3,000 of 256 x 256; of PNG 5,800, or 530, and four
    threads on two cores 8,600, or 980. Raw records are compressed without loss, too: photographs
    to 0.79 to 0.96 of their pixels' size, MNIST to 0.36; PNG to 0.57 to 0.77, and 0.43.

    Examples:
        >>> import tempfile
        >>> stream = ({"x": np.full((4, 4, 8), i), "cond": int(i) % 2} for i in np.arange(9.0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     data.write_records(f"{folder}/latents", stream, num_classes=2)
        ...     data.records(f"{folder}/latents")
        RecordSource(9 x (4, 4, 8) float32, num_classes=2)
    """
    if num_classes is None and class_names is not None:
        num_classes = len(class_names)
    blocks = (
        array_source(
            **rows, num_classes=num_classes, class_names=class_names, words=words, pixels=pixels
        )
        for rows in _stacked(_checked(examples))
    )
    first = next(blocks, None)
    if first is None:
        raise ValueError("`examples` must hold one at least, got none.")
    info = _describe(first, num_classes, None, encoding, shard_bytes)
    directory = _begin(path, info)
    _finish(directory, info, _write(directory, info, itertools.chain([first], blocks)))


def to_records(
    source: Source,
    path,
    *,
    encoding: Encoding = "raw",
    shard_bytes: int = 2**30,
    progress: Callable[[int], Any] = lambda count: None,
) -> None:
    """Write the examples of any source, a few in memory at once, for `records` to read.

    Where it was interrupted, the same call goes on with the first file that is not whole; where
    it was not, there is nothing to do. A source is known by its size and 64 of its examples: where
    others changed since, write to a new directory.

    Args:
        source: any random-access source. Where its `dtype` is uint8, images are kept so; its
            `class_names`, `words` and `pixels` are kept if it has them.
        path: directory, new or empty, or one in which the same source was being written.
        encoding: as of `write_records`, which says what either costs.
        shard_bytes: size of a file, before compression.
        progress: called with the number of examples that are written, again and again.

    Raises:
        ValueError: for a directory that holds anything else, labels without a number of classes,
            PNG of what is no image, and all that `array_source` rejects.

    Examples:
        >>> import tempfile
        >>> source, rows = data.digits("test"), np.arange(9)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     data.to_records(source, folder)
        ...     stored = data.records(folder)
        ...     np.array_equal(stored[rows]["x"], source[rows]["x"])
        True
    """
    first, count = _block(source, 0, 1), len(source)
    info = _describe(first, source.num_classes, fingerprint(source), encoding, shard_bytes)
    directory = _begin(path, info)
    if not (directory / INFO).exists():
        done = len(list(directory.glob("*.array_record")))

        def blocks() -> Iterator[ArraySource]:
            for start in range(done * info.shard_size, count, _BLOCK):
                progress(start)
                yield _block(source, start, min(start + _BLOCK, count))

        _write(directory, info, blocks(), done)
        _finish(directory, info, count)
    progress(count)


def _checked(examples: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Examples as arrays, each as the first one."""
    first = None
    for index, example in enumerate(examples):
        arrays = jax.tree.map(np.asarray, dict(example))
        found = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", arrays)
        first = found if first is None else first
        if found != first or not {"x"} <= set(found) <= {"x", "cond"}:
            raise ValueError(
                "`examples` must be {'x': ..., 'cond': ...}, or without 'cond', of the dtypes and "
                f"shapes of the first, {first}, got {found} at index {index}."
            )
        yield arrays


def _stacked(examples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    while block := list(itertools.islice(examples, _BLOCK)):
        yield jax.tree.map(lambda *leaves: np.stack(leaves), *block)


def _block(source: Source, start: int, stop: int) -> ArraySource:
    """Some examples of any source, as they are to be stored."""
    examples = gather(source, np.arange(start, stop))
    x = examples["x"]
    return array_source(
        to_bytes(x) if getattr(source, "dtype", None) == np.uint8 else x,
        examples.get("cond"),
        num_classes=source.num_classes,
        class_names=getattr(source, "class_names", None),
        words=getattr(source, "words", None),
        pixels=getattr(source, "pixels", None),
    )


def _describe(
    first: ArraySource,
    num_classes: int | None,
    source: str | None,
    encoding: Encoding,
    shard_bytes: int,
) -> Info:
    """What is known before anything is written."""
    if first.num_classes != num_classes:
        raise ValueError(
            "`num_classes` must say how many classes the labels have, got None. The examples are "
            "not looked through for the largest."
        )
    layout = Layout.of(first, encoding)
    size = max(1, check_count("shard_bytes", shard_bytes) // layout.nbytes)
    names, words = first.class_names, first.words
    return Info(
        version=VERSION,
        source=source,
        layout=layout,
        shard_size=size,
        num_classes=num_classes,
        class_names=None if names is None else list(names),
        words=None if words is None else list(words),
        pixels=first.pixels,
    )


def _begin(path, info: Info) -> Path:
    """The directory: a new one, or one in which the same is being written."""
    require("array_record")
    directory = Path(path)
    there = [directory / name for name in (INFO, UNFINISHED) if (directory / name).exists()]
    if there:
        found = json.loads(there[0].read_text()) | {"count": 0, "file_bytes": []}
        if info.source is None or found != dataclasses.asdict(info):
            raise ValueError(
                f"`path` must be a new or empty directory, got {str(directory)!r}, where other "
                "records are, or the same written otherwise. Choose another, or remove it."
            )
        return directory
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"`path` must be a new or empty directory, got {str(directory)!r}.")
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / UNFINISHED, info)
    return directory


def _write(directory: Path, info: Info, blocks: Iterable[ArraySource], done: int = 0) -> int:
    """The files from number `done` on; how many examples they hold."""
    records = itertools.chain.from_iterable(_encoded(info.layout, block) for block in blocks)
    count = 0
    for number, first in enumerate(records, done):
        rest = itertools.islice(records, info.shard_size - 1)
        count += _write_file(shard_file(directory, number), itertools.chain([first], rest))
    return count


def _encoded(layout: Layout, block: ArraySource) -> Iterator[tuple[bytes, Any]]:
    """Each example's record and label."""
    labels = [None] * len(block) if block.labels is None else block.labels
    return zip(layout.encode(block), labels, strict=True)


def _write_file(file: Path, records: Iterator[tuple[bytes, Any]]) -> int:
    from array_record.python.array_record_module import ArrayRecordWriter

    temporary, labels = file.with_suffix(".tmp"), []
    with closing(ArrayRecordWriter(str(temporary), _OPTIONS)) as writer:
        for record, label in records:
            writer.write(record)
            labels.append(label)
    if labels[0] is not None:
        np.save(file.with_suffix(".npy"), np.asarray(labels, np.int32))
    temporary.replace(file)
    return len(labels)


def _finish(directory: Path, info: Info, count: int) -> None:
    files = [shard_file(directory, i) for i in range(-(-count // info.shard_size))]
    sizes = [file.stat().st_size for file in files]
    _write_json(directory / INFO, dataclasses.replace(info, count=count, file_bytes=sizes))
    (directory / UNFINISHED).unlink()


def _write_json(file: Path, info: Info) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(dataclasses.asdict(info), indent=1))
    temporary.replace(file)

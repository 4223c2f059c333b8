"""The data of a recipe: what to read, how to hold out, and what a model must know of it."""

import dataclasses
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxdiff import data
from jaxdiff.conditions import as_entries, from_entries
from jaxdiff.data import ArraySource, FolderSource, RecordSource

FILES = ("cifar10", "mnist", "folder", "records", "npz", "idx")
DENSITIES = ("two_moons", "swiss_roll", "checkerboard", "eight_gaussians", "rings")
Source = ArraySource | FolderSource | RecordSource


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data set.

    Attributes:
        name: which reader; the last five are densities in the plane.
        path: where the files are (cifar10, mnist, folder, records: a directory; npz, idx: a file).
            A directory with "train" and "test" inside, or an npz with "x_test", is its own split.
        labels_path: labels file of an idx data set.
        test_fraction: part of every class that is held out, at random, of data without a test set.
        exclude_class: classes that are left out, while the others keep their numbers.
        flip: mirror images at random.
        resize: side of images in pixels; folders resample, other images are averaged over blocks.
        crop: how images of a folder become square before; "none" changes their aspect ratio.
        mode: make images rgb or gray; None leaves them.
        background: colour behind transparent pixels of a folder's images.
        lazy: decode images of a folder as they are read, for sets larger than memory.
        threads: that prepare batches; more than one is for what must be decoded. May change when a
            run is resumed.
    """

    name: Literal[
        *("digits", "prompts"),
        *FILES,
        *DENSITIES,
    ] = "digits"
    path: str = ""
    labels_path: str = ""
    test_fraction: float = 0.1
    exclude_class: tuple[int, ...] = ()
    flip: bool = False
    resize: int | None = None
    crop: Literal["center", "none"] = "center"
    mode: Literal["rgb", "gray"] | None = None
    background: str = "white"
    lazy: bool = False
    threads: int = 1


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """What sampling must know of the data a model was trained on, without having them.

    Attributes:
        event_shape: shape of an example.
        num_classes: number of classes, or None.
        class_names: their names, or None.
        classes: those that were trained.
        words: those of captions, or None.
        pixels: whether examples were born as pixels, in [-1, 1].
        cond: shape of every condition but a class, by name; a vector by itself is the "label".
    """

    event_shape: tuple[int, ...]
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    classes: tuple[int, ...] = ()
    words: tuple[str, ...] | None = None
    pixels: bool = False
    cond: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, source: Source) -> "DataInfo":
        """That of a source."""
        labels = source.labels
        return cls(
            tuple(source.event_shape),
            source.num_classes,
            source.class_names,
            () if labels is None else tuple(np.unique(labels).tolist()),
            source.words,
            source.pixels,
            {
                name: np.shape(value)
                for name, value in as_entries(source[0].get("cond")).items()
                if labels is None or name != "label"
            },
        )

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "DataInfo":
        """What `dataclasses.asdict` gave, through JSON."""
        value = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        try:
            return cls(**value | {"cond": {k: tuple(v) for k, v in value["cond"].items()}})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"`run_dir` must be a run of a recipe, whose model.json tells of its data, got one "
                f"without {error}. Use load_run in Python."
            ) from None

    @property
    def null_cond(self) -> Any:
        """The condition of nothing: no class, and zeros for vectors and tokens; None without."""
        null: dict[str, Any] = {name: 0.0 for name in ("label", "tokens") if name in self.cond}
        if self.num_classes is not None:
            null["label"] = self.num_classes
        if self.words is not None:
            null["tokens"] = len(self.words)
        return from_entries(null)

    def name_of(self, label: int) -> str:
        """What a class is called; the label of none included."""
        if label == self.num_classes:
            return "none"
        return str(label) if self.class_names is None else self.class_names[label]


def build_sources(config: DataConfig) -> tuple[Source, Source]:
    """The data to train on and those held out.

    Raises:
        ValueError: for a reader without a path, whatever the reader rejects, and where a class
            would be missing from a side.
    """
    train, held_out = _read(config)
    if train.event_shape != held_out.event_shape:
        raise ValueError(
            f"The test set must have examples of shape {train.event_shape}, as the training set, "
            f"got {held_out.event_shape}."
        )
    if train.labels is not None and held_out.labels is not None:
        strange = sorted(set(held_out.labels.tolist()) - set(train.labels.tolist()))
        if strange:
            raise ValueError(
                f"The training set must have examples of every class of the test set, got none of "
                f"{train.class_names[strange[0]] if train.class_names else strange[0]}."
            )
    if train.num_classes != held_out.num_classes or train.class_names != held_out.class_names:
        raise ValueError(
            "The test set must have the classes of the training set, "
            f"{train.class_names or train.num_classes}, got "
            f"{held_out.class_names or held_out.num_classes}."
        )
    if config.exclude_class:
        train, held_out = (data.without_classes(s, config.exclude_class) for s in (train, held_out))
    return train, held_out


def build_source(config: DataConfig, split: Literal["train", "test"] = "train") -> Source:
    """One side of `build_sources`."""
    return build_sources(config)[split == "test"]


def _read(config: DataConfig) -> tuple[Source, Source]:
    reads_files = config.name in FILES
    if reads_files and not config.path:
        raise ValueError(
            f"`data.path` must say where the {config.name} data are, got nothing. Pass --data.path."
        )
    for field, used in (("path", reads_files), ("labels_path", config.name == "idx")):
        if getattr(config, field) and not used:
            raise ValueError(
                f"`data.{field}` must be left out for {config.name}, got {getattr(config, field)}."
            )
    if config.name == "folder":
        return _folder(config)
    if config.lazy:
        raise ValueError(f"`data.lazy` is for folders of images, got data of {config.name}.")
    if config.name == "records":
        return _sides(config, lambda path: _reduced(data.records(path), config))
    if config.name in ("digits", "prompts", "cifar10", "mnist"):
        at = () if config.name in ("digits", "prompts") else (config.path,)
        reader = getattr(data, config.name)
        found = [_reduced(reader(*at, part), config) for part in ("train", "test")]
        return found[0], found[1]
    if config.name == "npz":
        if "x_test" in _names(config.path):
            found = [_reduced(data.npz(config.path, part), config) for part in ("train", "test")]
            return found[0], found[1]
        source = data.npz(config.path)
    elif config.name == "idx":
        source = data.idx(config.path, config.labels_path or None)
    else:
        density = getattr(data, config.name)
        source = data.array_source(density(jax.random.key(0), 20_000))
    return data.split(_reduced(source, config), config.test_fraction)


def _folder(config: DataConfig) -> tuple[Source, Source]:
    mode: Any = {"rgb": "RGB", "gray": "L", None: None}[config.mode]

    def read(path):
        return data.image_folder(
            path,
            resize=config.resize,
            crop=config.crop,
            mode=mode,
            background=config.background,
            lazy=config.lazy,
        )

    return _sides(config, read)


def _sides(config: DataConfig, read: Callable[[Any], Source]) -> tuple[Source, Source]:
    """The parts of a directory that is its own split, or those that are drawn."""
    root = Path(config.path)
    inside = {entry.name for entry in root.iterdir() if entry.is_dir()} if root.is_dir() else set()
    shown = {name for name in inside if not name.startswith(".") and name != "__MACOSX"}
    if shown == {"train", "test"}:
        return read(root / "train"), read(root / "test")
    return data.split(read(config.path), config.test_fraction)


def _reduced(source: Any, config: DataConfig) -> Any:
    """Images in memory, or records, as the configuration wants them."""
    shape = source.event_shape
    if config.mode == "rgb" and (len(shape) != 3 or shape[2] != 3):
        raise ValueError(f"`data.mode` rgb needs images of three channels, got examples {shape}.")
    gray = config.mode == "gray" and (len(shape) != 3 or shape[2] != 1)
    if config.resize is None and not gray:
        return source
    return data.reduced(source, size=config.resize, gray=gray)


def _names(path: str) -> list[str]:
    try:
        # Opened here, because NumPy leaves a damaged archive open.
        with open(path, "rb") as stream, np.load(stream) as file:
            return list(file)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile):
        return []  # the reader says what is wrong

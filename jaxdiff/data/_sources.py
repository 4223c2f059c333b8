"""Sources held in memory: the one class behind every reader, and the checks on what it holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Source(Protocol):
    """What `make_loader` reads: a random-access Grain source of examples.

    Any object with these members will do; `ArraySource` is the one most readers return.

    Attributes:
        event_shape: shape of one example, (H, W, C) for images.
        num_classes: labels are in [0, num_classes); None if there are no labels.

    Records keep a few more attributes of those that have them: `class_names`, `words` and `pixels`
    as of `array_source`, and a `dtype` uint8 of images that were 0..255.
    """

    event_shape: tuple[int, ...]
    num_classes: int | None

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """{"x": float32 (*event_shape), "cond": a pytree of arrays, absent without conditions}.

        A condition that is a class is an int32 scalar, alone or as "label" of a dict.
        """


@dataclass(frozen=True, eq=False, repr=False)
class ArraySource:
    """Examples in memory; images stay uint8 and are scaled to [-1, 1] as they are read.

    `source[i]` is one example, `source[indices]` (an integer array) a stacked batch of them.
    Make one with `array_source`, which checks its arguments.

    Attributes:
        x: (n, *event_shape), uint8 (scaled by x / 127.5 - 1 on reading) or float32 (as it is).
        cond: arrays with a leading axis n: int32 labels, float32 vectors, or a dict of such; None
            without conditions.
        num_classes: labels are in [0, num_classes); None without labels.
        class_names: a name for each class, or None.
        words: those of captions, whose "tokens" are their indices; None without captions.
        pixels: whether examples were born as pixels: their range is [-1, 1], and nothing outside
            it can be shown.
    """

    x: np.ndarray
    cond: Any = None
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    words: tuple[str, ...] | None = None
    pixels: bool = False

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return self.x.shape[1:]

    @property
    def dtype(self) -> np.dtype:
        """Of x as it is stored."""
        return self.x.dtype

    @property
    def labels(self) -> np.ndarray | None:
        """The class of every example, int32 (n,), or None without classes."""
        return labels_of(self.cond, self.num_classes)

    def take(self, indices: np.ndarray) -> "ArraySource":
        """A source of the examples at these indices, in this order."""
        cond = _rows(self.cond, indices)
        return replace(self, x=self.x[indices], cond=cond)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.x)

    def __repr__(self) -> str:
        classes = f", num_classes={self.num_classes}" if self.num_classes else ""
        return f"ArraySource({len(self)} x {self.event_shape} {self.x.dtype}{classes})"

    def __getitem__(self, index: int | np.ndarray) -> dict[str, Any]:
        """One example, or the stacked examples of an integer array of indices."""
        x = self.x[index]
        if x.dtype == np.uint8:
            x = from_bytes(x)
        return {"x": x} if self.cond is None else {"x": x, "cond": _rows(self.cond, index)}


def array_source(
    x,
    cond=None,
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    words: Sequence[str] | None = None,
    pixels: bool | None = None,
) -> ArraySource:
    """Wrap arrays as a source.

    Args:
        x: (n, *event) examples; uint8 images (n, H, W, C), scaled to [-1, 1] as they are read, or
            floats, kept as they are (in float32).
        cond: conditions, arrays with a leading axis n, or None: integer labels (n,) in
            [0, num_classes); float vectors (n, ...); or a dict of several, whose classes, if any,
            are its "label".
        num_classes: number of classes; the largest label + 1 if None.
        class_names: a name for each class, in the order of the labels.
        words: of captions, whose integers (n, length), "tokens" in `cond`, are their indices, or
            len(words) for a word that is not said.
        pixels: whether examples were born as pixels, with the range [-1, 1]; None for uint8 alone.

    Returns:
        The source. Arrays already of the stored dtype are not copied.

    Raises:
        ValueError: for no examples, another dtype, a shape that does not fit, NaN or infinite
            values, or labels or names that do not match.

    Examples:
        >>> source = data.array_source(np.zeros((20, 4, 4, 3), np.uint8), np.arange(20) % 2)
        >>> source.event_shape, source.num_classes, source.pixels
        ((4, 4, 3), 2, True)
    """
    x = np.asarray(x)
    if x.ndim < 2 or len(x) == 0:
        raise ValueError(
            f"`x` must be an array (n, *event) with n > 0, got shape {x.shape}. "
            "Put the examples along the first axis."
        )
    if x.dtype == np.uint8 and x.ndim != 4:
        raise ValueError(
            f"`x` of dtype uint8 must be images (n, H, W, C), got shape {x.shape}. "
            "Add a channel axis with x[..., None], or pass floats."
        )
    pixels = x.dtype == np.uint8 if pixels is None else pixels
    if x.dtype != np.uint8:
        x = _finite_float32(x, "x")
    tokens = None
    if words is not None:
        tokens, cond = _captions(cond, len(x), len(words))
    cond, classes = _conditions(cond, len(x), num_classes)
    if tokens is not None:
        cond = {**({} if cond is None else cond), "tokens": tokens}
    if classes is None and num_classes is not None:
        raise ValueError(
            f"`num_classes` must be None without labels, got {num_classes}. Pass `cond` as well."
        )
    names = None if class_names is None else tuple(class_names)
    if names is not None and len(names) != classes:
        raise ValueError(
            f"`class_names` must hold a name for each of {classes or 0} classes, got {len(names)}."
        )
    return ArraySource(x, cond, classes, names, None if words is None else tuple(words), pixels)


def require(module: str) -> None:
    """Say how to install what a reader needs, where it is missing.

    Raises:
        ModuleNotFoundError: if it is.
    """
    try:
        found = find_spec(module) is not None
    except ValueError:  # it was set to None, as tests do
        found = False
    if not found:
        raise ModuleNotFoundError(
            f"{module} is missing, which this needs. Install it: pip install 'jaxdiff[train]'",
            name=module,
        )


def from_bytes(x: np.ndarray) -> np.ndarray:
    """[0, 255] -> [-1, 1]."""
    x = x / np.float32(127.5)
    x -= 1
    return x


def to_bytes(x: np.ndarray) -> np.ndarray:
    """[-1, 1] -> [0, 255], rounded; gives what `from_bytes` was given."""
    return np.rint((x + 1) * 127.5).astype(np.uint8)


def labels_of(cond: Any, num_classes: int | None) -> np.ndarray | None:
    """The classes among conditions, or None."""
    if num_classes is None:
        return None
    return cond["label"] if isinstance(cond, dict) else cond


def _rows(cond: Any, index: int | np.ndarray) -> Any:
    if isinstance(cond, dict):
        return {name: values[index] for name, values in cond.items()}
    return None if cond is None else cond[index]


def check_exists(path, argument: str = "path") -> Path:
    """`path` as a `Path`, or a FileNotFoundError that names the argument."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"`{argument}` must exist, got {str(path)!r}. Check the spelling and the drive."
        )
    return path


def _finite_float32(x: np.ndarray, argument: str) -> np.ndarray:
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError(
            f"`{argument}` must be uint8 images or floats, got dtype {x.dtype}. Convert it: "
            "x.astype(np.uint8) for pixels in 0..255, or floats scaled to [-1, 1]."
        )
    x = x.astype(np.float32, copy=False)
    bad = np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(1))
    if bad.size:
        raise ValueError(
            f"`{argument}` must be finite in float32, got NaN or infinity in {bad.size} of "
            f"{len(x)} examples, the first at index {bad[0]}. Remove or repair them."
        )
    return x


def _captions(cond: Any, count: int, num_words: int) -> tuple[np.ndarray, Any]:
    """The captions among conditions, and the others."""
    rest = dict(cond) if isinstance(cond, Mapping) else {}
    tokens = np.asarray(rest.pop("tokens", None))
    fits = tokens.ndim == 2 and len(tokens) == count and np.issubdtype(tokens.dtype, np.integer)
    if not fits or tokens.min() < 0 or tokens.max() > num_words:
        raise ValueError(
            f"`cond` must hold integers 'tokens', ({count}, length), in [0, {num_words}] for "
            f"{num_words} words, got dtype {tokens.dtype} of shape {tokens.shape}."
        )
    return tokens.astype(np.int32), rest or None


def _conditions(cond: Any, count: int, num_classes: int | None) -> tuple[Any, int | None]:
    """Conditions as they are stored, and the number of classes among them."""
    if cond is None:
        return None, None
    if not isinstance(cond, Mapping):
        return _condition(np.asarray(cond), count, num_classes, "cond", may_be_label=True)
    found, classes = {}, None
    for name, values in cond.items():
        is_label = name == "label"
        given = num_classes if is_label else None
        argument = f"cond[{name!r}]"
        found[name], of_this = _condition(
            np.asarray(values), count, given, argument, may_be_label=is_label
        )
        classes = of_this if is_label else classes
    return found, classes


def _condition(
    cond: np.ndarray, count: int, num_classes: int | None, argument: str, *, may_be_label: bool
) -> tuple[np.ndarray, int | None]:
    if cond.ndim == 0 or len(cond) != count:
        raise ValueError(
            f"`{argument}` must hold one condition per example, shape ({count}, ...), got shape "
            f"{cond.shape}. Check that conditions and examples come from the same set."
        )
    if cond.dtype == bool and not may_be_label:
        return cond, None  # a mask of tokens, say
    # Class numbers saved as floats are no condition; a scalar has a name, and is in a dict.
    if np.issubdtype(cond.dtype, np.floating) and (cond.ndim > 1 or not may_be_label):
        return _finite_float32(cond, argument), None
    if not np.issubdtype(cond.dtype, np.integer) or not (may_be_label and cond.ndim == 1):
        raise ValueError(
            f"`{argument}` must hold integer labels, got dtype {cond.dtype} of shape {cond.shape}; "
            "or float vectors, (n, size). Convert class numbers with cond.astype(np.int32); "
            "scalars and several conditions are a dict of arrays, whose classes are its 'label'."
        )
    num_classes = int(cond.max()) + 1 if num_classes is None else num_classes
    bad = np.flatnonzero((cond < 0) | (cond >= num_classes))
    if bad.size:
        raise ValueError(
            f"`{argument}` must be in [0, {max(num_classes, 0)}), got {cond[bad[0]]} at index "
            f"{bad[0]}. Number the classes from 0, or pass a larger `num_classes`."
        )
    return cond.astype(np.int32), num_classes

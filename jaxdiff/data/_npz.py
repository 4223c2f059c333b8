"""Arrays saved by NumPy."""

import zipfile
import zlib
from typing import Any

import numpy as np

from jaxdiff.conditions import LABEL, as_entries
from jaxdiff.data._sources import ArraySource, array_source, check_exists

_HOW = "Save it with np.savez(path, x=images, cond=labels)."


def npz(path, split: str | None = None, *, num_classes: int | None = None) -> ArraySource:
    """Examples, and conditions if any, from an .npz file.

    Args:
        path: file with the array "x" (uint8 images (n, H, W, C), scaled to [-1, 1] as they are
            read, or floats (n, *event), kept as they are) and, optionally, conditions as of
            `array_source`: one array named "cond" or "label", or several named "cond/age",
            "cond/label" and so on; and names of the classes as "class_names".
        split: "train" for the arrays of these names, "test" for those of a set to be held out,
            "x_test", "cond_test" or "label_test", "cond_test/age"; None for a file that has no
            test set.
        num_classes: number of classes; the largest label + 1 if None.

    Returns:
        The source.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: for a corrupt file, other names, a split that the file does not have, and all
            that `array_source` rejects.
    """
    if split not in (None, "train", "test"):
        raise ValueError(f"`split` must be 'train', 'test' or None, got {split!r}.")
    arrays = _load(check_exists(path), path)
    names = sorted(arrays)
    parts = {end: _part(arrays, end, names, path) for end in ("", "_test")}
    if parts[""] is None:
        raise ValueError(f"{str(path)!r} must hold the array `x`, got {names}. {_HOW}")
    if (parts["_test"] is None) == (split is not None):
        has = "no `x_test`" if split is not None else "a test set, `x_test`"
        raise ValueError(f"`split` must fit {str(path)!r}, which has {has}, got {split!r}.")
    for end, part in parts.items():
        if part is not None and len(part[0]) == 0:
            raise ValueError(f"`x{end}` of {str(path)!r} must hold examples, got none.")
    if parts["_test"] is not None and (parts[""][1] is None) != (parts["_test"][1] is None):
        raise ValueError(
            f"{str(path)!r} must hold conditions of both `x` and `x_test`, or of neither, got "
            f"{names}. {_HOW}"
        )
    used = {name for part in parts.values() if part is not None for name in part[2]}
    unknown = [name for name in names if name not in used and name != "class_names"]
    if unknown:
        raise ValueError(
            f"{str(path)!r} must hold `x`, conditions and `class_names`, got also {unknown}. "
            "Leave them out, or name conditions 'cond/age'."
        )
    class_names = [str(name) for name in arrays["class_names"]] if "class_names" in arrays else None
    if num_classes is None:
        num_classes = _count(class_names, [part[1] for part in parts.values() if part is not None])
    x, cond, _ = parts["_test" if split == "test" else ""]
    return array_source(x, cond, num_classes=num_classes, class_names=class_names)


def _part(arrays: dict[str, np.ndarray], end: str, names: list[str], path):
    """x, conditions and the names they have in the file, or None."""
    if f"x{end}" not in arrays:
        return None
    single = [name for name in (f"cond{end}", f"label{end}") if name in arrays]
    prefix = f"cond{end}/"
    several = {name.removeprefix(prefix): name for name in arrays if name.startswith(prefix)}
    if len(single) + bool(several) > 1:
        raise ValueError(
            f"{str(path)!r} must hold at most one of `cond` and `label`, or conditions named "
            f"'cond/...', got {names}. {_HOW}"
        )
    cond: Any = {name: arrays[stored] for name, stored in several.items()} or None
    cond = arrays[single[0]] if single else cond
    return arrays[f"x{end}"], cond, [f"x{end}", *single, *several.values()]


def _count(class_names: list[str] | None, conditions: list[Any]) -> int | None:
    """The number of classes of all sets together."""
    if class_names is not None:
        return len(class_names)
    labels = [as_entries(cond).get(LABEL) for cond in conditions]
    whole = [row for row in labels if row is not None and np.issubdtype(row.dtype, np.integer)]
    return max(int(row.max()) for row in whole if row.size) + 1 if whole else None


def _load(path, given) -> dict[str, np.ndarray]:
    try:
        # Opened here, because NumPy leaves a damaged archive open.
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array")
            return {name: file[name] for name in file}
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(
            f"`path` must be an .npz file of plain arrays, but {str(given)!r} cannot be read "
            f"({error}). {_HOW}"
        ) from None

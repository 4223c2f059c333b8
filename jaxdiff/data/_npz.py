"""Arrays saved by NumPy."""

import zipfile
import zlib

import numpy as np

from jaxdiff.data._sources import ArraySource, array_source, check_exists


def npz(path, *, num_classes: int | None = None) -> ArraySource:
    """Examples, and labels if any, from an .npz file.

    Args:
        path: file with the array "x" (uint8 images (n, H, W, C), scaled to [-1, 1] as they are
            read, or floats (n, *event), kept as they are) and, optionally, integer labels
            (n,) named "cond" or "label".
        num_classes: number of classes; the largest label + 1 if None.

    Returns:
        The source.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: for a corrupt file, other names, and all that `array_source` rejects.
    """
    path = check_exists(path)
    try:
        # Opened here, because NumPy leaves a damaged archive open.
        with path.open("rb") as stream:
            names, arrays = _load(stream)
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(
            f"`path` must be an .npz file of plain arrays, but {str(path)!r} cannot be read "
            f"({error}). Save it with np.savez(path, x=images, cond=labels)."
        ) from None
    if "x" not in arrays or {"cond", "label"} <= arrays.keys():
        raise ValueError(
            f"{str(path)!r} must hold the array `x` and at most one of `cond` and `label`, got "
            f"{names}. Save it with np.savez(path, x=images, cond=labels)."
        )
    return array_source(
        arrays["x"], arrays.get("cond", arrays.get("label")), num_classes=num_classes
    )


def _load(stream) -> tuple[list[str], dict[str, np.ndarray]]:
    file = np.load(stream, allow_pickle=False)
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError("it is a single array")
    return sorted(file), {name: file[name] for name in ("x", "cond", "label") if name in file}

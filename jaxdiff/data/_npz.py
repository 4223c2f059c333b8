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
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("x", "cond", "label") if name in file}
            names = sorted(file)
    # A plain .npy array is no context manager (TypeError, or AttributeError in older Python).
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zlib.error) as error:
        raise _unreadable(path, error) from None
    except zipfile.BadZipFile as error:
        raise _unreadable(path, error) from None
    if "x" not in arrays or {"cond", "label"} <= arrays.keys():
        raise ValueError(
            f"{str(path)!r} must hold the array `x` and at most one of `cond` and `label`, got "
            f"{names}. Save it with np.savez(path, x=images, cond=labels)."
        )
    return array_source(
        arrays["x"], arrays.get("cond", arrays.get("label")), num_classes=num_classes
    )


def _unreadable(path, error: Exception) -> ValueError:
    return ValueError(
        f"`path` must be an .npz file of plain arrays, but {str(path)!r} cannot be read ({error}). "
        "Save it with np.savez(path, x=images, cond=labels)."
    )

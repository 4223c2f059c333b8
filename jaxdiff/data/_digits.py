"""The handwritten digits that scikit-learn carries with it."""

import numpy as np

from jaxdiff.data._sources import ArraySource, array_source, require

_HELD_OUT = 0.2


def digits(split: str = "train") -> ArraySource:
    """1,797 handwritten digits, 8x8x1, ten classes; nothing is downloaded.

    Pixels 0..16 are mapped to [-1, 1] by x / 8 - 1. In every class a fifth of the images, drawn
    by one fixed permutation, is held out: 1,438 images for "train", 359 for "test". The split is
    the same on every machine and with every version of NumPy.

    Args:
        split: "train" or "test".

    Returns:
        A source of float32 (8, 8, 1) images, in the order of the original set.

    Raises:
        ValueError: for another split.

    Reference: Alpaydin, Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
    Repository, 1998, doi 10.24432/C50P49 (its test set, as in `sklearn.datasets.load_digits`).
    """
    if split not in ("train", "test"):
        raise ValueError(f"`split` must be 'train' or 'test', got {split!r}.")
    require("sklearn")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    held_out = _held_out(labels)
    chosen = held_out if split == "test" else ~held_out
    x = (images[chosen] / 8 - 1).reshape(-1, 8, 8, 1)
    labels = labels[chosen].astype(np.int32)
    return array_source(
        x, labels, num_classes=10, class_names=[str(digit) for digit in range(10)], pixels=True
    )


def _held_out(labels: np.ndarray) -> np.ndarray:
    # Raw bits are the one stream that NumPy promises never to change.
    order = np.argsort(np.random.Philox(0).random_raw(len(labels)), kind="stable")
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        held_out[members[: round(_HELD_OUT * len(members))]] = True
    return held_out

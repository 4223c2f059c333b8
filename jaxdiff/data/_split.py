"""Which examples are trained on, and which are held out."""

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from jaxdiff._checks import check_count
from jaxdiff.data._folder import FolderSource
from jaxdiff.data._records import RecordSource
from jaxdiff.data._sources import ArraySource

S = TypeVar("S", ArraySource, FolderSource, RecordSource)


def split(source: S, fraction: float = 0.1, *, seed: int = 0) -> tuple[S, S]:
    """Hold out a part of a source, drawn at random, the same part of every class.

    The split depends on the labels, the fraction and the seed alone, and is the same on every
    machine and with every version of NumPy.

    Args:
        source: examples, with or without classes.
        fraction: which part is held out, in (0, 1); of each class rounded, but one at least.
        seed: in [0, 2^32).

    Returns:
        The source to train on and the one held out, both in the order of the original.

    Raises:
        ValueError: for a fraction out of range, or where a class would be missing from a side.

    Examples:
        >>> source = data.array_source(np.zeros((20, 2)), np.arange(20) % 2)
        >>> train, held_out = data.split(source, 0.2)
        >>> len(train), np.bincount(held_out.labels).tolist()
        (16, [2, 2])
    """
    if isinstance(fraction, str) or not 0 < fraction < 1:
        raise ValueError(f"The fraction held out must lie in (0, 1), got {fraction}.")
    if not isinstance(source, ArraySource | FolderSource | RecordSource):
        raise TypeError(
            f"`source` must be a source, got {type(source).__name__}. Pass array_source(x), say."
        )
    check_count("seed", seed, least=0)
    count, labels = len(source), source.labels
    # Raw bits are the one stream that NumPy promises never to change.
    bits = np.random.Philox(np.random.SeedSequence(seed)).random_raw(count)
    order = np.argsort(bits, kind="stable")
    groups = [order] if labels is None else [order[labels[order] == c] for c in np.unique(labels)]
    held_out = np.zeros(count, bool)
    for group in groups:
        number = max(1, math.floor(fraction * len(group) + 0.5))
        if number >= len(group):
            name = "the set" if labels is None else _name(source, int(labels[group[0]]))
            raise ValueError(
                f"To hold out {fraction:g} of every class needs two examples of each at least, one "
                f"for either side, got {len(group)} of {name}. Add examples, leave the class out, "
                "or change the fraction."
            )
        held_out[group[:number]] = True
    return source.take(np.flatnonzero(~held_out)), source.take(np.flatnonzero(held_out))


def without_classes(source: S, classes: Sequence[int]) -> S:
    """A source without some classes, whose labels are as they were.

    What a model that never saw a class is trained on: the reference of unlearning.

    Args:
        source: examples with classes.
        classes: which are left out.

    Raises:
        ValueError: for a source without classes, a class that it does not have, or all of them.
    """
    labels, known = source.labels, source.num_classes or 0
    bad = [c for c in classes if not 0 <= c < known]
    if labels is None or bad:
        raise ValueError(f"Classes to leave out must lie in [0, {known}), got {list(classes)}.")
    kept = np.flatnonzero(~np.isin(labels, classes))
    if not kept.size:
        raise ValueError(f"Classes to leave out must not be all of them, got {list(classes)}.")
    return source.take(kept)


def _name(source: ArraySource | FolderSource | RecordSource, label: int) -> str:
    names = source.class_names
    return f"class {label}" if names is None else f"class {label} ({names[label]})"

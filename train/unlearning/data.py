"""What is kept and what is to be forgotten, in one source."""

import dataclasses
from typing import Any

import numpy as np

from jaxdiff.data import ArraySource
from train.core.data import Source


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Forgetting(ArraySource):
    """Kept examples, each beside one that is to be forgotten, in turn.

    Attributes:
        forget: the latter.
        labels: of both, so that samples are drawn of all classes.
    """

    forget: Any = None

    @property
    def labels(self) -> np.ndarray | None:
        """The classes of both."""
        return np.concatenate([super().labels, self.forget.labels])

    def __getitem__(self, index: int | np.ndarray) -> dict[str, Any]:
        """See `ArraySource`."""
        other = np.asarray(index) % len(self.forget)
        return {**super().__getitem__(index), "forget": self.forget[other]}


def check_forget(source: Source, forget: tuple[int, ...]) -> None:
    """Refuse classes that cannot be forgotten.

    Raises:
        ValueError: for data without classes, a class that is not there, or nothing that is left.
    """
    labels = getattr(source, "labels", None)
    if labels is None or not isinstance(source, ArraySource):
        raise ValueError(
            "`base` must be a run on data of classes that fit in memory, such as digits, mnist or "
            "cifar10."
        )
    there = np.unique(labels).tolist()
    if not forget or len(set(forget)) < len(forget) or not set(forget) <= set(there):
        raise ValueError(f"`forget` must be different classes among {there}, got {forget}.")
    if set(forget) == set(there):
        raise ValueError(f"`forget` must leave a class, got all of {there}.")


def split(source: ArraySource, forget: tuple[int, ...]) -> tuple[ArraySource, ArraySource]:
    """Kept examples, and those of the classes that are to be forgotten."""
    hit = np.isin(source.labels, forget)
    return source.take(np.flatnonzero(~hit)), source.take(np.flatnonzero(hit))


def joined(kept: ArraySource, forget: ArraySource) -> Forgetting:
    """Both in one source."""
    own = {f.name: getattr(kept, f.name) for f in dataclasses.fields(ArraySource)}
    return Forgetting(**own, forget=forget)

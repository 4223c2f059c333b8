"""What is said in place of what is to be forgotten: other conditions."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_callable, check_count
from jaxdiff._tree import is_known
from jaxdiff.conditions import as_entries, from_entries
from jaxdiff.unlearning._shared import replaced


class Override(eqx.Module):
    """Base of rules for the condition that takes the place of a forgotten one."""

    @abstractmethod
    def __call__(self, key: PRNGKeyArray, cond: PyTree, x: Array) -> PyTree:
        """The other conditions of a batch.

        Args:
            key: typed key; example i draws from its fold_in with i.
            cond: those that are to be forgotten, with leading axis B.
            x: clean examples `(B, *event)`, such as what a generator makes of them.
        """


def _as_labels(labels: Any) -> Array:
    found = jnp.asarray(labels)
    if found.ndim != 1 or not found.size or not jnp.issubdtype(found.dtype, jnp.integer):
        raise ValueError(
            f"`labels` must be classes, integers (k,), got {found.dtype} of shape {found.shape}."
        )
    if is_known(found) and (np.asarray(found) < 0).any():
        raise ValueError(f"`labels` must be classes, none below 0, got {np.asarray(found)}.")
    return found


class Always(Override):
    """One and the same condition, such as an anchor concept, or the condition of nothing.

    Args:
        cond: of one example; entries that it does not name stay as they are.
    """

    cond: PyTree

    def __check_init__(self):
        if self.cond is None:
            raise ValueError(
                "`cond` must be what is said instead, got None, which replaces nothing."
            )

    def __call__(self, key: PRNGKeyArray, cond: PyTree, x: Array) -> PyTree:
        """See `Override`."""
        del key, x
        return replaced(cond, self.cond)


def _labels(cond: PyTree) -> Array:
    found = as_entries(cond).get("label")
    known = found is not None and jnp.ndim(found) == 1
    if not known or not jnp.issubdtype(jnp.result_type(found), jnp.integer):
        got = "none" if found is None else f"{jnp.result_type(found)} of shape {jnp.shape(found)}"
        raise ValueError(
            f"`cond` must have a class for every example, integers (B,), got {got}. Say what else "
            "takes its place by unlearning.Always(cond)."
        )
    return jnp.asarray(found)


def _relabelled(cond: PyTree, labels: Array) -> PyTree:
    _labels(cond)
    entries = as_entries(cond)
    return from_entries({**entries, "label": labels.astype(jnp.result_type(entries["label"]))})


class AnyOf(Override):
    """A class drawn uniformly from a few, for every example anew.

    Args:
        labels: integers `(k,)`, those that are kept.
    """

    labels: Array = eqx.field(converter=_as_labels)

    def __call__(self, key: PRNGKeyArray, cond: PyTree, x: Array) -> PyTree:
        """See `Override`."""

        def draw(i):
            return jax.random.choice(jax.random.fold_in(key, i), self.labels)

        return _relabelled(cond, jax.vmap(draw)(jnp.arange(len(x))))


class NextClass(Override):
    """The class after: (c + 1) mod K.

    Args:
        num_classes: K.
    """

    num_classes: int = eqx.field(static=True)

    def __check_init__(self):
        check_count("num_classes", self.num_classes)

    def __call__(self, key: PRNGKeyArray, cond: PyTree, x: Array) -> PyTree:
        """See `Override`."""
        del key, x
        labels = _labels(cond)
        return _relabelled(cond, (labels + 1) % self.num_classes)


class MostAlike(Override):
    """The class that a classifier takes an example for, among those that are kept.

    Args:
        classifier: `image -> logits`.
        labels: integers `(k,)`, those that are kept.
    """

    classifier: Callable[[Array], Array]
    labels: Array = eqx.field(converter=_as_labels)

    def __check_init__(self):
        check_callable("classifier", self.classifier, "a network of images to logits")

    def __call__(self, key: PRNGKeyArray, cond: PyTree, x: Array) -> PyTree:
        """See `Override`."""
        del key
        logits = jax.vmap(self.classifier)(jax.lax.stop_gradient(x))
        return _relabelled(cond, self.labels[jnp.argmax(logits[:, self.labels], axis=1)])

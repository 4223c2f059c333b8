"""Conditions: what goes to the network, and what maps of denoisers take for themselves.

A condition is a pytree for one example. Where maps need data of their own beside the network's, a
measurement or a mask, it is a mapping of named entries:

    cond = {"label": classes, "y": measurements}        # with a leading axis, as any condition

A map takes its entries with `take` and hands the rest on; what remains goes to the network. A
condition that is no mapping is the network's `label`, and a mapping that holds `label` alone is
that label again. Null conditions replace the network's entries and leave those of maps.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxdiff._tree import is_known

LABEL = "label"


def as_entries(cond: PyTree) -> dict[str, PyTree]:
    """A condition by name: a mapping as it is, None as no entry, anything else as the label.

    Args:
        cond: of one example or of many; arrays of any shape, a mapping of them, or None.

    Returns:
        name -> entry.
    """
    if cond is None:
        return {}
    return dict(cond) if isinstance(cond, Mapping) else {LABEL: cond}


def from_entries(entries: Mapping[str, PyTree]) -> PyTree:
    """The condition of these entries: None without any, and the label itself where it is alone.

    Args:
        entries: name -> array of any shape.

    Returns:
        A condition, of which `as_entries` gives the entries again.
    """
    if not entries:
        return None
    return entries[LABEL] if set(entries) == {LABEL} else dict(entries)


def take(cond: PyTree, *names: str, by: str) -> tuple[PyTree, ...]:
    """The entries of a map of denoisers, and the condition without them.

        y, mask, cond = take(cond, "y", "mask", by="Inpainting")

    Args:
        cond: the condition of one example.
        names: the entries the map takes.
        by: who takes them, for the error.

    Returns:
        The entries in order, then what remains for the base.

    Raises:
        ValueError: if an entry is missing.
    """
    entries = as_entries(cond)
    missing = [name for name in names if name not in entries]
    if missing:
        raise ValueError(
            f"`cond` must have the entries {', '.join(map(repr, names))} for {by}, got "
            f"{sorted(entries) or 'no condition'}. Pass a mapping with one row per example, e.g. "
            f"cond={{{', '.join(f'{name!r}: ...' for name in names)}, 'label': ...}}."
        )
    rest = {name: value for name, value in entries.items() if name not in names}
    return *(entries[name] for name in names), from_entries(rest)


def check_taken(cond: PyTree, known: tuple[str, ...], by: str) -> dict[str, PyTree]:
    """The entries of the condition that reached a network, all of which it must know.

    Args:
        cond: of one example, as in `as_entries`.
        known: names that the network takes.
        by: who takes them, for the error.

    Raises:
        ValueError: naming an entry that nobody took.
    """
    entries = as_entries(cond)
    for name in entries:
        if name not in known:
            expected = ", ".join(map(repr, known)) or "nothing"
            raise ValueError(
                f"`cond` has an entry {name!r} that nobody takes: {by} takes {expected}. Remove "
                "it, or put the map that takes it around the denoiser."
            )
    return entries


def check_labels(labels: PyTree, num_classes: int) -> None:
    """Reject class labels outside [0, num_classes], the last being the null label, where known.

    Args:
        labels: integers of any shape; traced ones pass.
        num_classes: number of classes, without the null label.

    Raises:
        ValueError: naming the first of them.
    """
    for leaf in jax.tree.leaves(labels):
        if not is_known(leaf) or not jnp.issubdtype(jnp.result_type(leaf), jnp.integer):
            continue
        values = np.asarray(leaf)
        outside = values[(values < 0) | (values > num_classes)]
        if outside.size:
            raise ValueError(
                f"Labels must lie in [0, {num_classes - 1}], or be {num_classes} for none, got "
                f"{outside.flat[0]}."
            )


def check_classes(y: PyTree, num_classes: int | None) -> None:
    """Reject what is no class of a classifier, as far as it is known.

    Args:
        y: integers of any shape; traced ones pass if they are integers.
        num_classes: number of classes, or None where the classifier does not say.

    Raises:
        ValueError: for numbers that are no integers, or the first class that there is not.
    """
    for leaf in jax.tree.leaves(y):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.integer):
            raise ValueError(
                f"`y` must be an integer class for each example, got {dtype} of shape "
                f"{jnp.shape(leaf)}. Convert it by jnp.asarray(y, jnp.int32)."
            )
        if not is_known(leaf):
            continue
        values = np.asarray(leaf)
        outside = values[
            (values < 0) | (values >= (np.inf if num_classes is None else num_classes))
        ]
        if outside.size:
            most = "" if num_classes is None else f" and at most {num_classes - 1}"
            raise ValueError(
                f"`y` must be classes of the classifier, at least 0{most}, got {outside.flat[0]}."
            )


def num_classes_of(classifier: Any) -> int | None:
    """How many classes a classifier has, if it says so: by `num_classes`, or its `out_features`."""
    found = getattr(classifier, "num_classes", None)
    return getattr(classifier, "out_features", None) if found is None else found


def null_where(drop: Array, cond: PyTree, null_cond: PyTree) -> PyTree:
    """The condition, with the network's entries replaced by their null values where `drop` is.

    Args:
        drop: scalar, whether to replace.
        cond: the condition of one example.
        null_cond: what means "none": a mapping of entries of the network, or its label. Values
            are broadcast to what they replace; entries that it does not name stay.

    Raises:
        ValueError: for a null entry that the condition does not have, or a class that means none
            where the condition is a vector.
    """
    entries, nulls = as_entries(cond), as_entries(null_cond)
    if missing := sorted(set(nulls) - set(entries)):
        raise ValueError(
            f"`null_cond` replaces the entries {sorted(nulls)} of a condition, got one without "
            f"{missing}: {sorted(entries) or 'no condition'}. Pass `cond` for every example."
        )

    def choose(null, value):
        kinds = [jnp.issubdtype(jnp.result_type(leaf), jnp.integer) for leaf in (null, value)]
        if kinds == [False, True]:
            raise ValueError(
                "`null_cond` must be of integers where the condition is, got "
                f"{jnp.result_type(null)}. A class that means none is a number of its own, such as "
                "the number of classes."
            )
        if kinds == [True, False] and jnp.ndim(value) > jnp.ndim(null) and _nonzero(null):
            raise ValueError(
                f"`null_cond` must be a vector, or 0, where the condition is one, got {null} for "
                f"{jnp.result_type(value)} of shape {jnp.shape(value)}. A class became its "
                "embedding, perhaps: put the map that embeds it inside of guidance."
            )
        null = jnp.broadcast_to(jnp.asarray(null, jnp.result_type(value)), jnp.shape(value))
        return jnp.where(drop, null, value)

    for name, null in nulls.items():
        value, structure = entries[name], _structure(entries[name])
        # One null value may serve a whole pytree.
        alike = _structure(null) == structure
        by_leaf = jax.tree.leaves(null) if alike else [null] * structure.num_leaves
        chosen = map(choose, by_leaf, jax.tree.leaves(value))
        entries[name] = jax.tree.unflatten(structure, list(chosen))
    return from_entries(entries)


def _nonzero(value: Any) -> bool:
    return is_known(value) and bool(np.any(np.asarray(value) != 0))


def _structure(tree: PyTree) -> Any:
    return jax.tree.structure(tree)

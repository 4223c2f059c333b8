"""Editing projections of conditions in closed form: UCE, TIME, and the first stage of TRCE."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_flatten_with_path
from jaxtyping import Array, PyTree

from jaxdiff._checks import check_number
from jaxdiff._tree import Number
from jaxdiff.parallel import path_of


def edited_kernel(
    kernel: Array,
    erase: Array,
    into: Array,
    keep: Array | None = None,
    *,
    keep_scale: Number = 1.0,
    ridge: Number = 0.5,
) -> Array:
    """The projection that says of some inputs what it said of others, and changes least besides.

        min_W sum_i |erase_i W - into_i W_0|^2 + keep_scale sum_j |keep_j (W - W_0)|^2
              + ridge |W - W_0|^2

    As W_0 + D: (sum erase erase^T + keep_scale sum keep keep^T + ridge) D = erase^T (into - erase)
    W_0, solved by Cholesky's factors in float32 or wider. Without `keep`, what is orthogonal to all
    of `erase` is said as before; with it, what is kept exactly so if erased inputs are orthogonal
    to all of it. With ridge to 0 and independent inputs, erase W = into W_0.

    Args:
        kernel: W_0, `(inputs, outputs)`.
        erase: rows to be said otherwise, `(n, inputs)`.
        into: what they shall be taken for, `(n, inputs)`.
        keep: rows to be said as before, `(m, inputs)`, or None.
        keep_scale: factor on them, >= 0.
        ridge: on all other inputs, > 0; UCE's 0.5, TIME's 0.1. It counts beside |erase_i|^2.

    Returns:
        W, of the kernel's dtype.

    Raises:
        ValueError: for rows of another length, or unequal numbers of them.

    Reference: Gandikota, Orgad, Belinkov, Materzynska, Bau, "Unified Concept Editing in Diffusion
    Models", 2023, arXiv 2308.14761; without `keep` Orgad, Kawar, Belinkov, "Editing
    Implicit Assumptions in Text-to-Image Diffusion Models", 2023, arXiv 2303.08084; the
    first stage of Chen et al., "TRCE: Towards Reliable Malicious Concept Erasure in Text-to-Image
    Diffusion Models", 2025, arXiv 2503.07389, is this of one token of each prompt.
    """
    check_number("keep_scale", keep_scale, least=0.0)
    check_number("ridge", ridge, above=0.0)
    size = kernel.shape[0]
    rows = {"erase": erase, "into": into, **({} if keep is None else {"keep": keep})}
    for name, value in rows.items():
        if jnp.ndim(value) != 2 or jnp.shape(value)[1] != size:
            raise ValueError(
                f"`{name}` must be rows of the kernel's {size} inputs, (n, {size}), got shape "
                f"{jnp.shape(value)}."
            )
    if len(erase) != len(into):
        raise ValueError(
            f"`erase` and `into` must be as many rows, got {len(erase)} and {len(into)}."
        )
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    old, a, b = kernel.astype(wide), jnp.asarray(erase, wide), jnp.asarray(into, wide)
    gram = a.T @ a + ridge * jnp.eye(size, dtype=wide)
    if keep is not None:
        kept = jnp.asarray(keep, wide)
        gram = gram + keep_scale * kept.T @ kept
    moved = jax.scipy.linalg.solve(gram, a.T @ ((b - a) @ old), assume_a="pos")
    return (old + moved).astype(kernel.dtype)


def edit_cross_attention(
    model: PyTree, erase: Array, into: Array, keep: Array | None = None, **options: Any
) -> PyTree:
    """`edited_kernel` for the keys and values of all attention to tokens.

    Args:
        model: a network, or anything that holds one.
        erase: tokens' vectors, `(n, token_size)`, as the network's `words` or an encoder make them.
        into: likewise.
        keep: likewise, or None.
        options: of `edited_kernel`.

    Returns:
        The model with these kernels; everything else bit for bit.

    Raises:
        ValueError: for a model without attention to tokens.
    """
    leaves, structure = tree_flatten_with_path(model)
    edited = ("cross/k/kernel", "cross/v/kernel")
    hits = [path_of(path).endswith(edited) for path, _ in leaves]
    if not any(hits):
        raise ValueError(
            "`model` must have attention to tokens, got none in it. Make the network with "
            "`token_size`, or edit its classes: `edit_classes`."
        )
    new = [
        edited_kernel(leaf, erase, into, keep, **options) if hit else leaf
        for (_, leaf), hit in zip(leaves, hits, strict=True)
    ]
    return jax.tree.unflatten(structure, new)


def edit_classes(model: PyTree, forget: Any, into: Any) -> PyTree:
    """The table of classes with some rows in place of others.

    Exact, without side effects on other classes, and **nothing is forgotten**: the network still
    makes the class of its old row, which relearning or a search finds at once. It is the baseline
    of every method that is judged by a class's accuracy alone.

    Args:
        model: a network with a table of classes, or anything that holds one.
        forget: classes, integers `(n,)` or one.
        into: the classes whose rows they get, likewise.

    Returns:
        The model with this table; everything else bit for bit.

    Raises:
        ValueError: for a model without a table of classes.
    """
    leaves, structure = tree_flatten_with_path(model)
    hits = [path_of(path).endswith("classes/embedding") for path, _ in leaves]
    # The last row of a table means none.
    tables = [leaf for (_, leaf), hit in zip(leaves, hits, strict=True) if hit]
    count = min((len(table) - 1 for table in tables), default=0)
    for name, value in (("forget", forget), ("into", into)):
        found = np.atleast_1d(np.asarray(value))
        whole = np.issubdtype(found.dtype, np.integer) and found.size
        if any(hits) and (not whole or found.min() < 0 or found.max() >= count):
            raise ValueError(f"`{name}` must be classes in [0, {count}), got {value}.")
    if len(np.unique(forget)) < np.size(forget):
        raise ValueError(f"`forget` must be different classes, got {forget}.")
    if not any(hits):
        raise ValueError(
            "`model` must have a table of classes, got none in it. Make the network with "
            "`num_classes`."
        )
    new = [
        leaf.at[jnp.asarray(forget)].set(leaf[jnp.asarray(into)]) if hit else leaf
        for (_, leaf), hit in zip(leaves, hits, strict=True)
    ]
    return jax.tree.unflatten(structure, new)


def parameter_mask(part: PyTree, *patterns: str) -> PyTree:
    """Which weights lie at paths with one of these words, as `Player(mask=...)` takes it.

    ESD-x is `parameter_mask(network, "cross")`, its strict form "cross/k/", "cross/v/"; ESD-u the
    opposite of the first: `jax.tree.map(operator.not_, mask)`.

    Args:
        part: what learns, usually a network.
        patterns: parts of paths, such as "blocks/0/cross/k/kernel".

    Returns:
        Booleans, one for each array.

    Raises:
        ValueError: where nothing has such a path.
    """
    mask = jax.tree_util.tree_map_with_path(
        lambda path, _: any(word in f"{path_of(path)}/" for word in patterns),
        eqx.filter(part, eqx.is_inexact_array),
    )
    if not any(jax.tree.leaves(mask)):
        paths = [path_of(path) for path, _ in tree_flatten_with_path(part)[0]]
        raise ValueError(
            f"`patterns` must be found in the paths of weights, got {patterns}, which are in none "
            f"of {paths[:20]}."
        )
    return mask

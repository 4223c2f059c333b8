"""One layer, one gradient: the edit that a line search ends."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.tree_util import tree_flatten_with_path
from jaxtyping import Array, PyTree

from jaxdiff._checks import check_callable, check_count, check_number
from jaxdiff._tree import Number
from jaxdiff.parallel import path_of


class LayerScore(eqx.Module):
    """What two gradients say of a layer.

    Attributes:
        importance: |g_f| / |theta|, how much forgetting depends on it.
        alignment: |cos(g_f, g_r)|, how much keeping does in the same direction.
    """

    importance: Array
    alignment: Array


def _by_layer(tree: PyTree, layers: Callable[[str], str]) -> dict[str, list[Array]]:
    groups: dict[str, list[Array]] = {}
    for path, leaf in tree_flatten_with_path(eqx.filter(tree, eqx.is_inexact_array))[0]:
        groups.setdefault(layers(path_of(path)), []).append(leaf)
    return groups


def _flat(leaves: list[Array]) -> Array:
    return jnp.concatenate([jnp.ravel(leaf).astype(jnp.float32) for leaf in leaves])


def _layer(path: str) -> str:
    return path.rpartition("/")[0]


def score_layers(
    model: PyTree,
    forget: PyTree,
    retain: PyTree,
    layers: Callable[[str], str] = _layer,
) -> dict[str, LayerScore]:
    """Importance for forgetting and alignment with keeping, of every layer.

    Args:
        model: the weights.
        forget: gradient of the loss of what is forgotten, as of `equinox.filter_grad`.
        retain: gradient of the loss of what is kept.
        layers: which layer a path of a weight belongs to; by default all but its last name.

    Returns:
        name -> score, in the order of the model.
    """
    groups = (_by_layer(tree, layers) for tree in (model, forget, retain))
    weights, of_forget, of_retain = groups
    found = {}
    for name, leaves in weights.items():
        w, f, r = _flat(leaves), _flat(of_forget[name]), _flat(of_retain[name])
        size = jnp.linalg.norm(f) * jnp.linalg.norm(r)
        cosine = jnp.abs(f @ r) / jnp.where(size > 0, size, 1)
        length = jnp.linalg.norm(w)
        found[name] = LayerScore(jnp.linalg.norm(f) / jnp.where(length > 0, length, 1), cosine)
    return found


def best_layers(scores: dict[str, LayerScore]) -> Sequence[str]:
    """Those that no other layer betters in both: more important, and less aligned.

    Args:
        scores: of `score_layers`.

    Returns:
        Names in the order of the model; the published choice is the last.
    """
    values = {n: (float(s.importance), -float(s.alignment)) for n, s in scores.items()}

    def beaten(name):
        own = values[name]
        return any(
            other != own and other[0] >= own[0] and other[1] >= own[1]
            for key, other in values.items()
            if key != name
        )

    return [name for name in values if not beaten(name)]


def move_layer(
    model: PyTree,
    gradient: PyTree,
    layer: str,
    step: Number,
    layers: Callable[[str], str] = _layer,
) -> PyTree:
    """The model with one layer moved along a gradient, theta + step g; the rest bit for bit.

    Args:
        model: the weights.
        gradient: of the loss of what is forgotten, which is to rise, as of `equinox.filter_grad`.
        layer: its name.
        step: > 0 for ascent.
        layers: as of `score_layers`.

    Raises:
        ValueError: for a layer that there is not.
    """
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    names = {layers(path_of(path)) for path, _ in tree_flatten_with_path(arrays)[0]}
    if layer not in names:
        raise ValueError(f"`layer` must be one of {sorted(names)[:20]}, got {layer!r}.")
    moved = jax.tree_util.tree_map_with_path(
        lambda path, w, g: (w + step * g).astype(w.dtype) if layers(path_of(path)) == layer else w,
        arrays,
        gradient,
    )
    return eqx.combine(moved, rest)


def search_step(
    forgets: Callable[[float], float],
    start: float,
    *,
    most: float = 0.0,
    rounds: int = 10,
    growth: int = 10,
) -> float:
    """The least step at which enough is forgotten: doubled until it is, then halved between.

    Args:
        forgets: how much is left at a step, such as the accuracy on what is forgotten; it falls.
        start: the first step tried, > 0; the published |theta| / (10 |g|).
        most: what may be left.
        rounds: of bisection.
        growth: doublings at most.

    Returns:
        The step: enough is forgotten at it, or it is the largest that was tried.

    Raises:
        ValueError: for a start that is not positive.

    Reference: Cai, Tan, Asif, "Targeted Unlearning with Single Layer Unlearning Gradient", 2024,
    arXiv 2407.11867, section 3.
    """
    check_callable("forgets", forgets, "lambda step: accuracy_of(move_layer(..., step))")
    check_number("start", start, above=0.0)
    check_count("rounds", rounds, least=0)
    check_count("growth", growth, least=0)
    low, high = 0.0, float(start)
    for n in range(growth + 1):
        if forgets(high) <= most:
            break
        if n == growth:
            return high
        low, high = high, 2 * high
    for _ in range(rounds):
        middle = (low + high) / 2
        low, high = (low, middle) if forgets(middle) <= most else (middle, high)
    return high

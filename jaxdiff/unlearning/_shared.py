"""What the losses of unlearning share: what is to be forgotten, and errors at noisy states."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_callable, check_number
from jaxdiff._tree import Number, number
from jaxdiff.conditions import null_where
from jaxdiff.denoiser import Denoiser
from jaxdiff.losses import Weighting
from jaxdiff.losses._batch import check_batch, wide
from jaxdiff.losses._frozen import said_by

FORGET = "forget"


def forget_of(batch: Any) -> dict[str, Any]:
    """The examples of a batch that are to be forgotten.

    Args:
        batch: `{"x": ..., "cond": ..., "forget": {"x": (F, *event), "cond": leading axis F}}`.

    Returns:
        The inner batch.

    Raises:
        ValueError: without one, or where it has no conditions.
        TypeError: if it is no batch.
    """
    if not isinstance(batch, Mapping) or FORGET not in batch:
        got = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"`batch` must have the examples to be forgotten as {FORGET!r}, a batch "
            f'{{"x": ..., "cond": ...}} of their own, got {got}.'
        )
    rows = batch[FORGET]
    check_batch(rows)
    if rows.get("cond") is None:
        raise ValueError(
            "`batch['forget']` must have conditions, by which a model is asked for what it is to "
            "forget, got none."
        )
    return rows


def beside_anchors(batch: Any) -> dict[str, Any]:
    """The examples to be forgotten, where each has one of an anchor beside it.

    Args:
        batch: as of `forget_of`, whose own examples are the anchors.

    Raises:
        ValueError: for anchors without conditions, or another number of them.
    """
    check_batch(batch)
    rows = forget_of(batch)
    if batch.get("cond") is None or len(rows["x"]) != len(batch["x"]):
        raise ValueError(
            "`batch` must have conditions, and as many examples as there are to be forgotten, "
            f"got {len(batch['x'])} with {'' if 'cond' in batch else 'no '}conditions, and "
            f"{len(rows['x'])}."
        )
    return rows


def check_inner(*losses: Any) -> None:
    """Reject losses with a rule for gradients, of which another loss would see the sum alone.

    Raises:
        TypeError: for one inside another.
    """
    for loss in losses:
        if hasattr(loss, "gradient"):
            raise TypeError(
                f"{type(loss).__name__} combines gradients, and must be outermost, got it inside "
                "another loss. Turn them: it takes the others as its `forget` and `retain`."
            )


class OnForgotten(eqx.Module):
    """Another loss, of the examples that are to be forgotten.

    Args:
        loss: any `loss(model, key, batch, frozen)`.
        scale: factor on it.
    """

    loss: Any
    scale: Number = number(1.0)

    def __check_init__(self):
        check_callable("loss", self.loss, "losses.DenoisingLoss()")
        check_number("scale", self.scale)
        check_inner(self.loss)

    def __call__(
        self, model: PyTree, key: PRNGKeyArray, batch: dict[str, Any], frozen: Any
    ) -> tuple[Array, dict[str, Array]]:
        """The loss of `batch["forget"]`; see `Player`."""
        loss, metrics = self.loss(model, key, forget_of(batch), frozen)
        return self.scale * loss, metrics


def replaced(cond: PyTree, other: PyTree) -> PyTree:
    """Conditions with leading axis B, with the entries that another one names in their place."""
    return jax.vmap(lambda one: null_where(jnp.bool_(True), one, other))(cond)


def asked(
    model: Denoiser, x: Array, t: Array, cond: PyTree, key: PRNGKeyArray | None = None
) -> Array:
    """What a denoiser says of a batch, `(B, *event)`.

    Args:
        model: the denoiser; without a key one whose noise is that which its x0 implies.
        x: states, `(B, *event)`.
        t: their times, `(B,)`.
        cond: leading axis B, or None.
        key: of the denoiser's own randomness; example i has its fold_in with i. None for none.
    """
    if key is None:
        return jax.vmap(lambda x, t, cond: said_by(model, x, t, cond))(x, t, cond)

    def one(i, x, t, cond):
        return model(x, t, cond, key=jax.random.fold_in(key, i))

    return jax.vmap(one)(jnp.arange(len(x)), x, t, cond)


class Seen(eqx.Module):
    """Noisy states of a batch, at which models are asked.

    Attributes:
        x: `(B, *event)`, which no gradient passes.
        t: `(B,)`.
        density: of the times, `(B,)`; 1 where they are on a grid.
    """

    x: Array
    t: Array
    density: Array

    def error(self, weighting: Weighting, model: Denoiser, difference: Array) -> Array:
        """Weighted mean squares of differences in x0 `(B, *event)`, `(B,)`."""
        errors = jnp.mean(wide(difference).reshape(len(difference), -1) ** 2, axis=1)

        def factor(t, density):
            return weighting(model.process, t, density)

        return jax.vmap(factor)(self.t, self.density) * errors

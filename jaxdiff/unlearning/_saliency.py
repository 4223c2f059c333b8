"""Saliency unlearning: other labels, learned by the weights that what is forgotten depends on."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_kind, check_number
from jaxdiff._tree import Number, is_known
from jaxdiff.denoiser import Denoiser, check_denoiser
from jaxdiff.losses import TimeLaw, Uniform, UniformTime, Weighting
from jaxdiff.losses._batch import wide
from jaxdiff.losses._frozen import still
from jaxdiff.unlearning._overrides import Override
from jaxdiff.unlearning._shared import asked, forget_of
from jaxdiff.unlearning._states import NoisedExamples


class Relabelled(eqx.Module):
    """At noisy examples of what is forgotten, the model says what it says of another condition.

        mean of weight(t) |D(x_t, t, f) - stop_gradient(D(x_t, t, o))|^2

    x_t noised examples of `batch["forget"]`, o from `override`. Two passes of the student.

    **Fixed point**: D(., f) = D(., o) on examples of f, for a table the answer to o that there was.
    A network's answer to o drifts meanwhile; add a loss of what is kept, `Both(Relabelled(...),
    losses.DenoisingLoss(), 1.0)`.

    Args:
        override: the other condition, such as `NextClass(10)`.
        weighting: factor on errors in x0.
        time_law: law of the time.

    Raises:
        TypeError: when called, for a model that is no denoiser.
        ValueError: when called, for a batch without "forget".

    Reference: Fan, Liu, Zhang, Wong, Wei, Liu, "SalUn: Empowering Machine Unlearning via
    Gradient-based Weight Saliency in Both Image Classification and Generation", 2023, arXiv
    2310.12508. There kept examples weigh 1 and this term, for DDPM, 1000.
    """

    override: Override | Any
    weighting: Weighting = Uniform()
    time_law: TimeLaw = UniformTime()

    def __check_init__(self):
        check_kind("weighting", self.weighting, Weighting, "losses.Uniform()")
        check_kind("time_law", self.time_law, TimeLaw, "losses.UniformTime()")

    def __call__(
        self, model: Denoiser, key: PRNGKeyArray, batch: dict[str, Any], frozen: Any
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            model: the denoiser that forgets.
            key: typed key; example i draws from its fold_in with i.
            batch: with "forget".
            frozen: not used.

        Returns:
            The scalar loss, and no metrics.
        """
        del frozen
        check_denoiser(model)
        rows = forget_of(batch)
        state_key, override_key, own_key = jax.random.split(key, 3)
        seen = NoisedExamples(self.time_law)(state_key, rows, model)
        other = self.override(override_key, rows["cond"], rows["x"])
        goal = asked(still(model), seen.x, seen.t, other, own_key)
        answer = asked(model, seen.x, seen.t, rows["cond"], own_key)
        return seen.error(self.weighting, model, answer - goal).mean(), {}


def saliency_mask(gradient: PyTree, share: Number = 0.5) -> PyTree:
    """Which entries of the weights a loss depends on most: the largest of a gradient, in size.

    Args:
        gradient: of the loss of what is to be forgotten at the weights before any step, as of
            `equinox.filter_grad`; of the part of the model that learns.
        share: of all entries together, in (0, 1]; those of no gradient are none of it.

    Returns:
        Booleans like the gradient's arrays, as `Player(mask=...)` takes them.

    Raises:
        ValueError: for a share outside (0, 1], or a gradient that is not finite.

    Reference: Fan, Liu, Zhang, Wong, Wei, Liu, "SalUn: Empowering Machine Unlearning via
    Gradient-based Weight Saliency in Both Image Classification and Generation", 2023, arXiv
    2310.12508.
    """
    check_number("share", share, above=0.0, most=1.0)
    leaves = jax.tree.leaves(gradient)
    if any(is_known(leaf) and not np.all(np.isfinite(leaf)) for leaf in leaves):
        raise ValueError("`gradient` must be finite, got NaN or infinity in it.")
    sizes = jnp.abs(jnp.concatenate([jnp.ravel(wide(leaf)) for leaf in leaves]))
    least = jnp.sort(sizes)[len(sizes) - jnp.ceil(share * len(sizes)).astype(jnp.int32)]
    return jax.tree.map(
        lambda leaf: (jnp.abs(wide(leaf)).astype(sizes.dtype) >= least) & (leaf != 0), gradient
    )

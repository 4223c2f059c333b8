"""Events of one's own, with the covariance that the denoiser's Jacobian gives."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_callable, check_number
from jaxdiff._tree import Number, number
from jaxdiff.conditions import take
from jaxdiff.denoiser import Denoiser, DenoiserMap, Estimate
from jaxdiff.guidance._scale import Scale, check_scale, scale_at


class EventGuidance(DenoiserMap):
    """E[x0 | x_t, event], with N(D, V) for p(x0 | x_t), V = sigma^2 / alpha J, J = dD / dx.

    Kind 2, with data of the example: the entry "y" of its condition, `(k,)`. With C the function,
    A = dC(D(x)) / dx and Q = C' V C'^T, both at D:

        equal:  D + sigma^2 / alpha A^T (Q + std^2 I)^-1 (y - C(D)),
        above:  D + sigma^2 / alpha sum_i A_i r(z_i) / sqrt(q_i),  z_i = (C_i(D) - y_i) / sqrt(q_i),

    q_i = Q_ii + std^2, r the normal density over its integral: numbers equal to y up to noise, or
    each above its own. Exact for Gaussian data and linear C, one constraint of "above"; of others
    to first order in C. k backward passes of the network, in which Q is taken for a constant.

    Args:
        base: any denoiser.
        function: C, `x0 -> (k,)`, a pytree.
        above: whether y is to be exceeded, and not met.
        std: standard deviation of the noise on C(x0); 0 asks for y itself.
        scale: 1 is Bayes' rule.

    Raises:
        ValueError: when called, without "y", or for a y of another shape than the function's.

    Reference: Finzi, Boral, Wilson, Sha, Zepeda-Nunez, "User-defined Event Sampling and Uncertainty
    Quantification in Diffusion Models for Physical Dynamical Systems", 2023, arXiv 2306.07526;
    the covariance in Boys, Girolami, Pidstrigach, Reich, Mosca, Akyildiz, "Tweedie
    Moment Projected Diffusions For Inverse Problems", 2023, arXiv 2310.06721.
    """

    base: Denoiser
    function: Callable[[Array], Array]
    above: bool = eqx.field(static=True, default=False)
    std: Number = number(0.0)
    scale: Scale = number(1.0)

    takes: ClassVar[tuple[str, ...]] = ("y",)

    def __check_init__(self):
        check_callable("function", self.function, "jax.tree_util.Partial(function, weights)")
        check_number("std", self.std, least=0.0)
        check_scale(self.scale)

    @property
    def needs_signal(self) -> bool:
        """True: the slope through the denoiser is divided by alpha."""
        return True

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        y, rest = take(cond, "y", by="EventGuidance")

        def through(x):
            found = self.base.estimate(x, t, rest, key=key)
            return found.x0, found

        _, pull, found = jax.vjp(through, x, has_aux=True)
        value, own_pull = jax.vjp(self.function, found.x0)
        if value.ndim != 1 or jnp.shape(y) != value.shape:
            raise ValueError(
                f"`y` must have the shape of what `function` returns, (k,), got {jnp.shape(y)} "
                f"and {value.shape}."
            )
        (normals,) = jax.vmap(own_pull)(jnp.eye(len(value), dtype=value.dtype))
        (slopes,) = jax.vmap(pull)(normals.astype(found.x0.dtype))
        process = self.process
        factor = process.sigma(t) ** 2 / process.alpha(t)
        flat = slopes.reshape(len(value), -1)
        covariance = factor * flat @ normals.reshape(len(value), -1).T
        if self.above:
            spread = jnp.sqrt(jnp.diag(covariance) + self.std**2)
            z = (value - y) / spread
            # The density over its integral, in the tail, too.
            push = jnp.exp(-(z**2) / 2 - 0.5 * jnp.log(2 * jnp.pi) - log_ndtr(z)) / spread
        else:
            total = covariance + self.std**2 * jnp.eye(len(value))
            push = jnp.linalg.solve(total, y - value)
        moved = scale_at(self.scale, process, t) * factor * jnp.tensordot(push, slopes, 1)
        return found.moved(process, t, found.x0 + moved)

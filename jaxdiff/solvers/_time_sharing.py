"""Time sharing: one noise label for a whole interval of small times."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff._checks import check_count, check_number
from jaxdiff._tree import Number, number
from jaxdiff.denoiser import Preconditioning, TimeLabel
from jaxdiff.processes import GaussianProcess


class SharedTimes(Preconditioning):
    """E-TSDM: below a threshold, the network is told only which interval its time is in.

    label(t) = base.label(f(t)) with f(t) = t for t >= threshold, and else
    f(t) = max(t_min, threshold floor(n t / threshold) / n), the left end of one of n equal
    intervals of [0, threshold).

    The derivative of eps_hat in t is unbounded towards t = 0. A label that is constant there
    takes the network's own share of it away. Everything else keeps the true t: the input scale,
    and alpha and sigma in the loss, the prediction and the solver. As the preconditioning of a
    denoiser it acts in training and in sampling alike, which it has to.

    Args:
        base: the preconditioning whose label is shared.
        threshold: end of the shared range, in the process's time, > 0. The paper's is timestep
            100 of 1000, t = 0.1; for a process on another scale, such as `EDM`, whose time is
            its noise level, convert it.
        num_intervals: n >= 1; the paper's is 5.

    Raises:
        ValueError: if `num_intervals` is below one.

    Reference: Yang, Feng, Zhang, Shen, Zhu, Huang, Zhang, Liu, Zhao, Zhou, Cheng, "Eliminating
    Lipschitz Singularities in Diffusion Models", 2023, arXiv 2306.11251, section 4. The paper
    counts timesteps from 0; here the first interval's label is that of t_min, where labels such
    as log(sigma) are still finite, and the edges of a `Tabulated` process lie one timestep
    lower.
    """

    base: Preconditioning = TimeLabel()
    threshold: Number = number(0.1)
    num_intervals: int = eqx.field(static=True, default=5)

    def __check_init__(self):
        check_number("threshold", self.threshold, above=0.0)
        remedy = "Use `base` alone to share nothing."
        check_count("num_intervals", self.num_intervals, instead=remedy)

    def shared_time(self, process: GaussianProcess, t: Array) -> Array:
        """f(t), elementwise: the time that the network is told."""
        edges = jnp.linspace(0.0, self.threshold, self.num_intervals + 1, dtype=t.dtype)
        # Looked up rather than computed by floor(n t / threshold), whose rounding may put an
        # edge into the interval below.
        left = edges[jnp.searchsorted(edges, t, side="right") - 1]
        shared = jnp.maximum(left, process.t_min).astype(t.dtype)
        return jnp.where(t < edges[-1], shared, t)

    def scale(self, process: GaussianProcess, t: Array) -> Array:
        """The base's scale at the true t."""
        return self.base.scale(process, t)

    def label(self, process: GaussianProcess, t: Array) -> Array:
        """The base's label at f(t)."""
        return self.base.label(process, self.shared_time(process, t))

"""A process through any table of alphas_cumprod."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from jaxdiff._tree import root
from jaxdiff.processes._base import GaussianProcess


class Tabulated(GaussianProcess):
    """The process of a discrete schedule, continuous in between.

    The table's entry i (of T) sits at t = (i + 1) / T, and t = 0 is clean data. Between
    nodes log alpha is linear in t, that is, beta(t) is piecewise constant: alpha and sigma
    at the nodes are exactly the discrete schedule's.

    Args:
        alphas_cumprod: `(T,)`, strictly decreasing in (0, 1): the cumulative product of
            1 - beta_i.

    Raises:
        ValueError: if the table is not one-dimensional, strictly decreasing and inside (0, 1).

    Reference:
        Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020, arXiv 2006.11239;
        the interpolation is that of Lu et al., "DPM-Solver", 2022, arXiv 2206.00927,
        appendix D.4.
    """

    log_alphas_cumprod: Array  # (T + 1,), beginning with 0 at t = 0

    def __init__(self, alphas_cumprod: ArrayLike):
        table = np.asarray(alphas_cumprod, dtype=np.float64)
        inside = table.ndim == 1 and table.size and table[0] < 1 and table[-1] > 0
        if not inside or not np.all(np.diff(table) < 0):
            raise ValueError(
                "`alphas_cumprod` must be a strictly decreasing one-dimensional table inside "
                f"(0, 1), got shape {table.shape}, "
                f"min={table.min(initial=np.inf):g}, max={table.max(initial=-np.inf):g}. A table "
                "that ends in exactly 0 (zero terminal SNR) needs its last entry raised, e.g. to "
                "2**-24."
            )
        self.log_alphas_cumprod = jnp.asarray(np.log(np.append(1.0, table)))

    @property
    def arguments(self) -> dict[str, Array]:
        """What another one would be made with."""
        return {"alphas_cumprod": jnp.exp(self.log_alphas_cumprod[1:])}

    @property
    def num_timesteps(self) -> int:
        """T, the length of the table."""
        return self.log_alphas_cumprod.shape[0] - 1

    @property
    def t_min(self) -> float:
        """The first entry of the table, t = 1 / T."""
        return 1 / self.num_timesteps

    @property
    def t_max(self) -> float:
        """The last entry of the table, t = 1."""
        return 1.0

    def _nodes(self, like: Array) -> tuple[Array, Array]:
        dtype = jnp.result_type(like, float)
        times = jnp.arange(self.num_timesteps + 1, dtype=dtype) / self.num_timesteps
        return times, self.log_alphas_cumprod.astype(dtype)

    def _log_alpha_squared(self, t: Array) -> Array:
        return jnp.interp(t, *self._nodes(t))

    def alpha(self, t: Array) -> Array:
        """sqrt of the interpolated table."""
        return jnp.exp(0.5 * self._log_alpha_squared(t))

    def sigma(self, t: Array) -> Array:
        """sqrt(1 - alpha^2)."""
        return root(-jnp.expm1(self._log_alpha_squared(t)))

    def log_snr(self, t: Array) -> Array:
        """log(alpha^2 / (1 - alpha^2))."""
        log_alpha_squared = self._log_alpha_squared(t)
        return log_alpha_squared - jnp.log(-jnp.expm1(log_alpha_squared))

    def unbounded_time(self, log_snr: Array) -> Array:
        """Inverse of `log_snr`: log alpha^2 = -softplus(-log_snr), then the inverse table."""
        log_snr = jnp.asarray(log_snr)
        times, table = self._nodes(log_snr)
        return jnp.interp(jax.nn.softplus(-log_snr), -table, times)

"""The forward process: how data become noise."""

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PRNGKeyArray

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, as_float_array, bounded, derivative, root


class Process(eqx.Module):
    """What every forward process has: a range of times, noise, and a prior that data end in.

    Time grows with noise. A process is safe in single precision on `[t_min, t_max]`, where it is
    trained, and defined on all of `[0, horizon]`, so that a sampler may start and end there.
    """

    horizon: ClassVar[float] = 1.0

    if TYPE_CHECKING:  # fields or properties

        @property
        def t_min(self) -> Number:
            """The first time that is safe in single precision."""
            ...

        @property
        def t_max(self) -> Number:
            """The last such time."""
            ...

    else:
        t_min: eqx.AbstractVar[Number]
        t_max: eqx.AbstractVar[Number]

    def __check_init__(self):
        check_number("t_min", self.t_min, least=0.0)
        check_number("t_max", self.t_max, most=self.horizon)
        if isinstance(self.t_min, float):
            check_number("t_max", self.t_max, above=self.t_min)

    @abstractmethod
    def noise(self, key: PRNGKeyArray, x0: Array, t: Array) -> Array:
        """A draw of x_t given the clean example x0 `(*event)`; t scalar."""

    @abstractmethod
    def prior(self, key: PRNGKeyArray, shape: tuple[int, ...], t: Array, dtype: jnp.dtype) -> Array:
        """One draw `(*event)` of the law that sampling starts from, at a time t of much noise."""

    @abstractmethod
    def prior_log_prob(self, x: Array, t: Array) -> Array:
        """log density of the prior at one example `(*event)`, a scalar in nats."""

    def times(self, num_steps: int, t_end: Number = 0.0) -> Array:
        """The grid customary for this process: uniform in t, from t_max down to `t_end`.

        Args:
            num_steps: number of steps, >= 1.
            t_end: last time.

        Returns:
            Decreasing times, `(num_steps + 1,)`.
        """
        return jnp.linspace(self.t_max, t_end, num_steps + 1)

    def unit_time(self, t: Array) -> Array:
        """t over the horizon, in [0, 1]: the time of what knows no process, such as schedules.

        A process whose time has no end says what stands for it.
        """
        return t / self.horizon


class GaussianProcess(Process):
    """A Gaussian process of noising, x_t = alpha(t) x0 + sigma(t) eps with eps ~ N(0, I).

    A process defines `alpha`, `sigma` and the range `[t_min, t_max]` on which its log-SNR, drift
    and diffusion are finite in float32; the rest is derived. `log_snr` must decrease strictly.

    The equivalent SDE is dx = f(t) x dt + g(t) dw with f = `drift` and g = `diffusion`:
    f = d log alpha / dt and g^2 = -sigma^2 d log_snr / dt.

    All methods are elementwise over `t`.

    Reference:
        Kingma, Salimans, Poole, Ho, "Variational Diffusion Models", 2021, arXiv 2107.00630,
        section 3.1; Song et al., "Score-Based Generative Modeling through Stochastic
        Differential Equations", 2021, arXiv 2011.13456, section 3.
    """

    @abstractmethod
    def alpha(self, t: Array) -> Array:
        """Signal scale alpha(t)."""

    @abstractmethod
    def sigma(self, t: Array) -> Array:
        """Noise standard deviation sigma(t)."""

    def log_snr(self, t: Array) -> Array:
        """log(alpha^2 / sigma^2); twice DPM-Solver's lambda."""
        return 2 * (jnp.log(self.alpha(t)) - jnp.log(self.sigma(t)))

    def time(self, log_snr: ArrayLike) -> Array:
        """The t in [t_min, t_max] of a log-SNR: the inverse of `log_snr`.

        Values outside the range of `log_snr`, infinite ones too, return the nearer end.
        """
        log_snr = as_float_array(log_snr)
        low, high = self._range(log_snr.dtype)
        # Not `clip`, which halves derivatives at the ends.
        inside = bounded(log_snr, self.log_snr(high), self.log_snr(low))
        return bounded(self.unbounded_time(inside), low, high)

    def unbounded_time(self, log_snr: Array) -> Array:
        """`time` without its range: where the formulas go on beyond it, so does the inverse.

        For noise levels between two times that may lie outside [t_min, t_max]. Here by bisection
        on [t_min, t_max], to the resolution of the dtype, with one closing Newton step that gives
        the exact derivative; a process with a closed form has that instead.
        """
        log_snr = as_float_array(log_snr)
        low = jnp.full_like(log_snr, self.t_min)
        high = jnp.full_like(log_snr, self.t_max)

        def halve(_, bounds):
            low, high = bounds
            middle = (low + high) / 2
            noisier = self.log_snr(middle) < log_snr
            return jnp.where(noisier, low, middle), jnp.where(noisier, middle, high)

        low, high = jax.lax.fori_loop(0, jnp.finfo(low.dtype).nmant + 12, halve, (low, high))
        t = jax.lax.stop_gradient((low + high) / 2)
        newton = t - (self.log_snr(t) - log_snr) / derivative(self.log_snr, t)
        return bounded(newton, *self._range(log_snr.dtype))

    def _range(self, dtype: jnp.dtype) -> tuple[Array, Array]:
        return jnp.asarray(self.t_min, dtype), jnp.asarray(self.t_max, dtype)

    def drift(self, t: Array) -> Array:
        """f(t) = d log alpha / dt of the SDE dx = f x dt + g dw."""
        return derivative(self.alpha, t) / self.alpha(t)

    def diffusion(self, t: Array) -> Array:
        """g(t) >= 0 of the SDE dx = f x dt + g dw: g^2 = -sigma^2 d log_snr / dt."""
        return self.sigma(t) * jnp.sqrt(-derivative(self.log_snr, t))

    def marginal(self, x0: Array, eps: Array, t: Array) -> Array:
        """x_t = alpha(t) x0 + sigma(t) eps for one example: x0 and eps `(*event)`, t scalar."""
        return self.alpha(t) * x0 + self.sigma(t) * eps

    def renoise(self, x: Array, eps: Array, s: Array, t: Array) -> Array:
        """x_t from x_s, with fresh noise: the forward process from s on to the noisier t.

            x_t = r x_s + sqrt(sigma_t^2 - (r sigma_s)^2) eps,    r = alpha_t / alpha_s

        Args:
            x: the state at s, `(*event)`.
            eps: standard normal noise, `(*event)`.
            s: scalar time of x.
            t: scalar time to go to, t >= s.

        Returns:
            The state at t, `(*event)`.
        """
        ratio = self.alpha(t) / self.alpha(s)
        return ratio * x + self.added_std(s, t) * eps

    def added_std(self, s: Array, t: Array) -> Array:
        """Standard deviation of the noise that the forward process adds from s to t >= s."""
        ratio = self.alpha(t) / self.alpha(s)
        return root(self.sigma(t) ** 2 - (ratio * self.sigma(s)) ** 2)

    def posterior(self, x0: Array, eps: Array, t: Array, s: Array) -> tuple[Array, Array]:
        """Mean `(*event)` and standard deviation (scalar) of q(x_s | x_t, x0), s < t.

            mean = alpha_s x0 + sigma_s e^-h eps,    std = sigma_s sqrt(1 - e^-2h)

        with e^-h = alpha_t sigma_s / (alpha_s sigma_t); std^2 is DDPM's beta-tilde, and 0 where
        sigma_s is.

        Args:
            x0: the clean example, or an estimate of it, `(*event)`.
            eps: the noise in x_t, `(*event)`.
            t: scalar time of x_t.
            s: scalar target time.

        Reference: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020,
        arXiv 2006.11239, equations 6 and 7.
        """
        sigma = self.sigma(s)
        return self.alpha(s) * x0 + sigma * self._decay(t, s) * eps, self.posterior_std(t, s)

    def posterior_std(self, t: Array, s: Array) -> Array:
        """The standard deviation of `posterior`: DDPM's sqrt(beta-tilde)."""
        return self.sigma(s) * jnp.sqrt(1 - self._decay(t, s) ** 2)

    def _decay(self, t: Array, s: Array) -> Array:
        """e^-h with h the step's length in log(alpha / sigma)."""
        return self.alpha(t) * self.sigma(s) / (self.alpha(s) * self.sigma(t))

    def noise(self, key: PRNGKeyArray, x0: Array, t: Array) -> Array:
        """See `Process`: `marginal` of standard normal noise."""
        return self.marginal(x0, jax.random.normal(key, x0.shape, x0.dtype), t).astype(x0.dtype)

    def prior(self, key: PRNGKeyArray, shape: tuple[int, ...], t: Array, dtype: jnp.dtype) -> Array:
        """See `Process`: N(0, sigma(t)^2 I)."""
        return (self.sigma(t) * jax.random.normal(key, shape, dtype)).astype(dtype)

    def prior_log_prob(self, x: Array, t: Array) -> Array:
        """See `Process`: log N(x; 0, sigma(t)^2 I)."""
        return jax.scipy.stats.norm.logpdf(x, scale=self.sigma(t)).sum()

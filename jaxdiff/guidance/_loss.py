"""Guidance by losses of clean examples, as maps of denoisers."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_callable, check_count, check_number
from jaxdiff._tree import Number, number
from jaxdiff.conditions import take
from jaxdiff.denoiser import Denoiser, DenoiserMap, Estimate
from jaxdiff.guidance._scale import Scale, check_scale, scale_at
from jaxdiff.guidance._training_free import check_scalar, smoothed
from jaxdiff.stepwise import Stepwise


class LossGuidance(Stepwise):
    """D + scale (sigma^2 / alpha) grad_x log (1/n) sum_i f(y | D(x) + r n_i).

    Kind 2: draws once a step; data of the example: the entry "y" of its condition. What is wanted
    is averaged over a normal law about D that stands for p(x0 | x_t). For a linear measurement
    and Gaussian noise the mean over infinitely many draws is J^T A^T (r^2 A A^T + S)^-1 (y - A D),
    which is exact where r^2 is the posterior's variance. In many dimensions the largest of f
    decides, whatever the number of draws. `TrainingFree` with smoothing r and
    rho = scale sigma_t^2 (1 - e^-h), h the step in log(alpha / sigma), is the same under DDIM.

    Args:
        base: any denoiser.
        log_prob: `(x0, y) -> log f(y | x0)`, a scalar of one clean example; a pytree.
        scale: 1 is Bayes' rule for what the law about D stands for.
        draws: n.
        width: r in units of sigma / sqrt(alpha^2 + sigma^2), the posterior's standard deviation of
            data of unit variance; 0 takes D for x0, with one draw.

    Raises:
        ValueError: when called, without "y", or for a log_prob that is no scalar.

    Reference: Song, Zhang, Yin, Mardani, Liu, Kautz, Chen, Vahdat, "Loss-Guided Diffusion Models
    for Plug-and-Play Controllable Generation", 2023.
    """

    base: Denoiser
    log_prob: Callable[[Array, PyTree], Array]
    scale: Scale = number(1.0)
    draws: int = eqx.field(static=True, default=10)
    width: Number = number(1.0)

    takes: ClassVar[tuple[str, ...]] = ("y",)

    def __check_init__(self):
        check_callable("log_prob", self.log_prob, "jax.tree_util.Partial(function, weights)")
        check_scale(self.scale)
        check_count("draws", self.draws)
        check_number("width", self.width, least=0.0)

    @property
    def needs_signal(self) -> bool:
        """True: the slope through the denoiser is divided by alpha."""
        return True

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        y, rest = take(cond, "y", by="LossGuidance")
        process = self.process
        alpha, sigma = process.alpha(t), process.sigma(t)
        size = self.width * sigma / jnp.hypot(alpha, sigma)
        log_prob = smoothed(self.log_prob, self.step.key, size, self.draws)

        def value(x):
            found = self.base.estimate(x, t, rest, key=key)
            return check_scalar(log_prob(found.x0, y)), found

        slope, found = jax.grad(value, has_aux=True)(x)
        factor = scale_at(self.scale, process, t) * sigma**2 / alpha
        return found.moved(process, t, found.x0 + factor * slope)


class ManifoldPreserving(DenoiserMap):
    """D + scale grad log f(y | x0 = D), and the noise of D itself: no derivative of the network.

    Kind 1, with another noise than that of its x0, and data of the example: the entry "y" of its
    condition. Where the Jacobian of D is a multiple of the identity this is the direction of
    `DPS`, and another elsewhere. `TrainingFree` with rho = None, mu = scale and one iteration is
    the same.

    Args:
        base: any denoiser.
        log_prob: `(x0, y) -> log f(y | x0)`, a scalar of one clean example; a pytree.
        scale: length of the step, a number or a `ScaleSchedule`.
        project: of the moved estimate, such as an autoencoder's round trip; None for nothing.

    Raises:
        ValueError: when called, without "y", or for a log_prob that is no scalar.

    Reference: He, Murata, Lai, Takida, Uesaka, Kim, Liao, Mitsufuji, Kolter, Salakhutdinov, Ermon,
    "Manifold Preserving Guided Diffusion", 2023, arXiv 2311.16424.
    """

    base: Denoiser
    log_prob: Callable[[Array, PyTree], Array]
    scale: Scale = number(1.0)
    project: Callable[[Array], Array] | None = None

    takes: ClassVar[tuple[str, ...]] = ("y",)

    def __check_init__(self):
        check_callable("log_prob", self.log_prob, "jax.tree_util.Partial(function, weights)")
        check_scale(self.scale)

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        y, rest = take(cond, "y", by="ManifoldPreserving")
        found = self.base.estimate(x, t, rest, key=key)
        eps = found.noise(self.process, x, t)
        slope = jax.grad(lambda x0: check_scalar(self.log_prob(x0, y)))(found.x0)
        x0 = found.x0 + scale_at(self.scale, self.process, t) * slope
        x0 = x0 if self.project is None else self.project(x0)
        return found.replace(x0=x0.astype(x.dtype), eps=eps.astype(x.dtype))


class Universal(DenoiserMap):
    """D + scale (sigma^2 / alpha) grad_x log f(y | D(x)) + d, d by gradient steps beside D.

    Kind 1, with data of the example: the entry "y" of its condition. Forward guidance goes through
    the denoiser; backward guidance makes `iterations` steps d += rate grad log f(y | D + d) from
    d = 0, which costs gradients of f alone. Its self-recurrence is `Recurrence` around a solver.
    `TrainingFree` with rho = scale sigma_t^2 (1 - e^-h), mu = rate and no `keep_eps` is the same
    under DDIM.

    Args:
        base: any denoiser.
        log_prob: `(x0, y) -> log f(y | x0)`, a scalar of one clean example; a pytree.
        scale: of forward guidance; 0 leaves it out.
        rate: of a step of backward guidance.
        iterations: of them; 0 leaves it out.

    Raises:
        ValueError: when called, without "y", or for a log_prob that is no scalar.

    Reference: Bansal, Chu, Schwarzschild, Sengupta, Goldblum, Geiping, Goldstein, "Universal
    Guidance for Diffusion Models", 2023, arXiv 2302.07121, sections 3.1 and 3.2.
    """

    base: Denoiser
    log_prob: Callable[[Array, PyTree], Array]
    scale: Scale = number(1.0)
    rate: Number = number(0.1)
    iterations: int = eqx.field(static=True, default=0)

    takes: ClassVar[tuple[str, ...]] = ("y",)

    def __check_init__(self):
        check_callable("log_prob", self.log_prob, "jax.tree_util.Partial(function, weights)")
        check_scale(self.scale)
        check_number("rate", self.rate)
        check_count("iterations", self.iterations, least=0)

    @property
    def needs_signal(self) -> bool:
        """True: the slope through the denoiser is divided by alpha."""
        return True

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        y, rest = take(cond, "y", by="Universal")

        def value(x):
            found = self.base.estimate(x, t, rest, key=key)
            return check_scalar(self.log_prob(found.x0, y)), found

        slope, found = jax.grad(value, has_aux=True)(x)
        process = self.process
        forward = scale_at(self.scale, process, t) * process.sigma(t) ** 2 / process.alpha(t)
        beside = jnp.zeros_like(found.x0)
        for _ in range(self.iterations):
            own = jax.grad(lambda d: check_scalar(self.log_prob(found.x0 + d, y)))(beside)
            beside = beside + self.rate * own
        return found.moved(process, t, found.x0 + forward * slope + beside)

"""Reflected diffusion: noise that stays inside a box.

In the coordinates y = x / alpha, with the noise level k = sigma / alpha, data in the box
[low, high]^d are noised by Brownian motion that the faces reflect,

    y = reflect(x0 + k n),    reflect: folding at the faces,

so that y stays in the box and its law flows to the uniform one. Its transition density, the
reflected heat kernel, is a product over coordinates. On a box of width one, with z = y - low,

    p(y | x0, k) = sum_m N(z - z0; 2m, k^2) + N(z + z0; 2m, k^2)
                 = 1 + 2 sum_{n>=1} exp(-n^2 pi^2 k^2 / 2) cos(n pi z) cos(n pi z0),

images for small k, eigenfunctions for large. A denoiser of this process is
x0_hat = y + k^2 grad log p_k(y), as in Tweedie's formula. It makes every solver follow the
reflected score, but it is not E[x0 | y], and may lie outside the box.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, derivative, number
from jaxdiff.processes import GaussianProcess
from jaxdiff.solvers._base import DiffusionSolver, Moved, Problem
from jaxdiff.solvers._wrapper import SolverWrapper
from jaxdiff.stepwise import Step

# The two sums change over at this noise level on a box of width one, where both leave out less
# than 1e-16 of the density: images beyond 3 periods, eigenfunctions beyond the 12th.
_CROSSOVER = 0.5
_PERIODS = 3
_EIGENFUNCTIONS = 12


def reflect(x: Array, low: Number = -1.0, high: Number = 1.0) -> Array:
    """Fold the line onto [low, high], as often as it takes: elementwise, exact inside.

    low + min(u, 2 w - u) with u = (x - low) mod 2 w and w = high - low. Brownian motion plus
    this map is reflected Brownian motion in law, at any time step. Its derivative is 1 or -1.

    Args:
        x: any shape.
        low: lower face.
        high: upper face, > low.

    Returns:
        Values in [low, high], of the shape of x.

    Reference: Lou, Ermon, "Reflected Diffusion Models", 2023, arXiv 2304.04740, section 3.
    """
    width = high - low
    above = jnp.mod(x - low, 2 * width)
    folded = jnp.clip(low + jnp.minimum(above, 2 * width - above), low, high)
    # Inside, folding would round: a step that does not leave the box must not change.
    return jnp.where((x >= low) & (x <= high), x, folded.astype(x.dtype))


def reflected_marginal(
    process: GaussianProcess,
    x0: Array,
    eps: Array,
    t: Array,
    low: Number = -1.0,
    high: Number = 1.0,
) -> Array:
    """x_t = alpha reflect(x0 + (sigma / alpha) eps): `GaussianProcess.marginal` inside a box.

    Args:
        process: the forward process.
        x0: data in [low, high], `(*event)`.
        eps: standard normal noise, `(*event)`.
        t: scalar time with alpha > 0.
        low: lower face.
        high: upper face.

    Returns:
        x_t in alpha [low, high], `(*event)`. Its score given x0, the target of denoising score
        matching, is `reflected_kernel_score(x_t / alpha, x0, sigma / alpha) / alpha`.

    Reference: Lou, Ermon, "Reflected Diffusion Models", 2023, arXiv 2304.04740, section 4.
    """
    alpha = process.alpha(t)
    return alpha * reflect(x0 + process.sigma(t) / alpha * eps, low, high)


def _log_images(z: Array, z0: Array, k: Array) -> Array:
    shifts = 2.0 * jnp.arange(-_PERIODS, _PERIODS + 1, dtype=z.dtype)
    distances = jnp.concatenate(
        [z[..., None] - z0[..., None] + shifts, z[..., None] + z0[..., None] + shifts], axis=-1
    )
    log_terms = -0.5 * (distances / k[..., None]) ** 2
    return jax.nn.logsumexp(log_terms, axis=-1) - jnp.log(k) - 0.5 * jnp.log(2 * jnp.pi)


def _log_series(z: Array, z0: Array, k: Array) -> Array:
    n = jnp.pi * jnp.arange(1, _EIGENFUNCTIONS + 1, dtype=z.dtype)
    decay = jnp.exp(-0.5 * (n * k[..., None]) ** 2)
    waves = jnp.cos(n * z[..., None]) * jnp.cos(n * z0[..., None])
    return jnp.log1p(2 * jnp.sum(decay * waves, axis=-1))


def reflected_log_kernel(
    y: Array, x0: Array, k: Array, low: Number = -1.0, high: Number = 1.0
) -> Array:
    """log p(y | x0) of one coordinate of y = reflect(x0 + k n), elementwise.

    A sum over images below k = width / 2 and over eigenfunctions above, see the module; sums
    over coordinates are the log densities of events.

    Args:
        y: coordinates in [low, high].
        x0: data in [low, high].
        k: noise level sigma / alpha, > 0, in the units of y; all three broadcast.
        low: lower face.
        high: upper face.

    Returns:
        Log densities in nats, of the broadcast shape. Differentiable in all of y, x0 and k.

    Reference: Lou, Ermon, "Reflected Diffusion Models", 2023, arXiv 2304.04740, section 4. The
    authors' code changes over at k = 0.14 and divides by the density plus 1e-12; logarithms make
    the change and the tails exact.
    """
    width = high - low
    z, z0, k = jnp.broadcast_arrays((y - low) / width, (x0 - low) / width, k / width)
    # Each sum gets levels it is good at only, so that the one not used has no NaN to pass on.
    small = k < _CROSSOVER
    images = _log_images(z, z0, jnp.where(small, k, _CROSSOVER))
    series = _log_series(z, z0, jnp.where(small, _CROSSOVER, k))
    return jnp.where(small, images, series) - jnp.log(jnp.asarray(width, z.dtype))


def reflected_kernel_score(
    y: Array, x0: Array, k: Array, low: Number = -1.0, high: Number = 1.0
) -> Array:
    """The score of the reflected heat kernel, d log p(y | x0) / dy, elementwise.

    It is zero at the faces: no probability crosses them.

    Args:
        y: coordinates in [low, high].
        x0: data in [low, high].
        k: noise level sigma / alpha, > 0; all three broadcast.
        low: lower face.
        high: upper face.

    Returns:
        Scores with respect to y, of the broadcast shape.

    Reference: as `reflected_log_kernel`.
    """
    y, x0, k = jnp.broadcast_arrays(y, x0, k)
    return derivative(lambda y: reflected_log_kernel(y, x0, k, low, high), y)


class Reflected(SolverWrapper):
    """Any solver, kept in the box: each step starts and ends with `reflect`.

    x_s = alpha_s reflect(base step(alpha_t reflect(x_t / alpha_t)) / alpha_s). The first
    reflection acts on the prior alone, which it makes uniform on the box, up to
    exp(-pi^2 k^2 / (2 width^2)).

    The denoiser must be one of a reflected process, see the module. Then, in the law of x:
    a step with a constant score, such as the zero one of uniform data, is exact for a base that
    adds noise, at any step size. `Reflected(Ancestral(1.0))` is reverse Euler-Maruyama with
    reflection, of weak order one. The probability flow does not leave the box, since the score
    is zero on its faces: a deterministic base keeps its order, and reflection only undoes its
    overshoots. A multistep base does not learn of a reflection and loses accuracy there.

    With a denoiser of the plain process it is a projection, as thresholding is, and not exact.

    Args:
        base: the solver.
        low: lower face, in the units of the data.
        high: upper face.

    Raises:
        ValueError: if `high` is not above `low`.

    Reference: Lou, Ermon, "Reflected Diffusion Models", 2023, arXiv 2304.04740, section 3; order
    of the scheme from Bossy, Gobet, Talay, "A symmetrized Euler scheme for an efficient
    approximation of reflected diffusions", 2004. Written there for alpha = 1 on [0, 1].
    """

    base: DiffusionSolver
    low: Number = number(-1.0)
    high: Number = number(1.0)

    def __check_init__(self):
        remedy = "Use the range of the data, e.g. low=-1, high=1."
        check_number("low", self.low)
        if isinstance(self.low, float):
            check_number("high", self.high, above=self.low, instead=remedy)

    @property
    def needs_signal(self) -> bool:
        """True."""
        return True

    def _reflect(self, problem: Problem, x: Array, t: Array) -> Array:
        alpha = problem.process.alpha(t)
        y = x / alpha
        folded = reflect(y, self.low, self.high)
        return jnp.where(folded == y, x, alpha * folded).astype(x.dtype)

    def init_memory(self, problem: Problem, x: Array) -> PyTree:
        """The base's, of the reflected start."""
        return super().init_memory(problem, self._reflect(problem, x, problem.times[0]))

    def update(self, problem: Problem, x: Array, step: Step) -> Moved:
        """See `DiffusionSolver`."""
        moved = self.move_base(problem, self._reflect(problem, x, step.t), step)
        return moved._replace(x=self._reflect(problem, moved.x, step.s))

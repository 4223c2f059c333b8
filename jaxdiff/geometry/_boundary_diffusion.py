"""BoundaryDiffusion: a hyperplane between two classes of noisy states, crossed in one step."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PRNGKeyArray, PyTree

from jaxdiff._tree import as_number, jit
from jaxdiff.denoiser import Denoiser, edit_taps
from jaxdiff.geometry._features import Offset
from jaxdiff.geometry._supervised_directions import check_labels
from jaxdiff.geometry._timed_edit import EditedBetween
from jaxdiff.processes import GaussianProcess
from jaxdiff.sampling import Solution, denoise
from jaxdiff.solvers._base import DiffusionSolver
from jaxdiff.solvers._ddim import DDIM


class MixingTime(eqx.Module):
    """Where trajectories from data to noise have lost their radius.

    Attributes:
        index: of the first saved time from which on the radius is noise's, int32; the last one if
            it never is.
        t: that time.
        radius: mean of ||x_t|| / (sigma(t) sqrt(d)) over the population, `(num_saved,)`; 1 is pure
            noise.
        settled: whether it comes within the tolerance at all.
    """

    index: Array
    t: Array
    radius: Array
    settled: Array


def mixing_time(
    process: GaussianProcess, times: Array, x: Array, *, tolerance: float = 0.02
) -> MixingTime:
    """The smallest time from which on the radius of inverted states is that of noise.

    In many dimensions noise lies on the sphere of radius sigma(t) sqrt(d). The radius of data
    carried to noise is

        ||x_t||^2 / (sigma^2 d) = 1 + (alpha / sigma)^2 E||x0||^2 / d,

    so that the tolerance sets a signal-to-noise ratio: within it x_t is close enough to noise to be
    moved freely, at the smallest such time it still has most structure.

    Args:
        process: the forward process.
        times: increasing, `(num_saved,)`, sigma > 0, e.g. `path.t[0]`.
        x: states of a population, `(num_samples, num_saved, *event)`: `path.x` of
            `invert(..., saveat=SaveAt(t0=True, steps=True))`.
        tolerance: relative to the radius of noise.

    Returns:
        A `MixingTime`.

    Raises:
        ValueError: if there is not one state per time.

    Reference: Zhu, Wu, Deng, Russakovsky, Yan, "Boundary Guided Learning-Free Semantic Control with
    Diffusion Models", 2023, arXiv 2302.08357. The idea of the search is the paper's, the criterion
    ours: its radius sqrt(d) is relative to sigma(t) here, so that it also serves data whose
    variance is 1, and any process. With the paper's linear schedule and images of variance 0.4 the
    default tolerance gives its timestep, 500 of 1000.
    """
    if x.shape[1:2] != times.shape:
        raise ValueError(
            "`x` must have shape (num_samples, num_saved, *event) with one state per time, got "
            f"{x.shape} for {times.shape[0]} `times`."
        )
    flat = x.reshape(*x.shape[:2], -1)
    norms = jnp.mean(jnp.linalg.norm(flat, axis=2), axis=0)
    radius = norms / (jax.vmap(process.sigma)(times) * flat.shape[2] ** 0.5)
    outside = jnp.abs(radius - 1) > tolerance
    last = times.shape[0] - 1
    after = jnp.where(jnp.any(outside), last + 1 - jnp.argmax(outside[::-1]), 0)
    index = jnp.minimum(after, last).astype(jnp.int32)
    return MixingTime(index, times[index], radius, ~outside[-1])


class Hyperplane(eqx.Module):
    """{x: <normal, x> + offset = 0}, with class 1 on the positive side.

    Attributes:
        normal: unit normal, `(*event)`.
        offset: scalar.
        accuracy: share of the population it was fitted to that lies on its side.
        converged: whether the fit is the exact minimiser.
    """

    normal: Array
    offset: Array
    accuracy: Array
    converged: Array

    @jax.default_matmul_precision("highest")
    def distance(self, x: Array) -> Array:
        """Signed distance of x, `(*event)`."""
        return jnp.vdot(self.normal, x) + self.offset

    def move(self, x: Array, step: Array | float) -> Array:
        """x + step normal: every example by the same step."""
        return x + step * self.normal

    def place(self, x: Array, distance: Array) -> Array:
        """x moved along the normal to a signed distance, wherever it was."""
        return self.move(x, distance - self.distance(x))

    def reflect(self, x: Array) -> Array:
        """x mirrored: the other class, as far from the plane."""
        return self.place(x, -self.distance(x))


@jit
@jax.default_matmul_precision("highest")
def _fit(x, labels, penalty, max_iterations):
    flat = x.reshape(x.shape[0], -1)
    centre = flat[0] + jnp.mean(flat - flat[0], axis=0)
    left, values, basis = jnp.linalg.svd(flat - centre, full_matrices=False)
    sign = 2 * labels.astype(x.dtype) - 1
    rows = jnp.concatenate([left * values, jnp.ones_like(sign)[:, None]], axis=1)
    theta, converged = _squared_hinge(rows, sign, penalty, max_iterations)
    normal = theta[:-1] @ basis
    length = jnp.linalg.norm(normal)
    normal, offset = normal / length, theta[-1] / length
    accuracy = jnp.mean((sign * (rows @ theta) > 0).astype(x.dtype))
    normal_event = normal.reshape(x.shape[1:])
    return Hyperplane(normal_event, offset - normal @ centre, accuracy, converged)


def _squared_hinge(rows: Array, sign: Array, penalty: Array, max_iterations: int):
    """argmin |w|^2 / 2 + C sum max(0, 1 - y f)^2 with f = rows @ (w, b), by Newton's method.

    The loss is quadratic as long as the set of examples inside the margin stays the same: when it
    does over a full step, the minimum is exact.
    """
    size = rows.shape[1]
    shrink = jnp.ones(size, rows.dtype).at[-1].set(0)
    fractions = 0.5 ** jnp.arange(12, dtype=rows.dtype)

    def inside(theta):
        return sign * (rows @ theta) < 1

    def loss(theta):
        return jnp.sum(shrink * theta**2) / 2 + penalty * jnp.sum(
            jnp.maximum(1 - sign * (rows @ theta), 0) ** 2
        )

    def newton(carry):
        theta, _, count = carry
        active = inside(theta)
        chosen = jnp.where(active[:, None], rows, 0)
        # With no example inside the margin the loss does not depend on b, which stays.
        stay = jnp.zeros(size, rows.dtype).at[-1].set(jnp.where(jnp.any(active), 0, 1))
        hessian = jnp.diag(shrink + stay) + 2 * penalty * chosen.T @ chosen
        target = jnp.linalg.solve(hessian, 2 * penalty * chosen.T @ sign + stay * theta)
        candidates = theta + fractions[:, None] * (target - theta)
        best = jnp.argmin(jax.vmap(loss)(candidates))
        done = (best == 0) & jnp.all(inside(candidates[0]) == active)
        return candidates[best], done, count + 1

    def unfinished(carry):
        return ~carry[1] & (carry[2] < max_iterations)

    start = jnp.zeros(size, rows.dtype), jnp.zeros((), bool), jnp.zeros((), jnp.int32)
    return jax.lax.while_loop(unfinished, newton, start)[:2]


def fit_hyperplane(
    x: Array, labels: ArrayLike, *, penalty: float = 1.0, max_iterations: int = 50
) -> Hyperplane:
    """A linear support vector machine between two classes of states or activations.

    min over w, b of |w|^2 / 2 + C sum_i max(0, 1 - y_i (<w, x_i> + b))^2. w lies in the span of the
    centred examples, so that the problem has at most n + 1 unknowns however large x; a few Newton
    steps solve it exactly. Deterministic; runs inside jit.

    Args:
        x: a population, `(n, *event)`: states at the mixing time, or activations there.
        labels: their classes, `(n,)`, boolean or 0 and 1.
        penalty: C > 0. For n below the dimension, where classes separate, it hardly matters as long
            as C times squared distances is large: the margin is then the widest.
        max_iterations: of Newton's method.

    Returns:
        A `Hyperplane`.

    Raises:
        ValueError: if `labels` do not fit, or, where that is known, lack a class.

    Reference: Zhu, Wu, Deng, Russakovsky, Yan, "Boundary Guided Learning-Free Semantic Control with
    Diffusion Models", 2023, arXiv 2302.08357; the solver: Chapelle, "Training a Support Vector
    Machine in the Primal", 2007. Squared hinge instead of the hinge of common packages; b is not
    penalised.
    """
    check_labels(x.shape[0], labels)
    return _fit(x, jnp.asarray(labels), as_number(penalty), max_iterations)


def boundary_edit(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    x: Array,
    times: Array,
    boundary: Hyperplane,
    step: Array | float,
    *,
    h_boundary: Hyperplane | None = None,
    h_step: Array | float = 0.0,
    tap: str = "mid",
    cond: PyTree = None,
    solver: DiffusionSolver = DDIM(),
) -> Solution:
    """Move states along the normal once, at the mixing time, and denoise them.

    x <- x + step n; and, with `h_boundary`, h <- h + h_step n_h in the first step of the solver
    alone.

    Args:
        key: typed PRNG key, as in `denoise`.
        denoiser: the denoiser; with `h_boundary`, one that has a network.
        x: states at times[0], `(num_samples, *event)`: images carried there by `invert`.
        times: decreasing grid from the mixing time, `(num_steps + 1,)`.
        boundary: the hyperplane of states at times[0].
        step: how far, in units of x; negative towards class 0.
        h_boundary: the hyperplane of activations at times[0], or None.
        h_step: how far, in units of h.
        tap: which activation `h_boundary` is of.
        cond: as in `denoise`.
        solver: a solver of this library, e.g. `DDIM(eta=1.0)` as in the paper.

    Returns:
        A `Solution`, as of `denoise`.

    Raises:
        TypeError: as `denoise`, or if there is no network inside to edit h.
        ValueError: as `denoise`.

    Reference: Zhu, Wu, Deng, Russakovsky, Yan, "Boundary Guided Learning-Free Semantic Control with
    Diffusion Models", 2023, arXiv 2302.08357. The published code places every example at a given
    distance from the hyperplane; for that pass `jax.vmap(boundary.place, (0, None))(x, distance)`
    and step 0.
    """
    if h_boundary is not None:
        edited = edit_taps(denoiser, {tap: Offset(h_step * h_boundary.normal)})
        denoiser = EditedBetween(denoiser, edited, (times[0] + times[1]) / 2)
    return denoise(key, denoiser, boundary.move(x, step), cond=cond, solver=solver, times=times)

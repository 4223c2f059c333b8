"""Asyrp: the asymmetric reverse process, which edits x0_hat and keeps eps_hat."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, jit, number, root
from jaxdiff.denoiser import Denoiser, Estimate
from jaxdiff.sampling import Trajectory
from jaxdiff.solvers._base import ExplicitSolver, Problem
from jaxdiff.stepwise import Step, at_step


class Asyrp(ExplicitSolver):
    """DDIM with x0_hat of an edited denoiser and eps_hat of the plain one.

        x_s = alpha_s x0_hat(edited) + sqrt(sigma_s^2 - c^2) eps_hat(plain) + c n

    where t >= t_edit; below, x0_hat is plain as well. Noise is injected where t < t_boost, with c
    that of ancestral sampling times `eta`. The same edit in both terms would nearly cancel.

    Two evaluations a step while editing, one after.

    Args:
        edited: the edited denoiser, e.g. `edit_taps(denoiser, {"mid": Offset(dh)})`, or a
            `TimedOffset` where the edit differs from step to step; of the process and condition of
            the denoiser that is sampled.
        t_edit: where editing ends, in the process's time. 0 edits at all times.
        t_boost: where the injection of noise starts ("quality boosting"); None for none.
        eta: how much noise is injected there; 1 is that of ancestral sampling.

    Raises:
        ValueError: when run, to invert.

    Reference: Kwon, Jeong, Uh, "Diffusion Models already have a Semantic Latent Space", 2022,
    arXiv 2210.10960. `asyrp_times` chooses t_edit and t_boost as there.
    """

    edited: Denoiser
    t_edit: Number = number(0.0)
    t_boost: Number | None = number(None)
    eta: Number = number(1.0)

    def __check_init__(self):
        check_number("t_edit", self.t_edit, finite=False)
        check_number("t_boost", self.t_boost, finite=False)
        check_number("eta", self.eta, least=0.0)

    @property
    def stochastic(self) -> bool:
        """Whether `t_boost` is given."""
        return self.t_boost is not None

    def plan(self, problem: Problem) -> PyTree:
        """Nothing, for a problem that can be solved."""
        if problem.direction > 0:
            raise ValueError("Asyrp has no inverse. Invert by DDIM(), and edit on the way back.")

    def move(
        self, problem: Problem, x: Array, step: Step, estimate: Estimate
    ) -> tuple[Array, PyTree, Array]:
        """See `ExplicitSolver`."""
        process, t, s = problem.process, step.t, step.s
        edited = at_step(self.edited, step)
        editing = t >= self.t_edit
        x0 = jax.lax.cond(editing, lambda: edited(x, t, problem.cond), lambda: estimate.x0)
        nfe = jnp.where(editing, edited.evaluations, 0)
        sigma = process.sigma(s)
        if self.t_boost is None:
            return process.alpha(s) * x0 + sigma * estimate.eps, step.memory, nfe
        std = jnp.where(t < self.t_boost, self.eta * process.posterior_std(t, s), 0.0)
        std = std.astype(sigma.dtype)
        noise = jax.random.normal(step.key, x.shape, x.dtype)
        # The difference of squares may round below zero at eta = 1.
        carried = root(sigma**2 - std**2)
        x = process.alpha(s) * x0 + carried * estimate.eps + std * noise
        return x, step.memory, nfe


def asyrp_times(
    denoiser: Denoiser,
    trajectory: Trajectory,
    distance: Callable[[Array, Array], Array],
    *,
    cond: PyTree = None,
    strength: float = 0.33,
    deficiency: float = 1.2,
) -> tuple[Array, Array]:
    """t_edit and t_boost for `Asyrp`, from images carried to noise.

    Of an image x at the times of its inversion x_t, averaged over images: x0_hat(x_t) loses the
    image as t grows, and editing stops where what is left to decide is small: t_edit is where
    distance(x, x0_hat(x_t)) crosses `strength`. x_t itself loses it faster; noise is injected below
    t_boost, where distance(x, x_t) crosses `deficiency` and injected noise can still be repaired
    without changing the content. Crossings are interpolated linearly, and are the last ones: beyond
    them the distance stays above the threshold.

    Args:
        denoiser: the plain denoiser.
        trajectory: of `invert(..., saveat=SaveAt(t0=True, steps=True))`, from nearly clean images
            on one grid.
        distance: `(x, y) -> scalar` for two images, LPIPS in the paper.
        cond: as it was in `invert`.
        strength: threshold for t_edit, in units of `distance`. The paper's 0.33 is for LPIPS, and
            is lowered there for attributes far from what the image shows.
        deficiency: threshold for t_boost; the paper's 1.2 is for LPIPS.

    Returns:
        t_edit and t_boost; infinity for a threshold that is never reached: then nothing is edited,
        or noise is injected at all times; the first time of the trajectory for one always exceeded.

    Reference: Kwon, Jeong, Uh, "Diffusion Models already have a Semantic Latent Space", 2022,
    arXiv 2210.10960. There for LPIPS alone, on the given timesteps.
    """
    times = trajectory.t[0]
    edit, boost = _decay(denoiser, trajectory.x, times, cond, distance)
    return _crossing(times, edit, strength), _crossing(times, boost, deficiency)


@jit
def _decay(denoiser, x, times, cond, distance):
    """Mean distances of the images to x0_hat(x_t) and to x_t, `(num_saved,)` each."""

    def at(row):
        states, t = row
        x0_hat = jax.vmap(denoiser, (0, None, 0))(states, t, cond)
        far = jax.vmap(distance)
        return jnp.mean(far(x[:, 0], x0_hat)), jnp.mean(far(x[:, 0], states))

    return jax.lax.map(at, (jnp.moveaxis(x, 1, 0), times))


def _crossing(times: Array, values: Array, threshold: float) -> Array:
    """The time from which on values exceed the threshold, between increasing times."""
    below = values < threshold
    last = times.shape[0] - 1 - jnp.argmax(below[::-1])
    after = jnp.minimum(last + 1, times.shape[0] - 1)
    share = (threshold - values[last]) / jnp.where(after > last, values[after] - values[last], 1)
    crossing = times[last] + share * (times[after] - times[last])
    crossing = jnp.where(below[-1], jnp.inf, crossing)
    return jnp.where(jnp.any(below), crossing, times[0]).astype(times.dtype)

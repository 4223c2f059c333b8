"""EDICT."""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, number
from jaxdiff.processes import GaussianProcess
from jaxdiff.solvers._base import DiffusionSolver, Moved, Problem
from jaxdiff.solvers._fixed_point import transfer
from jaxdiff.stepwise import Step


class Coupled(eqx.Module):
    """What EDICT remembers beside its state.

    Attributes:
        y: the second latent, `(*event)`.
        turned: whether y leads at the next step of sampling.
    """

    y: Array
    turned: Array


class EDICT(DiffusionSolver):
    """Exact diffusion inversion via coupled transformations: two latents, two evaluations a step.

    With A = alpha_s / alpha_t, B = sigma_s - A sigma_t, a step of sampling is

    x' = A x + B eps_hat(y, t),    y' = A y + B eps_hat(x', t),
    x_s = p x' + (1 - p) y',       y_s = p y' + (1 - p) x_s,

    and a step of inverting solves these four for x and y, from the last to the first. The
    mixing keeps p x + y and multiplies x - y by p^2, so that the latents stay together when
    sampling, and grow apart by p^-2 a step when inverting, with all rounding errors: the authors
    take 50 steps. A step also multiplies x - y by A, so that what rounding adds to x - y at the
    noisy end is divided by alpha there: in float32 `denoise` retraces `invert` badly from where
    alpha is below 0.01. First order.

    The state of the solver is x; y is in `Solution.memory`, and with it `invert` retraces
    `sample` and `denoise` retraces `invert`, on the same times in reverse. Without memory a run
    starts from y = x. Times may end at sigma = 0, and start there when inverting, but alpha must
    not vanish.

    Args:
        p: weight of the mixing, in (0, 1]; 1 does not mix. Below 0.9 inverting loses digits
            fast, near 1 the latents drift apart.
        alternate: whether the latents take turns in going first, counted so that x leads the
            first step from noise. The mixing always starts with x.

    Raises:
        ValueError: for p outside (0, 1].

    Reference: Wallace, Gokul, Naik, "EDICT: Exact Diffusion Inversion via Coupled
    Transformations", 2022, arXiv 2211.12446, section 4; the turns are from the authors' code.
    """

    p: Number = number(0.93)
    alternate: bool = eqx.field(default=True, static=True)

    retraces: ClassVar[bool] = True

    def __check_init__(self):
        remedy = (
            "Take the authors' 0.93: the mixing multiplies x - y by p^2, and its inverse divides "
            "by it."
        )
        check_number("p", self.p, above=0.0, most=1.0, instead=remedy)

    @property
    def bounded_start(self) -> bool:
        """True."""
        return True

    @property
    def stochastic(self) -> bool:
        """No noise is drawn."""
        return False

    def init_memory(self, problem: Problem, x: Array) -> Coupled:
        """y = x, and the turn that makes x lead the first step from noise."""
        inverting = problem.direction == 1
        turned = self.alternate and inverting and problem.num_steps % 2 == 1
        return Coupled(x, jnp.asarray(turned))

    def check_start(self, process: GaussianProcess, times: Array, memory: PyTree) -> None:
        """Anywhere: evaluations are at the noisier end of a step."""

    def update(self, problem: Problem, x: Array, step: Step) -> Moved:
        """See `DiffusionSolver`."""
        (x, y), turned = (x, step.memory.y), step.memory.turned
        if problem.direction == -1:
            x, y, notes = self._couple(problem, x, y, step, turned)
            x, y = self._mix(x, y)
            turned = turned ^ self.alternate
        else:
            turned = turned ^ self.alternate
            x, y, notes = self._couple(problem, *self._unmix(x, y), step, ~turned)
        return Moved(x, Coupled(y, turned), 2 * problem.cost, notes)

    def _couple(self, problem: Problem, x: Array, y: Array, step: Step, y_leads: Array):
        """Move one latent with the noise seen by the other, then the other with the first's."""
        # Either way the noise is that of the noisier time, the one sampling starts from.
        noisier = step.t if problem.direction == -1 else step.s

        def move(z: Array, other: Array) -> tuple[Array, dict]:
            found = problem.settle(other, noisier, problem.estimate(other, noisier))[1]
            moved = transfer(problem.process, z, found.eps, step.t, step.s)
            return moved.astype(z.dtype), found.notes

        first, second = jnp.where(y_leads, y, x), jnp.where(y_leads, x, y)
        first, notes = move(first, second)
        second, _ = move(second, first)
        return jnp.where(y_leads, second, first), jnp.where(y_leads, first, second), notes

    def _mix(self, x: Array, y: Array) -> tuple[Array, Array]:
        x = self.p * x + (1 - self.p) * y
        return x, self.p * y + (1 - self.p) * x

    def _unmix(self, x: Array, y: Array) -> tuple[Array, Array]:
        y = (y - (1 - self.p) * x) / self.p
        return (x - (1 - self.p) * y) / self.p, y

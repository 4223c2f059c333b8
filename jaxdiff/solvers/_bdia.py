"""BDIA."""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, is_known, number
from jaxdiff.processes import GaussianProcess
from jaxdiff.solvers._base import DiffusionSolver, Moved, Problem, check_noisy_start
from jaxdiff.stepwise import Step


class Neighbour(eqx.Module):
    """A state beside the current one, on either side.

    Attributes:
        x: the state, `(*event)`.
        t: its time.
    """

    x: Array
    t: Array


class BDIA(DiffusionSolver):
    """Bi-directional integration approximation of DDIM: exactly invertible, one evaluation a step.

    With r the state before x_t, and x_t -> u DDIM's step from x_t to time u,

    x_s = (x_t -> s) + gamma [x_r - (x_t -> r)],

    both from the evaluation at x_t. When inverting, the same equation is solved for its other
    end: x_s = (x_t -> s) + [x_r - (x_t -> r)] / gamma. Order 1 with (1 - gamma) / (1 + gamma)
    times the error of DDIM for gamma < 1, order 2 for gamma = 1.

    `Solution.memory` holds the state one step before the last. With it a run in the same
    direction continues, and `invert` retraces `sample`, and `denoise` retraces `invert`, to
    rounding. Retracing needs exactly the same times in reverse; it starts by stepping to the
    remembered state, with an evaluation in vain, and so may start at sigma = 0. A run without
    memory starts with a step of DDIM, which needs sigma > 0.

    Errors shrink by gamma a step when sampling and grow by 1 / gamma when inverting: rounding,
    where `invert` retraces; where it starts without memory, DDIM's own error of each step, so
    that only gamma = 1 carries data to noise of the right scale.

    Args:
        gamma: in (0, 1]; the authors take 1 for editing and 0.5 for sampling.

    Raises:
        ValueError: for gamma outside (0, 1].

    Reference: Zhang, Lewis, Kleijn, "Exact Diffusion Inversion via Bi-directional Integration
    Approximation", 2023, arXiv 2307.10829, the update of BDIA-DDIM. Written there for the
    variance-preserving process; x_t -> u extends it to every process.
    """

    gamma: Number = number(1.0)

    retraces: ClassVar[bool] = True

    def __check_init__(self):
        remedy = "Take 1.0 to invert, or DDIM() for gamma = 0, which has no exact inverse."
        check_number("gamma", self.gamma, above=0.0, most=1.0, instead=remedy)

    @property
    def stochastic(self) -> bool:
        """No noise is drawn."""
        return False

    def init_memory(self, problem: Problem, x: Array) -> Neighbour:
        """The start itself, for which the bracket vanishes and the step is DDIM's."""
        return Neighbour(x, problem.times[0])

    def check_start(self, process: GaussianProcess, times: Array, memory: Neighbour | None) -> None:
        """See `DiffusionSolver`; a run that turns back needs the times it came by.

        Raises:
            ValueError: for another first step than the remembered one, or a start afresh at
                sigma = 0.
        """
        if memory is None:
            check_noisy_start(type(self), process, times)
        elif is_known(times) and is_known(memory.t):
            start, following = np.asarray(times)[..., 0], np.asarray(times)[..., 1]
            before = np.asarray(memory.t)
            ahead = (before - start) * (following - start) > 0
            if np.any(ahead & (before != following)):
                raise ValueError(
                    "`times` must go back the way that `memory` came, whose last step started at "
                    f"{before.ravel()[0]:g}, got a first step to {following.ravel()[0]:g}. Pass "
                    "the same grid, reversed."
                )

    def update(self, problem: Problem, x: Array, step: Step) -> Moved:
        """See `DiffusionSolver`."""
        process, before = problem.process, step.memory
        # A run that turns back finds the state it steps to in its memory. It may turn at
        # sigma = 0, where eps, though not used, would make gradients NaN.
        turning = before.t == step.s
        t = jnp.where(turning, jnp.maximum(step.t, step.s), step.t)
        found = problem.settle(x, t, problem.estimate(x, t))[1]

        def ddim(s: Array) -> Array:
            return process.alpha(s) * found.x0 + process.sigma(s) * found.eps

        gamma = self.gamma if problem.direction == -1 else 1 / self.gamma
        bracket = jnp.where(before.t == step.t, 0.0, before.x - ddim(before.t))
        following = (ddim(step.s) + gamma * bracket).astype(x.dtype)
        following = jnp.where(turning, before.x, following)
        return Moved(following, Neighbour(x, step.t), problem.cost, found.notes)

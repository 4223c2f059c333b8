"""Stepping by a map between two times."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, number, root
from jaxdiff.flow_map import FlowMap
from jaxdiff.processes import GaussianProcess
from jaxdiff.solvers._base import DiffusionSolver, Moved, Problem
from jaxdiff.stepwise import Step


class FlowMapSteps(DiffusionSolver):
    """A flow map once a step, from time to time: consistency and flow-map sampling.

    With noise levels k = sigma / alpha, a step jumps from t to the time u of level
    sqrt(1 - gamma^2) k_s, and adds noise up to s by the forward process,

        x_u = flow_map(x_t, t, u),    x_s = r x_u + sqrt(sigma_s^2 - (r sigma_u)^2) n,

    r = alpha_s / alpha_u. With the exact flow map every gamma keeps the marginals.

        gamma None     no noise is drawn: the map itself, t -> s
        gamma = 1      multistep consistency sampling: to data, and noise up to s
        between        gamma-sampling of consistency trajectory models

    One evaluation a step. Takes a `FlowMap`, and no denoiser.

    Args:
        gamma: None, or a number in [0, 1].

    Raises:
        ValueError: for gamma outside [0, 1]; when used, for several steps of a map that makes one.

    Reference: Song, Dhariwal, Chen, Sutskever, "Consistency Models", 2023, arXiv 2303.01469,
    algorithm 1; Kim, Lai, Liao, Murata, Takida, Uesaka, He, Mitsufuji, Ermon, "Consistency
    Trajectory Models: Learning Probability Flow ODE Trajectory of Diffusion", 2023,
    arXiv 2310.02279, algorithm 3. Written there for alpha = 1.
    """

    gamma: Number | None = number(None)

    model: ClassVar[type] = FlowMap

    def __check_init__(self):
        check_number("gamma", self.gamma, least=0.0, most=1.0)

    @property
    def stochastic(self) -> bool:
        """Whether `gamma` is given."""
        return self.gamma is not None

    def default_times(self, process: GaussianProcess, num_steps: int, t_end: float) -> Array:
        """The process's customary grid of these steps down to t_min, whose last ends at `t_end`.

        From t_min there is no step of its own, as denoisers have: it would move nothing.
        """
        return process.times(num_steps, process.t_min).at[-1].set(t_end)

    def check_start(self, process: GaussianProcess, times: Array, memory: object) -> None:
        """Anywhere that the map starts from."""

    def plan(self, problem: Problem) -> Array:
        """Where the map jumps to."""
        process, s = problem.process, problem.times[1:]
        if problem.denoiser.one_step and len(s) > 1:
            name = type(problem.denoiser).__name__
            raise ValueError(
                f"`times` must be one step for {name}, which starts from noise, got {len(s)}. "
                "Pass times=1."
            )
        if self.gamma is None:
            return s
        level = root(1 - self.gamma**2) * process.sigma(s) / process.alpha(s)
        inside = process.unbounded_time(-2 * jnp.log(jnp.where(level > 0, level, 1.0)))
        return jnp.where(level > 0, inside, 0.0)

    def update(self, problem: Problem, x: Array, step: Step) -> Moved:
        """See `DiffusionSolver`."""
        x = problem.denoiser(x, step.t, step.plan, problem.cond)
        if self.gamma is not None:
            noise = jax.random.normal(step.key, x.shape, x.dtype)
            x = problem.process.renoise(x, noise, step.plan, step.s)
        return Moved(x, step.memory, problem.cost)

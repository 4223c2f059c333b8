"""EDM's Heun sampler."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, number, root
from jaxdiff.denoiser import Estimate
from jaxdiff.solvers._base import ExplicitSolver, Moved, Problem
from jaxdiff.stepwise import Step


class EDMHeun(ExplicitSolver):
    """Second-order Heun in the noise level k = sigma / alpha, with optional churn.

    In y = x / alpha: raise the noise from k to k^ = k (1 + gamma), then with
    d = (y - x0_hat) / k^ take an Euler step to k' and, unless k' = 0, average d with the slope
    found there. gamma = min(s_churn / num_steps, sqrt(2) - 1) for k in [s_tmin, s_tmax], else
    0. Two evaluations a step, one for a step that ends at k' = 0.

    Args:
        s_churn: None for the deterministic sampler (no noise is drawn).
        s_tmin: smallest noise level that is churned.
        s_tmax: largest noise level that is churned.
        s_noise: standard deviation of the added noise, relative to the exact one.

    Reference: Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based
    Generative Models", 2022, arXiv 2206.00364, algorithms 1 and 2. Written there for
    alpha = 1; k and y extend it to every process.
    """

    s_churn: Number | None = number(None)
    s_tmin: Number = number(0.0)
    s_tmax: Number = number(float("inf"))
    s_noise: Number = number(1.0)

    def __check_init__(self):
        check_number("s_churn", self.s_churn, least=0.0)
        check_number("s_noise", self.s_noise, least=0.0)
        check_number("s_tmin", self.s_tmin, least=0.0)
        check_number("s_tmax", self.s_tmax, finite=False)

    @property
    def stochastic(self) -> bool:
        """Whether `s_churn` is given."""
        return self.s_churn is not None

    @property
    def bounded_start(self) -> bool:
        """True."""
        return True

    def _churn(
        self, problem: Problem, x: Array, step: Step, s_churn: Number
    ) -> tuple[Array, Array]:
        """The state with more noise, and its time."""
        process, t = problem.process, step.t
        k = process.sigma(t) / process.alpha(t)
        gamma = jnp.minimum(s_churn / problem.num_steps, jnp.sqrt(2.0) - 1)
        gamma = jnp.where((k >= self.s_tmin) & (k <= self.s_tmax), gamma, 0.0).astype(k.dtype)
        std = self.s_noise * k * root(gamma * (2 + gamma))
        y = x / process.alpha(t) + std * jax.random.normal(step.key, x.shape, x.dtype)
        raised = process.unbounded_time(-2 * jnp.log(k * (1 + gamma)))
        t = jnp.where(gamma > 0, raised, t)
        return (process.alpha(t) * y).astype(x.dtype), t

    def update(self, problem: Problem, x: Array, step: Step) -> Moved:
        """See `DiffusionSolver`."""
        if self.s_churn is not None:
            x, t = self._churn(problem, x, step, self.s_churn)
            step = dataclasses.replace(step, t=t)
        return super().update(problem, x, step)

    def move(
        self, problem: Problem, x: Array, step: Step, estimate: Estimate
    ) -> tuple[Array, PyTree, Array]:
        """See `ExplicitSolver`; the slope in y = x / alpha is eps."""
        process, t, s = problem.process, step.t, step.s
        alpha = process.alpha(s)
        k, target = process.sigma(t) / process.alpha(t), process.sigma(s) / alpha
        y, slope = x / process.alpha(t), estimate.eps
        euler = y + (target - k) * slope

        def correct():
            end = (alpha * euler).astype(x.dtype)
            end_slope = problem.settle(end, s, problem.estimate(end, s))[1].eps
            return y + (target - k) * (slope + end_slope) / 2

        y = jax.lax.cond(target > 0, correct, lambda: euler)
        return alpha * y, step.memory, jnp.where(target > 0, problem.cost, 0)

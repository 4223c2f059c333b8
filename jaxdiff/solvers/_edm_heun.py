"""EDM's Heun sampler."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._tree import _as_float, number, root
from jaxdiff.solvers._base import DiffusionSolver, Problem, Step


class EDMHeun(DiffusionSolver):
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

    s_churn: float | None = eqx.field(default=None, converter=_as_float)
    s_tmin: float = number(0.0)
    s_tmax: float = number(float("inf"))
    s_noise: float = number(1.0)

    @property
    def stochastic(self) -> bool:
        """Whether `s_churn` is given."""
        return self.s_churn is not None

    def _churn(self, problem: Problem, y: Array, k: Array, t: Array, key: PRNGKeyArray):
        gamma = jnp.minimum(self.s_churn / problem.num_steps, jnp.sqrt(2.0) - 1)
        gamma = jnp.where((k >= self.s_tmin) & (k <= self.s_tmax), gamma, 0.0).astype(k.dtype)
        raised = k * (1 + gamma)
        std = self.s_noise * k * root(gamma * (2 + gamma))
        y = y + std * jax.random.normal(key, y.shape, y.dtype)
        return y, raised, jnp.where(gamma > 0, problem.process.time(-2 * jnp.log(raised)), t)

    def update(self, problem: Problem, x: Array, step: Step) -> tuple[Array, PyTree, Array]:
        """See `DiffusionSolver`."""
        t, s = step.t, step.s
        process = problem.process
        alpha = process.alpha(s)
        k, target = process.sigma(t) / process.alpha(t), process.sigma(s) / alpha
        y = x / process.alpha(t)
        if self.s_churn is not None:
            y, k, t = self._churn(problem, y, k, t, step.key)

        slope = (y - problem.x0(process.alpha(t) * y, t)) / k
        euler = y + (target - k) * slope

        def correct():
            end_slope = (euler - problem.x0(alpha * euler, s)) / target
            return y + (target - k) * (slope + end_slope) / 2

        y = jax.lax.cond(target > 0, correct, lambda: euler)
        return alpha * y, step.memory, jnp.where(target > 0, 2, 1)

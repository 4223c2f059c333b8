"""Ancestral noise around any single-step solver."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxdiff._tree import number, root
from jaxdiff.predictions import X0
from jaxdiff.solvers._base import DiffusionSolver, Problem, Step, check_memoryless
from jaxdiff.solvers._dpm_solver import DPMSolver


class AncestralNoise(DiffusionSolver):
    """Each step of another solver goes further down, and noise makes up for it.

    With noise levels k = sigma / alpha, the base goes from k_t to k_down and noise k_up is added,

        k_up = min(k_s, eta k_s sqrt(1 - k_s^2 / k_t^2)),    k_down^2 = k_s^2 - k_up^2,

    in y = x / alpha. The exact flow followed by this noise keeps every marginal, so that the weak
    order is the base's. Known as

        DPM++ 2S a     AncestralNoise(DPMSolver(2, X0()))
        DPM2 a         AncestralNoise(DPMSolver(2, Eps()))
        Euler a        AncestralNoise(DDIM()), the same as `DDIM(eta)`

    Args:
        base: a solver of single steps.
        eta: noise relative to ancestral sampling; 0 is the base.

    Raises:
        ValueError: for a base with a memory, which assumes that its steps join.

    Reference: Crowson, "k-diffusion", 2022, github.com/crowsonkb/k-diffusion,
    `get_ancestral_step`; the noise is that of Song, Meng, Ermon, "Denoising Diffusion Implicit
    Models", 2020, arXiv 2010.02502, equation 16.
    """

    base: DiffusionSolver = DPMSolver(2, X0())
    eta: float = number(1.0)

    @property
    def stochastic(self) -> bool:
        """True."""
        return True

    def init_memory(self, problem: Problem, x: Array) -> PyTree:
        """The base's, which must be empty."""
        problem = dataclasses.replace(problem, plan=self.base.plan(problem))
        return check_memoryless(self.base, self.base.init_memory(problem, x))

    def update(self, problem: Problem, x: Array, step: Step) -> tuple[Array, PyTree, Array | int]:
        """See `DiffusionSolver`."""
        process, s = problem.process, step.s
        alpha = process.alpha(s)
        k, target = process.sigma(step.t) / process.alpha(step.t), process.sigma(s) / alpha
        up = jnp.minimum(target, self.eta * target * jnp.sqrt(1 - (target / k) ** 2))
        down = root(target**2 - up**2)
        below = process.time(-2 * jnp.log(jnp.where(down > 0, down, 1.0)))
        below = jnp.where(down > 0, below, 0.0)
        inner = dataclasses.replace(problem, times=jnp.stack([step.t, below]))
        plan = jax.tree.map(lambda rows: rows[0], self.base.plan(inner))
        base_key, key = jax.random.split(step.key)
        y, memory, nfe = self.base.update(inner, x, Step(step.t, below, base_key, plan, None))
        y = y / process.alpha(below) + up * jax.random.normal(key, x.shape, x.dtype)
        return (alpha * y).astype(x.dtype), memory, nfe

"""Soft value-based decoding: the best of several next states, at every step."""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff._checks import check_callable, check_count, check_number
from jaxdiff._tree import Number, number
from jaxdiff.conditions import take
from jaxdiff.guidance._training_free import check_scalar, or_worst, with_cond
from jaxdiff.solvers import Ancestral, DiffusionSolver, SolverWrapper
from jaxdiff.solvers._base import Moved, Problem
from jaxdiff.stepwise import Step


class SVDD(SolverWrapper):
    """One of `count` next states, drawn with weights exp(r(D(x_s)) / temperature).

    A solver around one that draws. The value of a state is the reward of its estimate; at the end
    that of the sample; NaN counts as the worst. No derivative of the reward is taken, and examples
    do not see each other. 1 + count evaluations a step.

    Where the value is exact (a linear reward of Gaussian data) samples tend to the law
    p(x0) exp(r(x0) / temperature) as `count` grows; elsewhere E exp(r / temperature) is not
    exp(r(E x0) / temperature), and another law comes out, whatever the count.

    Args:
        base: a solver that draws, from an estimate.
        reward: `x0 -> r`, a scalar of one clean example; a pytree.
        count: next states that are drawn.
        temperature: 0 takes the best.
        of_example: whether the reward is `(x0, y) -> r`, with the entry "y" of the example's
            condition.

    Raises:
        ValueError: for a base that draws nothing, a reward that is no scalar, or without "y" where
            the reward wants it.

    Reference: Li, Zhao, Wang, Scalia, Eraslan, Nair, Biancalani, Ji, Regev, Levine, Uehara,
    "Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based
    Decoding", 2024, arXiv 2408.08252, algorithm 1 with the posterior mean's value.
    """

    base: DiffusionSolver = Ancestral()
    count: int = eqx.field(static=True, default=8)
    temperature: Number = number(1.0)
    reward: Callable[..., Array] = eqx.field(kw_only=True)
    of_example: bool = eqx.field(static=True, default=False, kw_only=True)

    def __check_init__(self):
        check_callable("reward", self.reward, "jax.tree_util.Partial(function, weights)")
        check_count("count", self.count)
        check_number("temperature", self.temperature, least=0.0)
        if not self.base.stochastic:
            raise ValueError(
                f"`base` of SVDD must draw its steps, got {type(self.base).__name__}, whose next "
                "states are all one. Take Ancestral() or DDIM(eta=1.0)."
            )

    @property
    def stochastic(self) -> bool:
        """True."""
        return True

    def update(self, problem: Problem, x: Array, step: Step) -> Moved:
        """See `DiffusionSolver`."""
        wanted: tuple = ()
        if self.of_example:
            y, rest = take(problem.cond, "y", by="SVDD")
            wanted, problem = (y,), with_cond(problem, rest)
        found = problem.estimate(x, step.t)

        def child(key):
            own = dataclasses.replace(step, key=key)
            moved = self.advance_base(problem, x, own, found)
            ahead = problem.estimate(moved.x, step.s).x0
            # At the end the state is the sample, and nothing is left to be estimated.
            clean = jnp.where(problem.process.sigma(step.s) > 0, ahead, moved.x)
            return moved, or_worst(check_scalar(self.reward(clean, *wanted), "reward"))

        moved, values = jax.vmap(child)(jax.random.split(step.key, self.count + 1)[1:])
        cold = self.temperature <= 0
        logits = values / jnp.where(cold, 1, self.temperature)
        drawn = jax.random.categorical(jax.random.fold_in(step.key, self.count), logits)
        chosen = jnp.where(cold, jnp.argmax(values), drawn)
        kept = jax.tree.map(lambda leaf: leaf[chosen], moved)
        return kept._replace(nfe=jnp.asarray(kept.nfe) + self.count * problem.cost)

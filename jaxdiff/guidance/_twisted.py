"""Twisted sequential Monte Carlo: particles that are weighed, and drawn anew by their weights."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_callable, check_number
from jaxdiff._tree import Number, is_known, number
from jaxdiff.conditions import take
from jaxdiff.denoiser import Estimate
from jaxdiff.guidance._training_free import check_scalar, or_worst, with_cond
from jaxdiff.solvers import Ancestral, DiffusionSolver, GaussianSolver, PopulationSolver
from jaxdiff.solvers._base import Moved, Problem
from jaxdiff.stepwise import Step


class ParticleMemory(eqx.Module):
    """What is known of a particle.

    Attributes:
        base: the solver's own memory.
        log_weight: since the last resampling.
        pending: log p(x_s | x_t) - log q(x_s | x_t) - log twist(x_t), of its last move.
        log_evidence: of the population, log of the estimate of E f(y | x0), up to the last
            resampling.
    """

    base: PyTree
    log_weight: Array
    pending: Array
    log_evidence: Array


class TwistedSMC(PopulationSolver):
    """Particles that follow E[x0 | x_t, y] as guidance has it, and are weighed for its error.

    At every step from t to s, with the twist f~(y | x_t) = f(y | D(x_t)) and its slope g,

        weight *= p(x_t | x_before) f~(y | x_t) / (q(x_t | x_before) f~(y | x_before)),
        if the effective number falls below threshold size: draw particles anew by their weights,
        x_s ~ q = base's kernel at D + sigma^2 / alpha g,

    and at the end f itself in place of f~. A population of `size` consecutive examples, which have
    one y, the entry of their conditions; systematic resampling, and once more at the end, so that
    samples count alike. As size grows they tend to the law p(x0) f(y | x0) of the discretised
    chain, whatever the twist; exp of `Solution.memory.log_evidence` has the expectation
    E f(y | x0) under that chain for any size. Where a kernel has no width, as in a step to
    sigma = 0, particles take the base's own. Where no particle has f > 0 the population goes on as
    it is, and its `log_evidence` is -inf.

    Args:
        base: a solver that draws from a Gaussian kernel.
        size: of a population.
        log_prob: `(x0, y) -> log f(y | x0)`, a scalar of one clean example; a pytree. NaN counts
            as f = 0.
        twist: `(x0_hat, y, level) -> log f~`, level being sigma / alpha; None for log_prob itself.
        threshold: share of the population; 0 resamples at the end alone.

    Raises:
        TypeError: for a base without a kernel.
        ValueError: for a base that draws nothing; when called, without "y", for particles of one
            population with different conditions, or for a log_prob that is no scalar.

    Reference: Wu, Trippe, Naesseth, Blei, Cunningham, "Practical and Asymptotically Exact
    Conditional Sampling in Diffusion Models", 2023, arXiv 2306.17775.
    """

    base: DiffusionSolver = Ancestral()
    size: int = eqx.field(static=True, default=16)
    log_prob: Callable[[Array, PyTree], Array] = eqx.field(kw_only=True)
    twist: Callable[[Array, PyTree, Array], Array] | None = eqx.field(kw_only=True, default=None)
    threshold: Number = number(0.5)

    def __check_init__(self):
        check_callable("log_prob", self.log_prob, "jax.tree_util.Partial(function, weights)")
        if self.twist is not None:
            check_callable("twist", self.twist, "jax.tree_util.Partial(function, weights)")
        check_number("threshold", self.threshold, least=0.0, most=1.0)
        check_kernel(self, self.base)

    def check_cond(self, cond: PyTree) -> None:
        """See `DiffusionSolver`: particles of a population have one condition."""
        super().check_cond(cond)
        for leaf in jax.tree.leaves(cond):
            if is_known(leaf) and len(leaf) % self.size == 0:
                groups = np.asarray(leaf).reshape(-1, self.size, *np.shape(leaf)[1:])
                if not np.array_equal(groups, np.broadcast_to(groups[:, :1], groups.shape)):
                    raise ValueError(
                        f"`cond` must be the same for {self.size} examples in a row, which are one "
                        "population, got different ones. Repeat each with jnp.repeat."
                    )

    @property
    def needs_signal(self) -> bool:
        """True."""
        return True

    def init_memory(self, problem: Problem, x: Array) -> ParticleMemory:
        """See `DiffusionSolver`."""
        zero = jnp.zeros((), jnp.promote_types(x.dtype, jnp.float32))
        return ParticleMemory(self.base.init_memory(problem, x), zero, zero, zero)

    def _look(self, problem: Problem, x: Array, step: Step) -> tuple[Array, Array, Estimate]:
        """Of one particle: log of the twist, its slope, and the estimate."""
        y, rest = take(problem.cond, "y", by="TwistedSMC")
        problem = with_cond(problem, rest)
        level = problem.process.sigma(step.t) / problem.process.alpha(step.t)

        def value(x):
            found = problem.estimate(x, step.t)
            if self.twist is None:
                return check_scalar(self.log_prob(found.x0, y)), found
            return check_scalar(self.twist(found.x0, y, level), "twist"), found

        (twist, found), slope = jax.value_and_grad(value, has_aux=True)(x)
        return twist, slope, found

    def _move(
        self, problem: Problem, x: Array, step: Step, found: Estimate, slope: Array, twist: Array
    ) -> tuple[Array, Array, Array]:
        """Of one particle: the next state, what is pending, and log f there."""
        base: Any = self.base
        process = problem.process
        factor = process.sigma(step.t) ** 2 / process.alpha(step.t)
        pushed = found.moved(process, step.t, found.x0 + factor * slope)
        plain, guided = (
            base.transition(problem, *settled(problem, x, step, estimate))
            for estimate in (found, pushed)
        )
        mean, std = plain
        noise = jax.random.normal(step.key, x.shape, x.dtype)
        wide = jnp.asarray(std) > 0
        moved = jnp.where(wide, guided[0] + std * noise, mean).astype(x.dtype)
        apart = (moved - mean) / jnp.where(wide, std, 1)
        drawn = jnp.where(wide, noise, 0)
        pending = (jnp.sum(drawn**2) - jnp.sum(apart**2)) / 2 - twist
        y, _ = take(problem.cond, "y", by="TwistedSMC")
        return moved, pending, check_scalar(self.log_prob(moved, y))

    def update(self, problem: Problem, x: Array, step: Step) -> Moved:
        """See `DiffusionSolver`."""
        twist, slope, found = self.each(self._look, problem, x, step)
        memory = step.memory
        dtype = memory.log_weight.dtype
        weight = or_worst(memory.log_weight + memory.pending + twist.astype(dtype))
        below = effective_number(weight) < self.threshold * self.size
        shared: Any = step.shared
        first, last = jax.random.split(shared)
        chosen, weight, evidence = resample(first, weight, memory.log_evidence, below)
        rows = (x, found, slope, twist, memory.base, step.notes)
        x, found, slope, twist, base, notes = jax.tree.map(lambda leaf: leaf[chosen], rows)
        step = dataclasses.replace(step, memory=base, notes=notes)
        moved, pending, value = self.each(self._move, problem, x, step, found, slope, twist)
        pending = pending.astype(dtype)

        # At the end the weight is known, and particles are drawn by it.
        ends = step.s == problem.times[-1]
        whole = or_worst(weight + pending + value.astype(dtype))
        final, rest, known = resample(last, whole, evidence, ends)
        moved, base, notes = jax.tree.map(lambda leaf: leaf[final], (moved, base, found.notes))
        weight = jnp.where(ends, rest, weight)
        pending = jnp.where(ends, 0, pending)
        evidence = jnp.where(ends, known, evidence)
        return Moved(moved, ParticleMemory(base, weight, pending, evidence), problem.cost, notes)


def settled(
    problem: Problem, x: Array, step: Step, estimate: Estimate
) -> tuple[Array, Step, Estimate]:
    """The arguments of a solver's `transition`, from an estimate."""
    x, estimate = problem.settle(x, step.t, estimate)
    return x, step, estimate


def check_kernel(asked_by: Any, base: Any) -> None:
    """Reject solvers that do not draw from a Gaussian kernel.

    Raises:
        TypeError: for one without a kernel.
        ValueError: for one that draws nothing, or remembers earlier steps.
    """
    name = asked_by if isinstance(asked_by, str) else f"`base` of {type(asked_by).__name__}"
    if not isinstance(base, GaussianSolver):
        raise TypeError(
            f"{name} must draw from a Gaussian kernel, as Ancestral() and DDIM(eta=1.0) do, got "
            f"{type(base).__name__}."
        )
    if not base.stochastic:
        raise ValueError(
            f"{name} must draw its steps, got {type(base).__name__}, which does not. Take "
            "Ancestral() or DDIM(eta=1.0)."
        )


def effective_number(log_weight: Array) -> Array:
    """(sum w)^2 / sum w^2 of a population's weights `(size,)`."""
    return jnp.exp(2 * jax.nn.logsumexp(log_weight) - jax.nn.logsumexp(2 * log_weight))


def resample(
    key: PRNGKeyArray, log_weight: Array, log_evidence: Array, wanted: Array
) -> tuple[Array, Array, Array]:
    """Systematic resampling, where it is wanted.

    Args:
        key: the population's.
        log_weight: `(size,)`.
        log_evidence: `(size,)`, equal numbers.
        wanted: a boolean scalar.

    Returns:
        Indices of those who go on, their log-weights, and the log-evidence.

    Of no weight at all every particle goes on, with an evidence of 0.
    """
    size = len(log_weight)
    ends = jnp.cumsum(jax.nn.softmax(log_weight))
    marks = (jnp.arange(size) + jax.random.uniform(key, dtype=ends.dtype)) / size
    # Rounding may leave the last end below the last mark.
    drawn = jnp.minimum(jnp.searchsorted(ends, marks), size - 1)
    mean = jax.nn.logsumexp(log_weight) - jnp.log(float(size))
    drawn = jnp.where(mean == -jnp.inf, jnp.arange(size), drawn)
    return (
        jnp.where(wanted, drawn, jnp.arange(size)),
        jnp.where(wanted, 0, log_weight),
        jnp.where(wanted, log_evidence + mean, log_evidence),
    )

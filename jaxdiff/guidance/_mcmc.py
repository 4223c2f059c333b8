"""Kernels of Markov chain Monte Carlo for the law of x_t that a denoiser stands for."""

from abc import abstractmethod
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_count, check_number
from jaxdiff._tree import Number, number
from jaxdiff.denoiser import Denoiser, Estimate, check_estimate
from jaxdiff.energy import check_density


class Point(eqx.Module):
    """A state, and what is known of the law there.

    Attributes:
        x: `(*event)`.
        estimate: the denoiser's.
        score: of the law, `(*event)`.
        log_prob: up to a constant; 0 where no kernel asks for it.
    """

    x: Array
    estimate: Estimate
    score: Array
    log_prob: Array


class Target(eqx.Module):
    """The law of x_t, as a denoiser knows it: its score, and its density if it has a `log_prob`.

    Attributes:
        denoiser: any, also one that guides or composes.
        t: scalar time with sigma(t) > 0.
        cond: its condition, of one example.
    """

    denoiser: Denoiser
    t: Array
    cond: PyTree = None

    def at(self, x: Array, *, density: bool) -> Point:
        """The law at x: one evaluation, and one of the density if that is asked for.

        Raises:
            TypeError: if the denoiser does not know a density that is asked for.
        """
        process = self.denoiser.process
        alpha, sigma = process.alpha(self.t), process.sigma(self.t)
        found = self.denoiser.estimate(x, self.t, self.cond)
        check_estimate(self.denoiser, found, x)
        eps = (x - alpha * found.x0) / sigma if found.eps is None else found.eps
        log_prob = jnp.zeros((), jnp.promote_types(x.dtype, jnp.float32))
        if density:
            known = check_density(self.denoiser, "A Metropolis step")
            log_prob = known.log_prob(x, self.t, self.cond).astype(log_prob.dtype)
        return Point(x, found, (-eps / sigma).astype(x.dtype), log_prob)

    @property
    def scale(self) -> Array:
        """sigma(t), the length that steps are measured in."""
        return self.denoiser.process.sigma(self.t)


class Chain(NamedTuple):
    """One chain: where it is, and its momentum, `(*event)` or None."""

    point: Point
    momentum: Any


class Info(NamedTuple):
    """Of one step: whether the proposal was taken, and the log of its Metropolis ratio.

    Without a Metropolis step, True and 0.
    """

    accepted: Array
    log_ratio: Array


class Kernel(eqx.Module):
    """Base of the kernels, of one chain; `jax.vmap` outside.

        chain = kernel.init(key, target, x)
        chain, info = kernel.step(key, target, chain)

    The target may change from step to step; `init` again where it has. With `adjusted` a Metropolis
    step leaves the law itself invariant, and needs its density; without it that is true as the step
    size tends to 0.
    """

    adjusted: eqx.AbstractVar[bool]

    @property
    @abstractmethod
    def evaluations(self) -> int:
        """Of the denoiser, by a step; `init` takes one more."""

    @abstractmethod
    def init(self, key: PRNGKeyArray, target: Target, x: Array) -> Chain:
        """The start of a chain at x, `(*event)`."""

    @abstractmethod
    def step(self, key: PRNGKeyArray, target: Target, chain: Chain) -> tuple[Chain, Info]:
        """One step."""

    def choose(
        self, key: PRNGKeyArray, new: Chain, old: Chain, log_ratio: Array
    ) -> tuple[Chain, Info]:
        """The new chain with probability min(1, ratio), and the old one otherwise."""
        if not self.adjusted:
            return new, Info(jnp.ones((), bool), jnp.zeros_like(log_ratio))
        # A proposal where the density is not a number is none.
        accepted = jnp.log(jax.random.uniform(key, dtype=log_ratio.dtype)) < log_ratio
        chosen = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, old)
        return chosen, Info(accepted, log_ratio)


class Langevin(Kernel):
    """x' = x + e score(x) + sqrt(2 e) n: ULA; with a Metropolis step, MALA.

    e = step_size sigma(t)^2. On a Gaussian of variance v ULA's own variance is v / (1 - e / (2 v)),
    and it diverges from e = 2 v on. One evaluation.

    Args:
        step_size: of one step, in units of sigma(t)^2.
        adjusted: whether proposals are accepted by their Metropolis ratio, example by example.

    Reference: Roberts, Tweedie, "Exponential Convergence of Langevin Distributions and Their
    Discrete Approximations", 1996. The proposal's density has the variance 2 e of its noise.
    """

    step_size: Number = number(0.1)
    adjusted: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        check_number("step_size", self.step_size, above=0.0)

    @property
    def evaluations(self) -> int:
        """1."""
        return 1

    def init(self, key: PRNGKeyArray, target: Target, x: Array) -> Chain:
        """See `Kernel`."""
        del key
        return Chain(target.at(x, density=self.adjusted), None)

    def step(self, key: PRNGKeyArray, target: Target, chain: Chain) -> tuple[Chain, Info]:
        """See `Kernel`."""
        noise_key, accept_key = jax.random.split(key)
        old = chain.point
        length = self.step_size * target.scale**2
        noise = jax.random.normal(noise_key, old.x.shape, old.x.dtype)
        x = old.x + length * old.score + jnp.sqrt(2 * length) * noise
        new = target.at(x.astype(old.x.dtype), density=self.adjusted)

        def log_proposal(end: Point, start: Point) -> Array:
            return -jnp.sum((end.x - start.x - length * start.score) ** 2) / (4 * length)

        back, forth = log_proposal(old, new), log_proposal(new, old)
        return self.choose(
            accept_key, Chain(new, None), chain, new.log_prob - old.log_prob + back - forth
        )


class Hamiltonian(Kernel):
    """Momentum and `leaps` leapfrog steps: U-HMC; with a Metropolis step, HMC.

        v <- damping v + sqrt(1 - damping^2) n
        leaps times:  v += e / 2 score(x),  x += e v,  v += e / 2 score(x)

    with e = step_size sigma(t) and a mass of 1. A rejected proposal turns the momentum around.
    `leaps` evaluations. damping = 0 draws the momentum anew.

    Args:
        step_size: of one leap, in units of sigma(t); leaps diverge from twice the smallest standard
            deviation of the law on.
        leaps: of one step.
        damping: in [0, 1), what is kept of the momentum.
        adjusted: whether proposals are accepted by their Metropolis ratio, example by example.

    Reference: Neal, "MCMC Using Hamiltonian Dynamics", 2011; the partly kept momentum in
    Horowitz, "A Generalized Guided Monte Carlo Algorithm", 1991.
    """

    step_size: Number = number(0.3)
    damping: Number = number(0.5)
    leaps: int = eqx.field(static=True, default=3)
    adjusted: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        check_number("step_size", self.step_size, above=0.0)
        check_number("damping", self.damping, least=0.0, below=1.0)
        check_count("leaps", self.leaps)

    @property
    def evaluations(self) -> int:
        """One for each leap."""
        return self.leaps

    def init(self, key: PRNGKeyArray, target: Target, x: Array) -> Chain:
        """See `Kernel`; the momentum is drawn."""
        momentum = jax.random.normal(key, x.shape, x.dtype)
        return Chain(target.at(x, density=self.adjusted), momentum)

    def step(self, key: PRNGKeyArray, target: Target, chain: Chain) -> tuple[Chain, Info]:
        """See `Kernel`."""
        noise_key, accept_key = jax.random.split(key)
        dtype = chain.point.x.dtype
        noise = jax.random.normal(noise_key, chain.point.x.shape, dtype)
        started = self.damping * chain.momentum + jnp.sqrt(1 - self.damping**2) * noise
        started = started.astype(dtype)
        length = self.step_size * target.scale

        def leap(_, moving):
            point, v = moving
            v = v + length / 2 * point.score
            point = target.at((point.x + length * v).astype(dtype), density=self.adjusted)
            return point, (v + length / 2 * point.score).astype(dtype)

        point, v = jax.lax.fori_loop(0, self.leaps, leap, (chain.point, started))
        kinetic = (jnp.sum(started**2) - jnp.sum(v**2)) / 2
        log_ratio = point.log_prob - chain.point.log_prob + kinetic
        old = Chain(chain.point, -started)
        return self.choose(accept_key, Chain(point, v), old, log_ratio)

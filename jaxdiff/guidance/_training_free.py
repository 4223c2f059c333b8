"""Training-free guidance: gradients of what is wanted of x0, in one frame."""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_callable, check_count, check_number
from jaxdiff._tree import Number, is_known, number
from jaxdiff.conditions import take
from jaxdiff.guidance._scale import norm
from jaxdiff.processes import GaussianProcess
from jaxdiff.solvers import DDIM, DiffusionSolver, SolverWrapper
from jaxdiff.solvers._base import Moved, Problem
from jaxdiff.stepwise import Step


class GridStrength(eqx.Module):
    """A strength that depends on the whole grid: one number for each of its steps."""

    @abstractmethod
    def over(self, process: GaussianProcess, times: Array) -> Array:
        """Strengths of the steps, `(num_steps,)`, of a grid of times `(num_steps + 1,)`."""


# How far to follow a gradient at a step from t to s: a number; a function of the process, t, s and
# the norm of the gradient; or a table of the grid.
StrengthFunction: TypeAlias = Callable[[GaussianProcess, Array, Array, Array], Array]
Strength: TypeAlias = Number | StrengthFunction | GridStrength


def _shared_out(strength: Number, weights: Array) -> Array:
    """Strengths in these proportions, of a mean over steps."""
    return strength * weights / jnp.mean(weights)


class IncreasingStrength(GridStrength):
    """In proportion to (alpha_t / alpha_s)^2, with a given mean over the steps: more near data.

    Args:
        strength: the mean.

    Reference: Ye, Lin, Han, Xu, Liu, Liang, Zhang, Ermon, "TFG: Unified Training-Free Guidance for
    Diffusion Models", 2024, arXiv 2409.15761; as of its code, where alpha_t is of one step.
    """

    strength: Number = number(1.0)

    def __check_init__(self):
        check_number("strength", self.strength)

    def over(self, process: GaussianProcess, times: Array) -> Array:
        """See `GridStrength`."""
        alpha = process.alpha(times)
        return _shared_out(self.strength, (alpha[:-1] / alpha[1:]) ** 2)


class DecreasingStrength(GridStrength):
    """In proportion to 1 - (alpha_t / alpha_s)^2, with a given mean over the steps: more in noise.

    Args:
        strength: the mean.

    Raises:
        ValueError: when used, for a process whose alpha does not fall.

    Reference: as of `IncreasingStrength`.
    """

    strength: Number = number(1.0)

    def __check_init__(self):
        check_number("strength", self.strength)

    def over(self, process: GaussianProcess, times: Array) -> Array:
        """See `GridStrength`."""
        with jax.ensure_compile_time_eval():
            ends = process.alpha(jnp.asarray([1e-3, 0.5]))
            flat = ends[0] == ends[1]
        # The process itself may be traced.
        if is_known(flat) and flat:
            raise ValueError(
                f"`DecreasingStrength` must be of a process whose alpha falls, got "
                f"{type(process).__name__}. Take a number, or a function of t."
            )
        alpha = process.alpha(times)
        return _shared_out(self.strength, 1 - (alpha[:-1] / alpha[1:]) ** 2)


class NoiseStrength(eqx.Module):
    """strength sigma_t: for the smoothing of `TrainingFree`, which falls with the noise.

    Args:
        strength: the number.

    Reference: as of `IncreasingStrength`.
    """

    strength: Number = number(1.0)

    def __check_init__(self):
        check_number("strength", self.strength)

    def __call__(self, process: GaussianProcess, t: Array, s: Array, length: Array) -> Array:
        """The strength of a step from t to s; the gradient's norm does not matter."""
        del s, length
        return self.strength * process.sigma(t)


def planned(problem: Problem, **strengths: Strength | None) -> dict[str, Array]:
    """Tables of those strengths that depend on the grid, by name: a part of a wrapper's plan."""
    return {
        name: strength.over(problem.process, problem.times)
        for name, strength in strengths.items()
        if isinstance(strength, GridStrength)
    }


def strength_at(
    name: str, strength: Strength, process: GaussianProcess, step: Step, length: Array
) -> Number:
    """The strength at a step of a wrapper, for a gradient of such a norm."""
    if isinstance(strength, GridStrength):
        return step.plan.own[name]
    if not callable(strength):
        return strength
    return strength(process, step.t, step.s, length)


def check_strength(argument: str, strength: Any) -> None:
    """Reject what is no number, function or table."""
    if not callable(strength) and not isinstance(strength, GridStrength):
        check_number(argument, strength)


def smoothed(
    log_prob: Callable[[Array, PyTree], Array],
    key: PRNGKeyArray,
    size: Array | Number,
    draws: int,
) -> Callable[[Array, PyTree], Array]:
    """log (1 / n) sum_i f(x0 + size n_i) of f = exp log_prob, with the same draws at every call."""

    def value(x0: Array, y: PyTree) -> Array:
        noise = jax.random.normal(key, (draws, *x0.shape), x0.dtype)
        values = jax.vmap(lambda n: log_prob(x0 + (size * n).astype(x0.dtype), y))(noise)
        return jax.nn.logsumexp(values) - jnp.log(float(draws))

    return value


def with_cond(problem: Problem, cond: PyTree) -> Problem:
    """The problem under what is left of its condition."""
    return dataclasses.replace(problem, cond=cond)


def check_scalar(value: Array, argument: str = "log_prob") -> Array:
    """Reject an energy that is no scalar of one example."""
    if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise ValueError(
            f"`{argument}` must return a floating scalar of one example, got "
            f"{jnp.result_type(value)} of shape {jnp.shape(value)}."
        )
    return value


def or_worst(value: Array) -> Array:
    """Rewards and log-weights, in which NaN counts as the worst there is."""
    return jnp.where(jnp.isnan(value), -jnp.inf, value)


class TrainingFree(SolverWrapper):
    """A solver that follows grad log f(y | x0), through the denoiser and beside it.

    At every step from t to s, with D of the denoiser at x and f~ the f smoothed by n draws of
    standard deviation `smoothing`:

        v = rho grad_x log f~(D(x)),    d = 0, and `iterations` times d += mu grad log f~(D + d),
        x_s = Base(x, D) + v alpha_s / alpha_t + alpha_s d,

    or, without `keep_eps`, + (alpha_s - sigma_s alpha_t / sigma_t) d: what DDIM makes of D + d
    whose noise is the one that it implies.

    rho costs a backward pass of the network, mu gradients of f alone. A solver around a solver,
    with data of the example: the entry "y" of its condition. Time travel is `Recurrence` around
    it. What others do are settings of it:

    | method | rho | mu | draws | iterations |
    |---|---|---|---|---|
    | `DPS`, `FreeDoM` | by (t, s), see there | - | 0 | 0 |
    | `LossGuidance` (LGD-MC) | by (t, s), see there | - | n | 0 |
    | `ManifoldPreserving` (MPGD) | None | scale | 0 | 1 |
    | `Universal` | by (t, s), see there | rate | 0 | its own |

    Args:
        base: a solver that steps from an estimate.
        log_prob: `(x0, y) -> log f(y | x0)`, a scalar of one clean example; a pytree.
        rho: strength through the denoiser: a number, a function of the process, t, s and the norm
            of the gradient, or a `GridStrength` such as `IncreasingStrength(1.0)`, the paper's;
            None leaves it out, and the network's backward pass.
        mu: strength beside it, of the same kinds; smoothing, too, whose paper's is `NoiseStrength`.
        smoothing: standard deviation of the draws.
        draws: n; 0 takes f itself.
        iterations: of d; 0 leaves it out.
        keep_eps: whether d moves x0 alone, and not the noise with it.

    Raises:
        ValueError: without "y", or for a log_prob that is no scalar.

    Reference: Ye, Lin, Han, Xu, Liu, Liang, Zhang, Ermon, "TFG: Unified Training-Free Guidance for
    Diffusion Models", 2024, arXiv 2409.15761, algorithm 1. `search_training_free` looks for its
    strengths.
    """

    base: DiffusionSolver = DDIM()
    log_prob: Callable[[Array, PyTree], Array] = eqx.field(kw_only=True)
    rho: Strength | None = number(1.0)
    mu: Strength = number(1.0)
    smoothing: Strength = number(0.1)
    draws: int = eqx.field(static=True, default=0)
    iterations: int = eqx.field(static=True, default=0)
    keep_eps: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        check_callable("log_prob", self.log_prob, "jax.tree_util.Partial(function, weights)")
        for name in ("mu", "smoothing", *(() if self.rho is None else ("rho",))):
            check_strength(name, getattr(self, name))
        check_count("draws", self.draws, least=0)
        check_count("iterations", self.iterations, least=0)

    @property
    def stochastic(self) -> bool:
        """Whether the base draws, or f is smoothed."""
        return self.base.stochastic or self.draws > 0

    @property
    def needs_signal(self) -> bool:
        """Where rho is used, or the base does."""
        return self.rho is not None or self.base.needs_signal

    def own_plan(self, problem: Problem) -> dict[str, Array]:
        """Strengths that depend on the grid."""
        return planned(problem, rho=self.rho, mu=self.mu, smoothing=self.smoothing)

    def update(self, problem: Problem, x: Array, step: Step) -> Moved:
        """See `DiffusionSolver`."""
        y, rest = take(problem.cond, "y", by=type(self).__name__)
        problem = with_cond(problem, rest)
        process = problem.process
        log_prob = self.log_prob
        if self.draws:
            size = strength_at("smoothing", self.smoothing, process, step, jnp.zeros(()))
            log_prob = smoothed(log_prob, jax.random.fold_in(step.key, 1), size, self.draws)

        def through(x):
            found = problem.estimate(x, step.t)
            return check_scalar(log_prob(found.x0, y)), found

        if self.rho is None:
            found, shift = problem.estimate(x, step.t), jnp.zeros_like(x)
        else:
            slope, found = jax.grad(through, has_aux=True)(x)
            rho = strength_at("rho", self.rho, process, step, norm(slope))
            ratio = process.alpha(step.s) / process.alpha(step.t)
            shift = ratio * rho * slope
        clean = jax.lax.stop_gradient(found.x0)
        beside = jnp.zeros_like(clean)
        for _ in range(self.iterations):
            slope = jax.grad(lambda d: check_scalar(log_prob(clean + d, y)))(beside)
            mu = strength_at("mu", self.mu, process, step, norm(slope))
            beside = beside + (mu * slope).astype(clean.dtype)
        moved = self.advance_base(problem, x, step, found)
        alpha_s, reach = process.alpha(step.s), process.alpha(step.s)
        if not self.keep_eps:
            carried = process.alpha(step.t) / process.sigma(step.t)
            reach = alpha_s - process.sigma(step.s) * carried
        whole = moved.x + shift + reach * beside
        return moved._replace(x=whole.astype(x.dtype))

"""EVODiff."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff._tree import root
from jaxdiff.denoiser import Estimate
from jaxdiff.solvers._base import ExplicitSolver, Problem
from jaxdiff.solvers._exponential import half_log_snr
from jaxdiff.stepwise import Step


class Row(eqx.Module):
    """Coefficients of a step from t to s, each `(num_steps,)`.

    Attributes:
        second: whether the step extrapolates, rather than being the first or among the last.
        last: whether the step is the last one before sigma = 0.
        carry: sigma_s / sigma_t.
        gain: alpha_s - alpha_t sigma_s / sigma_t, the weight of x0_hat in DDIM's step.
        ratio: length of the step before, relative to this one, in log(alpha / sigma).
        balance: sqrt(carry / carry of the step before).
        weight: of the measured part of a balance.
        target: sigma_s.
        many: whether the grid has many steps, for which the authors have another zeta.
    """

    second: Array
    last: Array
    carry: Array
    gain: Array
    ratio: Array
    balance: Array
    weight: Array
    target: Array
    many: bool = eqx.field(static=True)


class Memory(eqx.Module):
    """What a step leaves for the next, which evaluates the state it probed.

    Attributes:
        output: the output at its start.
        older: the output at the start of the step before.
        base: DDIM's step.
        difference: d_1.
    """

    output: Array
    older: Array
    base: Array
    difference: Array


def _dot(a: Array, b: Array) -> Array:
    """Inner products over all axes but the channels, or over the only axis; of a number, itself."""
    axes = tuple(range(min(max(a.ndim - 1, 1), a.ndim)))
    return jnp.sum(a * b, axis=axes, keepdims=True)


def _along(a: Array, b: Array) -> Array:
    """The coefficient of a along b, within [-2, 2]; 0 where b is 0."""
    size = _dot(b, b)
    return jnp.clip(_dot(a, b) / jnp.where(size > 0, size, 1.0), -2.0, 2.0)


class EVODiff(ExplicitSolver):
    """Entropy-aware variance-optimised inference: a heuristic for few evaluations.

    A two-step method whose weights follow from how the outputs correlate, per channel. With D_-1
    and D_0 the last outputs, b = DDIM's step, g its weight of x0_hat and r the ratio of steps in
    lambda, it probes

        x_p = b + g / (2 r_i) d_1,    d_1 = D_0 - c_1 D_-1,    r_i = sigmoid(|c_1| / 4) r,

    evaluates D_p there, d_2 = D_p - c_2 D_0, and goes to

        x_s = b + g / (2 zeta) B,    B = -(eta / r) d_1 + r (1 - eta) d_2,

    c, eta and zeta being sigmoids of projections of one difference on another. D_p also serves
    as the next step's D_0: one evaluation a step.

    Not a convergent method: of formal order 1, and the authors' last step multiplies x by
    1 - sqrt(sigma_t sigma_s), so that errors level off as steps are added. Made for ten
    evaluations or so; use another solver to converge, and for likelihoods.

    Args:
        rescale_last: whether to take the authors' last step, the last one before sigma = 0; False
            takes DDIM's. A step to sigma = 0 returns x0_hat.

    Raises:
        ValueError: for a grid of fewer than two steps.

    Reference: Li, Chen, Zeng, "EVODiff: Entropy-aware Variance Optimized Diffusion Inference",
    2025, arXiv 2509.26096, with the constants of the authors' code.
    """

    rescale_last: bool = eqx.field(default=True, static=True)

    @property
    def needs_signal(self) -> bool:
        """True."""
        return True

    @property
    def stochastic(self) -> bool:
        """False."""
        return False

    def plan(self, problem: Problem) -> tuple[Row, Row]:
        """The coefficients of each step, and those of the step before it."""
        process, times, n = problem.process, problem.times, problem.num_steps
        if n < 2:
            raise ValueError(f"`times` must have at least 2 steps, got {n}.")
        alpha, sigma = process.alpha(times), process.sigma(times)
        to_zero = sigma[1:] == 0
        carry, index = sigma[1:] / sigma[:-1], jnp.arange(n)
        last = index == n - 1 - to_zero[-1]
        half = half_log_snr(process, times)
        h = jnp.where(to_zero, 1.0, jnp.where(to_zero, 0.0, half[1:]) - half[:-1])
        progress = (times[1:] + times[-1]) / (times[0] + times[-1])
        row = Row(
            (index > 0) & ~last & ~to_zero,
            last,
            carry,
            alpha[1:] - alpha[:-1] * carry,
            _previous(h) / h,
            root(carry / _previous(carry)),
            (1 - progress**2) / 2,
            sigma[1:],
            n > 20,
        )
        return row, jax.tree.map(_previous, row)

    def init_memory(self, problem: Problem, x: Array) -> Memory:
        """Nothing to correct."""
        del problem
        zero = jnp.zeros_like(x)
        return Memory(zero, zero, x, zero)

    def correct(self, x: Array, step: Step, estimate: Estimate) -> Array:
        """See `ExplicitSolver`."""
        before = step.plan[1]
        return jnp.where(before.second, _correct(before, step.memory, estimate.x0), x)

    def move(
        self, problem: Problem, x: Array, step: Step, estimate: Estimate
    ) -> tuple[Array, Memory, int]:
        """See `ExplicitSolver`."""
        row, process = step.plan[0], problem.process
        output, old = estimate.x0, step.memory.output
        base = row.carry * x + row.gain * output
        balance = _balance(row, output, old)
        difference = output - balance * old
        probe = base + row.gain / (2 * _factor(row, balance)) * difference
        following = jnp.where(row.second, probe, base)
        if self.rescale_last:
            share = 1 - root(jnp.where(row.carry < 0.5, row.carry, row.carry - 0.5)) / 2
            shrunk = (1 - root(process.sigma(step.t) * process.sigma(step.s))) * base
            following = jnp.where(
                row.last, shrunk + row.gain / 2 * (output - share * old), following
            )
        following, base, difference = (y.astype(x.dtype) for y in (following, base, difference))
        return following, Memory(output, old, base, difference), 0


def _previous(rows: Array) -> Array:
    return jnp.concatenate([rows[:1], rows[:-1]])


def _balance(row: Row, new: Array, old: Array) -> Array:
    """c: a number of the grid, mixed with how much of the new output the old one explains."""
    return (1 - row.weight) * row.balance + row.weight * _along(new, old)


def _factor(row: Row, balance: Array) -> Array:
    return jax.nn.sigmoid(jnp.abs(balance) / 4) * row.ratio


def _correct(row: Row, memory: Memory, output: Array) -> Array:
    """The end of a step from the output at its probe."""
    old, older, first = memory.output, memory.older, memory.difference
    second = output - _balance(row, output, old) * old
    backward, forward = first / row.ratio, row.ratio * second
    eta = jax.nn.sigmoid(jnp.abs(_along(forward + backward, forward - backward)) / 2) / 2
    slope = (1 - eta) * forward - eta * backward
    scale = row.gain / (2 * _factor(row, _balance(row, old, older)))
    zeta = jnp.abs(_along(scale * (first - slope), first) / row.gain) - 0.5
    if row.many:
        # In the authors' units, the outputs' difference is over a step in e^lambda.
        change = (old - older) * row.target / row.gain
        zeta = -zeta * jax.nn.sigmoid(_along(old, change) * (2 - row.carry**2))
    return memory.base + row.gain / (2 * jax.nn.sigmoid(zeta)) * slope

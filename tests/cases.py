"""Processes and oracles that several tests share."""

import dataclasses
from contextlib import nullcontext
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.scipy.stats import norm

import jaxdiff
from jaxdiff import oracles, processes, solvers
from jaxdiff._tree import jit
from jaxdiff.denoiser import Denoiser

PROCESSES = {
    "VP": processes.VP,
    "SubVP": processes.SubVP,
    "VE": processes.VE,
    "EDM": processes.EDM,
    "Cosine": processes.Cosine,
    "CosineOffset": lambda: processes.Cosine(offset=0.008),
    "RectifiedFlow": processes.RectifiedFlow,
    "TrigFlow": processes.TrigFlow,
    "Tabulated": lambda: processes.Tabulated(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))),
}


def mixture(process, dtype=jnp.float64):
    """Three unequal, correlated Gaussians in the plane, in two classes."""
    factors = jnp.asarray(
        [[[0.5, 0.0], [0.2, 0.3]], [[0.3, -0.1], [0.0, 0.4]], [[0.2, 0], [0, 0.6]]]
    )
    return oracles.gaussian_mixture(
        process,
        jnp.asarray([[-1.5, 0.5], [1.0, 1.0], [0.5, -1.5]], dtype),
        (factors @ factors.mT).astype(dtype),
        weights=jnp.asarray([0.5, 0.3, 0.2], dtype),
        labels=[0, 1, 1],
    )


def gaussian(process, size=3):
    """A correlated Gaussian."""
    factor = jax.random.normal(jax.random.key(7), (size, size)) / np.sqrt(size)
    mean = jnp.linspace(-0.5, 0.5, size)
    return oracles.gaussian(process, mean, factor @ factor.T + 0.01 * jnp.eye(size))


def bimodal(process):
    """Two unequal Gaussians on the line."""
    return oracles.gaussian_mixture(
        process,
        jnp.asarray([[-1.0], [0.8]]),
        jnp.asarray([[[0.09]], [[0.16]]]),
        weights=jnp.asarray([0.4, 0.6]),
    )


def quantile(oracle, x, t):
    """P(x_t <= x) for a mixture on the line: constant along the probability flow."""
    alpha, sigma = oracle.process.alpha(t), oracle.process.sigma(t)
    spread = jnp.sqrt(alpha**2 * oracle.covariances()[:, 0, 0] + sigma**2)
    tails = norm.cdf((x[..., None] - alpha * oracle.means[:, 0]) / spread)
    return jnp.sum(jnp.exp(oracle.log_weights) * tails, -1)


def quantile_error(solver, oracle, steps):
    """How far a solver leaves the exact flow of a mixture on the line."""
    times = times_at(oracle.process, -3.0, 2.0, steps + 1)
    x = jnp.linspace(-1.2, 1.2, 7)[:, None]
    out = jaxdiff.denoise(jax.random.key(0), oracle, x, solver=solver, times=times)
    ends = quantile(oracle, out.x[:, 0], times[-1]), quantile(oracle, x[:, 0], times[0])
    return np.abs(ends[0] - ends[1]).max()


def with_random_weights(build, seed=0):
    """The network with all weights drawn, also those that start at zero."""
    rng = np.random.default_rng(seed)
    shapes = nnx.eval_shape(build)
    return jax.tree.map(lambda w: jnp.asarray(0.3 * rng.normal(size=w.shape), w.dtype), shapes)


class Counting(Denoiser):
    """Counts its evaluations on the host."""

    denoiser: Denoiser
    calls: list = eqx.field(static=True, default_factory=list)

    @property
    def process(self):
        return self.denoiser.process

    def __hash__(self):
        return id(self)

    def __call__(self, x, t, cond=None, *, key=None):
        jax.debug.callback(lambda _: self.calls.append(1), t, ordered=False)
        return self.denoiser(x, t, cond, key=key)


class Coordinates(Denoiser):
    """An oracle of one number, for every coordinate."""

    oracle: oracles.GaussianMixture

    @property
    def process(self):
        return self.oracle.process

    def __call__(self, x, t, cond=None, *, key=None):
        return jax.vmap(lambda value: self.oracle(value[None], t)[0])(x.reshape(-1)).reshape(
            x.shape
        )


def coordinates(process):
    """The model of the golden trajectories, in every coordinate."""
    return Coordinates(bimodal(process))


@jit
def times_at(process, low, high, count):
    """Decreasing times, uniform in log-SNR."""
    return process.time(jnp.linspace(low, high, count))


@jit
def flow(oracle, x, start, times):
    """The exact states at `times` of an example that is at `x` at `start`."""
    return jax.vmap(lambda t: oracles.gaussian_flow_map(oracle, x, start, t))(times)


def walk(solver, denoiser, times, x, *, direction=-1, start=0, memory=None, noise=None):
    """All states of one example from `times[start]` on, one update after the other.

    `noise` replaces the draws: `(num_steps, draws of a step, *event)`; `memory` replaces what the
    first step would find.
    """
    return _walk(solver, denoiser, times, x, direction, start, memory, noise)


@jit  # one program, and one for all calls of the same structure
def _walk(solver, denoiser, times, x, direction, start, memory, noise):
    problem = solvers.Problem(denoiser, None, jax.random.key(0), times, direction)
    problem = dataclasses.replace(problem, plan=solver.plan(problem))
    memory = solver.init_memory(problem, x) if memory is None else memory

    def update(carry, row):
        i, t, s, plan, draws = row
        x, memory = carry
        step = solvers.Step(t, s, jax.random.fold_in(problem.key, i), plan, memory)
        remaining = iter(()) if draws is None else iter(draws)
        drawn = mock.patch("jax.random.normal", lambda key, shape, dtype: next(remaining))
        with nullcontext() if draws is None else drawn:
            moved = solver.take(problem, x, step)
        return (moved.x, moved.memory), moved.x

    rows = (jnp.arange(len(times) - 1), times[:-1], times[1:], problem.plan, noise)
    rows = jax.tree.map(lambda row: row[start:], rows)
    return jnp.concatenate([x[None], jax.lax.scan(update, (x, memory), rows)[1]])

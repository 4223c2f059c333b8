"""A solver of one's own: the exponential Euler step in the noise level, with a memory.

An `ExplicitSolver` defines `move`: one step of one example, from the estimate at its start. This
one extrapolates x0_hat linearly in log-SNR from the step before, which makes it second order.
"""

import jax
import jax.numpy as jnp
import numpy as np

import jaxdiff
from jaxdiff import oracles, processes, solvers


class LinearX0(solvers.ExplicitSolver):
    """x_s = (sigma_s / sigma_t) x_t + (alpha_s - alpha_t sigma_s / sigma_t) x0, x0 extrapolated."""

    stochastic = False  # nothing is drawn, and so it may invert

    def init_memory(self, problem, x):
        """No step before, no estimate of it, and no log-SNR."""
        return jnp.zeros_like(x), jnp.asarray(jnp.inf, x.dtype)

    def move(self, problem, x, step, estimate):
        """One step; the memory holds the estimate and its log-SNR; no further evaluation."""
        process = problem.process
        alpha_t, sigma_t = process.alpha(step.t), process.sigma(step.t)
        alpha_s, sigma_s = process.alpha(step.s), process.sigma(step.s)
        before, then = step.memory
        now = process.log_snr(step.t)
        # Half a step ahead of t; at the end of the grid log-SNR is infinite, and x0 is taken as is.
        ahead = (process.log_snr(step.s) - now) / 2
        usable = jnp.isfinite(then) & jnp.isfinite(ahead)
        slope = jnp.where(usable, ahead / jnp.where(usable, now - then, 1.0), 0.0)
        x0 = estimate.x0 + slope * (estimate.x0 - before)
        ratio = sigma_s / sigma_t
        return ratio * x + (alpha_s - alpha_t * ratio) * x0, (estimate.x0, now), 0


process = processes.VP()
oracle = oracles.gaussian(process, jnp.asarray([0.5, -1.0]), jnp.diag(jnp.asarray([0.2, 1.5])))
x = jax.random.normal(jax.random.key(0), (64, 2))


def error(solver, steps):
    """RMS distance to the exact flow, between log-SNR -3 and 3."""
    times = process.time(jnp.linspace(-3.0, 3.0, steps + 1))
    found = jaxdiff.denoise(jax.random.key(1), oracle, x, solver=solver, times=times).x
    exact = jax.vmap(lambda x: oracles.gaussian_flow_map(oracle, x, times[0], times[-1]))(x)
    return float(jnp.sqrt(jnp.mean((found - exact) ** 2)))


errors = np.array([[error(s, n) for n in (20, 40)] for s in (solvers.DDIM(), LinearX0())])
print("DDIM and LinearX0, 20 and 40 steps:", errors)
orders = np.log2(errors[:, 0] / errors[:, 1])
assert orders[0] < 1.2 and orders[1] > 1.6

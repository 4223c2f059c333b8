"""Guidance of one's own: towards a measurement y of the first coordinate.

A map of denoisers is a `DenoiserMap` with a `base`. It may take entries of the condition for itself
(`take`) and hands the rest on; numbers that are swept are `jaxdiff.number`s. The gradient goes
through x0_hat, and the step is that of a Gaussian posterior, so that it is exact on a Gaussian.
"""

import jax
import jax.numpy as jnp
import numpy as np

import jaxdiff
from jaxdiff import oracles, processes, solvers
from jaxdiff.conditions import take


class Measured(jaxdiff.DenoiserMap):
    """x0_hat + J^T-weighted residual: E[x0 | x_t, y] where the posterior of x0 is Gaussian."""

    base: jaxdiff.Denoiser
    std: jaxdiff.Number = jaxdiff.number(0.3)

    def __call__(self, x, t, cond=None, *, key=None):
        """The corrected estimate of one example."""
        y, rest = take(cond, "y", by="Measured")
        x0, pull = jax.vjp(lambda x: self.base(x, t, rest, key=key), x)
        (slope,) = pull(jnp.zeros_like(x).at[0].set(1.0))
        # sigma^2 / alpha J^T is the posterior covariance: its first row, and its corner.
        covariance = self.process.sigma(t) ** 2 / self.process.alpha(t) * slope
        gain = covariance / (covariance[0] + self.std**2)
        return (x0 + gain * (y - x0[0])).astype(x.dtype)


prior = oracles.gaussian(processes.VP(), jnp.zeros(2), jnp.asarray([[1.0, 0.8], [0.8, 1.0]]))
exact = prior.condition(jnp.asarray([[1.0, 0.0]]), jnp.asarray([1.2]), 0.3)
mean, covariance = exact.moments()
options = {"solver": solvers.DPMSolverMultistep(2), "times": 40}
out = jaxdiff.sample(
    jax.random.key(0), Measured(prior), (2,), 4000, cond={"y": jnp.full(4000, 1.2)}, **options
)
print("mean", out.x.mean(0), "exact", mean)
np.testing.assert_allclose(out.x.mean(0), mean, atol=0.05)
np.testing.assert_allclose(np.cov(np.asarray(out.x).T), covariance, atol=0.05)

# A sweep over the standard deviation of the measurement, in one program.
sweep = jax.jit(
    jax.vmap(
        lambda std: jaxdiff.sample(
            jax.random.key(0),
            Measured(prior, std),
            (2,),
            500,
            cond={"y": jnp.full(500, 1.2)},
            **options,
        ).x.mean(0)
    )
)
means = sweep(jnp.asarray([0.1, 0.5, 2.0]))
assert means[0, 0] > means[1, 0] > means[2, 0]

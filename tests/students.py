"""Students of unlimited capacity on a grid, for proofs of what a loss converges to."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff import processes
from jaxdiff.conditions import as_entries
from jaxdiff.denoiser import Denoiser
from jaxdiff.flow_map import FlowMap
from jaxdiff.processes import GaussianProcess


class AffineTable(FlowMap):
    """x -> slope_n x + offset_n to the end of a grid from its n-th time; from the end, x.

    Attributes:
        process: the forward process.
        times: of the grid, increasing, `(N + 1,)`.
        slopes: `(N,)`, of times[1:].
        offsets: likewise.
    """

    process: processes.EDM
    times: Array
    slopes: Array
    offsets: Array

    @classmethod
    def start(cls, process, grid, steps):
        times = grid.quantile(process, jnp.linspace(0, 1, steps + 1))
        return cls(process, times, jnp.ones(steps), jnp.zeros(steps))

    def __call__(self, x, t, s, cond=None, *, key=None):
        del s, cond, key
        n = jnp.argmin(jnp.abs(jnp.log(jax.lax.stop_gradient(self.times) / t)))
        moved = self.slopes[n - 1] * x + self.offsets[n - 1]
        return jnp.where(n == 0, x, moved)


class DenoiserTable(Denoiser):
    """D(x, t) = slope_n x + offset_n, with n the time of a grid that is nearest to t.

    Attributes:
        process: the forward process.
        times: of the grid, `(N,)`.
        slopes: `(N,)`.
        offsets: likewise.
    """

    process: processes.GaussianProcess
    times: Array
    slopes: Array
    offsets: Array

    @classmethod
    def start(cls, process, times):
        return cls(process, times, jnp.zeros(len(times)), jnp.zeros(len(times)))

    def __call__(self, x, t, cond=None, *, key=None):
        del cond, key
        n = jnp.argmin(jnp.abs(jax.lax.stop_gradient(self.times) - t))
        return self.slopes[n] * x + self.offsets[n]


class Count:
    """How often."""

    number = 0


class Passes(Denoiser):
    """A denoiser whose calls in a program are counted; under `vmap` each is one of a batch."""

    base: Denoiser
    count: Count = eqx.field(static=True, default_factory=Count)

    @property
    def process(self):
        return self.base.process

    def __call__(self, x, t, cond=None, *, key=None):
        self.count.number += 1
        return self.base(x, t, cond, key=key)


def learned(table):
    """For `Player(trainable=learned)`."""
    return table.slopes, table.offsets


class GaussianJump(Denoiser):
    """What a `Jump` is told where to must say to be the flow map of N(mean, std^2) in each number.

    The mean and the logarithm of the deviation learn. Of y = (1 - tau) x0 + tau eps, with the
    variance S = (1 - tau)^2 std^2 + tau^2, the mean velocity from tau to r is

        -mean + (y - (1 - tau) mean) ((tau + r) (1 + std^2) - 2 std^2) / (S_tau + sqrt(S_tau S_r)),

    which is finite where r = tau.
    """

    process: GaussianProcess
    network: dict[str, Array]

    @classmethod
    def of(cls, process, mean, std):
        return cls(process, {"mean": jnp.asarray(mean), "log_std": jnp.log(jnp.asarray(std))})

    def __call__(self, x, t, cond=None, *, key=None):
        del key
        mean, variance = self.network["mean"], jnp.exp(2 * self.network["log_std"])
        s = as_entries(cond)["until"]
        tau, r = (self.process.sigma(v) / (self.process.alpha(v) + self.process.sigma(v))
                  for v in (t, s))  # fmt: skip
        here, there = ((1 - v) ** 2 * variance + v**2 for v in (tau, r))
        y = x / (self.process.alpha(t) + self.process.sigma(t))
        rate = ((tau + r) * (1 + variance) - 2 * variance) / (here + jnp.sqrt(here * there))
        return y - tau * (rate * (y - (1 - tau) * mean) - mean)


class TwoTimesTable(Denoiser):
    """What a `Jump` is told where to says, of its own for any two times of a grid.

    The mean velocity slope y + offset of y, see `distillation.straightened`.

    Attributes:
        process: the forward process.
        times: of the grid, increasing, `(N + 1,)`.
        network: slopes and offsets, `(N + 1, N + 1)` each: of where from, and where to.
    """

    process: GaussianProcess
    times: Array
    network: tuple[Array, Array]

    @classmethod
    def start(cls, process, grid, steps):
        times = grid.quantile(process, jnp.linspace(0, 1, steps + 1))
        return cls(process, times, (jnp.zeros((steps + 1,) * 2), jnp.zeros((steps + 1,) * 2)))

    def __call__(self, x, t, cond=None, *, key=None):
        del key
        here, there = (
            jnp.argmin(jnp.abs(jax.lax.stop_gradient(self.times) - v))
            for v in (t, as_entries(cond)["until"])
        )
        size = self.process.alpha(t) + self.process.sigma(t)
        y, (slopes, offsets) = x / size, self.network
        return y - self.process.sigma(t) / size * (slopes[here, there] * y + offsets[here, there])

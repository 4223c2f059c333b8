"""What one call of `jaxdiff.sample` costs beside the program that it runs."""

from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx

import jaxdiff
from benchmarks.measure import Record, alternate
from benchmarks.solvers import PROCESS, ddim, nothing, scanned
from jaxdiff import networks

CALLS = 20


def sample_call() -> Iterator[Record]:
    """Ten DDIM steps of a tiny MLP for one example, against a compiled `lax.scan` of the same."""
    network = networks.MLP(2, hidden=32, num_blocks=1, rngs=nnx.Rngs(0))
    denoiser, key = jaxdiff.NetworkDenoiser(network, PROCESS), jax.random.key(0)
    times, by_hand = PROCESS.times(10), scanned(ddim, nothing, (2,), 1)

    def ours():
        return [jaxdiff.sample(key, denoiser, (2,), 1, times=times).x for _ in range(CALLS)]

    def theirs():
        return [by_hand(network, key, times, None) for _ in range(CALLS)]

    np.testing.assert_allclose(ours()[0], theirs()[0], rtol=1e-3, atol=1e-4)
    spent = np.array(alternate(ours, theirs, rounds=30)) / CALLS
    name = "jaxdiff.sample, 10 steps of a tiny MLP, batch 1"
    yield Record.of(f"{name} / jitted scan", (spent[0] / spent[1]).tolist(), "", "ratio")
    yield Record.of(name, (1e6 * spent[0]).tolist(), "us", "seconds")
    yield Record.of(
        f"{name}, over the scan", (1e6 * (spent[0] - spent[1])).tolist(), "us", "seconds"
    )

"""EVODiff against runs of its authors' code; golden/README.md says how they were made."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import coordinates, gaussian, times_at, walk

from jaxdiff import oracles, processes, solvers

GOLDEN = np.load(Path(__file__).with_name("golden") / "evodiff.npz")
POINTS = np.asarray([-1.7, -0.6, -0.2, 0.3, 0.9, 1.5])


@pytest.mark.parametrize("name", sorted({key.split("|")[0] for key in GOLDEN}))
def test_samples_are_those_of_the_authors(x64, name):
    times, expected = GOLDEN[f"{name}|times"], GOLDEN[f"{name}|x"]
    start = times[0] * POINTS.reshape(2, 3, 1)
    denoiser = coordinates(processes.EDM())
    path = walk(
        solvers.EVODiff(), denoiser, jnp.asarray(times), jnp.asarray(start.transpose(1, 2, 0))
    )
    # Their schedule rounds levels to float32.
    np.testing.assert_allclose(path[-1].transpose(2, 0, 1), expected, rtol=1e-5)


def errors(solver, steps):
    oracle = gaussian(processes.VP())
    times = times_at(oracle.process, -3.0, 3.0, steps + 1)
    x = jnp.asarray([1.0, -0.5, 0.7])
    exact = oracles.gaussian_flow_map(oracle, x, times[0], times[-1])
    return np.abs(walk(solver, oracle, times, x)[-1] - exact).max()


def test_it_does_not_converge_and_the_ddim_step_at_the_end_leaves_first_order(x64):
    rescaled = [errors(solvers.EVODiff(), n) for n in (160, 320)]
    assert rescaled[1] > 0.5 * rescaled[0] > 0.01
    plain = [errors(solvers.EVODiff(rescale_last=False), n) for n in (160, 320)]
    assert 0.7 < np.log2(plain[0] / plain[1]) < 1.3


def test_a_step_to_zero_returns_the_denoiser(x64):
    oracle = gaussian(processes.VP())
    times = jnp.asarray([0.9, 0.7, 0.5, 0.3, 0.0])
    path = walk(solvers.EVODiff(), oracle, times, jnp.asarray([1.0, -0.5, 0.7]))
    np.testing.assert_allclose(path[-1], oracle(path[-2], times[-2]), rtol=1e-9)
    # A point mass, where all differences vanish, is no division by zero.
    point = oracles.gaussian(processes.VP(), jnp.ones(3), jnp.zeros((3, 3)))
    end = jax.jit(lambda x: walk(solvers.EVODiff(False), point, times, x)[-1])(jnp.ones(3))
    np.testing.assert_allclose(end, jnp.ones(3), rtol=1e-9)


def test_bad_grids_are_named():
    with pytest.raises(ValueError, match="at least 2 steps, got 1"):
        walk(solvers.EVODiff(), gaussian(processes.VP()), jnp.asarray([0.9, 0.5]), jnp.ones(3))

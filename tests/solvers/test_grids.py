import jax.numpy as jnp
import numpy as np
import pytest
from cases import PROCESSES

from jaxdiff import processes, solvers

GRIDS = [
    solvers.uniform_times,
    solvers.log_snr_times,
    solvers.karras_times,
    solvers.quadratic_times,
    lambda process, n: process.times(n),
]


@pytest.mark.parametrize("make", PROCESSES.values(), ids=PROCESSES.keys())
def test_grids_decrease_strictly_in_float32_and_start_at_the_noise(make):
    process = make()
    for grid in GRIDS:
        for steps in (1, 2, 50, 1000):
            times = np.asarray(grid(process, steps))
            assert times.shape == (steps + 1,) and times.dtype == np.float32
            assert np.all(np.diff(times) < 0), (grid, steps)
            np.testing.assert_allclose(times[0], process.t_max, rtol=1e-6)
            solvers.check_times(process, times)


def test_each_grid_is_uniform_in_its_own_variable(x64):
    process = processes.VP()
    even = lambda values: np.ptp(np.diff(values)) < 1e-9 * np.abs(np.diff(values)).max()
    assert even(solvers.uniform_times(process, 20))
    assert even(process.log_snr(solvers.log_snr_times(process, 20)))
    assert even(np.sqrt(solvers.quadratic_times(process, 20)))
    levels = solvers.karras_times(process, 20, rho=3.0)[:-1]
    noise = np.exp(-process.log_snr(levels) / 2)
    assert even(noise ** (1 / 3))
    np.testing.assert_allclose(noise[-1], process.sigma(process.t_min), rtol=1e-4)


def test_karras_is_the_grid_of_edm(x64):
    edm = processes.EDM()
    np.testing.assert_allclose(solvers.karras_times(edm, 18), edm.times(18), rtol=1e-12)


def test_increasing_grids_are_for_inversion():
    process = processes.VP()
    times = solvers.uniform_times(process, 4, t_end=0.1)
    np.testing.assert_array_equal(
        solvers.check_times(process, times[::-1], increasing=True), times[::-1]
    )
    with pytest.raises(ValueError, match=r"strictly increase.*Pass times\[::-1\]"):
        solvers.check_times(process, times, increasing=True)
    with pytest.raises(ValueError, match="one-dimensional"):
        solvers.check_times(process, jnp.ones((2, 2)))
    resolved = solvers.resolve_times(process, 4, t_end=process.t_min, increasing=True)
    assert resolved[0] == np.float32(process.t_min) and np.all(np.diff(resolved) > 0)

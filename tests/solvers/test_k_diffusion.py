"""k-diffusion's samplers, state by state; see golden/README.md."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from cases import coordinates, walk

from jaxdiff import processes, solvers
from jaxdiff.predictions import X0, Eps

GOLDEN = np.load(Path(__file__).with_name("golden") / "k_diffusion.npz")
POINTS = np.asarray([-1.7, -0.6, -0.2, 0.3, 0.9, 1.5])


def sde(order, eta, kind="midpoint"):
    """k-diffusion's eta is the square of ours."""
    return solvers.DPMSolverMultistep(order, X0(), kind, eta**0.5, False)


CASES = {
    **{f"euler_ancestral/eta={e}": (solvers.DDIM(e), 1) for e in (0.5, 1.0)},
    **{
        f"dpm_2_ancestral/eta={e}": (solvers.AncestralNoise(solvers.DPMSolver(2, Eps()), e), 1)
        for e in (0.5, 1.0)
    },
    **{f"dpmpp_2s_ancestral/eta={e}": (solvers.AncestralNoise(eta=e), 1) for e in (0.5, 1.0)},
    **{
        f"dpmpp_2m_sde/{kind}/eta={e}": (sde(2, e, kind), 1)
        for e in (0.5, 1.0)
        for kind in ("midpoint", "heun")
    },
    **{f"dpmpp_3m_sde/eta={e}": (sde(3, e, "heun"), 1) for e in (0.5, 1.0)},
    "dpmpp_2m": (solvers.DPMSolverMultistep(2, lower_order_final=False), 0),
    "lms": (solvers.DEIS(4, "noise_level", False), 0),
}


def run(solver, name, draws):
    kap, states, drawn = (GOLDEN[f"{name}|{field}"] for field in ("kap", "x", "noise"))
    noise = None
    if draws:
        noise = np.zeros((len(kap) - 1, 1, 6))
        noise[: len(drawn), 0] = drawn
    denoiser = coordinates(processes.EDM())
    path = walk(solver, denoiser, jnp.asarray(kap), jnp.asarray(states[0]), noise=noise)
    return path, states


@pytest.mark.parametrize("name", sorted(CASES))
def test_states_are_those_of_the_reference(x64, name):
    solver, draws = CASES[name]
    path, states = run(solver, name, draws)
    np.testing.assert_allclose(path, states, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("nfe", [9, 10, 11])
def test_dpm_solver_fast_is_three_solvers_one_after_another(x64, nfe):
    """Orders 3, ..., 3 and what is left of the evaluations, on a grid uniform in log-SNR."""
    count = nfe // 3 + 1
    orders = [3] * (count - 2) + [2, 1] if nfe % 3 == 0 else [3] * (count - 1) + [nfe % 3]
    times = jnp.exp(jnp.linspace(jnp.log(15.0), jnp.log(0.03), count + 1))
    denoiser, x = coordinates(processes.EDM()), jnp.asarray(15.0 * POINTS)
    for i, order in enumerate(orders):
        x = walk(solvers.DPMSolver(order), denoiser, times[i : i + 2], x)[-1]
    np.testing.assert_allclose(x, GOLDEN[f"dpm_fast/nfe={nfe}|x"][0], rtol=1e-5)

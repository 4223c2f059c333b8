"""Trajectories of the reference schedulers, state by state; see golden/README.md."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import coordinates, walk

from jaxdiff import processes, solvers
from jaxdiff.predictions import X0, Eps

GOLDEN = np.load(Path(__file__).with_name("golden") / "diffusers.npz")
NAMES = sorted({key.split("|")[0] for key in GOLDEN})


def table(schedule):
    ends = (0.00085, 0.012) if schedule == "scaled_linear" else (1e-4, 0.02)
    if schedule == "scaled_linear":
        betas = np.linspace(*np.sqrt(ends), 1000) ** 2
    else:
        betas = np.linspace(*ends, 1000)
    return processes.Tabulated(np.cumprod(1 - betas))


@pytest.fixture(scope="module")
def models():
    with jax.enable_x64(True):
        tables = {name: table(name) for name in ("scaled_linear", "linear")}
        yield {name: coordinates(p) for name, p in (tables | {"ve": processes.EDM()}).items()}


def golden(name):
    return {key.split("|")[1]: GOLDEN[key] for key in GOLDEN if key.split("|")[0] == name}


def fields(name):
    parts = name.split("/")
    return parts, dict(part.split("=") for part in parts if "=" in part)


def times_of(denoiser, levels):
    """The process's times of noise levels, 0 for 0."""
    safe = np.where(levels > 0, levels, 1.0)
    return jnp.where(levels > 0, denoiser.process.time(-2 * jnp.log(safe)), 0.0)


def solver_of(name):
    """Our name for a case, or None where there is deliberately none."""
    parts, options = fields(name)
    family, order = parts[0], int(options.get("order", 1))
    lower = None if options.get("lof", "1") == "1" else False
    if family in ("DDIM", "DDIMInverse", "EulerDiscrete"):
        eta = float(options.get("eta", 0))
        return solvers.DDIM(eta if eta else None)
    if family == "EulerAncestralDiscrete":
        return solvers.Ancestral()
    if family in ("DPMSolverMultistep", "DPMSolverMultistepInverse", "EDMDPMSolverMultistep"):
        prediction = Eps() if parts[1].endswith("dpmsolver") else X0()
        kind = "heun" if "heun" in parts else "midpoint"
        eta = 1.0 if parts[1].startswith("sde") else None
        return solvers.DPMSolverMultistep(order, prediction, kind, eta, lower)
    if family == "UniPCMultistep":
        prediction = X0() if options["predict_x0"] == "1" else Eps()
        corrector = options["corrector"] == "1"
        return solvers.UniPC(
            order, prediction, parts[1], corrector=corrector, lower_order_final=True
        )
    if family == "DEISMultistep":
        return solvers.DEIS(order, "log_noise_level", lower)
    if family == "LMSDiscrete":
        return solvers.DEIS(order, "noise_level", False)
    if family == "SASolver":
        return solvers.SASolver(
            int(options["predictor"]),
            int(options["corrector"]),
            float(options["tau"]),
            few_step=True,
            lower_order_final=True,
        )
    if family == "PNDM":
        return solvers.PNDM(4, "heun" if options["skip_prk"] == "1" else "runge_kutta")
    if family == "IPNDM":
        return solvers.PNDM(4, "none")
    if family == "HeunDiscrete":
        return solvers.EDMHeun()
    if family == "KDPM2Discrete":
        return solvers.DPMSolver(2, Eps())
    raise AssertionError(name)


def left_out(name):
    """Cases of which the library has no counterpart on purpose."""
    parts, options = fields(name)
    return (
        parts[0] == "DPMSolverSinglestep"  # see its own test below
        or "noise_prediction" in parts
        or "euler_at_final" in parts
        # Its third-order SDE formula has a wrong sign, and order 1; see below.
        or (parts[1].startswith("sde") and options["order"] == "3")
    )


def run(name, models):
    """Our states at the golden's levels, and the golden's, in x coordinates."""
    case = golden(name)
    schedule = next((s for s in ("scaled_linear", "linear") if s in name.split("/")), "ve")
    denoiser = models[schedule if case["vp"] else "ve"]
    levels, states = case["kap"], case["x"]
    # Steps of length zero at an end are no steps, and inversion starts where sigma > 0.
    gaps = np.abs(np.diff(levels)) > 1e-9 * levels.max()
    levels, states = levels[0 if gaps[0] else 1 :], states[0 if gaps[0] else 1 :]
    compared = len(levels)
    if not gaps[-1]:
        # The reference lowers its order towards the step that is none, we towards the one before.
        levels, states, compared = levels[:-1], states[:-1], len(levels) - 3
    direction = -1 if levels[0] > levels[-1] else 1
    if direction == 1 and levels[0] == 0:
        levels, states = levels[1:], states[1:]
        compared -= 1
    noise = None
    if "noise" in case:
        noise = jnp.asarray(case["noise"])[: len(levels) - 1, None]
    ours = walk(
        solver_of(name),
        denoiser,
        times_of(denoiser, levels),
        jnp.asarray(states[0]),
        direction=direction,
        noise=noise,
    )
    return np.asarray(ours)[:compared], states[:compared]


@pytest.mark.parametrize("family", sorted({name.split("/")[0] for name in NAMES}))
def test_states_are_those_of_the_reference(x64, models, family):
    names = [n for n in NAMES if n.split("/")[0] == family and not left_out(n)]
    for name in names:
        ours, theirs = run(name, models)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7, err_msg=name)


def test_single_steps_are_those_of_the_reference(x64, models):
    """Two levels are one step of ours, with its stage at the one between.

    At order 3 the reference's second stage has M_0 / 2 where the paper has M_1: not compared.
    """
    chosen = [n for n in NAMES if n.startswith("DPMSolverSinglestep") and "midpoint" in n]
    for name in (n for n in chosen if "order=2" in n and "lof=1" in n and "sigma_min" in n):
        case, denoiser = golden(name), models["scaled_linear"]
        prediction = X0() if "dpmsolver++" in name.split("/") else Eps()
        levels, states, orders = case["kap"], case["x"], case["orders"].astype(int)
        for end in np.flatnonzero(np.append(orders[1:], 1) == 1):
            order, begin = int(orders[end]), end + 1 - orders[end]
            log = np.log(levels[begin : end + 1])
            r1 = (
                float((log[1] - log[0]) / (np.log(levels[end + 1]) - log[0])) if order > 1 else None
            )
            times = times_of(denoiser, levels[[begin, end + 1]])
            solver = solvers.DPMSolver(order, prediction, r1)
            ours = walk(solver, denoiser, times, jnp.asarray(states[begin]))[-1]
            np.testing.assert_allclose(ours, states[end + 1], rtol=1e-7, err_msg=name)


def test_the_third_order_sde_formula_of_the_reference_differs(x64, models):
    """Its quadratic term has the wrong sign, so that only its first steps, lower, agree."""
    name = next(n for n in NAMES if n.startswith("DPMSolverMultistep/sde") and "order=3" in n)
    ours, theirs = run(name, models)
    np.testing.assert_allclose(ours[:3], theirs[:3], rtol=1e-7)
    assert np.abs(ours[3] - theirs[3]).max() > 1e-5

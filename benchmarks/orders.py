"""Measure the order of every solver, and write orders.json for METHODS.md.

    make orders

The problems are those of the tests: the exact flows of a Gaussian (global order, with exact
starting values for methods with a history) and of a mixture on the line, and exact moments of a
Gaussian for solvers with noise (weak order of the variance). Double precision, slopes between n
and 2 n steps.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import test_family
import test_orders
from cases import bimodal, quantile_error

import jaxdiff
from jaxdiff import oracles, processes, solvers
from jaxdiff.solvers._singlestep import Singlestep

# Solvers that have no order of their own, and why.
WITHOUT_ORDER = {
    "EVODiff": "does not converge",
    "FixedPointInversion": "that of DDIM",
    "FlowMapSteps": "that of the flow map",
    "LearnedAncestral": "that of `Ancestral`",
    "RNRI": "that of DDIM",
}


def evaluations(solver) -> int:
    """Network evaluations that one more step costs."""
    oracle = test_family.vp_gaussian()
    first, second = (
        int(jaxdiff.sample(jax.random.key(0), oracle, (3,), 1, solver=solver, times=n).nfe[0])
        for n in (20, 21)
    )
    return second - first


def row(name, solver, claimed, measured, noise) -> dict:
    """One line of the table."""
    own = isinstance(solver, solvers.DiffusionSolver)
    if own:
        times = jnp.linspace(1.0, 0.1, 21)
        problem = solvers.Problem(test_family.vp_gaussian(), None, None, times, -1)
        problem = dataclasses.replace(problem, plan=solver.plan(problem))
        history = bool(jax.tree.leaves(solver.init_memory(problem, jnp.zeros(3))))
    kind = "stock" if not own else "multistep" if history else "single step"
    if isinstance(solver, Singlestep) and len(solver.fractions) > 1:
        kind = f"single step, {len(solver.fractions)} stages"
    return {
        "solver": name,
        "class": type(solver).__name__,
        "kind": kind,
        "noise": noise,
        "claimed": claimed,
        "measured": round(float(measured), 2),
        "evaluations": evaluations(solver),
    }


def main() -> None:
    """Measure everything; a few minutes."""
    rows = []
    with jax.enable_x64(True):
        for name, (solver, claimed) in test_orders.ON_THE_LINE.items():
            errors = [quantile_error(solver, bimodal(processes.VP()), n) for n in (80, 160)]
            rows.append(row(name, solver, claimed, np.log2(errors[0] / errors[1]), "ODE"))
        oracle = test_family.vp_gaussian()
        for name, (solver, formal, own) in test_family.DETERMINISTIC.items():
            measured = test_family.measured_order(solver, oracle, 70, exact_start=True)
            rows.append(row(name, solver, formal or own, measured, "ODE"))
        oracle = oracles.gaussian(processes.VP(), jnp.asarray([0.4]), jnp.asarray([[0.3]]))
        for name, (solver, claimed) in test_family.STOCHASTIC.items():
            errors = test_family.variance_errors(solver, oracle, (320, 640))
            rows.append(row(name, solver, claimed, np.log2(errors[0] / errors[1]), "SDE, weak"))
    path = Path(__file__).with_name("orders.json")
    path.write_text(json.dumps({"orders": rows, "none": WITHOUT_ORDER}, indent=1) + "\n")


if __name__ == "__main__":
    main()

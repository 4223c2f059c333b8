"""Any stock diffrax ODE solver, in variables that are finite at both ends.

With w = x / (alpha + sigma) and the clock v = -sigma / (alpha + sigma), which increases from
-1 (pure noise) to 0 (data), every Gaussian path is the rectified flow of its process,

    dw/dv = x0_hat - eps_hat,

regular at both ends. Explicit Euler in it is DDIM exactly; solvers of higher order keep theirs.
v is small near the data, where floating point then resolves it best.
"""

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff.processes import Process
from jaxdiff.solvers._base import Problem


def clock(process: Process, t: Array) -> Array:
    """v(t) = -sigma / (alpha + sigma)."""
    return -process.sigma(t) / (process.alpha(t) + process.sigma(t))


def time(process: Process, v: Array) -> Array:
    """The time of a clock value: the inverse of `clock`, within [t_min, t_max]."""
    return process.time(2 * (jnp.log1p(v) - jnp.log(-v)))


def scale(process: Process, t: Array) -> Array:
    """x / w = alpha + sigma at time t."""
    return process.alpha(t) + process.sigma(t)


def vector_field(v: Array, w: Array, problem: Problem) -> Array:
    """dw/dclock; the clock is v when sampling and -v when inverting."""
    process = problem.process
    v = -problem.direction * v
    noisiest, cleanest = jnp.sort(problem.times)[-1], jnp.sort(problem.times)[0]
    t = jnp.clip(time(process, v), cleanest, noisiest)
    x = scale(process, t) * w
    x0 = problem.x0(x, t)
    return -problem.direction * (x0 - problem.eps(x, t, x0))


def count_evaluations(solver: diffrax.AbstractSolver, num_steps: Array) -> Array:
    """Vector-field evaluations that an explicit diffrax solver spends in `num_steps` steps.

    Raises:
        TypeError: for solvers whose cost per step is not fixed.
    """
    if isinstance(solver, diffrax.Euler):
        return num_steps
    if isinstance(solver, diffrax.AbstractERK):
        stages = solver.tableau.num_stages
        # A first-same-as-last method evaluates its first stage once, at the start.
        return num_steps * (stages - 1) + 1 if solver.tableau.fsal else num_steps * stages
    raise TypeError(
        f"`solver` must be a solver of this library or an explicit diffrax ODE solver (Euler or "
        f"a Runge-Kutta method such as Heun, Tsit5, Dopri5), got {type(solver).__name__}."
    )


def check_stock(process: Process, times: Array) -> None:
    """A Runge-Kutta stage at sigma = 0 would divide zero by zero."""
    last = times.min()
    if isinstance(last, jax.core.Tracer):
        return
    if process.sigma(last) == 0:
        raise ValueError(
            f"`times` must stay where sigma > 0 with a stock diffrax solver, got {float(last):g}. "
            f"End the grid at process.t_min = {float(process.t_min):g}, or use a solver of this "
            "library, which takes the last step to 0 exactly."
        )

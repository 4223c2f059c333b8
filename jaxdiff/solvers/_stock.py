"""In which variables a solver integrates: its own, or diffrax's solvers in finite ones.

Stock ODE solvers integrate w = x / (alpha + sigma) in the clock v = -sigma / (alpha + sigma),
which increases from -1 (pure noise) to 0 (data). There every Gaussian path is the rectified flow
of its process,

    dw/dv = x0_hat - eps_hat,

regular at both ends. Explicit Euler in it is DDIM exactly; solvers of higher order keep theirs.
v is small near the data, where floating point then resolves it best.

Stock SDE solvers integrate z = x / sigma in the clock lambda = log(alpha / sigma), where the
noise is additive:

    dz = [-eta^2 z + (1 + eta^2) e^lambda x0_hat] dlambda + sqrt(2) eta dW.
"""

from abc import abstractmethod
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, is_known, number
from jaxdiff.processes import GaussianProcess
from jaxdiff.solvers._base import DiffusionSolver, Problem, is_silent
from jaxdiff.solvers._brownian import AREAS, AdditiveNoise, GridNoise


class ReverseSDE(eqx.Module):
    """A stock diffrax SDE solver on the reverse SDE with noise level eta.

    In z = x / sigma and lambda = log(alpha / sigma) the noise is additive, which solvers such as
    `diffrax.ShARK` and `diffrax.SRA1` turn into strong order 1.5. The drift is stiff where
    eta^2 h > 1 in steps h of lambda: `SEEDS` and `SASolver`, which integrate it exactly, stand
    longer steps.

    Args:
        solver: `diffrax.Euler()`, `EulerHeun()`, or a stochastic Runge-Kutta method (`ShARK()`,
            `SRA1()`, `SEA()`, ...). On a grid, each step draws its own increment. With a
            `stepsize_controller` the increments come from a virtual Brownian tree: the path of
            an example then does not depend on the steps that sample it, but steps cost more and
            diffrax's runtime checks come in, which on a mesh need communication.
        eta: noise level; 1 is Anderson's reverse SDE.

    Raises:
        TypeError: for other solvers.

    Reference: Kidger, "On Neural Differential Equations", 2021, arXiv 2202.02435, section 4;
    Foster, dos Reis, Strange, "High Order Splitting Methods for SDEs Satisfying a Commutativity
    Condition", 2022, arXiv 2210.17543, for ShARK.
    """

    solver: diffrax.AbstractSolver
    eta: Number = number(1.0)

    def __check_init__(self):
        check_number("eta", self.eta, least=0.0)
        if not isinstance(self.solver, (diffrax.Euler, diffrax.EulerHeun, diffrax.AbstractSRK)):
            raise TypeError(
                "`solver` must be diffrax.Euler(), EulerHeun() or a stochastic Runge-Kutta method "
                f"such as ShARK(), got {type(self.solver).__name__}."
            )


def clock(process: GaussianProcess, t: Array) -> Array:
    """v(t) = -sigma / (alpha + sigma)."""
    return -process.sigma(t) / scale(process, t)


def time(process: GaussianProcess, v: Array) -> Array:
    """The time of a clock value: the inverse of `clock`."""
    return process.unbounded_time(2 * (jnp.log1p(v) - jnp.log(-v)))


def scale(process: GaussianProcess, t: Array) -> Array:
    """x / w = alpha + sigma at time t."""
    return process.alpha(t) + process.sigma(t)


def vector_field(v: Array, w: Array, problem: Problem) -> Array:
    """dw/dclock of one example; the clock is v when sampling and -v when inverting."""
    process = problem.process
    t = _clip(problem, time(process, -problem.direction * v))
    x = scale(process, t) * w
    x0 = plain_x0(problem, x, t)
    return -problem.direction * (x0 - problem.eps(x, t, x0))


def plain_x0(problem: Problem, x: Array, t: Array) -> Array:
    """x0_hat of a denoiser that has no noise of its own to go on with.

    Raises:
        TypeError: for one that has, of which the flow knows nothing.
    """
    found = problem.estimate(x, t)
    if found.eps is not None:
        raise TypeError(
            f"`denoiser` {type(problem.denoiser).__name__} goes on with another noise than x0_hat "
            "implies, which the probability flow does not have. Sample it with a solver of this "
            "library, such as DDIM()."
        )
    return found.x0


def count_evaluations(solver: Any, num_steps: Any) -> Any:
    """Vector-field evaluations that an explicit diffrax solver spends in `num_steps` steps.

    Raises:
        TypeError: for solvers whose cost per step is not fixed.
    """
    if isinstance(solver, (diffrax.Euler, diffrax.EulerHeun)):
        return num_steps
    if isinstance(solver, diffrax.AbstractSRK):
        return num_steps * len(solver.tableau.b_sol)
    if isinstance(solver, diffrax.AbstractERK):
        tableau: Any = solver.tableau
        stages = tableau.num_stages
        # A first-same-as-last method evaluates its first stage once, at the start.
        return num_steps * (stages - 1) + 1 if tableau.fsal else num_steps * stages
    raise TypeError(
        f"`solver` must be a solver of this library or an explicit diffrax ODE solver (Euler or "
        f"a Runge-Kutta method such as Heun, Tsit5, Dopri5), got {type(solver).__name__}."
    )


def _clip(problem: Problem, t: Array) -> Array:
    """Rounding of the clock may leave the grid."""
    # By its ends, because a reduction over the grid might be spread over devices.
    low, high = problem.times[-1], problem.times[0]
    return jnp.clip(t, low, high) if problem.direction == -1 else jnp.clip(t, high, low)


class Gauge(eqx.Module):
    """The variables of one solver: an increasing clock, and the state x / scale(t); of a batch."""

    @abstractmethod
    def clock(self, problem: Problem, t: Array) -> Array:
        """The clock at a time of the process."""

    @abstractmethod
    def time(self, problem: Problem, clock: Array) -> Array:
        """The time of the process, within the grid, at a value of the clock."""

    @abstractmethod
    def scale(self, process: GaussianProcess, t: Array) -> Array:
        """x over the solver's state."""

    @abstractmethod
    def terms(self, problem: Problem, state: Array) -> diffrax.AbstractTerm:
        """What diffrax integrates; `state` is the initial one, `(batch, *event)`."""


class Own(Gauge):
    """The solvers of this library: x itself, and the number of the step."""

    def clock(self, problem: Problem, t: Array) -> Array:
        """See `Gauge`; linear within a step, of a grid that all examples share."""
        steps = jnp.arange(problem.num_steps + 1, dtype=problem.times.dtype)
        return jnp.interp(problem.direction * t, problem.direction * problem.times, steps)

    def time(self, problem: Problem, clock: Array) -> Array:
        """See `Gauge`; one for all, or one for each example."""
        index = jnp.clip(jnp.floor(clock).astype(jnp.int32), 0, problem.num_steps - 1)
        start, end = problem.times[..., index], problem.times[..., index + 1]
        within = clock - index
        # Exact at both ends of a step.
        return jnp.where(within == 1, end, start + within * (end - start))

    def scale(self, process: GaussianProcess, t: Array) -> Array:
        """1."""
        return jnp.ones_like(t)

    def terms(self, problem: Problem, state: Array) -> diffrax.ODETerm:
        """A placeholder: these solvers read the problem instead."""
        del problem, state
        return diffrax.ODETerm(lambda t, x, problem: x)


class Flow(Gauge):
    """Stock ODE solvers: the rectified flow of the process."""

    def clock(self, problem: Problem, t: Array) -> Array:
        """See `Gauge`."""
        return -problem.direction * clock(problem.process, t)

    def time(self, problem: Problem, clock: Array) -> Array:
        """See `Gauge`."""
        return _clip(problem, time(problem.process, -problem.direction * clock))

    def scale(self, process: GaussianProcess, t: Array) -> Array:
        """See `Gauge`."""
        return scale(process, t)

    def terms(self, problem: Problem, state: Array) -> diffrax.ODETerm:
        """See `Gauge`."""
        del problem, state

        def field(v: Any, w: Array, problem: Problem) -> Array:
            return jax.vmap(vector_field, (None, 0, problem.axes))(v, w, problem)

        return diffrax.ODETerm(field)


class Noisy(Gauge):
    """Stock SDE solvers: x / sigma and lambda."""

    sde: ReverseSDE
    adaptive: bool = eqx.field(static=True)

    def clock(self, problem: Problem, t: Array) -> Array:
        """See `Gauge`."""
        return problem.process.log_snr(t) / 2

    def time(self, problem: Problem, clock: Array) -> Array:
        """See `Gauge`."""
        return _clip(problem, problem.process.unbounded_time(2 * clock))

    def scale(self, process: GaussianProcess, t: Array) -> Array:
        """See `Gauge`."""
        return process.sigma(t)

    def terms(self, problem: Problem, state: Array) -> diffrax.MultiTerm:
        """Drift, and additive noise along each example's own Brownian path."""
        eta, solver = jnp.asarray(self.sde.eta, state.dtype), self.sde.solver
        wanted: Any = getattr(solver, "minimal_levy_area", None)
        area: Any = AREAS.get(wanted, diffrax.BrownianIncrement)
        if self.adaptive:
            # Of a single example: steps are its own.
            shape = jax.ShapeDtypeStruct(state.shape, state.dtype)
            start, end = self.clock(problem, problem.times[jnp.asarray([0, -1])])
            resolution = (end - start) / 2**12
            path: Any = diffrax.VirtualBrownianTree(
                start, end, resolution, shape, problem.key[0], area
            )
        else:
            event = jax.ShapeDtypeStruct(state.shape[1:], state.dtype)
            path = GridNoise(key=problem.key, shape=event, levy_area=area)

        def drift(clock, z, problem):
            t = self.time(problem, clock)

            def one(z, problem):
                x0 = plain_x0(problem, (problem.process.sigma(t) * z).astype(z.dtype), t)
                return ((1 + eta**2) * jnp.exp(clock) * x0 - eta**2 * z).astype(z.dtype)

            return jax.vmap(one, (0, problem.axes))(z, problem)

        noise = AdditiveNoise(jnp.sqrt(jnp.asarray(2.0, state.dtype)) * eta, path)
        return diffrax.MultiTerm(diffrax.ODETerm(drift), noise)


def gauge(
    solver: diffrax.AbstractSolver | ReverseSDE, adaptive: bool
) -> tuple[Gauge, diffrax.AbstractSolver]:
    """The variables of a solver, and the diffrax solver itself."""
    if isinstance(solver, DiffusionSolver):
        return Own(), solver
    if isinstance(solver, ReverseSDE):
        return Noisy(solver, adaptive), solver.solver
    return Flow(), solver


def check_stock(
    solver: diffrax.AbstractSolver | ReverseSDE, process: GaussianProcess, times: Array
) -> None:
    """Reject solvers of other equations, and stages at sigma = 0, which divide zero by zero.

    Raises:
        TypeError: for an SDE solver as such, and for implicit ones.
        ValueError: if the grid reaches sigma = 0.
    """
    if isinstance(solver, (diffrax.AbstractSRK, diffrax.EulerHeun)):
        raise TypeError(
            f"`solver` must be a solver of ODEs, got {type(solver).__name__}, which solves SDEs. "
            f"Wrap it: ReverseSDE(diffrax.{type(solver).__name__}())."
        )
    if not isinstance(solver, ReverseSDE):
        count_evaluations(solver, 0)
    if not is_known(times):
        return
    last = np.asarray(times).min()
    if is_silent(process, last):
        raise ValueError(
            f"`times` must stay where sigma > 0 with a stock diffrax solver, got {last:g}. "
            f"End the grid at process.t_min = {float(process.t_min):g}, or use a solver of this "
            "library, which takes the last step to 0 exactly."
        )

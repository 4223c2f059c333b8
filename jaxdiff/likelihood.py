"""Log-likelihood, by the change of variables along the probability-flow ODE.

In the variables of the stock solvers, w = x / c with c = alpha + sigma and a clock q that
grows with noise, the flow dw/dq = f(w, q) is regular at both ends, and density follows it as
d log p(w) / dq = -div f. From t_min = eps to t_max = T, in x coordinates,

    log p_eps(x) = log N(x_T; 0, sigma_T^2 I) + d log(c_T / c_eps) + int div f dq.

Reference: Chen, Rubanova, Bettencourt, Duvenaud, "Neural Ordinary Differential Equations",
2018, arXiv 1806.07366, theorem 1; Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole,
"Score-Based Generative Modeling through Stochastic Differential Equations", 2021,
arXiv 2011.13456, appendix D.2, equations 39 and 40.
"""

import math

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PRNGKeyArray, PyTree

from jaxdiff._checks import (
    check_batch_size,
    check_cond,
    check_count,
    check_finite,
    check_key,
    check_number,
    check_scalars,
)
from jaxdiff._tree import as_float_array, as_number, batched, jit
from jaxdiff.denoiser import Denoiser, check_denoiser
from jaxdiff.solvers import _stock
from jaxdiff.solvers._base import GridSteps, Problem
from jaxdiff.solvers._times import resolve_times
from jaxdiff.stepwise import check_stepless
from jaxdiff.traces import ExactTrace, TraceEstimator, check_probe_key, standard_error


class LogLikelihood(eqx.Module):
    """What `log_likelihood` returns for a batch.

    Attributes:
        log_prob: log p(x) in nats, `(batch,)`; NaN where the solver failed.
        standard_error: of log_prob over the probes, `(batch,)`: 0 for the exact trace, NaN for
            a single probe. It knows nothing of the solver's own error. A constant to derivatives.
        latent: the states at the last time, `(batch, *event)`.
        nfe: network evaluations spent on each example, `(batch,)` integers. The products with
            the Jacobian come on top: as many as probes, at each evaluation.
        result: diffrax's result code of each example.
    """

    log_prob: Array
    standard_error: Array
    latent: Array
    nfe: Array
    result: diffrax.RESULTS


def _augmented_field(q: Array, state: tuple[Array, Array], args: tuple) -> tuple[Array, Array]:
    problem, trace, probes = args
    return trace(lambda w: _stock.vector_field(q, w, problem), state[0], probes)


def _larger_rms(y: PyTree) -> Array:
    """The larger error of state and log density: a joint mean would drown the density in d."""
    return jnp.stack([jnp.sqrt(jnp.mean(leaf**2)) for leaf in jax.tree.leaves(y)]).max()


@jit
def _log_likelihood(
    key, x, cond, denoiser, times, trace, *, solver, controller, adjoint, batch_size
):
    process, ends = denoiser.process, times[jnp.asarray([0, -1])]
    clock, (start, end) = -_stock.clock(process, times), _stock.scale(process, ends)

    def one(index, x, cond):
        w = x / start
        probes = trace.probes(None if key is None else jax.random.fold_in(key, index), w)
        problem = Problem(denoiser, cond, None, times, 1)
        estimates = jax.eval_shape(_augmented_field, clock[0], (w,), (problem, trace, probes))[1]
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(_augmented_field),
            solver,
            clock[0],
            clock[-1],
            None,
            (w, jnp.zeros(estimates.shape, w.dtype)),
            args=(problem, trace, probes),
            stepsize_controller=GridSteps(clock) if controller is None else controller,
            adjoint=adjoint,
            max_steps=clock.shape[0] - 1 if controller is None else 4096,
            throw=False,
        )
        latent, integrals = end * solution.ys[0][0], solution.ys[1][0]
        log_prior = process.prior_log_prob(latent, ends[-1])
        log_prob = log_prior + x.size * jnp.log(end / start) + integrals.mean()
        failed = solution.result != diffrax.RESULTS.successful
        nfe = _stock.count_evaluations(solver, solution.stats["num_steps"])
        return LogLikelihood(
            jnp.where(failed, jnp.nan, log_prob),
            standard_error(integrals, trace.stochastic),
            latent.astype(x.dtype),
            nfe * denoiser.evaluations,
            solution.result,
        )

    return batched(one, batch_size)(jnp.arange(x.shape[0]), x, cond)


def log_likelihood(
    denoiser: Denoiser,
    x: Array,
    *,
    cond: PyTree = None,
    key: PRNGKeyArray | None = None,
    trace: TraceEstimator = ExactTrace(),
    solver: diffrax.AbstractSolver = diffrax.Tsit5(),
    times: int | ArrayLike | None = None,
    stepsize_controller: diffrax.AbstractStepSizeController | None = diffrax.PIDController(
        rtol=1e-5, atol=1e-5, norm=_larger_rms
    ),
    batch_size: int | None = None,
    adjoint: diffrax.AbstractAdjoint = diffrax.RecursiveCheckpointAdjoint(),
) -> LogLikelihood:
    """log p(x) of each example under the probability-flow ODE of a denoiser.

    The prior at t_max is N(0, sigma(t_max)^2 I), as in `sample`. What comes out is the density
    of the model at the first time, p_eps with eps = t_min, and not of clean data, p_0: x should
    be data, dequantised if it is discrete, whose density at noise eps is close to its own. With
    the exact denoiser it differs from the true log p_eps by what the prior leaves out,
    log N(x_T; 0, sigma_T^2 I) - log p_T(x_T) at the latent x_T, of order alpha_T.

    Differentiable in x and the denoiser. Compiled once for each structure, like `sample`.

    Args:
        denoiser: the denoiser; deterministic, since no key is passed to it.
        x: states at the first time, `(batch, *event)`; integers become floats.
        cond: pytree with a leading axis of `batch`, or None.
        key: typed PRNG key; example i draws its probes from `fold_in(key, i)`. Needed by the
            estimators that draw probes.
        trace: `ExactTrace()` for small events, `Hutchinson(...)` or `HutchPlusPlus(...)`.
        solver: an explicit diffrax ODE solver.
        times: an increasing grid of times, or a number of steps on the process's customary
            grid from t_min to t_max. An adaptive controller takes two times, or None for t_min
            and t_max.
        stepsize_controller: a diffrax controller for adaptive steps; None to step through
            `times`. The default bounds the error of the state and of the log density, in nats,
            each by 1e-5 plus 1e-5 of its size per step.
        batch_size: examples computed at a time, to bound memory; None for all at once.
        adjoint: how to differentiate; `diffrax.ForwardMode()` for forward derivatives.

    Returns:
        A `LogLikelihood`.

    Raises:
        TypeError: if `key` is not a typed key, the solver is not an explicit diffrax one, or the
            denoiser draws, remembers or decides once a step.
        ValueError: for a missing key, an x that is not finite, a grid that does not increase,
            leaves the process or does not suit the controller, or a `cond` of the wrong length.

    Examples:
        >>> oracle = oracles.gaussian(processes.VP(), jnp.zeros(2), jnp.eye(2))
        >>> exact = jaxdiff.log_likelihood(oracle, jnp.zeros((1, 2)), trace=traces.ExactTrace())
        >>> round(float(exact.log_prob[0]), 2)  # of the standard normal, -log(2 pi)
        -1.84

    Reference: Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole, "Score-Based Generative
    Modeling through Stochastic Differential Equations", 2021, arXiv 2011.13456, appendix D.2,
    equations 39 and 40. They integrate x in t; the density is the same, the path is smoother.
    """
    check_denoiser(denoiser)
    check_stepless(denoiser, "`log_likelihood`")
    _check_solver(solver)
    check_probe_key(key, trace)
    x = as_float_array(x)
    check_finite(x)
    check_cond(cond, x.shape[0])
    denoiser.check_cond(cond)
    check_scalars(denoiser)
    check_batch_size(batch_size)
    times = _resolve(solver, denoiser.process, times, stepsize_controller)
    return _log_likelihood(
        key if trace.stochastic else None, x, cond, denoiser, times, trace, solver=solver,
        controller=stepsize_controller, adjoint=adjoint, batch_size=batch_size,
    )  # fmt: skip


def _resolve(solver, process, times, controller) -> Array:
    if times is None and controller is None:
        raise ValueError(
            "`times` must be given to step through a grid, got None with "
            "`stepsize_controller=None`. Pass a number of steps, e.g. times=100."
        )
    times = 1 if times is None else times
    times = resolve_times(process, times, t_end=process.t_min, increasing=True)
    if controller is not None and times.shape[0] > 2:
        raise ValueError(
            "`times` must be two times, the ends, or None with an adaptive "
            f"`stepsize_controller`, got {times.shape[0]} times. Pass stepsize_controller=None "
            "to step through them."
        )
    _stock.check_stock(solver, process, times)
    return times


def _check_solver(solver) -> None:
    if not isinstance(solver, (diffrax.Euler, diffrax.AbstractERK)):
        raise TypeError(
            "`solver` must be a stock explicit diffrax ODE solver, which can integrate the state "
            f"and its density together, got {type(solver).__name__}. Use e.g. diffrax.Tsit5()."
        )


def bits_per_dim(
    log_prob: ArrayLike,
    size: int,
    *,
    levels: int = 256,
    low: float = -1.0,
    high: float = 1.0,
) -> Array:
    """Bits per dimension of discrete data, from the log density of its `dequantize`d values.

    -log_prob / (d ln 2) + log2(levels / (high - low)): the offset is +7 for 256 levels on
    [-1, 1] and +8 on [0, 1]. Averaged over the dequantising noise it is at least what the
    model's discrete probability, its density integrated over a bin, would give; the average over
    data is at least their entropy. Of a `variational_bound` in nats with the reconstruction of
    continuous data, pass its negative.

    Args:
        log_prob: log density of the dequantised data in nats, any shape.
        size: d, the size of one example.
        levels: number of levels of one dimension.
        low: lower edge of the first bin.
        high: upper edge of the last bin.

    Returns:
        Bits per dimension, of the shape of `log_prob`.

    Examples:
        >>> float(likelihood.bits_per_dim(jnp.zeros(()), 2))  # 256 levels in [-1, 1]
        7.0

    Reference: Theis, van den Oord, Bethge, "A note on the evaluation of generative models",
    2015, arXiv 1511.01844, section 3.1.
    """
    check_count("size", size)
    _check_levels(levels, low, high)
    return -jnp.asarray(log_prob) / (size * math.log(2)) + jnp.log2(levels / (high - low))


def dequantize(
    key: PRNGKeyArray, x: Array, *, levels: int = 256, low: float = -1.0, high: float = 1.0
) -> Array:
    """Spread discrete data uniformly over bins that tile [low, high].

    Level k, which comes in as low + k (high - low) / (levels - 1), so that the first level is
    `low` and the last is `high`, goes to low + (k + u) (high - low) / levels with u uniform on
    [0, 1). The bins are (high - low) / levels wide, a little less than the spacing of the levels,
    and each contains its level; it is the usual (k + u) / 256, stretched. Train on dequantised
    data, too, if the likelihood is to count.

    Args:
        key: typed PRNG key, for all of x; `jax.vmap` over keys and examples for one per example.
        x: data on the levels, any shape; other values are rounded to the nearest level.
        levels: number of levels, >= 2.
        low: value of the first level.
        high: value of the last level.

    Returns:
        Continuous data, of the shape and dtype of x.

    Raises:
        TypeError: if `key` is not a typed key.

    Reference: Theis, van den Oord, Bethge, "A note on the evaluation of generative models",
    2015, arXiv 1511.01844, section 3.1.
    """
    check_key(key)
    _check_levels(levels, low, high)
    x = as_float_array(x)
    level = jnp.round((x - low) * ((levels - 1) / (high - low)))
    return low + (level + jax.random.uniform(key, x.shape, x.dtype)) * ((high - low) / levels)


def _check_levels(levels, low, high) -> None:
    check_count("levels", levels, least=2)
    check_number("low", low)
    if isinstance(as_number(low), float):
        check_number("high", high, above=as_number(low))

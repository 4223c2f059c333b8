"""Exponential integrators: what DPM-Solver, UniPC, SEEDS, SA-Solver and their kin share.

In lambda = log(alpha / sigma) the probability-flow ODE, and the reverse SDEs with its marginals,
are linear in x but for the network's output. A step of length h = lambda_s - lambda_t, with the
output replaced by a polynomial, is then exact:

    x_s = carry x_t + scale sum_j w_j f_j + noise n,    w_j = H int_0^1 e^(-H (1 - u)) l_j(u) du

with l_j the Lagrange polynomials of the outputs' nodes and u = (lambda - lambda_t) / h. For
outputs f = x0, H = (1 + eta^2) h; for f = eps, H = -h. All published coefficients are these, or
these with one of the moments w(u^k) replaced.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff._tree import root
from jaxdiff.denoiser import Estimate
from jaxdiff.predictions import X0, Eps, Prediction
from jaxdiff.processes import GaussianProcess
from jaxdiff.solvers._base import Problem


class Linear(eqx.Module):
    """The parts of one step that do not depend on the polynomial; see the module."""

    carry: Array
    scale: Array
    stiffness: Array
    noise: Array


def check_prediction(prediction: Prediction) -> None:
    """Exponential integrators are written for two outputs.

    Raises:
        TypeError: for any other prediction than X0 and Eps.
    """
    if not isinstance(prediction, (X0, Eps)):
        raise TypeError(
            f"`prediction` must be X0() or Eps(), got {prediction}. It is what the solver "
            "extrapolates; the network may predict anything."
        )


def extrapolated(prediction: Prediction, estimate: Estimate) -> Array:
    """What is extrapolated of a settled estimate: x0 or eps."""
    return estimate.x0 if isinstance(prediction, X0) else estimate.eps


def output(problem: Problem, prediction: Prediction, x: Array, t: Array) -> Array:
    """What is extrapolated at (x, t); one evaluation."""
    found = problem.estimate(x, t)
    # x0 needs no noise, which at sigma = 0 is 0 / 0.
    return found.x0 if isinstance(prediction, X0) else problem.settle(x, t, found)[1].eps


def half_log_snr(process: GaussianProcess, t: Array) -> Array:
    """lambda = log(alpha / sigma), infinite where sigma = 0."""
    sigma = process.sigma(t)
    return jnp.where(
        sigma > 0, process.log_snr(jnp.where(sigma > 0, t, process.t_max)) / 2, jnp.inf
    )


def linear_parts(
    process: GaussianProcess,
    prediction: Prediction,
    t: Array,
    s: Array,
    h: Array,
    eta2: Array | float,
) -> Linear:
    """Carry, scale, H and noise of steps from t to s, elementwise over t, s and h.

    Args:
        process: the forward process.
        prediction: X0() or Eps().
        t: current times.
        s: target times, where sigma > 0 or the order is one.
        h: their steps in lambda.
        eta2: eta^2, the reverse SDE's noise relative to Anderson's; 0 is the ODE.
    """
    alpha, sigma = process.alpha(s), process.sigma(s)
    if isinstance(prediction, X0):
        carry = sigma / process.sigma(t) * jnp.exp(-eta2 * h)
        noise = sigma * root(-jnp.expm1(-2 * eta2 * h))
        return Linear(carry, alpha, (1 + eta2) * h, noise)
    # sigma_s e^h = alpha_s k_t: finite where sigma_s = 0.
    level, target = process.sigma(t) / process.alpha(t), sigma / alpha
    spread = root(eta2 * (level**2 - target**2))
    return Linear(alpha / process.alpha(t), (1 + eta2) * sigma, -h, alpha * spread)


def moments(stiffness: Array, count: int) -> list[Array]:
    """[H int_0^1 e^(-H (1 - u)) u^k du for k < count], elementwise over H.

    The first is 1 - e^-H and M_(k+1) = 1 - (k + 1) M_k / H, which cancels for small H, where
    the power series M_k = H sum_j (-H)^j k! / (k + j + 1)! is summed instead.
    """
    small = jnp.abs(stiffness) < 2.0
    large = jnp.where(small, 2.0, stiffness)
    near = jnp.where(small, stiffness, 0.0)
    closed, result = -jnp.expm1(-large), [-jnp.expm1(-stiffness)]
    for k in range(1, count):
        closed = 1 - k * closed / large
        term = near / (k + 1)
        series = term
        for j in range(1, 24):
            term = -term * near / (k + j + 1)
            series = series + term
        result.append(jnp.where(small, series, closed))
    return result


def newton_weights(moments: list[Array], nodes: list[Array]) -> list[Array]:
    """The weights w_j with sum_j w_j f(node_j) = sum_k moment_k c_k, f = sum_k c_k u^k.

    Exact Lagrange weights if the moments are exact; elementwise.
    """
    weights = []
    for j, node in enumerate(nodes):
        coefficients, scale = [jnp.ones_like(node)], jnp.ones_like(node)
        for other in nodes[:j] + nodes[j + 1 :]:
            shifted = [jnp.zeros_like(node), *coefficients]
            padded = [*coefficients, jnp.zeros_like(node)]
            coefficients = [a - other * b for a, b in zip(shifted, padded, strict=True)]
            scale = scale * (node - other)
        products = [m * c for m, c in zip(moments, coefficients, strict=True)]
        weights.append(sum(products[1:], products[0]) / scale)
    return weights

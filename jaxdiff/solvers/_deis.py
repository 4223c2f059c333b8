"""DEIS."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdiff.predictions import Eps, Prediction
from jaxdiff.solvers._base import Problem
from jaxdiff.solvers._exponential import Linear
from jaxdiff.solvers._multistep import (
    Multistep,
    Predictor,
    check_choice,
    check_order,
    make_grid,
    step_orders,
)

_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(24)


class DEIS(Multistep):
    """Diffusion exponential integrator sampler, tAB-r: Adams-Bashforth for eps_hat.

    x_s / alpha_s = x_t / alpha_t + sum_j eps_hat_j int l_j(v) dk, k = sigma / alpha,
    over the step, l_j the Lagrange polynomials of the last r + 1 outputs in a variable v.
    Order r + 1 with starting values that accurate; with its own first steps, order 2 at most.

    Args:
        order: r + 1, from 1 to 4. 1 is DDIM.
        variable: what the polynomials are in: "t", the paper's tAB; "noise_level" for k, its
            rho-AB; "log_noise_level" for log k, as in diffusers.
        lower_order_final: as in `DPMSolverMultistep`. With "log_noise_level", a step to
            sigma = 0 is of order 1.

    Raises:
        ValueError: for an unknown order or variable, or a grid of fewer steps than the order.

    Reference: Zhang, Chen, "Fast Sampling of Diffusion Models with Exponential Integrator", 2022,
    arXiv 2204.13902, equations 14 and 15. The integrals, Riemann sums there, are
    Gauss-Legendre sums of 24 nodes in k.
    """

    order: int = eqx.field(default=4, static=True)  # type: ignore[assignment]
    variable: str = eqx.field(default="t", static=True)
    lower_order_final: bool | None = eqx.field(default=None, static=True)

    def __check_init__(self):
        check_order(self.order, 4)
        check_choice("variable", self.variable, ("t", "noise_level", "log_noise_level"))

    @property
    def prediction(self) -> Prediction:
        """eps_hat."""
        return Eps()

    @property
    def history(self) -> int:
        """The order."""
        return self.order

    def plan(self, problem: Problem) -> tuple[Predictor, None]:
        """See `Multistep`."""
        process, times = problem.process, problem.times
        levels = process.sigma(times) / process.alpha(times)
        start, target = levels[:-1, None], levels[1:, None]
        points = start + (target - start) * (1 + jnp.asarray(_POINTS, levels.dtype)) / 2
        singular = self.variable == "log_noise_level"
        if self.variable == "t":
            variable, inside = times, process.unbounded_time(-2 * jnp.log(points))
        elif self.variable == "noise_level":
            variable, inside = levels, points
        else:
            # The logarithm of a last level of 0 is not used.
            variable, inside = jnp.log(jnp.where(levels > 0, levels, 1.0)), jnp.log(points)

        def parts(h: Array) -> Linear:
            alpha, zero = process.alpha(times[1:]), jnp.zeros_like(h)
            scale = alpha * (levels[1:] - levels[:-1])
            return Linear(alpha / process.alpha(times[:-1]), scale, h, zero)

        def rule(count: int, h: Array) -> list[Array]:
            u = (inside - variable[:-1, None]) / h[:, None]
            return [u**k @ jnp.asarray(_WEIGHTS / 2, u.dtype) for k in range(count)]

        orders = step_orders(problem.num_steps, self.order, self.lower_order_final)
        grid = make_grid(problem, self.prediction, variable, self.history, parts, singular=singular)
        return grid.predictor(orders, rule), None

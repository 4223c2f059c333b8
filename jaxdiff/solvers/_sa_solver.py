"""SA-Solver."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, number
from jaxdiff.predictions import X0, Prediction
from jaxdiff.solvers._base import Problem
from jaxdiff.solvers._exponential import moments
from jaxdiff.solvers._multistep import (
    Corrector,
    Multistep,
    Predictor,
    check_order,
    exponential_grid,
    step_orders,
)


class SASolver(Multistep):
    """Stochastic Adams solver: a multistep predictor and corrector for the reverse SDE.

    x_s = (sigma_s / sigma_t) e^(-tau^2 h) x_t + sum_j b_j x0_hat_j
    + sigma_s sqrt(1 - e^(-2 tau^2 h)) n, with
    b_j = (1 + tau^2) sigma_s int e^((1 + tau^2) l - tau^2 lambda_s) l_j(l) dl over the step: the
    exponential Adams-Bashforth weights, and Adams-Moulton ones for the corrector, which shares
    the predictor's noise and costs nothing. Mean order `predictor_order` (one more with the
    corrector); with tau > 0 the variance is of weak order 2 at most.

    Args:
        predictor_order: outputs used by the predictor, 1 to 4. 1 with tau = 1 is ancestral
            sampling.
        corrector_order: nodes of the corrector, the new one included, 1 to 4 and at most one
            more than `predictor_order`; 0 for none.
        tau: noise of the SDE, 1 being Anderson's; 0 the ODE.
        t_low: smallest time at which tau is on; below it, tau = 0.
        t_high: largest such time. The authors' code has [0.2, 0.8]; the target time of a step
            decides.
        few_step: use M_1 = H / 2 for the two-node rules, as the authors' code does: an error of
            the same order, smaller for few steps.
        lower_order_final: as in `DPMSolverMultistep`. A step to sigma = 0 is of order 1.

    Raises:
        ValueError: for unknown orders, or a grid of fewer steps than the order.

    Reference: Xue, Yi, Luo, Zhang, Sun, Li, Ma, "SA-Solver: Stochastic Adams Solver for Fast
    Sampling of Diffusion Models", 2023, arXiv 2309.05019, algorithm 1 and section 5. tau is
    held constant over each step, as in the authors' code.
    """

    predictor_order: int = eqx.field(default=3, static=True)
    corrector_order: int = eqx.field(default=4, static=True)
    tau: Number = number(1.0)
    t_low: Number = number(0.0)
    t_high: Number = number(float("inf"))
    few_step: bool = eqx.field(default=False, static=True)
    lower_order_final: bool | None = eqx.field(default=None, static=True)

    def __check_init__(self):
        check_number("tau", self.tau, least=0.0)
        check_number("t_low", self.t_low)
        check_number("t_high", self.t_high, finite=False)
        check_order(self.predictor_order, 4)
        highest = min(self.predictor_order + 1, 4)
        if not 0 <= self.corrector_order <= highest:
            raise ValueError(
                f"`corrector_order` must be an integer from 0 to {highest} with predictor_order="
                f"{self.predictor_order}, got {self.corrector_order!r}."
            )

    @property
    def prediction(self) -> Prediction:
        """x0_hat."""
        return X0()

    @property
    def history(self) -> int:
        """The predictor's order."""
        return self.predictor_order

    @property
    def stochastic(self) -> bool:
        """True."""
        return True

    def plan(self, problem: Problem) -> tuple[Predictor, Corrector | None]:
        """See `Multistep`."""

        def rule(count: int, stiffness: Array) -> list[Array]:
            found = moments(stiffness, count)
            if count == 2 and self.few_step:
                found[1] = stiffness / 2
            return found

        target = problem.times[1:]
        tau = jnp.where((target >= self.t_low) & (target <= self.t_high), self.tau, 0.0)
        grid = exponential_grid(problem, self.prediction, tau**2, self.history)
        n = problem.num_steps
        orders = step_orders(n, self.predictor_order, self.lower_order_final)
        predictor = grid.predictor(orders, rule)
        if self.corrector_order == 0:
            return predictor, None
        # A corrector of order k has k - 1 old nodes.
        old = step_orders(n, self.corrector_order - 1, self.lower_order_final)
        return predictor, grid.corrector(old, rule)

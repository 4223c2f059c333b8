"""DPM-Solver and DPM-Solver++: multistep, and single step."""

import equinox as eqx
from jaxtyping import Array

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, number
from jaxdiff.predictions import X0, Eps, Prediction
from jaxdiff.solvers._base import Problem
from jaxdiff.solvers._exponential import check_prediction, moments
from jaxdiff.solvers._multistep import (
    Multistep,
    Predictor,
    check_choice,
    check_order,
    exponential_grid,
    step_orders,
)
from jaxdiff.solvers._singlestep import (
    Singlestep,
    check_fractions,
    runge_kutta_weights,
    stage_fractions,
)


class DPMSolverMultistep(Multistep):
    """DPM-Solver++ (1M, 2M, 3M), DPM-Solver's multistep form, and their SDE versions.

    One evaluation a step; the output, x0_hat or eps_hat, is extrapolated from the last `order`
    ones in lambda = log(alpha / sigma). In the notation of `x_s = carry x_t + scale (M_0 f_0 +
    M_1 G_1 + M_2 G_2) + noise n`, with G_k the coefficients of the interpolating polynomial in
    u = (lambda - lambda_t) / h, the exact M_k are `H int e^(-H(1-u)) u^k du`. The variants
    replace some of them:

        "midpoint"    M_1 = M_0 / 2 at order 2 (the paper's 2M), M_2 half the exact one at 3
        "heun"        M_2 half the exact one at order 3
        "corrected"   exact throughout

    The published third-order formula, which official code and its ports share, lacks a factor of
    2 in M_2 and therefore converges with order 2; "corrected" restores order 3. With its own
    first steps, of lower order, every variant is of global order 2 at most.

    Args:
        order: 1, 2 or 3. Order 1 is DDIM.
        prediction: what is extrapolated: X0() is DPM-Solver++, Eps() is DPM-Solver.
        variant: "midpoint", "heun" or "corrected".
        eta: None for the ODE; a number for the reverse SDE with noise eta (1 is ancestral
            sampling's), SDE-DPM-Solver++ for X0().
        lower_order_final: whether the last steps fall back to lower orders; None for grids of
            fewer than 15 steps. A step to sigma = 0 is always of order 1.

    Raises:
        ValueError: for an unknown order or variant, or a grid of fewer steps than the order.
        TypeError: for a prediction other than X0() and Eps().

    Reference: Lu, Zhou, Bao, Chen, Li, Zhu, "DPM-Solver++: Fast Solver for Guided Sampling of
    Diffusion Probabilistic Models", 2022, arXiv 2211.01095, algorithm 2 and appendix B; Lu et
    al., "DPM-Solver", 2022, arXiv 2206.00927, for Eps().
    """

    order: int = eqx.field(default=2, static=True)  # type: ignore[assignment]
    prediction: Prediction = X0()
    variant: str = eqx.field(default="midpoint", static=True)
    eta: Number | None = number(None)
    lower_order_final: bool | None = eqx.field(default=None, static=True)

    def __check_init__(self):
        check_order(self.order, 3)
        check_number("eta", self.eta, least=0.0)
        check_prediction(self.prediction)
        check_choice("variant", self.variant, ("midpoint", "heun", "corrected"))

    @property
    def history(self) -> int:
        """The order."""
        return self.order

    @property
    def stochastic(self) -> bool:
        """Whether `eta` is given."""
        return self.eta is not None

    def plan(self, problem: Problem) -> tuple[Predictor, None]:
        """See `Multistep`."""

        def rule(count: int, stiffness: Array) -> list[Array]:
            found = moments(stiffness, count)
            if count == 2 and self.variant == "midpoint":
                found[1] = found[0] / 2
            if count == 3 and self.variant != "corrected":
                found[2] = found[2] / 2
            return found

        orders = step_orders(problem.num_steps, self.order, self.lower_order_final)
        eta2 = 0.0 if self.eta is None else self.eta**2
        grid = exponential_grid(problem, self.prediction, eta2, self.history)
        return grid.predictor(orders, rule), None


class DPMSolver(Singlestep):
    """DPM-Solver-1, -2, -3 and, for X0(), DPM-Solver++ 1S, 2S, 3S: exponential Runge-Kutta.

    `order` evaluations a step, at the start and at the fractions r_1, r_2 of it in
    lambda = log(alpha / sigma). Order `order`, with no history and so no loss at the first step.

    Args:
        order: 1, 2 or 3. Order 1 is DDIM.
        prediction: Eps() is DPM-Solver, X0() DPM-Solver++, which suits large guidance scales.
        r1: fraction of the first stage, in (0, 1); None for 1/2 at order 2 and 1/3 at order 3.
        r2: fraction of the second stage, in (r1, 1); order 3 only.

    Raises:
        ValueError: for an unknown order, or fractions that do not increase inside (0, 1).
        TypeError: for a prediction other than X0() and Eps().

    Reference: Lu, Zhou, Bao, Chen, Li, Zhu, "DPM-Solver: A Fast ODE Solver for Diffusion
    Probabilistic Model Sampling in Around 10 Steps", 2022, arXiv 2206.00927, algorithms 1 and 2
    (with general r as in appendix B); Lu et al., "DPM-Solver++", 2022, arXiv 2211.01095,
    algorithm 1, for X0().
    """

    order: int = eqx.field(default=2, static=True)  # type: ignore[assignment]
    prediction: Prediction = Eps()
    r1: float | None = eqx.field(default=None, static=True)
    r2: float = eqx.field(default=2 / 3, static=True)

    def __check_init__(self):
        check_order(self.order, 3)
        check_prediction(self.prediction)
        check_fractions(self.fractions)

    @property
    def fractions(self) -> tuple[float, ...]:
        """Where the stages are, 1 being the target."""
        return stage_fractions(self.order, self.r1, self.r2)

    def weights(self, stage: int, stiffness: Array) -> list[Array]:
        """See `Singlestep`."""
        return runge_kutta_weights(self.fractions, stage, stiffness)

"""UniPC."""

import equinox as eqx
from jaxtyping import Array

from jaxdiff.predictions import X0, Prediction
from jaxdiff.solvers._base import Problem
from jaxdiff.solvers._exponential import check_prediction, moments
from jaxdiff.solvers._multistep import (
    Corrector,
    Multistep,
    Predictor,
    check_choice,
    check_order,
    exponential_grid,
    step_orders,
)


class UniPC(Multistep):
    """Unified predictor-corrector, one evaluation a step: UniPC-p, and with no corrector UniP-p.

    The predictor extrapolates the last p outputs in lambda = log(alpha / sigma); the corrector
    repeats the step with the output at the predicted state as one node more, and is free. With
    p outputs for the predictor and p + 1 for the corrector both are the exact exponential
    Adams methods, whatever B(h) is, except where one equation is left to choose: the two-node
    rules (the predictor of order 2, the corrector of order 1) take M_1 = B(h) / 2, where
    B = H for "bh1" and B = 1 - e^-H for "bh2", H being h for X0() and -h for Eps().

    UniP-p is of order p and UniPC-p of order p + 1, given starting values that accurate and the
    final corrector; with its own first steps UniP is of order 2 at most, UniPC of order 3.

    Args:
        order: p, from 1 to 4. The authors advise 3 for unconditional and 2 for guided models.
        prediction: what is extrapolated, X0() or Eps().
        variant: "bh2", or "bh1", advised for unconditional models at 10 evaluations or fewer.
        corrector: False for UniP.
        final_corrector: whether to correct the last state too, for one more evaluation. Not for
            grids that end at sigma = 0.
        lower_order_final: whether the last steps fall back to lower orders; None for grids of
            fewer than 15 steps.

    Raises:
        ValueError: for an unknown order or variant, or a grid of fewer steps than the order.
        TypeError: for a prediction other than X0() and Eps().

    Reference: Zhao, Bai, Rao, Zhou, Lu, "UniPC: A Unified Predictor-Corrector Framework for Fast
    Sampling of Diffusion Models", 2023, arXiv 2302.04867, algorithms 1 and 2.
    """

    order: int = eqx.field(default=3, static=True)  # type: ignore[assignment]
    prediction: Prediction = X0()
    variant: str = eqx.field(default="bh2", static=True)
    corrector: bool = eqx.field(default=True, static=True)
    final_corrector: bool = eqx.field(default=False, static=True)
    lower_order_final: bool | None = eqx.field(default=None, static=True)

    def __check_init__(self):
        check_order(self.order, 4)
        check_prediction(self.prediction)
        check_choice("variant", self.variant, ("bh1", "bh2"))

    @property
    def history(self) -> int:
        """The order."""
        return self.order

    @property
    def corrects_the_end(self) -> bool:
        """`final_corrector`."""
        return self.final_corrector

    def plan(self, problem: Problem) -> tuple[Predictor, Corrector | None]:
        """See `Multistep`."""

        def rule(count: int, stiffness: Array) -> list[Array]:
            found = moments(stiffness, count)
            if count == 2:
                found[1] = (stiffness if self.variant == "bh1" else found[0]) / 2
            return found

        orders = step_orders(problem.num_steps, self.order, self.lower_order_final)
        grid = exponential_grid(problem, self.prediction, 0.0, self.history)
        corrector = grid.corrector(orders, rule) if self.corrector else None
        return grid.predictor(orders, rule), corrector

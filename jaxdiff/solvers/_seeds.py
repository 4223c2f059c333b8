"""SEEDS."""

import equinox as eqx
from jaxtyping import Array

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, number
from jaxdiff.predictions import X0, Prediction
from jaxdiff.solvers._multistep import check_order
from jaxdiff.solvers._singlestep import (
    Singlestep,
    check_fractions,
    runge_kutta_weights,
    stage_fractions,
)


class SEEDS(Singlestep):
    """Stochastic exponential derivative-free solvers, SEEDS-1, -2, -3, for x0_hat.

    DPM-Solver++ 1S, 2S, 3S for the reverse SDE with noise eta: h becomes (1 + eta^2) h in the
    outputs' weights, x decays by e^(-eta^2 h), and all stages see the same Brownian path:
    from stage to stage the noise so far is carried along, and the new stretch of relative
    length r adds sigma sqrt(1 - e^(-2 eta^2 r h)) n. Weak order 2 for two and three stages.

    Args:
        order: 1 (ancestral sampling for eta = 1), 2 or 3: evaluations a step.
        eta: noise, 1 being Anderson's reverse SDE; 0 the ODE.
        r1: as in `DPMSolver`.
        r2: as in `DPMSolver`.

    Raises:
        ValueError: for an unknown order, or fractions that do not increase inside (0, 1).

    Reference: Gonzalez, Fernandez, Tran, Gherbi, Hajri, Masmoudi, "SEEDS: Exponential SDE Solvers
    for Fast High-Quality Sampling from Diffusion Models", 2023, arXiv 2305.14267, algorithms 1
    to 3. A common port gives the last stretch the length of the first, which is right for
    equal stretches only and otherwise of weak order 1.
    """

    order: int = eqx.field(default=2, static=True)  # type: ignore[assignment]
    eta: Number = number(1.0)
    r1: float | None = eqx.field(default=None, static=True)
    r2: float = eqx.field(default=2 / 3, static=True)

    def __check_init__(self):
        check_number("eta", self.eta, least=0.0)
        check_order(self.order, 3)
        check_fractions(self.fractions)

    @property
    def prediction(self) -> Prediction:
        """x0_hat."""
        return X0()

    @property
    def eta2(self) -> Array | float:
        """eta^2."""
        return self.eta**2

    @property
    def stochastic(self) -> bool:
        """True."""
        return True

    @property
    def fractions(self) -> tuple[float, ...]:
        """Where the stages are, 1 being the target."""
        return stage_fractions(self.order, self.r1, self.r2)

    def weights(self, stage: int, stiffness: Array) -> list[Array]:
        """See `Singlestep`."""
        return runge_kutta_weights(self.fractions, stage, stiffness)

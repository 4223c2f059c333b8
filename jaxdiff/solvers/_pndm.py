"""PNDM: pseudo numerical methods."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxdiff.denoiser import Estimate
from jaxdiff.predictions import Eps
from jaxdiff.solvers._base import ExplicitSolver, Problem, combine
from jaxdiff.solvers._exponential import output
from jaxdiff.solvers._multistep import by_order, check_choice, check_order, step_orders
from jaxdiff.stepwise import Step

# Adams-Bashforth for equal steps.
_WEIGHTS = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


class PNDM(ExplicitSolver):
    """S-PNDM, F-PNDM and PLMS: Adams-Bashforth weights for equal steps, DDIM's transfer.

    x_s = (alpha_s / alpha_t) x + alpha_s (k_s - k_t) e, k = sigma / alpha, where e combines the
    last eps_hat by Adams-Bashforth weights, whatever the spacing. Of order 2, and of order 4
    (`order` 4 with exact starting values) only on grids uniform in k; `DEIS` has the weights
    of any grid.

        S-PNDM    order=2, warm_up="heun"
        F-PNDM    order=4, warm_up="runge_kutta"
        PLMS      order=4, warm_up="heun"
        iPNDM     order=4, warm_up="none"

    Args:
        order: outputs used by a step, 2, 3 or 4.
        warm_up: "runge_kutta" takes the first `order - 1` steps by the classical fourth-order
            scheme, with four evaluations each; "heun" the first one by two, and the next ones
            with as many outputs as there are; "none" spends no extra evaluations.

    Raises:
        ValueError: for an unknown order or warm-up, or a grid of fewer steps than the order.

    Reference: Liu, Ren, Lin, Zhao, "Pseudo Numerical Methods for Diffusion Models on Manifolds",
    2022, arXiv 2202.09778, algorithm 2 and equations 11 to 13; PLMS: Rombach, Blattmann, Lorenz,
    Esser, Ommer, "High-Resolution Image Synthesis with Latent Diffusion Models", 2022,
    arXiv 2112.10752, the samplers of its code.
    """

    order: int = eqx.field(default=4, static=True)  # type: ignore[assignment]
    warm_up: str = eqx.field(default="heun", static=True)

    def __check_init__(self):
        check_order(self.order, 4)
        check_choice("warm_up", self.warm_up, ("heun", "runge_kutta", "none"))

    @property
    def bounded_start(self) -> bool:
        """True."""
        return True

    @property
    def stochastic(self) -> bool:
        """False."""
        return False

    def plan(self, problem: Problem) -> tuple[Array, Array]:
        """Weights of the outputs, and whether a step warms up."""
        warm = {"heun": 1, "runge_kutta": self.order - 1, "none": 0}[self.warm_up]
        orders = step_orders(problem.num_steps, self.order, False)

        def rows(k: int) -> Array:
            weights = np.zeros((problem.num_steps, self.order))
            weights[:, :k] = _WEIGHTS[k]
            return jnp.asarray(weights, problem.times.dtype)

        return by_order(orders, rows), jnp.arange(problem.num_steps) < warm

    def init_memory(self, problem: Problem, x: Array) -> tuple[Array, ...]:
        """No outputs yet."""
        del problem
        return (jnp.zeros_like(x),) * (self.order - 1)

    def move(
        self, problem: Problem, x: Array, step: Step, estimate: Estimate
    ) -> tuple[Array, PyTree, Array | int]:
        """See `ExplicitSolver`."""
        process, (weights, warm) = problem.process, step.plan

        def level(t):
            return process.sigma(t) / process.alpha(t)

        def transfer(target, eps):
            alpha = process.alpha(target)
            carried = alpha / process.alpha(step.t) * x
            return (carried + alpha * (level(target) - level(step.t)) * eps).astype(x.dtype)

        def eps(x, t):
            return output(problem, Eps(), x, t)

        first = estimate.eps
        outputs = (first, *step.memory)

        def heun():
            return (first + eps(transfer(step.s, first), step.s)) / 2

        def runge_kutta():
            middle = (step.t + step.s) / 2
            second = eps(transfer(middle, first), middle)
            third = eps(transfer(middle, second), middle)
            fourth = eps(transfer(step.s, third), step.s)
            return (first + 2 * second + 2 * third + fourth) / 6

        if self.warm_up == "none":
            slope = combine(weights, outputs).astype(x.dtype)
            return transfer(step.s, slope), outputs[: self.order - 1], 0
        start, more = (heun, 1) if self.warm_up == "heun" else (runge_kutta, 3)
        slope = jax.lax.cond(
            warm, lambda: start().astype(x.dtype), lambda: combine(weights, outputs).astype(x.dtype)
        )
        return (
            transfer(step.s, slope),
            outputs[: self.order - 1],
            jnp.where(warm, more * problem.cost, 0),
        )

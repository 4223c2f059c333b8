"""Diffusion posterior sampling, and energies without training."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxdiff._checks import check_callable, check_number
from jaxdiff._tree import Number, number
from jaxdiff.conditions import take
from jaxdiff.guidance._scale import norm
from jaxdiff.guidance._training_free import (
    Strength,
    check_scalar,
    check_strength,
    planned,
    strength_at,
    with_cond,
)
from jaxdiff.solvers import DDIM, DiffusionSolver, SolverWrapper
from jaxdiff.solvers._base import Moved, Problem
from jaxdiff.stepwise import Step


class DPS(SolverWrapper):
    """x_s = Base(x, D) - scale grad_x |y - A(D(x))|: towards a measurement, of any operator.

    A solver around a solver, with data of the example: the entry "y" of its condition. The norm
    is of one example. One evaluation and one backward pass of the network.

    On Gaussian data the exact step is J^T A^T (A V A^T + S)^-1 (y - A D); here the middle factor
    is a number, so that strength and grid go together: choose `scale` for a number of steps.
    `TrainingFree` with log_prob = -|y - A(x0)| and rho = scale alpha_t / alpha_s is the same.

    Args:
        base: a solver that steps from an estimate.
        operator: A, `x0 -> measurement`, a pytree.
        scale: length of the step along the unit residual's gradient.

    Raises:
        ValueError: without "y", or for a y of another shape than A's.

    Reference: Chung, Kim, Mccann, Klasky, Ye, "Diffusion Posterior Sampling for General Noisy
    Inverse Problems", 2022, arXiv 2209.14687, algorithm 1, with step 1 / |y - A(D)| as its code
    has it: the gradient of the norm, half of that of its square over the norm.
    """

    base: DiffusionSolver = DDIM()
    operator: Callable[[Array], Array] = eqx.field(kw_only=True)
    scale: Number = number(1.0)

    def __check_init__(self):
        check_callable("operator", self.operator, "jax.tree_util.Partial(function, weights)")
        check_number("scale", self.scale)

    @property
    def stochastic(self) -> bool:
        """The base's."""
        return self.base.stochastic

    def update(self, problem: Problem, x: Array, step: Step) -> Moved:
        """See `DiffusionSolver`."""
        y, rest = take(problem.cond, "y", by="DPS")
        problem = with_cond(problem, rest)

        def residual(x):
            found = problem.estimate(x, step.t)
            seen = self.operator(found.x0)
            if jnp.shape(seen) != jnp.shape(y):
                raise ValueError(
                    f"`y` must have the shape of what `operator` returns, {jnp.shape(seen)}, got "
                    f"{jnp.shape(y)}."
                )
            return norm(y - seen), found

        slope, found = jax.grad(residual, has_aux=True)(x)
        moved = self.advance_base(problem, x, step, found)
        return moved._replace(x=(moved.x - self.scale * slope).astype(x.dtype))


class FreeDoM(SolverWrapper):
    """x_s = Base(x, D) - rho grad_x E(D(x), y), with any energy of a clean example.

    A solver around a solver, with data of the example: the entry "y" of its condition. Its time
    travel is `Recurrence(FreeDoM(...), count, t_low, t_high)`. `TrainingFree` with log_prob = -E
    and rho alpha_t / alpha_s is the same.

    Args:
        base: a solver that steps from an estimate.
        energy: `(x0, y) -> E`, a scalar of one example; a pytree.
        rho: strength, of the kinds that `TrainingFree` takes.

    Raises:
        ValueError: without "y", or for an energy that is no scalar.

    Reference: Yu, Wang, Zhao, Ghanem, Zhang, "FreeDoM: Training-Free Energy-Guided Conditional
    Diffusion Model", 2023, arXiv 2303.09833, algorithm 1.
    """

    base: DiffusionSolver = DDIM()
    energy: Callable[[Array, PyTree], Array] = eqx.field(kw_only=True)
    rho: Strength = number(1.0)

    def __check_init__(self):
        check_callable("energy", self.energy, "jax.tree_util.Partial(function, weights)")
        check_strength("rho", self.rho)

    @property
    def stochastic(self) -> bool:
        """The base's."""
        return self.base.stochastic

    def own_plan(self, problem: Problem) -> dict[str, Array]:
        """The strength, where it depends on the grid."""
        return planned(problem, rho=self.rho)

    def update(self, problem: Problem, x: Array, step: Step) -> Moved:
        """See `DiffusionSolver`."""
        y, rest = take(problem.cond, "y", by="FreeDoM")
        problem = with_cond(problem, rest)

        def value(x) -> tuple[Array, Any]:
            found = problem.estimate(x, step.t)
            return check_scalar(self.energy(found.x0, y), "energy"), found

        slope, found = jax.grad(value, has_aux=True)(x)
        moved = self.advance_base(problem, x, step, found)
        rho = strength_at("rho", self.rho, problem.process, step, norm(slope))
        return moved._replace(x=(moved.x - rho * slope).astype(x.dtype))

"""Linear multistep solvers: a step is a linear combination of the state and past outputs."""

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdiff.denoiser import Estimate
from jaxdiff.predictions import X0, Eps, Prediction
from jaxdiff.solvers._base import ExplicitSolver, Problem, combine
from jaxdiff.solvers._exponential import (
    Linear,
    extrapolated,
    half_log_snr,
    linear_parts,
    newton_weights,
    output,
)
from jaxdiff.stepwise import Step

# The moments of n nodes, from n and the stiffness H; see `jaxdiff.solvers._exponential`.
Rule = Callable[[int, Array], list[Array]]


class Predictor(eqx.Module):
    """x_s = carry x_t + sum_j outputs_j f_j + noise n, f_j the outputs, newest first.

    Attributes:
        carry: `(num_steps,)`.
        outputs: `(num_steps, history)`; zero for outputs that do not exist yet.
        noise: `(num_steps,)`.
    """

    carry: Array
    outputs: Array
    noise: Array


class Corrector(eqx.Module):
    """x_s once more, with the output at the predicted x_s as a further node.

    Attributes:
        outputs: `(num_steps, history)`, as the predictor's.
        new: `(num_steps,)`, the weight of the output at the predicted state.
    """

    outputs: Array
    new: Array


class Memory(eqx.Module):
    """Past outputs, newest first, and the correction that waits for its new output."""

    outputs: tuple[Array, ...]
    base: Array | None
    new: Array | None


class Multistep(ExplicitSolver):
    """Base of the linear multistep solvers, one evaluation a step.

    The corrector costs nothing: the output at the predicted state is the one that the next step
    needs anyway (PEC mode). The last state is therefore not corrected, unless a method pays one
    more evaluation for it.

    A method defines `prediction` (which output is extrapolated), `history` (how many outputs a
    step uses) and `plan`, a pair of a `Predictor` and a `Corrector` or None.
    """

    if TYPE_CHECKING:  # a field or a property

        @property
        def prediction(self) -> Prediction:
            """Which output is extrapolated."""
            ...

    else:
        prediction: eqx.AbstractVar[Prediction]

    @property
    @abstractmethod
    def history(self) -> int:
        """Outputs used by one step."""

    @property
    def corrects_the_end(self) -> bool:
        """Whether the last state is corrected too, for one more evaluation."""
        return False

    @property
    def bounded_start(self) -> bool:
        """Where eps_hat is extrapolated."""
        return isinstance(self.prediction, Eps)

    @property
    def needs_signal(self) -> bool:
        """True."""
        return True

    @property
    def stochastic(self) -> bool:
        """Whether noise is added."""
        return False

    @abstractmethod
    def plan(self, problem: Problem) -> tuple[Predictor, Corrector | None]:
        """See `DiffusionSolver`."""

    def init_memory(self, problem: Problem, x: Array) -> Memory:
        """No outputs yet, and nothing to correct."""
        corrector = problem.plan[1]
        base, new = (None, None) if corrector is None else (x, jnp.zeros_like(corrector.new[0]))
        return Memory((jnp.zeros_like(x),) * (self.history - 1), base, new)

    def correct(self, x: Array, step: Step, estimate: Estimate) -> Array:
        """See `ExplicitSolver`."""
        if step.memory.base is None:
            return x
        return step.memory.base + step.memory.new * extrapolated(self.prediction, estimate)

    def move(
        self, problem: Problem, x: Array, step: Step, estimate: Estimate
    ) -> tuple[Array, Memory, Array | int]:
        """See `ExplicitSolver`."""
        predictor, corrector = step.plan
        outputs = (extrapolated(self.prediction, estimate), *step.memory.outputs)
        carried = predictor.carry * x
        if self.stochastic:
            carried = carried + predictor.noise * jax.random.normal(step.key, x.shape, x.dtype)
        predicted = (carried + combine(predictor.outputs, outputs)).astype(x.dtype)
        if corrector is None:
            return predicted, Memory(outputs[: self.history - 1], None, None), 0
        base = (carried + combine(corrector.outputs, outputs)).astype(x.dtype)
        memory = Memory(outputs[: self.history - 1], base, corrector.new)
        if not self.corrects_the_end:
            return predicted, memory, 0
        # Where sigma = 0 the step stays predicted, and the noise there is 0 / 0.
        corrects = (step.s == problem.times[-1]) & (corrector.new != 0)

        def correct():
            final = output(problem, self.prediction, predicted, step.s)
            return (base + corrector.new * final).astype(x.dtype)

        x = jax.lax.cond(corrects, correct, lambda: predicted)
        return x, memory, jnp.where(corrects, problem.cost, 0)


def check_order(order: int, highest: int) -> None:
    """Reject orders a method does not have.

    Raises:
        ValueError: if `order` is not in [1, highest].
    """
    if not (isinstance(order, int) and 1 <= order <= highest):
        raise ValueError(f"`order` must be an integer from 1 to {highest}, got {order!r}.")


def check_choice(argument: str, value: str, known: tuple[str, ...]) -> None:
    """Reject choices a method does not have.

    Raises:
        ValueError: if `value` is not among the known ones.
    """
    if value not in known:
        raise ValueError(f"`{argument}` must be one of {', '.join(known)}, got {value!r}.")


def step_orders(num_steps: int, order: int, lower_order_final: bool | None) -> np.ndarray:
    """The order of each step: it grows with the history, and may fall again towards the end.

    Args:
        num_steps: number of steps.
        order: the method's order.
        lower_order_final: whether step n - k is of order k at most; None for grids of fewer than
            15 steps, as in DPM-Solver's code.

    Raises:
        ValueError: if the grid has fewer steps than the order.
    """
    if num_steps < order:
        raise ValueError(
            f"`times` must have at least as many steps as the solver's order {order}, got "
            f"{num_steps}. Take more steps or a lower order."
        )
    index = np.arange(num_steps)
    orders = np.minimum(order, index + 1)
    if lower_order_final or (lower_order_final is None and num_steps < 15):
        orders = np.minimum(orders, num_steps - index)
    return orders


def past_nodes(variable: Array, h: Array, count: int) -> list[Array]:
    """(v_(i-j) - v_i) / h_i for j < count, each `(num_steps,)`; -j where unknown."""
    index = jnp.arange(h.shape[0])
    return [
        jnp.where(index >= j, (variable[jnp.maximum(index - j, 0)] - variable[:-1]) / h, -1.0 * j)
        for j in range(count)
    ]


def by_order(orders: np.ndarray, rows: Callable[[int], Array]) -> Array:
    """Rows `rows(k)`, each `(num_steps, width)`, where the order is k."""
    lowest = min(orders)
    table = rows(lowest)
    for k in range(lowest + 1, max(orders) + 1):
        # `where` and not a product: rows of other orders may be infinite.
        table = jnp.where((orders == k)[:, None], rows(k), table)
    return table


class Grid(eqx.Module):
    """What the coefficients are made of: the linear parts of each step, and its nodes."""

    parts: Linear
    nodes: list[Array]
    to_zero: Array
    last_weights: Array
    last_carry: Array

    def predictor(self, orders: np.ndarray, rule: Rule) -> Predictor:
        """The steps with as many nodes as their order."""
        to_zero = self.to_zero
        return Predictor(
            jnp.where(to_zero, self.last_carry, self.parts.carry),
            jnp.where(to_zero[:, None], self.last_weights, self._weights(orders, rule)),
            jnp.where(to_zero, 0.0, self.parts.noise),
        )

    def corrector(self, orders: np.ndarray, rule: Rule) -> Corrector:
        """The steps with one node more, at their target; a step to sigma = 0 stays predicted."""
        weights = self._weights(orders, rule, (jnp.ones_like(self.parts.carry),))
        outputs = jnp.where(self.to_zero[:, None], self.last_weights, weights[:, :-1])
        return Corrector(outputs, jnp.where(self.to_zero, 0.0, weights[:, -1]))

    def _weights(self, orders: np.ndarray, rule: Rule, new: tuple[Array, ...] = ()) -> Array:
        unused = jnp.zeros_like(self.parts.carry)

        def rows(k: int) -> Array:
            nodes = [*self.nodes[:k], *new]
            found = newton_weights(rule(len(nodes), self.parts.stiffness), nodes)
            columns = [*found[:k], *[unused] * (len(self.nodes) - k), *found[k:]]
            return self.parts.scale[:, None] * jnp.stack(columns, axis=1)

        return by_order(orders, rows)


def make_grid(
    problem: Problem,
    prediction: Prediction,
    variable: Array,
    history: int,
    parts: Callable[[Array], Linear],
    *,
    singular: bool = True,
) -> Grid:
    """The grid of a method that extrapolates in some variable.

    Args:
        problem: holds the process and the times.
        prediction: X0() or Eps(), the output that is extrapolated.
        variable: what it extrapolates in, at every time, `(num_steps + 1,)`.
        history: past outputs used by a step.
        parts: the linear parts, from the steps' lengths in the variable.
        singular: whether the variable is infinite at sigma = 0. A step there returns x0_hat: it is
            infinitely long, and nothing can be extrapolated.
    """
    process, t, s = problem.process, problem.times[:-1], problem.times[1:]
    to_zero = (process.sigma(s) == 0) & singular
    h = jnp.where(to_zero, 1.0, jnp.where(to_zero, 0.0, variable[1:]) - variable[:-1])
    alpha = process.alpha(s)
    if isinstance(prediction, X0):
        carry, weight = jnp.zeros_like(alpha), alpha
    else:
        carry = alpha / process.alpha(t)
        weight = -carry * process.sigma(t)
    first = jnp.arange(history) == 0
    nodes = past_nodes(variable, h, history)
    return Grid(parts(h), nodes, to_zero, weight[:, None] * first, carry)


def exponential_grid(
    problem: Problem, prediction: Prediction, eta2: Array | float, history: int
) -> Grid:
    """The grid of exponential integrators, in lambda; eta2 = eta^2 is a number or one per step."""
    process, times = problem.process, problem.times
    return make_grid(
        problem,
        prediction,
        half_log_snr(process, times),
        history,
        lambda h: linear_parts(process, prediction, times[:-1], times[1:], h, eta2),
    )

"""Single-step solvers of several stages: exponential Runge-Kutta methods in lambda."""

from abc import abstractmethod
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxdiff.denoiser import Estimate
from jaxdiff.predictions import Eps, Prediction
from jaxdiff.solvers._base import ExplicitSolver, Problem, combine
from jaxdiff.solvers._exponential import (
    extrapolated,
    half_log_snr,
    linear_parts,
    moments,
    output,
)
from jaxdiff.stepwise import Step


class Stage(eqx.Module):
    """y = carry x_t + sum_j outputs_j f_j + sum_k noises_k n_k, at time `t`.

    Attributes:
        t: time of y, `(num_steps,)`.
        carry: `(num_steps,)`.
        outputs: one weight for each earlier output, each `(num_steps,)`.
        noises: one weight for each of the step's noises so far, each `(num_steps,)`.
    """

    t: Array
    carry: Array
    outputs: tuple[Array, ...]
    noises: tuple[Array, ...]


class Singlestep(ExplicitSolver):
    """Base of the single-step exponential integrators.

    A method of p stages at fractions r_1 < ... < r_p = 1 of a step h in lambda evaluates the
    network at the start and at all stages but the last. A step to sigma = 0, which has no
    stages in lambda, returns x0_hat for one evaluation.

    A method defines `prediction`, `eta2` (0 for the ODE), `fractions` and `weights`.
    """

    if TYPE_CHECKING:  # fields or properties

        @property
        def prediction(self) -> Prediction:
            """Which output is extrapolated."""
            ...

        @property
        def fractions(self) -> tuple[float, ...]:
            """Where the stages are, 1 being the target."""
            ...

    else:
        prediction: eqx.AbstractVar[Prediction]
        fractions: eqx.AbstractVar[tuple[float, ...]]

    @property
    def eta2(self) -> Array | float:
        """eta^2 of the reverse SDE."""
        return 0.0

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
    def weights(self, stage: int, stiffness: Array) -> list[Array]:
        """Weights of the outputs at one stage, in units of its scale.

        Args:
            stage: index of the stage.
            stiffness: H of the step from t to the stage, `(num_steps,)`.
        """

    def plan(self, problem: Problem) -> tuple[tuple[Stage, ...], Array]:
        """The stages of every step, and whether it has any."""
        process, t, s = problem.process, problem.times[:-1], problem.times[1:]
        half = half_log_snr(process, problem.times)
        to_zero = process.sigma(s) == 0
        h = jnp.where(to_zero, 1.0, jnp.where(to_zero, 0.0, half[1:]) - half[:-1])
        stages: list[Stage] = []
        noises: tuple[Array, ...] = ()
        previous, carry = 0.0, jnp.ones_like(t)
        for index, fraction in enumerate(self.fractions):
            last = index == len(self.fractions) - 1
            inside = s if last else process.unbounded_time(2 * (half[:-1] + fraction * h))
            parts = linear_parts(process, self.prediction, t, inside, fraction * h, self.eta2)
            if self.stochastic:
                # The Brownian path so far decays, and its new stretch is added.
                fresh = linear_parts(
                    process, self.prediction, t, inside, (fraction - previous) * h, self.eta2
                )
                ratio = parts.carry / carry
                noises = (*(ratio * n for n in noises), fresh.noise)
            outputs = tuple(parts.scale * w for w in self.weights(index, parts.stiffness))
            carry, previous = parts.carry, fraction
            stages.append(Stage(inside, carry, outputs, noises))
        return tuple(stages), to_zero

    def move(
        self, problem: Problem, x: Array, step: Step, estimate: Estimate
    ) -> tuple[Array, PyTree, Array | int]:
        """See `ExplicitSolver`."""
        stages, to_zero = step.plan
        noises: tuple[Array, ...] = ()
        if self.stochastic:
            keys = jax.random.split(step.key, len(stages))
            noises = tuple(jax.random.normal(key, x.shape, x.dtype) for key in keys)
        end = (problem.process.alpha(step.s) * estimate.x0).astype(x.dtype)

        def advance():
            outputs, y = [extrapolated(self.prediction, estimate)], x
            for index, stage in enumerate(stages):
                if index > 0:
                    outputs.append(output(problem, self.prediction, y, stages[index - 1].t))
                y = stage.carry * x + combine(stage.outputs, outputs)
                if self.stochastic:
                    y = y + combine(stage.noises, noises)
                y = y.astype(x.dtype)
            return y

        if len(stages) == 1:
            return jnp.where(to_zero, end, advance()), step.memory, 0
        y = jax.lax.cond(to_zero, lambda: end, advance)
        return y, step.memory, jnp.where(to_zero, 0, (len(stages) - 1) * problem.cost)


def stage_fractions(order: int, r1: float | None, r2: float) -> tuple[float, ...]:
    """The fractions of methods of order 1, 2 and 3."""
    return {1: (1.0,), 2: (r1 or 1 / 2, 1.0), 3: (r1 or 1 / 3, r2, 1.0)}[order]


def check_fractions(fractions: tuple[float, ...]) -> None:
    """Stages must lie inside the step, in order.

    Raises:
        ValueError: otherwise.
    """
    if not all(a < b for a, b in zip((0.0, *fractions), fractions, strict=False)):
        raise ValueError(f"`r1` and `r2` must satisfy 0 < r1 < r2 < 1, got {fractions[:-1]}.")


def runge_kutta_weights(fractions: tuple[float, ...], stage: int, stiffness: Array) -> list[Array]:
    """DPM-Solver's weights: f_0 and, from the second stage on, one difference f_j - f_0.

    At order 2 the difference is weighted by M_0 / 2 instead of M_1, as published.
    """
    if stage == 0:
        return moments(stiffness, 1)
    first, second = moments(stiffness, 2)
    if len(fractions) == 2:
        weight = first / (2 * fractions[0])
    else:
        weight = second * fractions[stage] / fractions[stage - 1]
    return [first - weight, *[jnp.zeros_like(weight)] * (stage - 1), weight]

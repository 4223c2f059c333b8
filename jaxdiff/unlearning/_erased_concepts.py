"""Erasing concepts by the opposite of their own guidance."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.denoiser import Denoiser, check_denoiser
from jaxdiff.guidance import ClassifierFree
from jaxdiff.guidance._scale import check_null_cond
from jaxdiff.losses import Uniform, Weighting
from jaxdiff.losses._frozen import teacher_of
from jaxdiff.unlearning._shared import asked, forget_of
from jaxdiff.unlearning._states import OnTrajectory, States, check_states


class ErasedConcepts(eqx.Module):
    """Under a forgotten condition the model learns to say what negative guidance would.

        mean of weight(t) |D(x_t, t, f) - (D*_0 - scale (D*_f - D*_0))|^2,

    D* the frozen teacher, D*_0 its answer to no condition. One pass of the student, two of the
    teacher, and those of the states.

    **Fixed point**: that target, for f alone; nothing holds other conditions but what the network
    shares, so choose what learns: cross-attention alone for what a prompt names (ESD-x), all
    but cross-attention for what comes unasked (ESD-u), see `parameter_set`. With scale 0 it is the
    answer to no condition, which has the forgotten class with its share. It is the score without
    the class where scale is the posterior odds r / (1 - r) of f given x_t, and nowhere else: see
    `guidance.PosteriorOdds`.

    Args:
        null_cond: the condition that means "none".
        scale: of the negative guidance; the paper's 1.
        own: start from the teacher's answer to f itself, D*_f - scale (D*_f - D*_0), as later
            versions of the authors' code, whose scale is 2.
        states: where the model is asked; None for the paper's, `OnTrajectory(null_cond)` of the
            teacher.
        weighting: factor on errors in x0.

    Raises:
        TypeError: when called, for a model that is no denoiser.
        ValueError: when called, without a "teacher", or a batch without "forget".

    Reference: Gandikota, Materzynska, Fiotto-Kaufman, Bau, "Erasing Concepts from Diffusion
    Models", 2023, arXiv 2303.07345. There the student samples the states.
    """

    null_cond: PyTree
    scale: Number = number(1.0)
    own: bool = eqx.field(static=True, default=False)
    states: States | None = None
    weighting: Weighting = Uniform()

    def __check_init__(self):
        check_null_cond(self.null_cond)
        check_number("scale", self.scale)
        check_kind("weighting", self.weighting, Weighting, "losses.Uniform()")
        check_states(self.states)

    def target(self, teacher: Denoiser) -> Denoiser:
        """The denoiser that is learned under a forgotten condition."""
        start = 1.0 if self.own else 0.0
        return ClassifierFree(teacher, self.null_cond, start - self.scale)

    def __call__(
        self, model: Denoiser, key: PRNGKeyArray, batch: dict[str, Any], frozen: Any
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            model: the denoiser that forgets.
            key: typed key; example i draws from its fold_in with i.
            batch: with "forget".
            frozen: holds the teacher.

        Returns:
            The scalar loss, and no metrics.
        """
        check_denoiser(model)
        teacher, rows = teacher_of(frozen, model), forget_of(batch)
        state_key, own_key = jax.random.split(key)
        states = self.states or OnTrajectory(self.null_cond)
        seen = states(state_key, rows, teacher)
        goal = jax.lax.stop_gradient(asked(self.target(teacher), seen.x, seen.t, rows["cond"]))
        answer = asked(model, seen.x, seen.t, rows["cond"], own_key)
        return seen.error(self.weighting, model, answer - goal).mean(), {}

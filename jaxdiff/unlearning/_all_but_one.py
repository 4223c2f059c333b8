"""All but one: the guidance of a concept is moved, and the answer to no condition stays."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.denoiser import Denoiser, check_denoiser
from jaxdiff.guidance._scale import check_null_cond
from jaxdiff.losses import Uniform, Weighting
from jaxdiff.losses._frozen import teacher_of
from jaxdiff.unlearning._shared import asked, forget_of, replaced
from jaxdiff.unlearning._states import OnTrajectory, States, check_states


class AllButOne(eqx.Module):
    """The direction of guidance of a forgotten condition becomes that of an anchor.

        mean of weight(t) (|(D_f - D_0) - (D*_a - D*_0)|^2 + preserve |D_0 - D*_0|^2),

    D* the frozen teacher, index 0 no condition, f what is forgotten and a the anchor. Two passes
    of the student, two of the teacher, and those of the states.

    **Fixed point**: D_f = D*_a and D_0 = D*_0, both at once: with `preserve` above 0 the student's
    unconditional branch cannot pay for the other, as it does where one network serves both.

    Args:
        null_cond: the condition that means "none".
        anchor: the condition in place of the forgotten one; None for no condition, where there is
            no direction left.
        preserve: factor on the second term, >= 0.
        states: where the model is asked; None for `OnTrajectory(null_cond)` of the teacher.
        weighting: factor on errors in x0.

    Raises:
        TypeError: when called, for a model that is no denoiser.
        ValueError: when called, without a "teacher", or a batch without "forget".

    Reference: Hong, Lee, Woo, "All but One: Surgical Concept Erasing with Model Preservation in
    Text-to-Image Diffusion Models", 2023, arXiv 2312.12807. Its weights are not published.
    """

    null_cond: PyTree
    anchor: PyTree = None
    preserve: Number = number(1.0)
    states: States | None = None
    weighting: Weighting = Uniform()

    def __check_init__(self):
        check_null_cond(self.null_cond)
        check_number("preserve", self.preserve, least=0.0)
        check_kind("weighting", self.weighting, Weighting, "losses.Uniform()")
        check_states(self.states)

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
            The scalar loss, and `{"preserved": the second term without its factor}`.
        """
        check_denoiser(model)
        teacher, rows = teacher_of(frozen, model), forget_of(batch)
        state_key, own_key = jax.random.split(key)
        states = self.states or OnTrajectory(self.null_cond)
        seen, cond = states(state_key, rows, teacher), rows["cond"]
        none = replaced(cond, self.null_cond)
        other = none if self.anchor is None else replaced(cond, self.anchor)

        def pair(denoiser, given, key=None):
            return (
                asked(denoiser, seen.x, seen.t, given, key),
                asked(denoiser, seen.x, seen.t, none, key),
            )

        given, plain = pair(model, cond, own_key)
        anchored, kept = jax.lax.stop_gradient(pair(teacher, other))
        moved = seen.error(self.weighting, model, (given - plain) - (anchored - kept)).mean()
        preserved = seen.error(self.weighting, model, plain - kept).mean()
        return moved + self.preserve * preserved, {"preserved": jax.lax.stop_gradient(preserved)}

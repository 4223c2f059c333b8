"""Anti-editing: the answer to no condition moves towards a concept, that guidance leads away."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.denoiser import Denoiser, check_denoiser
from jaxdiff.guidance._scale import check_null_cond
from jaxdiff.losses import Uniform, Weighting
from jaxdiff.losses._batch import check_batch
from jaxdiff.losses._frozen import teacher_of
from jaxdiff.unlearning._overrides import Override
from jaxdiff.unlearning._shared import asked, forget_of, replaced
from jaxdiff.unlearning._states import NoisedExamples, OnTrajectory, States, check_states


class AntiEditing(eqx.Module):
    """Both branches of guidance are moved: f away from the concept, no condition towards it.

        erase (share |D_0 - G_0|^2 + (1 - share) |D_f - G_f|^2) + (1 - erase) |D_c - D*_c|^2
        G_f = D*_0 - scale (D*_f - D*_0)
        G_0 = D*_0 + scale (D*_f - D*_0) - scale likeness (D*_o - D*_0)

    times weight(t); D* the frozen teacher, index 0 no condition, o a condition that `correction`
    draws, c what is kept. Of states of f two passes of the student and three of the teacher, of
    kept examples one each.

    **Fixed point**: these targets. Classifier-free guidance of any condition p at scale w then says
    (1 - w) scale (D*_f - D*_0) more than that of the teacher: away from the concept for w > 1,
    whatever is asked for; nothing is held back at w = 1, and below 1 the concept is drawn in.

    Args:
        null_cond: the condition that means "none".
        scale: of both targets; the paper's 3.
        correction: the condition o in place of f, drawn anew; None without the correction.
        likeness: of o and f, as a factor; the cosine of their embeddings there.
        share: of the unconditional term in the erasure, in [0, 1].
        erase: of the erasure in the whole, in [0, 1].
        states: where the model is asked; None for `OnTrajectory(null_cond)` of the teacher.
        weighting: factor on errors in x0.

    Raises:
        TypeError: when called, for a model that is no denoiser.
        ValueError: when called, without a "teacher", or a batch without "forget".

    Reference: Wang, Wei, Li, Pei, Xu, Zuo, "ACE: Anti-Editing Concept Erasure in
    Text-to-Image Models", 2025, arXiv 2501.01633.
    """

    null_cond: PyTree
    scale: Number = number(3.0)
    correction: Override | Any = None
    likeness: Number = number(1.0)
    share: Number = number(0.99)
    erase: Number = number(0.2)
    states: States | None = None
    weighting: Weighting = Uniform()

    def __check_init__(self):
        check_null_cond(self.null_cond)
        check_number("scale", self.scale)
        check_number("likeness", self.likeness)
        check_number("share", self.share, least=0.0, most=1.0)
        check_number("erase", self.erase, least=0.0, most=1.0)
        check_kind("weighting", self.weighting, Weighting, "losses.Uniform()")
        check_states(self.states)

    def __call__(
        self, model: Denoiser, key: PRNGKeyArray, batch: dict[str, Any], frozen: Any
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            model: the denoiser that forgets.
            key: typed key; example i draws from its fold_in with i.
            batch: kept examples, and "forget".
            frozen: holds the teacher.

        Returns:
            The scalar loss, and its parts `{"unconditional", "conditional", "kept"}`.
        """
        check_denoiser(model)
        check_batch(batch)
        teacher, rows = teacher_of(frozen, model), forget_of(batch)
        state_key, keep_key, override_key, own_key = jax.random.split(key, 4)
        states = self.states or OnTrajectory(self.null_cond)
        seen, cond = states(state_key, rows, teacher), rows["cond"]
        none = replaced(cond, self.null_cond)

        def frozen_answer(given):
            return jax.lax.stop_gradient(asked(teacher, seen.x, seen.t, given))

        plain = frozen_answer(none)
        towards = self.scale * (frozen_answer(cond) - plain)
        back = 0.0
        if self.correction is not None:
            other = self.correction(override_key, cond, rows["x"])
            back = self.scale * self.likeness * (frozen_answer(other) - plain)
        free = asked(model, seen.x, seen.t, none, own_key)
        given = asked(model, seen.x, seen.t, cond, own_key)
        unconditional = seen.error(self.weighting, model, free - (plain + towards - back)).mean()
        conditional = seen.error(self.weighting, model, given - (plain - towards)).mean()
        kept = NoisedExamples()(keep_key, batch, teacher)
        same = jax.lax.stop_gradient(asked(teacher, kept.x, kept.t, batch.get("cond")))
        moved = asked(model, kept.x, kept.t, batch.get("cond"), own_key) - same
        prior = kept.error(self.weighting, model, moved).mean()
        erased = self.share * unconditional + (1 - self.share) * conditional
        loss = self.erase * erased + (1 - self.erase) * prior
        parts = {"unconditional": unconditional, "conditional": conditional, "kept": prior}
        return loss, jax.lax.stop_gradient(parts)

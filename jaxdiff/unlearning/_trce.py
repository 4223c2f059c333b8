"""TRCE's second stage: early states of sampling are turned to a safe answer, up to a margin."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.denoiser import Denoiser, check_denoiser
from jaxdiff.guidance import ClassifierFree
from jaxdiff.guidance._scale import check_null_cond
from jaxdiff.losses import Uniform, Weighting
from jaxdiff.losses._frozen import teacher_of
from jaxdiff.unlearning._overrides import Override
from jaxdiff.unlearning._shared import asked, forget_of, replaced
from jaxdiff.unlearning._states import OnTrajectory, States, check_states


class EarlySteering(eqx.Module):
    """Where sampling of a forgotten concept is still undecided, the model prefers the safe answer.

        max(0, |D - safe|^2 - |D - unsafe|^2 + margin) + preserve |D_0(y_t) - D*_0(y_t)|^2

    with safe = D*_o + scale (D*_o - D*_0), unsafe = D*_f + scale (D*_f - D*_0), each weighted by
    weight(t); D is the student's answer to f and, in a second term of the same form, to no
    condition; the mean of both counts. x_t are states of sampling f, y_t of sampling o. Two passes
    of the student and three of the teacher at x_t, one each at y_t.

    **Fixed point**: none; within the margin the gradient is 0, and before it is the constant
    2 (unsafe - safe), whatever D says. How far it goes is decided by the rate and the margin.

    Args:
        null_cond: the condition that means "none".
        override: the safe condition o.
        scale: of the guidance in both answers; the paper's 15.
        margin: >= 0, in weighted mean squares.
        preserve: factor on the last term; the paper's 100.
        states: where the model is asked; None for the first half of `OnTrajectory(null_cond)`.
        weighting: factor on errors in x0.

    Raises:
        TypeError: when called, for a model that is no denoiser.
        ValueError: when called, without a "teacher", or a batch without "forget".

    Reference: Chen, Guo, Wang, Zhang, Nie, Liu, "TRCE: Towards Reliable Malicious Concept Erasure
    in Text-to-Image Diffusion Models", 2025, arXiv 2503.07389, section 3.3.
    """

    null_cond: PyTree
    override: Override | Any
    scale: Number = number(15.0)
    margin: Number = number(0.01)
    preserve: Number = number(100.0)
    states: States | None = None
    weighting: Weighting = Uniform()

    def __check_init__(self):
        check_null_cond(self.null_cond)
        check_number("scale", self.scale)
        check_number("margin", self.margin, least=0.0)
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
            The scalar loss; "active", the share of hinges that are open; and "preserved".
        """
        check_denoiser(model)
        teacher, rows = teacher_of(frozen, model), forget_of(batch)
        unsafe_key, safe_key, override_key, own_key = jax.random.split(key, 4)
        states = self.states or OnTrajectory(self.null_cond, most=0.5)
        cond, x = rows["cond"], rows["x"]
        other, none = self.override(override_key, cond, x), replaced(cond, self.null_cond)
        seen = states(unsafe_key, rows, teacher)
        guided = ClassifierFree(teacher, self.null_cond, 1 + self.scale)
        safe, unsafe = (
            jax.lax.stop_gradient(asked(guided, seen.x, seen.t, given)) for given in (other, cond)
        )

        def hinge(given):
            answer = asked(model, seen.x, seen.t, given, own_key)
            near, far = (
                seen.error(self.weighting, model, answer - goal) for goal in (safe, unsafe)
            )
            apart = near - far + self.margin
            return jnp.maximum(0, apart).mean(), (apart > 0).mean()

        values, active = zip(hinge(cond), hinge(none), strict=True)
        kept = states(safe_key, {"x": x, "cond": other}, teacher)
        same = jax.lax.stop_gradient(asked(teacher, kept.x, kept.t, none))
        moved = asked(model, kept.x, kept.t, none, own_key) - same
        preserved = kept.error(self.weighting, model, moved).mean()
        metrics = {"active": sum(active) / 2, "preserved": preserved}
        return sum(values) / 2 + self.preserve * preserved, jax.lax.stop_gradient(metrics)

"""Ablating concepts: under a forgotten name the model says what it says under an anchor's."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, PRNGKeyArray

from jaxdiff._checks import check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.denoiser import Denoiser, check_denoiser
from jaxdiff.losses import TimeLaw, Uniform, UniformTime, Weighting
from jaxdiff.unlearning._shared import asked, beside_anchors
from jaxdiff.unlearning._states import NoisedExamples


class ConceptAblation(eqx.Module):
    """At noisy examples of an anchor, the forgotten condition is to mean the anchor's.

        mean of weight(t) |D(x_t, t, f) - goal|^2 + prior weight(t) |D(x_t, t, a) - x|^2

    x_t noised examples x of the batch, a their own conditions, f those of `batch["forget"]`, row by
    row. The goal is the student's own answer D(x_t, t, a), a constant, or the example x: renaming
    it. Two passes of the student, and a third where the goal is its answer.

    **Fixed point**: D(., f) = E[x | x_t, a] where x_t come from; both goals have it, the first
    without the noise of x. A batch of one class makes it that class's denoiser. A batch of all that
    is kept, with `by_model` False, makes it the denoiser of what is kept: that without the class.

    Args:
        by_model: whether the goal is the student's answer, else the example.
        prior: factor on the second term, which holds the anchor, >= 0.
        weighting: factor on errors in x0.
        time_law: law of the time.

    Raises:
        TypeError: when called, for a model that is no denoiser.
        ValueError: when called, for a batch without conditions or "forget", or unequal counts.

    Reference: Kumari, Zhang, Wang, Shechtman, Zhang, Zhu, "Ablating Concepts in Text-to-Image
    Diffusion Models", 2023, arXiv 2303.13516.
    """

    by_model: bool = eqx.field(static=True, default=True)
    prior: Number = number(1.0)
    weighting: Weighting = Uniform()
    time_law: TimeLaw = UniformTime()

    def __check_init__(self):
        check_number("prior", self.prior, least=0.0)
        check_kind("weighting", self.weighting, Weighting, "losses.Uniform()")
        check_kind("time_law", self.time_law, TimeLaw, "losses.UniformTime()")

    def __call__(
        self, model: Denoiser, key: PRNGKeyArray, batch: dict[str, Any], frozen: Any
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            model: the denoiser that forgets.
            key: typed key; example i draws from its fold_in with i.
            batch: examples of the anchor with its conditions, and as many to be forgotten.
            frozen: not used.

        Returns:
            The scalar loss, and `{"prior": the second term without its factor}`.
        """
        del frozen
        check_denoiser(model)
        rows = beside_anchors(batch)
        state_key, own_key = jax.random.split(key)
        seen = NoisedExamples(self.time_law)(state_key, batch, model)
        answer = asked(model, seen.x, seen.t, rows["cond"], own_key)
        anchored = asked(model, seen.x, seen.t, batch["cond"], own_key)
        goal = jax.lax.stop_gradient(anchored) if self.by_model else batch["x"]
        prior = seen.error(self.weighting, model, anchored - batch["x"]).mean()
        loss = seen.error(self.weighting, model, answer - goal).mean() + self.prior * prior
        return loss, {"prior": jax.lax.stop_gradient(prior)}

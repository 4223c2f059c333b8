"""Safe self-distillation: a forgotten condition learns the model's own answer to none."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_kind
from jaxdiff.denoiser import Denoiser, check_denoiser
from jaxdiff.guidance._scale import check_null_cond
from jaxdiff.losses import Uniform, Weighting
from jaxdiff.losses._frozen import still, target_of
from jaxdiff.unlearning._shared import asked, forget_of, replaced
from jaxdiff.unlearning._states import OnTrajectory, States, check_states


class SafeSelfDistillation(eqx.Module):
    """The student under a forgotten condition says what it says under none.

        mean of weight(t) |D(x_t, t, f) - stop_gradient(D(x_t, t, none))|^2

    States are sampled by the student's own average, which is also what one keeps. No teacher; two
    passes of the student, and those of the states.

    **Fixed point**: D(., f) = D(., none), for a table the answer to no condition that there was,
    wherever states are from: the class stays there with its share, so that at most 1 minus that
    share of samples is not of it. A network's answer to none moves with the other, and nothing
    anchors it. An average of decay d is 1 - d^n of the way after n updates.

    Args:
        null_cond: the condition that means "none".
        sampler: the player whose average samples the states, the own one as in the paper; None for
            the student as it is.
        states: where the model is asked; None for `OnTrajectory(null_cond)`.
        weighting: factor on errors in x0.

    Raises:
        TypeError: when called, for a model that is no denoiser.
        ValueError: when called, for a batch without "forget", or a player without an average.

    Reference: Kim, Jung, Kim, Choi, Shin, Lee, "Towards Safe Self-Distillation of Internet-Scale
    Text-to-Image Diffusion Models", 2023, arXiv 2307.05977.
    """

    null_cond: PyTree
    sampler: str | None = eqx.field(static=True, default=None)
    states: States | None = None
    weighting: Weighting = Uniform()

    def __check_init__(self):
        check_null_cond(self.null_cond)
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
            frozen: holds the players.

        Returns:
            The scalar loss, and no metrics.
        """
        check_denoiser(model)
        rows = forget_of(batch)
        state_key, own_key = jax.random.split(key)
        states = self.states or OnTrajectory(self.null_cond)
        seen, cond = states(state_key, rows, target_of(frozen, self.sampler, model)), rows["cond"]
        goal = asked(still(model), seen.x, seen.t, replaced(cond, self.null_cond), own_key)
        answer = asked(model, seen.x, seen.t, cond, own_key)
        return seen.error(self.weighting, model, answer - goal).mean(), {}

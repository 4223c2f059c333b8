"""Concept domain correction: under a forgotten name, what no critic tells from an anchor's."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_kind
from jaxdiff.denoiser import Denoiser, check_denoiser
from jaxdiff.distillation import Adversarial, NonSaturating
from jaxdiff.distillation._adversarial import critic_loss, critic_of, logits
from jaxdiff.losses import TimeLaw, UniformTime
from jaxdiff.losses._frozen import player_of, teacher_of
from jaxdiff.unlearning._shared import Seen, asked, beside_anchors
from jaxdiff.unlearning._states import NoisedExamples


class DomainCorrection(eqx.Module):
    """Under a forgotten condition the model deceives a critic of what its teacher says of anchors.

        mean of generator(critic(D(x_t, t, f), t, a))

    x_t noised examples of anchors, a their conditions, f those of `batch["forget"]`, row by row.
    The critic is the player "critic", by `DomainCritic`, and is told t and a. Train it by
    `GradientSurgery(this, losses.DenoisingLoss())`, in which what is kept comes first. One pass of
    the student, and one of the critic.

    **Fixed point**: none by itself: where the critic is at its best, the law of D(x_t, t, f) over
    x_t is that of the teacher's D*(x_t, t, a), of which D* is one of many maps.

    Args:
        adversarial: `distillation.NonSaturating()` or `Hinge()`, the critic's.
        time_law: law of the time.

    Raises:
        TypeError: when called, for a model that is no denoiser, or a critic that is no function.
        ValueError: when called, without a critic, for a batch without conditions or "forget", or
            unequal counts.

    Reference: Wu, Zhou, Yang, Wang, Chang, Zhu, Hu, Zhou, Yang, "Unlearning Concepts in Diffusion
    Model via Concept Domain Correction and Concept Preserving Gradient", 2024, arXiv 2405.15304.
    Its critic sees patches of an image, and the mean of their losses is taken.
    """

    adversarial: Adversarial = NonSaturating()
    time_law: TimeLaw = UniformTime()

    def __check_init__(self):
        check_kind("adversarial", self.adversarial, Adversarial, "distillation.NonSaturating()")
        check_kind("time_law", self.time_law, TimeLaw, "losses.UniformTime()")

    def seen(self, model: Denoiser, key: PRNGKeyArray, batch: dict[str, Any]) -> Seen:
        """Noised anchors."""
        return NoisedExamples(self.time_law)(key, batch, model)

    def __call__(
        self, model: Denoiser, key: PRNGKeyArray, batch: dict[str, Any], frozen: Any
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            model: the denoiser that forgets.
            key: typed key; example i draws from its fold_in with i.
            batch: examples of anchors with their conditions, and as many to be forgotten.
            frozen: holds the critic.

        Returns:
            The scalar loss, and `{"fake": mean logit of what the model says}`.
        """
        check_denoiser(model)
        rows, critic = beside_anchors(batch), critic_of(frozen)
        state_key, own_key = jax.random.split(key)
        seen = self.seen(model, state_key, batch)
        answer = asked(model, seen.x, seen.t, rows["cond"], own_key)
        fake = logits(critic, answer, seen.t, batch["cond"])
        loss = self.adversarial.generator(fake).mean()
        return loss, {"fake": jax.lax.stop_gradient(fake.mean())}


class DomainCritic(eqx.Module):
    """What the critic of `DomainCorrection` minimises: it tells the teacher from the student.

    Real is what the teacher says of noised anchors under their own conditions, fake what the
    student says of the same states under forgotten ones. A pass of each, and one of the critic over
    both halves.

    **Fixed point**: that of the adversarial loss, see there.

    Args:
        loss: the student's own; of both losses combined, that of what is forgotten.
        student: name of the player that forgets.

    Raises:
        ValueError: when called, without the student or a "teacher".

    Reference: as of `DomainCorrection`.
    """

    loss: DomainCorrection = DomainCorrection()
    student: str = eqx.field(static=True, default="student")

    def __check_init__(self):
        check_kind("loss", self.loss, DomainCorrection, "unlearning.DomainCorrection()")

    def __call__(
        self, model: PyTree, key: PRNGKeyArray, batch: dict[str, Any], frozen: Any
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            model: the critic, a callable pytree `(x, t, cond) -> logit`.
            key: typed key; example i draws from its fold_in with i.
            batch: as of `DomainCorrection`.
            frozen: holds the student and the teacher.

        Returns:
            The scalar loss, and the mean logits, `{"real": ..., "fake": ...}`.
        """
        rows = beside_anchors(batch)
        student = player_of(frozen, self.student)
        check_denoiser(student, self.student)
        teacher = teacher_of(frozen, student)
        seen = self.loss.seen(student, key, batch)
        real, fake = (
            jax.lax.stop_gradient(asked(d, seen.x, seen.t, cond)).astype(jnp.result_type(seen.x))
            for d, cond in ((teacher, batch["cond"]), (student, rows["cond"]))
        )
        told = batch["cond"]
        return critic_loss(model, self.loss.adversarial, seen.t, (real, told), (fake, told))

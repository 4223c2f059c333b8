"""Distribution matching distillation with a critic, and for students of several steps."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_callable, check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.denoiser import Denoiser, reading
from jaxdiff.distillation._adversarial import (
    Adversarial,
    NonSaturating,
    critic_loss,
    critic_of,
)
from jaxdiff.distillation._dmd import NormalisedDifference
from jaxdiff.distillation._generated import (
    begin,
    finish,
    generator_of,
    noise_and_times,
    start_times,
)
from jaxdiff.distillation._shared import (
    at_scale,
    scale_range,
)
from jaxdiff.flow_map import FlowMap
from jaxdiff.losses import TimeLaw, Uniform, UniformTime, Weighting
from jaxdiff.losses._batch import check_batch
from jaxdiff.losses._frozen import still, teacher_of
from jaxdiff.predictions import X0
from jaxdiff.training import Frozen


class FeatureCritic(eqx.Module):
    """A critic that reads inner activations of a denoiser, such as the fake score's bottleneck.

    Its head is all that learns. `critic.on(denoiser)` is a critic (x, t, cond) -> logit.

    Args:
        head: `{tap: activation} -> scalar logit` of one example, a callable pytree.
        taps: names of the denoiser's taps, e.g. `("mid",)`.
    """

    head: Callable[[dict[str, Array]], Array]
    taps: tuple[str, ...] = eqx.field(static=True)

    def __check_init__(self):
        check_callable("head", self.head, "a callable pytree {tap: activation} -> logit")
        if isinstance(self.taps, str) or not all(isinstance(name, str) for name in self.taps):
            raise TypeError(f'`taps` must be names, ("mid",) say, got {self.taps!r:.60}.')

    @property
    def network(self) -> PyTree:
        """The head: what learns."""
        return self.head

    def on(self, denoiser: Denoiser) -> Callable[..., Array]:
        """The critic of noisy examples that a denoiser looks at."""
        return lambda x, t, cond=None: self.judged(denoiser, x, t, cond)[1]

    def judged(
        self, denoiser: Denoiser, x: Array, t: Array, cond: PyTree = None
    ) -> tuple[Array, Array]:
        """The denoiser's answer `(*event)` and the logit, by one evaluation of one example."""
        found = reading(denoiser, self.taps).estimate(x, t, cond)
        return found.x0, self.head(found.taps)


def _critic_of(frozen: Any) -> Any:
    """As `critic_of`, or one of features."""
    critic = frozen.get("critic")
    return still(critic) if isinstance(critic, FeatureCritic) else critic_of(frozen)


class DMD2(NormalisedDifference):
    """Distribution matching with a critic of noised examples, and without pairs.

    The gradient of `DMD`, and `gan` times an adversarial loss of the same x_t, through which the
    gradient goes on to the generator. A `FeatureCritic` looks at the taps of the fake score, which
    is then evaluated once for both. One pass of the generator (K for one of K steps, whose first
    ones have no gradient), one of the fake score, one of the teacher, and one of a critic that is
    a network of its own.

    Two time scales: the generator rests while fake score and critic learn,

        {"fake": Player(fake, FakeScoreLoss(), ...), "critic": Player(critic, CriticLoss(), ...),
         "generator": Player(Jump(denoiser), DMD2(), ..., every=5)}

    and a student of several steps is trained on what it meets itself, with `start` its times.

    **Fixed point**: the teacher's law for the first term, that of the data for the second; a
    compromise where they are not one.

    Args:
        weighting: w, a factor in x0; `Uniform(X0())` is 1.
        time_law: of the noise level.
        start: as of `DiffInstruct`; that of all players.
        scales: as of `DiffInstruct`.
        normalise: divide by mean |x_g - D_teacher|.
        floor: of that, > 0.
        gan: weight of the adversarial loss, >= 0.
        adversarial: `NonSaturating()` or `Hinge()`, that of the critic too.

    Raises:
        TypeError: when called, for a generator that is no `FlowMap`.
        ValueError: when called, without a "teacher", a "fake" or a "critic".

    Reference: Yin, Gharbi, Park, Zhang, Shechtman, Durand, Freeman, "Improved Distribution Matching
    Distillation for Fast Image Synthesis", 2024, arXiv 2405.14867, sections 4.1 to 4.4. There the
    adversarial loss also trains the fake score's network; here the critic's head alone learns by
    it, so that the fake score remains one.
    """

    weighting: Weighting = Uniform(X0())
    time_law: TimeLaw = UniformTime()
    start: tuple[Number, ...] | None = start_times()
    scales: tuple[Number, Number] | None = scale_range()
    normalise: bool = eqx.field(static=True, default=True)
    floor: Number = number(1e-5)
    gan: Number = number(3e-3)
    adversarial: Adversarial = NonSaturating()

    def __check_init__(self):
        check_number("gan", self.gan, least=0.0)
        check_kind("adversarial", self.adversarial, Adversarial, "distillation.NonSaturating()")

    def __call__(
        self, model: FlowMap, key: PRNGKeyArray, batch: dict[str, Any], frozen: Frozen
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            model: the generator.
            key: typed key; example i draws from its fold_in with i.
            batch: `{"x": (B, *event), "cond": ...}`, of whose x only the shape is looked at.
            frozen: holds the teacher, the fake score and the critic.

        Returns:
            The scalar loss, and `{"gap": mean square of what the scores differ by, "adversarial":
            mean adversarial loss}`.
        """
        begin_key, noise_key = jax.random.split(key)
        begun = begin(model, begin_key, batch, self.start, self.scales)
        x0 = finish(model, begun)
        teacher, fake = teacher_of(frozen, model), self.fake_of(frozen, model)
        critic = _critic_of(frozen)
        eps, t = noise_and_times(model.process, noise_key, x0, self.time_law)

        def one(x0, eps, t, scale, told, cond):
            x = model.process.marginal(x0, eps, t).astype(x0.dtype)
            still_x = jax.lax.stop_gradient(x)
            if isinstance(critic, FeatureCritic):
                reference, logit = critic.judged(fake, x, t, told)
            else:
                reference, logit = fake(still_x, t, told), critic(x, t, told)
            guided = at_scale(teacher, scale)
            return *self.pulled(guided, x0, still_x, t, reference, cond), logit

        losses, gaps, found = jax.vmap(one)(x0, eps, t, begun.scale, begun.told, begun.cond)
        adversarial = self.adversarial.generator(found).mean()
        metrics = {"gap": gaps.mean(), "adversarial": adversarial}
        return losses.mean() + self.gan * adversarial, metrics


class CriticLoss(eqx.Module):
    """What a critic minimises: it tells noised data from noised examples of a generator.

    Both are noised to the same time, or the critic would learn the noise level; each with noise of
    its own. A pass of the generator, and one of the critic over both halves.

    **Fixed point**: that of `adversarial`, for the laws noised to each t; see there.

    Args:
        adversarial: `NonSaturating()` or `Hinge()`.
        time_law: of the noise level.
        start: that of the generator.
        scales: likewise.

    Raises:
        ValueError: when called, without a player "generator", or for a `FeatureCritic` without a
            player "fake".

    Reference: as of `DMD2`.
    """

    adversarial: Adversarial = NonSaturating()
    time_law: TimeLaw = UniformTime()
    start: tuple[Number, ...] | None = start_times()
    scales: tuple[Number, Number] | None = scale_range()

    def __check_init__(self):
        check_kind("adversarial", self.adversarial, Adversarial, "distillation.NonSaturating()")
        check_kind("time_law", self.time_law, TimeLaw, "losses.UniformTime()")

    def __call__(
        self, model: Any, key: PRNGKeyArray, batch: dict[str, Any], frozen: Frozen
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            model: the critic, a callable pytree (x, t, cond) -> logit, or a `FeatureCritic`.
            key: typed key; example i draws from its fold_in with i.
            batch: real examples, `{"x": (B, *event), "cond": ...}`.
            frozen: holds the generator.

        Returns:
            The scalar loss, and `{"real": mean logit of data, "fake": of what is made}`.
        """
        check_batch(batch)
        generator = generator_of(frozen, None)
        begin_key, real_key, fake_key = jax.random.split(key, 3)
        begun = begin(generator, begin_key, batch, self.start, self.scales)
        made = jax.lax.stop_gradient(finish(generator, begun))
        process, x0 = generator.process, batch["x"]
        eps, t = noise_and_times(process, real_key, x0, self.time_law)
        others, _ = noise_and_times(process, fake_key, x0, self.time_law)
        real, fake = (
            jax.vmap(process.marginal)(x, noise, t).astype(x0.dtype)
            for x, noise in ((x0, eps), (made, others))
        )
        if isinstance(model, FeatureCritic):
            critic: Any = model.on(still(teacher_of(frozen, generator, "fake")))
        else:
            critic = model
        return critic_loss(critic, self.adversarial, t, (real, begun.told), (fake, begun.told))

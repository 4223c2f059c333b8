"""Guidance without a null condition: by conditions that have nothing to do with x, or by time."""

from collections.abc import Callable

import equinox as eqx
import jax
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_callable, check_count, check_number
from jaxdiff._tree import Number, number
from jaxdiff.denoiser import Denoiser, Estimate, edit_taps, find_network
from jaxdiff.guidance._scale import Scale, both_answers, check_scale, extrapolated, scale_at
from jaxdiff.stepwise import Stepwise


class UniformLabel(eqx.Module):
    """A class drawn uniformly: `key -> label`.

    Args:
        num_classes: how many there are.
    """

    num_classes: int = eqx.field(static=True)

    def __check_init__(self):
        check_count("num_classes", self.num_classes)

    def __call__(self, key: PRNGKeyArray) -> Array:
        """One of the classes, a scalar."""
        return jax.random.randint(key, (), 0, self.num_classes)


class IndependentCondition(Stepwise):
    """D_other + scale (D_cond - D_other), with a condition drawn anew at every step.

    Kind 2: draws. For models without a null condition. The mean of D_other over conditions has
    their prior weights, where D_null has posterior ones: it is D_null where x says nothing of the
    condition, in much noise, and another elsewhere.

    Args:
        base: any conditional denoiser.
        draw: `key -> condition`, which replaces the network's; such as `UniformLabel(10)`.
        scale: as of `ClassifierFree`.

    Reference: Sadat, Kansy, Hilliges, Weber, "No Training, No Problem: Rethinking Classifier-Free
    Guidance for Diffusion Models", 2024, arXiv 2407.02687.
    """

    base: Denoiser
    draw: Callable[[PRNGKeyArray], PyTree]
    scale: Scale = number(1.0)

    def __check_init__(self):
        check_callable("draw", self.draw, "guidance.UniformLabel(10)")
        check_scale(self.scale)

    @property
    def evaluations(self) -> Array | int:
        """Twice the base denoiser's."""
        return 2 * self.base.evaluations

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        given, other = both_answers(self.base, x, t, cond, self.draw(self.step.key), key)
        scale = scale_at(self.scale, self.process, t)
        return extrapolated(scale, self.process, x, t, given, other)


class _Noise(eqx.Module):
    """h + size n, n ~ N(0, I)."""

    key: PRNGKeyArray
    size: Array

    def __call__(self, h: Array) -> Array:
        return h + (self.size * jax.random.normal(self.key, h.shape)).astype(h.dtype)


class TimeStepGuidance(Stepwise):
    """D' + scale (D - D'), with D' of a noisy embedding of the time, emb + size u^power n.

    Kind 2: draws once a step, and edits the network's tap "emb"; u is the `unit_time` of the
    process, in [0, 1]. Needs no condition, and no training. Where the embedding is that of time
    and condition together, as in the networks here, both are disturbed.

    Args:
        base: a network's denoiser, or maps of one.
        scale: 1 is the model itself.
        size: of the noise on the embedding.
        power: how the noise falls with u.
        tap: the embedding's.

    Raises:
        TypeError: if there is no network inside.

    Reference: as of `IndependentCondition`.
    """

    base: Denoiser
    scale: Scale = number(1.0)
    size: Number = number(2.0)
    power: Number = number(1.0)
    tap: str = eqx.field(static=True, default="emb")

    def __check_init__(self):
        find_network(self.base)
        check_scale(self.scale)
        check_number("size", self.size, least=0.0)
        check_number("power", self.power)

    @property
    def evaluations(self) -> Array | int:
        """Twice the base denoiser's."""
        return 2 * self.base.evaluations

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        found = self.base.estimate(x, t, cond, key=key)
        noise = _Noise(self.step.key, self.size * self.process.unit_time(t) ** self.power)
        other = edit_taps(self.base, {self.tap: noise}).estimate(x, t, cond, key=key)
        scale = scale_at(self.scale, self.process, t)
        return extrapolated(scale, self.process, x, t, found, other)

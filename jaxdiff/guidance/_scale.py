"""How strong guidance is over time, and the two answers that it compares."""

from abc import abstractmethod
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_number, is_no_number
from jaxdiff._tree import Number, number
from jaxdiff.conditions import null_where
from jaxdiff.denoiser import Denoiser, DenoiserMap, Estimate, combined
from jaxdiff.processes import GaussianProcess


class ScaleSchedule(eqx.Module):
    """A guidance scale that depends on time: a pure function of the process and t."""

    @abstractmethod
    def __call__(self, process: GaussianProcess, t: Array) -> Array:
        """The scale at time t, a scalar."""


Scale: TypeAlias = Number | ScaleSchedule


def scale_at(scale: Scale, process: GaussianProcess, t: Array) -> Number:
    """The scale at time t, of a number or a schedule.

    Raises:
        ValueError: for an array of numbers, which would be broadcast.
    """
    if isinstance(scale, ScaleSchedule):
        return scale(process, t)
    if np.ndim(scale):
        raise ValueError(
            f"`scale` must be a scalar, got shape {np.shape(scale)}. Sweep it by jax.vmap, one "
            "scalar at a time."
        )
    return scale


def check_scale(scale: Scale) -> None:
    """Reject what is neither a number nor a schedule."""
    if isinstance(scale, ScaleSchedule):
        return
    if scale is None or is_no_number(scale):
        raise TypeError(
            f"`scale` must be a number, got {scale!r:.60}. Pass 3.0, or a schedule such as "
            "LinearScale(4.0)."
        )
    check_number("scale", scale)


class LinearScale(ScaleSchedule):
    """1 + 2 (scale - 1)(1 - u): no guidance in noise, twice the mean guidance at the data.

    u is the `unit_time` of the process: t over its horizon, and of EDM 2 / pi arctan t.

    Args:
        scale: mean of the scale over u in [0, 1].
        least: a lower bound of it.

    Reference: Wang, Dufour, Andreou, Cani, Fernandez Abrevaya, Picard, Kalogeiton, "Analysis of
    Classifier-Free Guidance Weight Schedulers", 2024, arXiv 2404.13040, section 3; "clamp-linear"
    with `least`, which is not counted in the mean.
    """

    scale: Number = number(1.0)
    least: Number = number(-float("inf"))

    def __check_init__(self):
        check_number("scale", self.scale)
        check_number("least", self.least, finite=False)

    def __call__(self, process: GaussianProcess, t: Array) -> Array:
        """See `ScaleSchedule`."""
        u = process.unit_time(t)
        return jnp.maximum(1 + 2 * (self.scale - 1) * (1 - u), self.least)


class CosineScale(ScaleSchedule):
    """1 + (scale - 1)(1 + cos(pi u)), which has the mean `scale` over u in [0, 1], too.

    u is the `unit_time` of the process, as of `LinearScale`.

    Args:
        scale: mean of the scale.
        least: a lower bound of it.

    Reference: as of `LinearScale`.
    """

    scale: Number = number(1.0)
    least: Number = number(-float("inf"))

    def __check_init__(self):
        check_number("scale", self.scale)
        check_number("least", self.least, finite=False)

    def __call__(self, process: GaussianProcess, t: Array) -> Array:
        """See `ScaleSchedule`."""
        u = process.unit_time(t)
        return jnp.maximum(1 + (self.scale - 1) * (1 + jnp.cos(jnp.pi * u)), self.least)


def check_null_cond(null_cond: PyTree) -> None:
    """Reject None, which would replace nothing.

    Raises:
        ValueError: for it.
    """
    if null_cond is None:
        raise ValueError(
            "`null_cond` must be the condition that means none, got None. Pass e.g. the number of "
            "classes, as in training."
        )


def check_condition(argument: str, cond: PyTree) -> None:
    """Reject None for a condition that is to be kept away from: nothing would be.

    Raises:
        ValueError: for it.
    """
    if cond is None:
        raise ValueError(
            f"`{argument}` must be what is to be kept away from, got None. Pass a class, say."
        )


class WithNull(DenoiserMap):
    """Base of the maps that look at one denoiser under its condition, and under none."""

    base: eqx.AbstractVar[Denoiser]
    null_cond: eqx.AbstractVar[PyTree]

    def __check_init__(self):
        check_null_cond(self.null_cond)

    def check_cond(self, cond: PyTree) -> None:
        """See `Denoiser`; the null condition too."""
        super().check_cond(cond)
        super().check_cond(self.null_cond)

    @property
    def evaluations(self) -> Array | int:
        """Twice the base denoiser's."""
        return 2 * self.base.evaluations

    def both(
        self, x: Array, t: Array, cond: PyTree, key: PRNGKeyArray | None
    ) -> tuple[Estimate, Estimate]:
        """The estimates under the condition and under none, by one batch of two."""
        return both_answers(self.base, x, t, cond, self.null_cond, key)


class PairRule(WithNull):
    """Base of the rules on two answers of one denoiser: under its condition, and under none.

    A rule defines `combine`. Both evaluations run as one batch of two. A learned variance, and
    what maps inside remember, are those of the conditional branch; a noise that it states moves
    along with x0.
    """

    @abstractmethod
    def combine(self, x: Array, t: Array, given: Array, none: Array) -> Array:
        """The guided x0 of the conditional and the unconditional one, each `(*event)`."""

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        given, none = self.both(x, t, cond, key)
        return given.moved(self.process, t, self.combine(x, t, given.x0, none.x0))


def both_answers(
    base: Denoiser,
    x: Array,
    t: Array,
    cond: PyTree,
    null_cond: PyTree,
    key: PRNGKeyArray | None,
) -> tuple[Estimate, Estimate]:
    """The estimates under a condition and under another one in its place, by one batch of two."""

    def branch(null):
        return base.estimate(x, t, null_where(null, cond, null_cond), key=key)

    pair = jax.vmap(branch)(jnp.asarray([False, True]))
    given, none = (jax.tree.map(lambda leaf, i=i: leaf[i], pair) for i in (0, 1))
    return given, none


def extrapolated(
    scale: Number, process: GaussianProcess, x: Array, t: Array, given: Estimate, other: Estimate
) -> Estimate:
    """other + scale (given - other), in x0 and stated noise; the rest is that of given."""
    return combined(lambda one, none: none + scale * (one - none), process, x, t, given, other)


def inner(a: Array, b: Array) -> Array:
    """The inner product of two examples, over all axes, in float32 at least."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.sum(a.astype(wide) * b.astype(wide))


def spread(a: Array) -> Array:
    """The standard deviation over the numbers of an example, as `norm` differentiable at 0."""
    wide = a.astype(jnp.promote_types(a.dtype, jnp.float32))
    return norm(wide - jnp.mean(wide)) / a.size**0.5


def norm(a: Array) -> Array:
    """The norm of an example, with a derivative of 0 where it is 0."""
    squared = inner(a, a)
    there = squared > 0
    return jnp.where(there, jnp.sqrt(jnp.where(there, squared, 1)), 0)

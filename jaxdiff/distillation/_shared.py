"""What the losses of distillation share: teachers, targets, distances, surrogates of gradients."""

import dataclasses
from abc import abstractmethod
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, as_number, number
from jaxdiff.conditions import as_entries, from_entries
from jaxdiff.denoiser import Denoiser
from jaxdiff.flow_map import FlowMap
from jaxdiff.losses._batch import wide
from jaxdiff.processes import GaussianProcess

# The entry of a condition by which a student is told the scale of guidance.
SCALE = "scale"


class Distance(eqx.Module):
    """Base of the distances between two examples; any function of two may stand in its place."""

    @abstractmethod
    def __call__(self, a: Array, b: Array) -> Array:
        """The distance of two examples `(*event)`, a scalar in float32 at least."""


class Squared(Distance):
    """mean (a - b)^2 over the numbers of an example."""

    def __call__(self, a: Array, b: Array) -> Array:
        """See `Distance`."""
        return jnp.mean(wide(a - b) ** 2)


class PseudoHuber(Distance):
    """sqrt(r^2 + c^2) - c of the root mean square r of a - b.

    r^2 / (2 c) for small differences, and r for large ones. The published c of iCT, 0.00054 sqrt(d)
    for the norm of d numbers, is 0.00054 here, and the published distance is sqrt(d) times this.

    Args:
        c: >= 0; 0 is the root mean square itself, whose derivative at 0 is taken for 0.

    Reference: Song, Dhariwal, "Improved Techniques for Training Consistency Models", 2023, arXiv
    2310.14189.
    """

    c: Number = number(0.00054)

    def __check_init__(self):
        check_number("c", self.c, least=0.0)

    def __call__(self, a: Array, b: Array) -> Array:
        """See `Distance`."""
        square = jnp.mean(wide(a - b) ** 2) + self.c**2
        there = square != 0  # NaN is there, too
        return jnp.where(there, jnp.sqrt(jnp.where(there, square, 1)), 0) - self.c


def with_gradient(x: Array, slope: Array) -> Array:
    """|slope|^2 / 2, a scalar whose gradient by x is `slope`, which is a constant.

    For losses of which only the gradient is known. It is `slope` bit for bit, however small beside
    x; that of 1/2 |x - stop_gradient(x - slope)|^2 is rounded as x is.

    Args:
        x: `(*event)`.
        slope: `(*event)`.
    """
    x, slope = wide(x), jax.lax.stop_gradient(wide(slope))
    return jnp.sum(slope**2) / 2 + jnp.sum(slope * (x - jax.lax.stop_gradient(x)))


def check_flow_map(model: Any, argument: str = "model") -> None:
    """Reject what is no map between two times.

    Raises:
        TypeError: for a denoiser, or anything else.
    """
    if not isinstance(model, FlowMap):
        raise TypeError(
            f"`{argument}` must be a map from one time to another, (x, t, s, cond) -> x_s, got "
            f"{type(model).__name__}. Wrap a denoiser: distillation.Jump(denoiser)."
        )


def _as_scales(scales: Any) -> tuple[Number, Number] | None:
    if scales is None:
        return None
    if isinstance(scales, str | dict) or np.shape(scales) != (2,):
        raise ValueError(f"`scales` must be None or (least, most), got {scales!r}.")
    low, high = (as_number(scale) for scale in scales)
    check_number("scales[0]", low)
    check_number("scales[1]", high)
    if isinstance(low, float) and isinstance(high, float) and low > high:
        raise ValueError(f"`scales` must be in order, (least, most), got {scales!r}.")
    return low, high


def scale_range() -> Any:
    """A dataclass field for a range of guidance scales, (least, most), or None.

    Raises:
        ValueError: when given anything else.
    """
    return eqx.field(default=None, converter=_as_scales)


def draw_scale(key: PRNGKeyArray, scales: tuple[Number, Number] | None) -> Array | None:
    """A guidance scale uniform between two, a scalar; None for None."""
    if scales is None:
        return None
    low, high = scales
    return low + (high - low) * jax.random.uniform(key)


def at_scale(teacher: Denoiser, scale: Array | None) -> Denoiser:
    """The guided teacher at this scale; for None as it is.

    Raises:
        ValueError: if it has no `scale` of its own.
    """
    if scale is None:
        return teacher
    if not hasattr(teacher, "scale"):
        raise ValueError(
            "Students of a range of guidance `scales` need a teacher with a `scale`, got "
            f"{type(teacher).__name__}. Pass guidance.ClassifierFree(denoiser, null_cond), say."
        )
    return dataclasses.replace(teacher, scale=scale)  # type: ignore[call-arg]


def guided_or_told(teacher: Denoiser, cond: PyTree, scale: Array | None) -> tuple[Denoiser, PyTree]:
    """A teacher at a scale, and its condition: guided by its own `scale`, else told of it.

    Args:
        teacher: guidance, or an earlier student that is told the scale.
        cond: of one example, without the scale.
        scale: a scalar, or None for the teacher as it is.
    """
    if hasattr(teacher, "scale"):
        return at_scale(teacher, scale), cond
    return teacher, told_scale(cond, scale)


def noised(
    process: GaussianProcess,
    key: PRNGKeyArray,
    x0: Array,
    t: Array,
    scales: tuple[Number, Number] | None,
) -> tuple[Array, Array, Array | None, PRNGKeyArray]:
    """What a loss draws for one example: (eps, x_t, the guidance scale, the network's own key)."""
    noise_key, scale_key, own = jax.random.split(key, 3)
    eps = jax.random.normal(noise_key, x0.shape, x0.dtype)
    x = process.marginal(x0, eps, t).astype(x0.dtype)
    return eps, x, draw_scale(scale_key, scales), own


def told_scale(cond: PyTree, scale: Array | None) -> PyTree:
    """The condition of a student that is told the scale of guidance; as it is without one."""
    return cond if scale is None else from_entries({**as_entries(cond), SCALE: scale})

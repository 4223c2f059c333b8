"""Edits at chosen times of the process."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, number
from jaxdiff.denoiser import Denoiser, DenoiserMap, Estimate, edit_taps, find_network
from jaxdiff.geometry._features import Offset


class EditedBetween(DenoiserMap):
    """One denoiser for t_low <= t <= t_high, another elsewhere.

    Kind 1: denoiser to denoiser, stateless. Only the one in use is evaluated, as long as t is
    shared by the batch; mapped over t, both are. Taps and other edits reach both, features are
    read from `base`.

    Args:
        base: the denoiser outside the interval.
        edited: the denoiser inside, of the same process, e.g. `edit_taps(base, ...)`.
        t_low: lower end of the interval, in the process's time.
        t_high: upper end; infinity for all times from `t_low` on.
    """

    base: Denoiser
    edited: Denoiser
    t_low: Number = number(0.0)
    t_high: Number = number(float("inf"))

    def __check_init__(self):
        check_number("t_low", self.t_low, finite=False)
        check_number("t_high", self.t_high, finite=False)

    same_network: ClassVar[tuple[str, ...]] = ("base", "edited")

    @property
    def evaluations(self) -> Array | int:
        """The larger cost of the two, which a call never exceeds where t is shared."""
        costs = self.base.evaluations, self.edited.evaluations
        return max(costs) if all(isinstance(c, int) for c in costs) else jnp.maximum(*costs)

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        children = [lambda d=d: d.estimate(x, t, cond, key=key) for d in (self.edited, self.base)]
        # Where one states its noise and the other leaves it to x0, both state it.
        stated = {eqx.filter_eval_shape(child).eps is not None for child in children}
        if len(stated) == 2:
            children = [lambda c=c: self._stated(c(), x, t) for c in children]
        return jax.lax.cond((t >= self.t_low) & (t <= self.t_high), *children)

    def _stated(self, found: Estimate, x: Array, t: Array) -> Estimate:
        return found.replace(eps=found.noise(self.process, x, t).astype(x.dtype))


class TimedOffset(DenoiserMap):
    """h -> h + offsets[j] at a tap, with times[j] the time nearest to t.

    Injects a direction that differs from step to step, such as a joint principal direction of the
    whole trajectory.

    Args:
        base: a network's denoiser, or guidance and other maps of one.
        times: `(num_steps,)`, in any order.
        offsets: `(num_steps, *h)`; scale it beforehand.
        tap: which activation.

    Raises:
        TypeError: if there is no network inside.
        ValueError: if there is not one offset per time.
    """

    base: Denoiser
    times: Array
    offsets: Array
    tap: str = eqx.field(static=True, default="mid")

    def __check_init__(self):
        find_network(self.base)
        if jnp.ndim(self.times) != 1 or jnp.shape(self.offsets)[:1] != jnp.shape(self.times):
            raise ValueError(
                "`offsets` must have a leading axis of one offset per entry of `times`, got shapes "
                f"{jnp.shape(self.offsets)} and {jnp.shape(self.times)}."
            )

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        offset = self.offsets[jnp.argmin(jnp.abs(self.times - t))]
        edited = edit_taps(self.base, {self.tap: Offset(offset)})
        return edited.estimate(x, t, cond, key=key)

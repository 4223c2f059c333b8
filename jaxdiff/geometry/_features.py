"""Functions of x whose geometry is studied: inner activations of a denoiser's network."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxdiff.denoiser import Denoiser, edit_taps, reading


def _as_names(taps: str | tuple[str, ...]) -> tuple[str, ...]:
    return (taps,) if isinstance(taps, str) else tuple(taps)


class TapFeature(eqx.Module):
    """f: x -> h, an inner activation of a denoiser's network at one time and condition.

    A pytree: new weights, times and conditions do not recompile. With several taps of equal shape,
    `index` chooses among them, and a change of it does not recompile either. Read through any maps,
    edits included; under guidance, of the conditional branch.

    Args:
        denoiser: a network's denoiser, or guidance and other maps of one.
        t: scalar time of the process.
        cond: condition, or None.
        taps: a tap or several; "mid" is the h-space of a UNet.
        index: which of the taps.

    Raises:
        TypeError: when called, if the denoiser has no network.
        ValueError: when called, if the network has no such tap (lists those it has), or if
            several taps differ in shape.
    """

    denoiser: Denoiser
    t: Array
    cond: PyTree = None
    taps: tuple[str, ...] = eqx.field(static=True, default=("mid",), converter=_as_names)
    index: Array = eqx.field(default=0, converter=jnp.asarray)

    def __call__(self, x: Array) -> Array:
        """The activation at x, `(*event)` to the tap's shape."""
        values = reading(self.denoiser, self.taps).estimate(x, self.t, self.cond).taps
        if len(self.taps) == 1:
            return values[self.taps[0]]
        shapes = {name: values[name].shape for name in self.taps}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"`taps` must have one shape to choose among them, got {shapes}.")
        return jnp.stack([values[name] for name in self.taps])[self.index]


class Offset(eqx.Module):
    """The edit h -> h + offset of an activation, for `edit_taps` and `networks.EditedNetwork`.

    Args:
        offset: broadcasts to the activation.
    """

    offset: Array

    def __call__(self, h: Array) -> Array:
        """h + offset, in the dtype of h."""
        return h + self.offset.astype(h.dtype)


class TapResponse(eqx.Module):
    """dh -> x0_hat: the denoiser's answer when an inner activation is moved by dh.

    Args:
        denoiser: a network's denoiser, or guidance and other maps of one.
        x: the noisy example, `(*event)`.
        t: scalar time.
        cond: condition, or None.
        tap: which activation.
    """

    denoiser: Denoiser
    x: Array
    t: Array
    cond: PyTree = None
    tap: str = eqx.field(static=True, default="mid")

    @property
    def origin(self) -> Array:
        """dh = 0: zeros of the activation's shape."""
        feature = TapFeature(self.denoiser, self.t, self.cond, (self.tap,))
        shape = jax.eval_shape(feature, self.x)
        return jnp.zeros(shape.shape, shape.dtype)

    def __call__(self, offset: Array) -> Array:
        """E[x0 | x] of the moved network, `(*event)`."""
        return edit_taps(self.denoiser, {self.tap: Offset(offset)})(self.x, self.t, self.cond)

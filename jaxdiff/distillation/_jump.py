"""Students that jump: a denoiser's answer, followed along a straight line in DDIM's sense."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, number
from jaxdiff.conditions import as_entries, from_entries
from jaxdiff.denoiser import Denoiser, check_denoiser
from jaxdiff.distillation._shared import check_flow_map
from jaxdiff.flow_map import FlowMap
from jaxdiff.processes import GaussianProcess


def ddim_jump(process: GaussianProcess, x: Array, x0: Array, t: Array, s: Array) -> Array:
    """The state at s on the line through x at time t whose clean end is x0.

    alpha_s x0 + sigma_s (x - alpha_t x0) / sigma_t, in a form that is x itself at s = t, bit for
    bit, and x0 where sigma_s = 0 and alpha_s = 1.

    Args:
        process: the forward process.
        x: the noisy example, `(*event)`.
        x0: what it is without noise, `(*event)`.
        t: scalar time of x, sigma_t > 0.
        s: scalar target time.
    """
    ratio = process.sigma(s) / process.sigma(t)
    return (ratio * x + (process.alpha(s) - ratio * process.alpha(t)) * x0).astype(x.dtype)


class OfDenoiser(FlowMap):
    """Base of the maps that a denoiser's network learns to be.

    Attributes:
        base: the denoiser.
    """

    base: Denoiser

    def __check_init__(self):
        check_denoiser(self.base, "base")

    @property
    def process(self) -> GaussianProcess:
        """The denoiser's."""
        return self.base.process

    @property
    def evaluations(self) -> Array | int:
        """The denoiser's."""
        return self.base.evaluations

    @property
    def network(self) -> PyTree:
        """The denoiser's network: what learns."""
        return self.base.network  # type: ignore[attr-defined]

    def check_cond(self, cond: PyTree) -> None:
        """See `FlowMap`: what the denoiser checks."""
        self.base.check_cond(cond)


class Jump(OfDenoiser):
    """x_s = alpha_s D + sigma_s (x - alpha_t D) / sigma_t, with a denoiser D that learns to jump.

    One step of DDIM, which a student makes exact over any length. With D the teacher it is the
    start of every distillation. At s = t it is the identity, whatever D: the boundary condition of
    consistency models, of trajectory models and of mean velocities, without a parameterisation of
    their own. With `until` D is told where to, a scalar entry of its condition: for maps between
    any two times; without it D looks at x and t alone, for maps to one end, or along one grid.

    For rectified flows D = x - t u with the mean velocity u; a network of `Velocity` predicts u.

    Args:
        base: the denoiser; guidance of one may be the start, as a student it is a network's.
        until: name of the entry, a scalar of `networks.UNet(scalars=...)`; None for none.
        factor: its value is the time s times this. Networks hear little of differences far below 1;
            losses that differentiate by s want a factor of order 1.
    """

    until: str | None = eqx.field(static=True, default=None)
    factor: Number = number(1.0)

    def __check_init__(self):
        check_number("factor", self.factor)

    def clean(
        self,
        x: Array,
        t: Array,
        s: Array,
        cond: PyTree = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Array:
        """D, `(*event)`; arguments as of a call."""
        if self.until is not None:
            target = self.factor * jnp.asarray(s, jnp.result_type(t))
            cond = from_entries({**as_entries(cond), self.until: target})
        return self.base(x, t, cond, key=key)

    def __call__(
        self,
        x: Array,
        t: Array,
        s: Array,
        cond: PyTree = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Array:
        """See `FlowMap`."""
        return ddim_jump(self.process, x, self.clean(x, t, s, cond, key=key), t, s)


def check_clean(model: Any) -> None:
    """Reject students of which no clean end is known.

    Raises:
        TypeError: for anything but a map with a `clean`, as a `Jump` has.
    """
    check_flow_map(model)
    if not hasattr(model, "clean"):
        raise TypeError(
            "`model` must have a method clean(x, t, s, cond, key=...), the clean end of its line "
            f"from t to s, got {type(model).__name__}. Pass a distillation.Jump(denoiser)."
        )


def check_told(model: Any) -> None:
    """Reject students of which there is no clean end between any two times.

    Raises:
        TypeError: for anything but a map with a `clean`, as a `Jump` has.
        ValueError: for a jump that is not told where to.
    """
    check_clean(model)
    if getattr(model, "until", "") is None:
        raise ValueError(
            "`model` must be told where it jumps to, got a Jump without `until`. Pass "
            "Jump(denoiser, until='until') of a network with scalars=('until',)."
        )

"""How a denoiser changes with time: what losses with a derivative by time will see."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxdiff._tree import jit
from jaxdiff.denoiser import Denoiser, check_denoiser
from jaxdiff.losses._batch import wide
from jaxdiff.predictions import Prediction, Velocity


class TimeSensitivity(NamedTuple):
    """Relative rates of change, all per unit of the process's time.

    Attributes:
        derivative: root mean square of the partial derivative by t, over that of the prediction.
        differences: the same of central differences, one for each distance, `(n,)`.
    """

    derivative: Array
    differences: Array


def time_sensitivity(
    denoiser: Denoiser,
    x: Array,
    t: Array,
    cond: PyTree = None,
    *,
    prediction: Prediction | None = None,
    distances: Sequence[float] | Array = (0.002, 0.01, 0.04),
) -> TimeSensitivity:
    """How fast a denoiser changes with time at fixed x: to measure before `jax.jvp` trains by it.

    A denoiser is trained at points and never pays for its derivative. An embedding of sinusoids
    of the label 1000 t turns by 1000 radians in a unit of t, and what the network makes of the
    fastest of them is noise to `ContinuousConsistency` and `MeanFlow`. Where `derivative` is far
    above the `differences` at the longer distances, or above some fifty, take a label of order one
    (`TimeLabel(1.0)`, `LogNoiseLabel()`) and let the teacher adapt to it in a short training.

    One evaluation with its forward derivative, and two for each distance.

    Args:
        denoiser: the teacher, or a student's denoiser.
        x: noisy examples, `(B, *event)`.
        t: their times, `(B,)`.
        cond: conditions, with leading axis B.
        prediction: of what the rate is; None for `Velocity`.
        distances: from t to either side, positive, in units of t; short enough to stay inside
            (0, horizon).
    """
    check_denoiser(denoiser)
    return _sensitivity(denoiser, x, t, cond, prediction or Velocity(), jnp.asarray(distances))


def relative(slope: Array, value: Array) -> Array:
    """The root of the ratio of two mean squares; 0 where both are."""
    return jnp.sqrt(slope / (value + jnp.finfo(value.dtype).tiny))


@jit
def _sensitivity(denoiser, x, t, cond, prediction, distances):
    def one(x, t, cond):
        def said(t):
            return wide(denoiser.predict(prediction, x, t, cond))

        value, slope = jax.jvp(said, (t,), (jnp.ones_like(t),))
        apart = jax.vmap(lambda d: (said(t + d) - said(t - d)) / (2 * d))(distances.astype(t.dtype))
        return jnp.mean(value**2), jnp.mean(slope**2), jax.vmap(lambda a: jnp.mean(a**2))(apart)

    value, slope, apart = (part.mean(0) for part in jax.vmap(one)(x, t, cond))
    return TimeSensitivity(relative(slope, value), relative(apart, value))

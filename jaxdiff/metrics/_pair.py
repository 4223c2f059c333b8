"""What metrics ask of their samples."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from jaxdiff._tree import is_known


def features(argument: str, sample: ArrayLike, *, minimum: int = 1) -> Array:
    """A sample as (n, d), its event axes flattened, in float32 at least.

    Raises:
        ValueError: for fewer than `minimum` samples, no floats, or numbers that are not finite.
    """
    sample = jnp.asarray(sample)
    if jnp.ndim(sample) < 2 or len(sample) < minimum:
        raise ValueError(
            f"`{argument}` must hold at least {minimum} samples along its first axis, (n, *event), "
            f"got shape {jnp.shape(sample)}. Add an event axis with [:, None], or samples."
        )
    if not jnp.issubdtype(sample.dtype, jnp.floating):
        raise ValueError(
            f"`{argument}` must hold floats, got dtype {sample.dtype}. Convert it with "
            ".astype(jnp.float32)."
        )
    if is_known(sample) and sample.is_fully_addressable:
        # In NumPy, because JAX would trace even a constant inside jit.
        wrong = ~np.isfinite(np.asarray(sample, float)).reshape(len(sample), -1).all(1)
        if wrong.any():
            raise ValueError(
                f"`{argument}` must be finite, got NaN or infinity in {int(wrong.sum())} of "
                f"{len(wrong)} samples, the first at index {int(np.argmax(wrong))}."
            )
    wide = jnp.promote_types(sample.dtype, jnp.float32)  # counts and sums are more than halves hold
    return jnp.reshape(sample, (len(sample), -1)).astype(wide)


def feature_pair(x: ArrayLike, y: ArrayLike, *, minimum: int) -> tuple[Array, Array]:
    """The two samples as (n, d) and (m, d), their event axes flattened.

    Raises:
        ValueError: for events of different shapes, and as `features`.
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    if jnp.ndim(x) > 1 and jnp.ndim(y) > 1 and x.shape[1:] != y.shape[1:]:
        raise ValueError(
            f"`x` and `y` must hold events of one shape, got {x.shape[1:]} and {y.shape[1:]}. "
            "Compare samples of the same space."
        )
    return features("x", x, minimum=minimum), features("y", y, minimum=minimum)

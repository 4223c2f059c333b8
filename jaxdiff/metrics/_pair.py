"""What two-sample metrics ask of their samples."""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike


def feature_pair(x: ArrayLike, y: ArrayLike, *, minimum: int) -> tuple[Array, Array]:
    """The two samples as (n, d) and (m, d), their event axes flattened.

    Raises:
        ValueError: for events of different shapes, fewer than `minimum` samples, or no floats.
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    for name, sample in (("x", x), ("y", y)):
        if jnp.ndim(sample) < 2 or len(sample) < minimum:
            raise ValueError(
                f"`{name}` must hold at least {minimum} samples along its first axis, (n, *event), "
                f"got shape {jnp.shape(sample)}. Add an event axis with [:, None], or samples."
            )
        if not jnp.issubdtype(sample.dtype, jnp.floating):
            raise ValueError(
                f"`{name}` must hold floats, got dtype {sample.dtype}. Convert it with "
                ".astype(jnp.float32)."
            )
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(
            f"`x` and `y` must hold events of one shape, got {x.shape[1:]} and {y.shape[1:]}. "
            "Compare samples of the same space."
        )
    return jnp.reshape(x, (len(x), -1)), jnp.reshape(y, (len(y), -1))

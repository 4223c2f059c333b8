"""A metric of one's own: the energy distance, with its standard error.

A metric is any function of samples and a reference, `(n, d)` and `(m, d)`. Proven where the answer
is known: zero within the error for equal laws, and the closed form for two Gaussians on the line.
"""

import jax
import jax.numpy as jnp
import numpy as np


@jax.jit
def energy_distance(x, y):
    """2 E|x - y| - E|x - x'| - E|y - y'|, unbiased, and its standard error by eighths."""

    def distances(a, b):
        return jnp.sqrt(jnp.sum((a[:, None] - b[None]) ** 2, -1) + 1e-20)

    def estimate(x, y):
        n, m = len(x), len(y)
        within = distances(x, x).sum() / (n * (n - 1)) + distances(y, y).sum() / (m * (m - 1))
        return 2 * distances(x, y).mean() - within

    parts = jax.vmap(estimate)(
        x[: len(x) // 8 * 8].reshape(8, -1, x.shape[1]),
        y[: len(y) // 8 * 8].reshape(8, -1, y.shape[1]),
    )
    return estimate(x, y), parts.std(ddof=1) / 8**0.5


first, second = jax.random.normal(jax.random.key(0), (2, 4000, 1))
value, error = energy_distance(first, second)
print(f"equal laws: {value:.4f} +- {error:.4f}")
assert abs(value) < 4 * error
value, error = energy_distance(first, second + 1.0)
# E|z| of z ~ N(1, 2) and N(0, 2).
spread = np.sqrt(2.0)
folded = spread * np.sqrt(2 / np.pi) * np.exp(-1 / 4) + float(jax.scipy.special.erf(0.5))
exact = 2 * folded - 2 * spread * np.sqrt(2 / np.pi)
print(f"shifted by 1: {value:.4f} +- {error:.4f}, exact {exact:.4f}")
assert abs(value - exact) < 4 * error

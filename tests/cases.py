"""Processes and oracles that several tests share."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import oracles, processes

PROCESSES = {
    "VP": processes.VP,
    "SubVP": processes.SubVP,
    "VE": processes.VE,
    "EDM": processes.EDM,
    "Cosine": processes.Cosine,
    "CosineOffset": lambda: processes.Cosine(offset=0.008),
    "RectifiedFlow": processes.RectifiedFlow,
    "TrigFlow": processes.TrigFlow,
    "Tabulated": lambda: processes.Tabulated(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))),
}


def mixture(process, dtype=jnp.float64):
    """Three unequal, correlated Gaussians in the plane, in two classes."""
    factors = jnp.asarray(
        [[[0.5, 0.0], [0.2, 0.3]], [[0.3, -0.1], [0.0, 0.4]], [[0.2, 0], [0, 0.6]]]
    )
    return oracles.gaussian_mixture(
        process,
        jnp.asarray([[-1.5, 0.5], [1.0, 1.0], [0.5, -1.5]], dtype),
        (factors @ factors.mT).astype(dtype),
        weights=jnp.asarray([0.5, 0.3, 0.2], dtype),
        labels=[0, 1, 1],
    )


def gaussian(process, size=3):
    """A correlated Gaussian."""
    factor = jax.random.normal(jax.random.key(7), (size, size)) / np.sqrt(size)
    mean = jnp.linspace(-0.5, 0.5, size)
    return oracles.gaussian(process, mean, factor @ factor.T + 0.01 * jnp.eye(size))


def times_at(process, low, high, count):
    """Decreasing times, uniform in log-SNR."""
    return process.time(jnp.linspace(low, high, count))

"""A linear network with a tap, whose edits have closed forms."""

import equinox as eqx
import jax

from jaxdiff import processes
from jaxdiff.denoiser import NetworkDenoiser


class Linear(eqx.Module):
    """eps_hat = B h with h = A x, and h a tap."""

    encoder: jax.Array
    decoder: jax.Array

    def __call__(self, x, t, cond=None, *, key=None, tap=None):
        h = self.encoder @ x
        return self.decoder @ (h if tap is None else tap("mid", h))


def linear_denoiser(size=4, inner=3):
    keys = jax.random.split(jax.random.key(3))
    encoder = 0.5 * jax.random.normal(keys[0], (inner, size))
    decoder = 0.5 * jax.random.normal(keys[1], (size, inner))
    return NetworkDenoiser(Linear(encoder, decoder), processes.VP())

"""Noise for diffrax's SDE solvers."""

import dataclasses

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray


class AdditiveNoise(diffrax.AbstractTerm):
    """c dW for a constant c."""

    coefficient: Array
    path: diffrax.AbstractBrownianPath

    def vf(self, t, y, args):
        """c."""
        del t, y, args
        return self.coefficient

    def contr(self, t0, t1, **kwargs):
        """The Brownian increment."""
        return self.path.evaluate(t0, t1, **kwargs)

    def prod(self, vf, control):
        """Their product; an increment may come with its Levy area."""
        return jax.tree.map(lambda w: vf * w, control)


AREAS = {
    diffrax.AbstractSpaceTimeLevyArea: diffrax.SpaceTimeLevyArea,
    diffrax.AbstractSpaceTimeTimeLevyArea: diffrax.SpaceTimeTimeLevyArea,
}


class GridNoise(diffrax.AbstractBrownianPath):
    """Brownian increments, with the Levy areas of their kind, drawn for each step by itself.

    Like `diffrax.UnsafeBrownianPath`, which reverse-mode differentiation refuses. An increment
    is a function of its ends, so that a step that is computed again draws it again.
    """

    key: PRNGKeyArray
    shape: jax.ShapeDtypeStruct = eqx.field(static=True)
    levy_area: type = eqx.field(static=True)

    @property
    def t0(self):
        """Anywhere."""
        return -jnp.inf

    @property
    def t1(self):
        """Anywhere."""
        return jnp.inf

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        """See diffrax."""
        del left
        key = self.key
        for end in (t0, t1):
            bits = jax.lax.bitcast_convert_type(jnp.asarray(end, jnp.float32), jnp.int32)
            key = jax.random.fold_in(key, bits)
        # Variances of the increment, its space-time and its space-time-time Levy area.
        names = [f.name for f in dataclasses.fields(self.levy_area) if f.name != "dt"]
        parts = {
            name: jnp.sqrt((t1 - t0) / scale).astype(self.shape.dtype)
            * jax.random.normal(part_key, self.shape.shape, self.shape.dtype)
            for name, scale, part_key in zip(
                names, (1, 12, 720), jax.random.split(key, len(names)), strict=False
            )
        }
        return self.levy_area(dt=t1 - t0, **parts) if use_levy else parts["W"]

"""Noise for diffrax's SDE solvers."""

import dataclasses

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray


def float_bits(t: Array) -> Array:
    """A number as an integer that a key can be folded with."""
    return jax.lax.bitcast_convert_type(jnp.asarray(t, jnp.float32), jnp.int32)


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

    key: PRNGKeyArray  # one for each example, `(batch,)`
    shape: jax.ShapeDtypeStruct = eqx.field(static=True)  # of one example
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
        # Variances of the increment, its space-time and its space-time-time Levy area.
        names = [f.name for f in dataclasses.fields(self.levy_area) if f.name != "dt"]
        scales = dict(zip(names, (1, 12, 720), strict=False))

        def draw(key):
            for end in (t0, t1):
                key = jax.random.fold_in(key, float_bits(end))
            keys = jax.random.split(key, len(names))
            return {
                name: jnp.sqrt((t1 - t0) / scales[name]).astype(self.shape.dtype)
                * jax.random.normal(part_key, self.shape.shape, self.shape.dtype)
                for name, part_key in zip(names, keys, strict=True)
            }

        parts = jax.vmap(draw)(self.key)
        return self.levy_area(dt=t1 - t0, **parts) if use_levy else parts["W"]

"""What every loss of several networks promises, on networks that compile in no time."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdiff import parallel, predictions, processes
from jaxdiff._tree import jit
from jaxdiff.conditions import as_entries
from jaxdiff.denoiser import NetworkDenoiser

KEY = jax.random.key(0)
COUNT = 8


class Small(eqx.Module):
    """A network that compiles in no time: tanh of the example, time, label and scalars."""

    weights: dict[str, Array]
    scalars: tuple[str, ...] = eqx.field(static=True, default=())

    def __call__(self, x, t, cond=None, *, key=None):
        del key
        entries = as_entries(cond)
        said = jnp.stack([t / 1000, *(jnp.asarray(entries[name]) for name in self.scalars)])
        h = self.weights["x"] @ x + self.weights["said"] @ jnp.sin(said.astype(x.dtype))
        if "label" in entries:
            h = h + self.weights["label"][entries["label"]]
        return self.weights["out"] @ jnp.tanh(h)


def small(seed, *scalars, out=2):
    shapes = {"x": (8, 2), "said": (8, 1 + len(scalars)), "label": (3, 8), "out": (out, 8)}
    draw = np.random.default_rng(seed).standard_normal
    weights = {name: jnp.asarray(0.5 * draw(s), jnp.float32) for name, s in shapes.items()}
    return Small(weights, scalars)


class Critic(eqx.Module):
    """The sum of what such a network says."""

    network: Small

    def __call__(self, x, t, cond=None):
        return self.network(x, t, cond).sum()


def denoiser(seed, *scalars, process=None, prediction=None):
    network, prediction = small(seed, *scalars), prediction or predictions.V()
    return NetworkDenoiser(network, process or processes.VP(), prediction)


def data():
    x, noise = np.random.default_rng(0).uniform(-1, 1, (2, COUNT, 2)).astype(np.float32)
    cond = np.arange(COUNT, dtype=np.int32) % 2
    return {"x": x, "noise": noise, "pair": np.sin(noise), "cond": cond}


def is_float(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def slopes_of(loss, model, batch, frozen):
    """The loss, its gradients by what learns, and by all that is given."""
    if hasattr(loss, "gradient"):  # of its own making
        (value, logged), slope = loss.gradient(model, KEY, batch, frozen)
        return value, logged, slope.network, None
    given, rest = eqx.partition(frozen, eqx.is_inexact_array)

    def total(weights, given):
        changed = eqx.tree_at(lambda m: m.network, model, weights)
        return loss(changed, KEY, batch, eqx.combine(given, rest))[:2]

    slopes = jax.value_and_grad(total, (0, 1), has_aux=True)
    (value, logged), (slope, others) = slopes(model.network, given)
    return value, logged, slope, others


def check_loss(loss, model, frozen, data=data, *, alone=True):
    """Finite in any precision, the same on any devices, with one program for all numbers.

    No gradient reaches what is frozen. And a loss is a sum over examples, unless they see one
    another: what changes by two of them is the sum of what changes by either.
    """
    traces = []

    @jit
    def found(loss, model, frozen, batch, spread):
        traces.append(1)
        low = jax.tree.map(lambda v: v.astype(jnp.bfloat16) if is_float(v) else v, batch)
        run = jax.jit(lambda batch: slopes_of(loss, model, batch, frozen))
        return tuple(run(b) for b in (batch, low, spread))

    mesh = parallel.make_mesh(devices=jax.devices())
    spread = jax.device_put(data(), parallel.batch_sharding(mesh))
    run = lambda batch, loss=loss: found(loss, model, frozen, batch, spread)
    whole, low, over = run(data())
    for value, logged, slope, others in (whole, low, over):
        assert value.dtype == jnp.float32 and value.shape == ()
        chex.assert_tree_all_finite((value, logged, slope))
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(slope))
        assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(slope))
        assert jax.tree.leaves(others) or hasattr(loss, "gradient")
        for leaf in jax.tree.leaves(others):
            np.testing.assert_array_equal(leaf, 0)
    size = max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole[2]))
    chex.assert_trees_all_close(over[2], whole[2], rtol=1e-3, atol=1e-5 * size)
    np.testing.assert_allclose(over[0], whole[0], rtol=1e-4)

    other = run(data(), jax.tree.map(lambda v: 0.9 * v if isinstance(v, float) else v, loss))[0]
    chex.assert_tree_all_finite((other[0], other[2]))

    def changed(*rows):
        batch = data()
        for row in rows:
            for v in jax.tree.leaves(batch):
                v[row] = v[row] + np.float32(0.3) if is_float(v) else 1 - v[row]
        return np.float64(run(batch)[0][0])

    first, second, both = changed(5), changed(7), changed(5, 7)
    assert first != whole[0] and second != whole[0]
    apart = np.abs(first + second - both - whole[0])
    size = 1e-5 * (1 + np.abs(np.asarray([first, second, both, whole[0]])).max())
    assert (apart <= size) == alone, apart
    assert len(traces) == 1


def same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    is_key = lambda v: jnp.issubdtype(jnp.result_type(v), jax.dtypes.prng_key)
    read = lambda v: jax.random.key_data(v) if is_key(v) else v
    return all(np.array_equal(read(x), read(y)) for x, y in pairs)

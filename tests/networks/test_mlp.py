import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff.networks import MLP, dropout, timestep_embedding

X = jnp.asarray([0.5, -1.0, 2.0])
T = jnp.float32(3.0)
CLASS = jnp.int32(1)


def mlp(**options):
    return MLP(3, hidden=8, num_blocks=2, num_classes=4, rngs=nnx.Rngs(0), **options)


def with_random_weights(build, seed=0):
    """The network with all weights drawn, also those that start at zero."""
    rng = np.random.default_rng(seed)
    shapes = nnx.eval_shape(build)
    return jax.tree.map(lambda w: jnp.asarray(0.3 * rng.normal(size=w.shape), w.dtype), shapes)


@jax.jit
def loss_and_grad(network, key):
    def loss(network):
        out = network(X, T, CLASS, key=key)
        return (out**2).sum(), out

    (_, out), grads = jax.value_and_grad(loss, has_aux=True)(network)
    return out, grads


@pytest.mark.parametrize("t", [0.0, 0.3, 999.0])
def test_time_embedding_turns_at_geometric_frequencies(t):
    turns = np.exp(1j * t * np.geomspace(1, 1e-4, 8))
    expected = np.concatenate([turns.imag, turns.real])
    np.testing.assert_allclose(timestep_embedding(jnp.float32(t), 16), expected, atol=1e-4)
    assert timestep_embedding(jnp.bfloat16(t), 16).dtype == jnp.float32


@pytest.mark.usefixtures("x64")
def test_time_embedding_in_double_precision():
    turns = np.exp(1j * 999.9 * np.geomspace(1, 1e-4, 8))
    embedding = timestep_embedding(jnp.float64(999.9), 16)
    np.testing.assert_allclose(embedding, np.concatenate([turns.imag, turns.real]), atol=1e-11)


def test_dropout_is_unbiased_and_belongs_to_its_key():
    x = jnp.linspace(-1, 1, 10)
    draw = jax.jit(jax.vmap(lambda key: dropout(x, 0.3, key)))
    draws = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    standard_error = np.abs(x) * np.sqrt(0.3 / 0.7 / 4000)
    assert np.all(np.abs(draws.mean(0) - x) <= 4 * standard_error)
    np.testing.assert_array_equal(dropout(x, 0.3, None), x)
    network = with_random_weights(lambda: mlp(dropout=0.5))
    keys = [None, None, *(jax.random.key(seed) for seed in (1, 1, 2))]
    a, b, c, d, e = (loss_and_grad(network, key)[0] for key in keys)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(c, d)
    assert len({float(out[0]) for out in (a, c, e)}) == 3


@pytest.mark.usefixtures("x64")
def test_against_numpy():
    network = with_random_weights(lambda: mlp(param_dtype=jnp.float64))
    x, t = np.asarray(X, np.float64), 3.0

    def linear(layer, h):
        return h @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])

    def silu(h):
        return h / (1 + np.exp(-h))

    def norm(h):
        return (h - h.mean()) / np.sqrt(h.var() + 1e-6)

    turns = np.exp(1j * t * np.geomspace(1, 1e-4, 4))
    emb = linear(network.embedding.first, np.concatenate([turns.imag, turns.real]))
    emb = linear(network.embedding.second, silu(emb))
    emb = emb + np.asarray(network.embedding.classes.embedding[...])[1]
    h = linear(network.first, x)
    for block in network.blocks:
        modulation = linear(block.modulation, silu(emb))
        inner = norm(h) * (1 + modulation[:8]) + modulation[8:]
        h = h + linear(block.second, silu(linear(block.first, inner)))
    h = norm(h) * np.asarray(network.norm.scale[...]) + np.asarray(network.norm.bias[...])
    out = jax.jit(lambda n: n(jnp.asarray(x), t, CLASS))(network)
    assert out.dtype == jnp.float64
    np.testing.assert_allclose(out, linear(network.last, silu(h)), rtol=1e-11)


def test_starts_at_zero_with_nothing_but_weights():
    network = mlp()
    assert not np.any(jax.jit(lambda n: n(X, T, CLASS))(network))
    kinds = {type(v) for _, v in nnx.iter_graph(network) if isinstance(v, nnx.Variable)}
    assert kinds == {nnx.Param}
    assert {leaf.dtype for leaf in jax.tree.leaves(network)} == {jnp.dtype(jnp.float32)}


def test_bfloat16_remat_and_batches_agree_with_the_plain_network():
    key = jax.random.key(3, impl="rbg")
    plain = with_random_weights(lambda: mlp(dropout=0.5))
    out, grads = loss_and_grad(plain, key)
    out_remat, grads_remat = loss_and_grad(
        with_random_weights(lambda: mlp(dropout=0.5, remat=True)), key
    )
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_remat), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    half, grads_half = loss_and_grad(
        with_random_weights(lambda: mlp(dropout=0.5, dtype=jnp.bfloat16)), key
    )
    assert half.dtype == jnp.float32
    assert 0 < np.abs(half - out).max() < 0.05 * np.abs(out).max()
    for leaf in jax.tree.leaves(grads_half):
        assert leaf.dtype == jnp.float32 and np.all(np.isfinite(leaf))

    xs, ts, labels = jnp.stack([X, -X]), jnp.asarray([0.1, 5.0]), jnp.asarray([4, 0])
    batch = jax.jit(lambda n: jax.vmap(n)(xs, ts, labels))(plain)
    one = jax.jit(lambda n, *args: n(*args))
    loop = [one(plain, *args) for args in zip(xs, ts, labels, strict=True)]
    np.testing.assert_allclose(batch, jnp.stack(loop), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "args, message",
    [
        ((X[:2], T, CLASS), r"`x` must be one example of shape \(3,\), got \(2,\)"),
        ((X, T), r"`cond` must have a scalar integer class in \[0, 4\), or 4 for none"),
        ((X, T, jnp.float32(1)), r"`cond` must have a scalar integer.*float32"),
        ((X, T, jnp.asarray([1])), r"`cond` must have a scalar integer.*\(1,\)"),
    ],
)
def test_bad_input_is_named(args, message):
    network = nnx.eval_shape(mlp)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda n: n(*args), network)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="`hidden` must be even"):
        MLP(3, hidden=7, rngs=nnx.Rngs(0))
    unconditional = nnx.eval_shape(lambda: MLP(3, hidden=8, rngs=nnx.Rngs(0)))
    with pytest.raises(
        ValueError, match="an entry 'label' that nobody takes: this network takes nothing"
    ):
        jax.eval_shape(lambda n: n(X, T, CLASS), unconditional)

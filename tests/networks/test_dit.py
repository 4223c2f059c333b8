import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import softmax

from jaxdiff.networks import DIT_SIZES, DiT, num_params, read_taps
from jaxdiff.networks._dit import DiTBlock, position_embedding
from jaxdiff.taps import Tap

X = jnp.sin(jnp.arange(32.0)).reshape(4, 4, 2)
T = jnp.float32(3.0)
CLASS = jnp.int32(1)


def dit(rngs=None, **options):
    sizes = {"image_size": 4, "in_channels": 2, "hidden": 8, "depth": 2, "num_heads": 2}
    return DiT(**sizes | {"num_classes": 3} | options, rngs=rngs or nnx.Rngs(0))


def with_random_weights(build, seed=0):
    """The network with all weights drawn, also those that start at zero."""
    rng = np.random.default_rng(seed)
    shapes = nnx.eval_shape(build)
    return jax.tree.map(lambda w: jnp.asarray(0.3 * rng.normal(size=w.shape), w.dtype), shapes)


# These programs are compiled once and run twice: optimising them is most of the time.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@quick_jit
def loss_and_grad(network, key):
    def loss(network):
        out = network(X, T, CLASS, key=key)
        return (out**2).sum(), out

    (_, out), grads = jax.value_and_grad(loss, has_aux=True)(network)
    return out, grads


@pytest.mark.usefixtures("x64")
def test_position_embedding_knows_offsets_only():
    """Inner products of sine-cosine embeddings are sums of cosines of frequency times offset."""
    table = np.asarray(position_embedding(3, 5, 16, jnp.float64))
    rows, columns = np.divmod(np.arange(15), 5)
    offsets = np.stack([rows[:, None] - rows, columns[:, None] - columns])
    frequencies = 10_000.0 ** -np.array([0, 0.25, 0.5, 0.75])
    expected = np.cos(offsets[..., None] * frequencies).sum((0, -1))
    np.testing.assert_allclose(table @ table.T, expected, atol=1e-12)
    np.testing.assert_array_equal(table[:5, :8], np.repeat([[0.0] * 4 + [1.0] * 4], 5, axis=0))
    np.testing.assert_allclose(table[1, 8], np.sin(1.0))


@pytest.mark.parametrize("size, millions", [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_sizes_have_the_published_number_of_weights(size, millions):
    """Table 1 of the paper at patch size 2, latents of 32x32x4, learned variances."""
    latents = {"image_size": 32, "in_channels": 4, "out_channels": 8, "num_classes": 1000}
    network = nnx.eval_shape(
        lambda: DiT(**latents, **DIT_SIZES[size], patch_size=2, rngs=nnx.Rngs(0))
    )
    hidden = DIT_SIZES[size]["hidden"]
    here = num_params(network) - (hidden - 256) * hidden  # there 256 sinusoids
    assert abs(here / 1e6 - millions) < 1


@pytest.mark.usefixtures("x64")
def test_block_against_numpy():
    kinds = {"dtype": None, "param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
    block = with_random_weights(lambda: DiTBlock(8, 2, 3, 0.0, **kinds | {"rngs": nnx.Rngs(0)}))
    rng = np.random.default_rng(1)
    tokens, emb = rng.normal(size=(5, 8)), rng.normal(size=8)

    def linear(layer, h):
        return h @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])

    def norm(h):
        return (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-6)

    def gelu(h):
        return h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))

    m = np.split(linear(block.modulation, emb / (1 + np.exp(-emb))), 6)
    seen, part = norm(tokens) * (1 + m[1]) + m[0], block.attention
    qkv = np.concatenate([linear(layer, seen) for layer in (part.q, part.k, part.v)], axis=1)
    heads = []
    for h in (0, 4):
        q, k, v = (qkv[:, start + h : start + h + 4] for start in (0, 8, 16))
        heads.append(softmax(q @ k.T / 2, axis=1) @ v)
    expected = tokens + m[2] * linear(part.out, np.concatenate(heads, axis=1))
    inner = norm(expected) * (1 + m[4]) + m[3]
    expected = expected + m[5] * linear(block.second, gelu(linear(block.first, inner)))
    out = jax.jit(lambda b: b(Tap(), "b", jnp.asarray(tokens), jnp.asarray(emb), None))(block)
    np.testing.assert_allclose(out, expected, rtol=1e-10, atol=1e-12)


def test_starts_with_identity_blocks_and_zero_output():
    make = lambda key: dit(rngs=nnx.Rngs(key))
    network = jax.jit(make)(jax.random.key(0, impl="rbg"))
    names = ["patches", "block.0", "block.1"]
    out, values = jax.jit(lambda n: read_taps(n, names, X, T, CLASS))(network)
    assert out.shape == X.shape
    assert not np.any(out)
    assert np.any(values["patches"])
    np.testing.assert_array_equal(values["block.0"], values["patches"])
    np.testing.assert_array_equal(values["block.1"], values["patches"])
    kinds = {type(v) for _, v in nnx.iter_graph(network) if isinstance(v, nnx.Variable)}
    assert kinds == {nnx.Param}
    assert {leaf.dtype for leaf in jax.tree.leaves(network)} == {jnp.dtype(jnp.float32)}


def test_patches_are_cut_and_put_back_in_place():
    """With closed gates every output patch depends on the same input patch, and on no other."""
    network = with_random_weights(dit)
    for block in network.blocks:
        block.modulation = jax.tree.map(jnp.zeros_like, block.modulation)
    jacobian = jax.jit(jax.jacobian(lambda x, n: n(x, T, CLASS)))(X, network)
    depends = np.abs(jacobian).max((2, 5)) > 1e-6
    patch = 2 * (np.arange(4)[:, None] // 2) + np.arange(4) // 2
    np.testing.assert_array_equal(depends, patch[:, :, None, None] == patch)


def test_a_patch_lists_its_pixels_row_by_row():
    network = with_random_weights(dit)
    network.patches.kernel[...] = jnp.eye(8)
    network.patches.bias[...] = jnp.zeros(8)
    _, values = jax.jit(lambda n: read_taps(n, ["patches"], X, T, CLASS))(network)
    pixels = values["patches"] - position_embedding(2, 2, 8)
    np.testing.assert_allclose(pixels[1], X[:2, 2:].ravel(), atol=1e-6)
    np.testing.assert_allclose(pixels[2], X[2:, :2].ravel(), atol=1e-6)


def test_remat_and_bfloat16_agree_with_the_plain_network():
    key = jax.random.key(3, impl="rbg")
    builds = [{}, {"remat": True}, {"dtype": jnp.bfloat16}]
    networks = [with_random_weights(lambda: dit(dropout=0.2, **b)) for b in builds]  # noqa: B023
    (out, grads), (_, grads_remat), (half, grads_half) = (loss_and_grad(n, key) for n in networks)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_remat), strict=True):
        assert np.any(a)
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(a).max())
    assert half.dtype == jnp.float32
    assert 0 < np.abs(half - out).max() < 0.05 * np.abs(out).max()
    for leaf in jax.tree.leaves(grads_half):
        assert leaf.dtype == jnp.float32 and np.all(np.isfinite(leaf))
    other = loss_and_grad(networks[0], jax.random.key(4, impl="rbg"))[0]
    assert np.abs(other - out).max() > 1e-4
    np.testing.assert_array_equal(loss_and_grad(networks[0], key)[0], out)


def test_batches_equal_a_loop_without_retracing():
    traces = []

    @jax.jit
    def one(network, *args):
        traces.append(1)
        return network(*args)

    first, second = (with_random_weights(dit, seed) for seed in (0, 1))
    xs, ts, labels = jnp.stack([X, -X]), jnp.asarray([0.1, 5.0]), jnp.asarray([3, 0])
    loop = [one(first, *args) for args in zip(xs, ts, labels, strict=True)]
    assert np.abs(one(second, xs[0], ts[0], labels[0]) - loop[0]).max() > 1e-4
    assert len(traces) == 1
    batch = jax.jit(lambda n: jax.vmap(n)(xs, ts, labels))(first)
    np.testing.assert_allclose(batch, jnp.stack(loop), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("x64")
def test_neither_widens_nor_narrows_under_x64():
    single = with_random_weights(dit)
    double = with_random_weights(lambda: dit(param_dtype=jnp.float64))
    read = lambda n, x: read_taps(n, ["block.1", "block.1.attn.weights"], x, 0.3, CLASS)
    for network, dtype in ((single, jnp.float32), (double, jnp.float64)):
        found = jax.eval_shape(read, network, X.astype(dtype))
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("options", [{"patch_size": 3}, {"hidden": 10}, {"num_heads": 3}])
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match="`patch_size` must divide `image_size`, and `num_heads`"):
        nnx.eval_shape(lambda: dit(**options))


@pytest.mark.parametrize(
    "args, message",
    [
        ((X[None], T, CLASS), r"`x` must be one example of shape \(4, 4, 2\), got \(1, 4, 4, 2\)"),
        ((X, T), r"`cond` must have a scalar integer class in \[0, 3\), or 3 for none"),
    ],
)
def test_bad_input_is_named(args, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda n: n(*args), nnx.eval_shape(dit))

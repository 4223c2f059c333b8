import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.signal import correlate2d
from scipy.special import expit, softmax

from jaxdiff.networks import UNet, num_params, read_taps
from jaxdiff.networks._unet import AttentionBlock, GroupNorm, ResBlock, downsample, upsample
from jaxdiff.taps import Tap

X = jnp.sin(jnp.arange(16.0)).reshape(4, 4, 1)
T = jnp.float32(3.0)
CLASS = jnp.int32(1)
ADM = {"scale_shift": True, "resample": "block", "skip_rescale": True, "head_channels": 4}


def unet(rngs=None, **options):
    sizes = {"channels": 4, "in_channels": 1, "image_size": 4, "channel_mults": (1, 2)}
    sizes |= {"num_res_blocks": 1, "attention_resolutions": (2,), "num_classes": 3}
    return UNet(**sizes | options, rngs=rngs or nnx.Rngs(0))


def with_random_weights(build, seed=0):
    """The network with all weights drawn, also those that start at zero."""
    rng = np.random.default_rng(seed)
    shapes = nnx.eval_shape(build)
    return jax.tree.map(lambda w: jnp.asarray(0.3 * rng.normal(size=w.shape), w.dtype), shapes)


# These programs are compiled once and run twice: optimising them is most of the time.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@quick_jit
def forward(network, x, t, cond, key=None):
    return network(x, t, cond, key=key)


@quick_jit
def loss_and_grad(network, key):
    def loss(network):
        out = network(X, T, CLASS, key=key)
        return (out**2).sum(), out

    (_, out), grads = jax.value_and_grad(loss, has_aux=True)(network)
    return out, grads


def weight(parameter):
    return np.asarray(parameter[...])


def group_norm(layer, x, groups):
    parts = []
    for part in np.split(x, groups, axis=-1):
        parts.append((part - part.mean()) / np.sqrt(part.var() + 1e-6))
    return np.concatenate(parts, axis=-1) * weight(layer.scale) + weight(layer.bias)


def conv(layer, x):
    kernel, out = weight(layer.kernel), []
    for o in range(kernel.shape[-1]):
        planes = [
            correlate2d(x[..., i], kernel[:, :, i, o], mode="same") for i in range(x.shape[-1])
        ]
        out.append(sum(planes))
    return np.stack(out, axis=-1) + weight(layer.bias)


def linear(layer, x):
    return x @ weight(layer.kernel) + weight(layer.bias)


def silu(x):
    return x * expit(x)


KINDS = {"dtype": None, "param_dtype": jnp.float64}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scale_shift", [False, True])
def test_residual_block_against_numpy(scale_shift):
    options = {"rate": 0.0, "scale_shift": scale_shift, "skip_scale": 0.5**0.5}
    block = with_random_weights(lambda: ResBlock(8, 12, 5, **options, **KINDS, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    x, emb = rng.normal(size=(4, 4, 8)), rng.normal(size=5)
    h = conv(block.conv1, silu(group_norm(block.norm1, x, 2)))
    modulation = linear(block.modulation, silu(emb))
    if scale_shift:
        h = group_norm(block.norm2, h, 3) * (1 + modulation[:12]) + modulation[12:]
    else:
        h = group_norm(block.norm2, h + modulation, 3)
    expected = (conv(block.conv2, silu(h)) + conv(block.skip, x)) / np.sqrt(2)
    out = jax.jit(lambda b: b(jnp.asarray(x), jnp.asarray(emb), None))(block)
    np.testing.assert_allclose(out, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_attention_block_against_numpy():
    build = lambda: AttentionBlock(8, 2, skip_scale=1.0, **KINDS, rngs=nnx.Rngs(0))
    block = with_random_weights(build)
    x = np.random.default_rng(1).normal(size=(3, 3, 8))
    tokens = group_norm(block.norm, x, 2).reshape(9, 8)
    part = block.attention
    qkv = np.concatenate([linear(layer, tokens) for layer in (part.q, part.k, part.v)], axis=1)
    heads = []
    for h in (0, 4):
        q, k, v = (qkv[:, start + h : start + h + 4] for start in (0, 8, 16))
        heads.append(softmax(q @ k.T / np.sqrt(4), axis=1) @ v)
    expected = x + linear(part.out, np.concatenate(heads, axis=1)).reshape(x.shape)
    out = jax.jit(lambda b: b(Tap(), "attn", jnp.asarray(x), None, None))(block)
    np.testing.assert_allclose(out, expected, rtol=1e-10, atol=1e-12)


def test_groups_adapt_to_the_width():
    groups = {c: nnx.eval_shape(lambda: GroupNorm(c, rngs=nnx.Rngs(0))).num_groups  # noqa: B023
              for c in (2, 4, 12, 40, 64, 128, 144, 192, 1024)}  # fmt: skip
    assert groups == {2: 1, 4: 1, 12: 3, 40: 10, 64: 16, 128: 32, 144: 24, 192: 32, 1024: 32}


def test_resampling_keeps_means_and_pixels():
    x = jnp.arange(32.0).reshape(4, 4, 2)
    np.testing.assert_array_equal(upsample(x), np.kron(x, np.ones((2, 2, 1))))
    np.testing.assert_array_equal(downsample(upsample(x)), x)
    np.testing.assert_array_equal(downsample(x)[1, 0], x[2:, :2].reshape(4, 2).mean(0))


def test_ddpm_cifar10_has_the_published_number_of_weights():
    """35,746,307: the weights of the CIFAR-10 checkpoint of Ho et al."""
    size = lambda **options: num_params(
        nnx.eval_shape(lambda: UNet(128, dropout=0.1, **options, rngs=nnx.Rngs(0)))
    )
    assert size() == 35_746_307
    # ADM's residual resampling: two 3x3 convolutions, two norms and an embedding for each of 6
    # resamplings, against one convolution.
    block = {c: 9 * c * c + c + 4 * c + 512 * c + c for c in (128, 256)}
    extra = block[128] + 5 * block[256]
    extra += 11 * 512 + 3 * (9 * 128 + 1)  # classes and the null class; channels for variances
    assert size(resample="block", num_classes=10, out_channels=6) - size() == extra


def test_starts_with_identity_blocks_and_zero_output():
    make = lambda key: unet(rngs=nnx.Rngs(key))
    network = jax.jit(make)(jax.random.key(0, impl="rbg"))
    names = ["in", "down.0.0", "down.1.0", "mid.0", "mid"]
    out, values = quick_jit(lambda n: read_taps(n, names, X, T, CLASS))(network)
    assert out.shape == X.shape
    assert not np.any(out)
    for before, after in (("in", "down.0.0"), ("down.1.0", "mid.0"), ("mid.0", "mid")):
        np.testing.assert_array_equal(values[before], values[after])
    kinds = {type(v) for _, v in nnx.iter_graph(network) if isinstance(v, nnx.Variable)}
    assert kinds == {nnx.Param}
    assert {leaf.dtype for leaf in jax.tree.leaves(network)} == {jnp.dtype(jnp.float32)}


def test_bfloat16_is_close_and_keeps_float32_outside():
    full, half = (with_random_weights(lambda: unet(dtype=d, **ADM)) for d in (None, jnp.bfloat16))  # noqa: B023
    out, (rounded, grads) = forward(full, X, T, CLASS), loss_and_grad(half, None)
    assert rounded.dtype == jnp.float32
    assert 0 < np.abs(rounded - out).max() < 0.05 * np.abs(out).max()
    for leaf in jax.tree.leaves(grads):
        assert leaf.dtype == jnp.float32 and np.all(np.isfinite(leaf))


def test_the_same_weights_for_another_size():
    """Far from its edges a larger image meets the same convolutions."""
    small = with_random_weights(lambda: unet(image_size=8, attention_resolutions=(4,)))
    large = small.resized(16)
    assert large.shape == (16, 16, 1) and dict(large.arguments)["attention_resolutions"] == (8,)
    assert num_params(large) == num_params(small)
    back = large.resized((8, 8))
    x = jnp.sin(jnp.arange(64.0)).reshape(8, 8, 1)
    np.testing.assert_array_equal(forward(back, x, T, CLASS), forward(small, x, T, CLASS))
    # An image of one colour is one of any size, but for its edges.
    flat = [forward(net, jnp.full(net.shape, 0.3), T, CLASS) for net in (small, large)]
    assert flat[1].shape == (16, 16, 1) and np.all(np.isfinite(flat[1]))
    with pytest.raises(ValueError, match="`image_size` must be divisible by 2"):
        small.resized(15)


def test_batches_keys_and_retracing():
    traces = []

    @jax.jit
    def one(network, x, t, cond, key):
        traces.append(1)
        return network(x, t, cond, key=key)

    first, second = (with_random_weights(lambda: unet(dropout=0.5), seed) for seed in (0, 1))
    xs, ts, labels = jnp.stack([X, -X]), jnp.asarray([0.1, 5.0]), jnp.asarray([3, 0])
    keys = jax.random.split(jax.random.key(0))
    loop = [one(first, *args) for args in zip(xs, ts, labels, keys, strict=True)]
    np.testing.assert_array_equal(one(first, xs[0], ts[0], labels[0], keys[0]), loop[0])
    assert np.abs(one(first, xs[0], ts[0], labels[0], keys[1]) - loop[0]).max() > 1e-4
    assert np.abs(one(second, xs[0], ts[0], labels[0], keys[0]) - loop[0]).max() > 1e-4
    assert len(traces) == 1

    call = lambda n, x, t, cond, key: n(x, t, cond, key=key)
    batch = jax.jit(jax.vmap(call, in_axes=(None, 0, 0, 0, 0)))(first, xs, ts, labels, keys)
    np.testing.assert_allclose(batch, jnp.stack(loop), rtol=1e-4, atol=1e-5)

    still = forward(first, X, T, CLASS)
    np.testing.assert_array_equal(forward(first, X, T, CLASS), still)
    assert np.abs(forward(first, X, T, jnp.int32(3)) - still).max() > 1e-4


@pytest.mark.usefixtures("x64")
def test_neither_widens_nor_narrows_under_x64():
    network = with_random_weights(unet)

    def widths(network, x):
        program = jax.make_jaxpr(lambda n, x: n(x, 0.3, CLASS))(network, x)
        convs = [e for e in program.eqns if e.primitive.name == "convolution"]
        assert len(convs) > 5
        return {str(v.aval.dtype) for e in (*convs, program.eqns[-1]) for v in e.outvars}

    assert widths(network, X) == {"float32"}
    double = with_random_weights(lambda: unet(param_dtype=jnp.float64))
    assert widths(double, X.astype(jnp.float64)) == {"float64"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_size": 5}, "`image_size` must be divisible by 2"),
        ({"channels": 5}, "`channels` must be even"),
        ({"num_heads": 3}, "`num_heads` must divide the 8 channels"),
        ({"head_channels": 16}, "`head_channels` must divide the 8 channels"),
        ({"resample": "fir"}, "`resample` must be .* got 'fir'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: unet(**options))


@pytest.mark.parametrize(
    "args, message",
    [
        ((X[None], T, CLASS), r"`x` must be one example of shape \(4, 4, 1\), got \(1, 4, 4, 1\)"),
        ((X, T), r"`cond` must have a scalar integer class in \[0, 3\), or 3 for none"),
    ],
)
def test_bad_input_is_named(args, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda n: n(*args), nnx.eval_shape(unet))

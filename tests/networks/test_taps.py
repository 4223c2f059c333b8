import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import with_random_weights
from flax import nnx
from scipy.special import softmax

from jaxdiff.networks import MLP, DiT, EditedNetwork, UNet, read_taps, tap_names


def unet(remat, **options):
    return UNet(
        4,
        in_channels=1,
        image_size=4,
        channel_mults=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(),
        num_heads=2,
        remat=remat,
        rngs=nnx.Rngs(0),
        **options,
    )


def dit(remat, **options):
    sizes = {"image_size": 4, "in_channels": 1, "hidden": 8, "depth": 2, "num_heads": 2}
    return DiT(**sizes, remat=remat, rngs=nnx.Rngs(0), **options)


@pytest.fixture(scope="module")
def networks():
    return {
        (name, remat): with_random_weights(lambda: build(remat))  # noqa: B023
        for name, build in (("unet", unet), ("dit", dit))
        for remat in (False, True)
    }


BOTH = pytest.mark.parametrize("remat", [False, True])
X = jnp.linspace(-1, 1, 16).reshape(4, 4, 1)
T = jnp.float32(3.0)
ATTENTION = tuple(f"mid.attn{part}" for part in (".q", ".k", ".v", ".weights", ""))


class Add(eqx.Module):
    """An edit whose number is a leaf."""

    delta: jax.Array

    def __call__(self, value):
        return value + self.delta


def identity_map(weights):
    return jnp.broadcast_to(jnp.eye(weights.shape[-1]), weights.shape)


def mean_query(q):
    return jnp.broadcast_to(q.mean(0), q.shape)


@BOTH
def test_names_come_in_the_order_of_the_computation(networks, remat):
    expected = ("emb", "in", "down.0.0", "down.0.resample", "down.1.0", *ATTENTION, "mid.0", "mid")
    expected += ("up.1.0", "up.1.1", "up.1.resample", "up.0.0", "up.0.1")
    assert tap_names(networks["unet", remat], X, T) == expected
    abstract = nnx.eval_shape(lambda: unet(remat))
    assert tap_names(abstract, jax.ShapeDtypeStruct(X.shape, X.dtype), T) == expected


@BOTH
def test_reading_returns_what_the_network_computed(networks, remat):
    network = networks["unet", remat]
    names = ("in", "down.0.0", *ATTENTION)
    out, values = jax.jit(lambda n, x: read_taps(n, names, x, T))(network, X)
    assert set(values) == set(names)
    np.testing.assert_allclose(out, jax.jit(lambda n, x: n(x, T))(network, X), rtol=1e-5, atol=1e-6)

    first = network.conv_in(X)
    np.testing.assert_allclose(values["in"], first, rtol=1e-5, atol=1e-6)
    block = network.down[0][0].block
    expected = block(first, network.embedding(T, None)[0], None)
    np.testing.assert_allclose(values["down.0.0"], expected, rtol=1e-5, atol=1e-5)

    q, k, v, weights, attn = (np.asarray(values[name]) for name in ATTENTION)
    heads = [slice(0, 4), slice(4, 8)]
    maps = [softmax(q[:, h] @ k[:, h].T / 2, axis=-1) for h in heads]
    np.testing.assert_allclose(weights, maps, rtol=1e-5, atol=1e-6)
    mixed = np.concatenate([m @ v[:, h] for m, h in zip(maps, heads, strict=True)], axis=-1)
    projection = network.mid[0].attention.attention.out
    expected = mixed @ np.asarray(projection.kernel[...]) + np.asarray(projection.bias[...])
    np.testing.assert_allclose(attn.reshape(4, 8), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, tap", [("unet", "up.0.1"), ("dit", "block.0")])
@BOTH
def test_a_constant_cuts_off_everything_upstream(networks, remat, name, tap):
    def edited(network, x):
        return EditedNetwork(network, {tap: jnp.ones_like})(x, T).sum()

    weights, x = jax.jit(jax.grad(edited, argnums=(0, 1)))(networks[name, remat], X)
    upstream, downstream = (
        (weights.conv_in, weights.conv_out) if name == "unet" else (weights.patches, weights.last)
    )
    assert not np.any(x)
    assert not np.any(upstream.kernel[...])
    assert np.any(downstream.kernel[...])


@BOTH
def test_identity_attention_uses_values_only(networks, remat):
    """The edit of perturbed-attention guidance."""
    network = networks["unet", remat]
    edited = EditedNetwork(network, {"mid.attn.weights": identity_map})
    names = ("mid.attn.v", "mid.attn", "mid.attn.weights")
    _, values = jax.jit(lambda n, x: read_taps(n, names, x, T))(edited, X)
    expected = network.mid[0].attention.attention.out(values["mid.attn.v"])
    np.testing.assert_allclose(values["mid.attn"].reshape(4, 8), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(values["mid.attn.weights"], [np.eye(4)] * 2)
    plain = jax.jit(lambda n, x: read_taps(n, names, x, T))(network, X)[1]
    assert np.abs(plain["mid.attn"] - values["mid.attn"]).max() > 1e-3


@BOTH
def test_blurred_queries_give_every_token_the_same_map(networks, remat):
    """The edit of smoothed energy guidance, with infinite blur."""
    edited = EditedNetwork(networks["unet", remat], {"mid.attn.q": mean_query})
    _, values = jax.jit(lambda n, x: read_taps(n, ATTENTION, x, T))(edited, X)
    weights = np.asarray(values["mid.attn.weights"])
    np.testing.assert_allclose(weights, np.broadcast_to(weights[:, :1], weights.shape), rtol=1e-6)
    assert np.ptp(weights[:, 0], axis=-1).min() > 1e-4


def test_edits_nest_inner_first(networks):
    network = networks["dit", True]
    inner = EditedNetwork(network, {"block.0": Add(jnp.float32(1.0)), "patches": jnp.negative})
    outer = EditedNetwork(inner, {"block.0": lambda h: 3 * h})
    at_once = EditedNetwork(network, {"block.0": lambda h: 3 * (h + 1), "patches": lambda h: -h})
    read = jax.jit(lambda n, x: read_taps(n, ["block.0", "block.1"], x, T))
    for a, b in zip(
        jax.tree.leaves(read(outer, X)), jax.tree.leaves(read(at_once, X)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@BOTH
def test_an_edits_numbers_are_leaves_and_do_not_retrace(networks, remat):
    traces = []

    @jax.jit
    def run(network, x):
        traces.append(1)
        return network(x, T)

    def edited(delta):
        return EditedNetwork(networks["dit", remat], {"block.0": Add(delta), "patches": jnp.sin})

    outs = [run(edited(delta), X) for delta in (jnp.zeros(8), jnp.arange(8.0))]
    assert len(traces) == 1
    assert np.abs(outs[0] - outs[1]).max() > 1e-3
    both = jnp.stack([jnp.zeros(8), jnp.arange(8.0)])
    sweep = jax.jit(jax.vmap(lambda delta: edited(delta)(X, T)))(both)
    np.testing.assert_allclose(sweep, jnp.stack(outs), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("x64")
def test_derivatives_through_reading_and_editing_under_remat():
    network = with_random_weights(lambda: dit(True, param_dtype=jnp.float64))
    x = X.astype(jnp.float64)

    @jax.jit
    def read(x, delta):
        edited = EditedNetwork(network, {"block.0": Add(delta)})
        out, values = read_taps(edited, ["block.1", "block.1.attn.weights"], x, T)
        return jnp.concatenate([out.ravel(), *(v.ravel() for v in values.values())])

    point = (x, jnp.linspace(0.0, 1.0, 8))
    way = (jnp.cos(x), jnp.sin(point[1]))
    h = 1e-5
    plus, minus = (read(*(p + s * w for p, w in zip(point, way, strict=True))) for s in (h, -h))
    _, slope = jax.jvp(read, point, way)
    np.testing.assert_allclose(slope, (plus - minus) / (2 * h), rtol=1e-7, atol=1e-8)
    assert np.abs(slope).max() > 0.1

    _, linear = jax.linearize(read, *point)
    np.testing.assert_allclose(linear(*way), slope, rtol=1e-12, atol=1e-12)
    out, pull = jax.vjp(read, *point)
    cotangents = pull(jnp.ones_like(out))
    inner = sum(jnp.vdot(c, w) for c, w in zip(cotangents, way, strict=True))
    np.testing.assert_allclose(inner, slope.sum(), rtol=1e-10)


def test_reading_is_pure_under_every_transformation(networks):
    network = networks["unet", True]
    names = ["mid", "mid.attn.weights"]
    xs = jnp.stack([X, X**2, -X])
    with jax.checking_leaks():
        one = jax.jit(lambda n, x: read_taps(n, names, x, T))
        many = jax.jit(lambda n, xs: jax.vmap(lambda x: read_taps(n, names, x, T))(xs))
        batch = many(network, xs)
    loop = jax.tree.map(lambda *values: jnp.stack(values), *(one(network, x) for x in xs))
    for a, b in zip(jax.tree.leaves(batch), jax.tree.leaves(loop), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@BOTH
def test_unknown_names_are_reported_with_the_taps_there_are(networks, remat):
    network = networks["dit", remat]
    with pytest.raises(ValueError, match=r"`names`.*\['middle'\].*'block\.1\.attn\.weights'"):
        jax.eval_shape(lambda: read_taps(network, ["block.0", "middle"], X, T))
    edited = EditedNetwork(network, {"mid": jnp.sin})
    with pytest.raises(ValueError, match=r"`edits`.*\['mid'\].*'patches'"):
        jax.eval_shape(lambda: edited(X, T))
    with pytest.raises(ValueError, match=r"`edits`.*\['mid'\]"):
        jax.eval_shape(lambda: EditedNetwork(edited, {"block.0": jnp.sin})(X, T))


def test_edits_keep_shape_and_dtype():
    network = with_random_weights(lambda: dit(False, dtype=jnp.bfloat16))
    edited = EditedNetwork(network, {"block.0": lambda h: np.float32(2) * h.astype(jnp.float32)})
    out, values = jax.eval_shape(lambda: read_taps(edited, ["block.0", "block.1"], X, T))
    assert out.dtype == jnp.float32
    assert {v.dtype for v in values.values()} == {jnp.dtype(jnp.bfloat16)}
    with pytest.raises(ValueError, match=r"edits\['block\.0'\].*\(4, 8\).*\(8,\)"):
        jax.eval_shape(lambda: EditedNetwork(network, {"block.0": lambda h: h[0]})(X, T))


def test_mlp_taps_are_its_residual_stream():
    network = with_random_weights(lambda: MLP(3, hidden=8, num_blocks=2, rngs=nnx.Rngs(0)))
    x = jnp.asarray([0.5, -1.0, 2.0])
    assert tap_names(network, x, T) == ("emb", "block.0", "block.1")
    out, values = read_taps(network, ["block.0", "block.1"], x, T)
    emb, _, _ = network.embedding(T, None)
    h = network.blocks[0](network.first(x), emb, None)
    np.testing.assert_allclose(values["block.0"], h, rtol=1e-6)
    np.testing.assert_allclose(values["block.1"], network.blocks[1](h, emb, None), rtol=1e-6)
    replaced = EditedNetwork(network, {"block.1": lambda _: values["block.1"]})
    np.testing.assert_allclose(replaced(-x, T), out, rtol=1e-6)

"""What networks take beside x and the noise label, their shapes, and how they are computed."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import with_random_weights
from flax import nnx

import jaxdiff
from jaxdiff import guidance, processes
from jaxdiff.networks import (
    MLP,
    DiT,
    EditedNetwork,
    UNet,
    read_taps,
    tap_names,
    with_attention,
    with_scalars,
)

T = jnp.float32(3.0)


def mlp(**options):
    options = {"num_classes": 3} | options
    return MLP(3, hidden=8, num_blocks=1, rngs=nnx.Rngs(0), **options)


def unet(**options):
    sizes = {"in_channels": 1, "image_size": 4, "channel_mults": (1, 2), "num_res_blocks": 1}
    sizes |= {"attention_resolutions": (2,), "num_heads": 2, "num_classes": 3}
    return UNet(4, **sizes | options, rngs=nnx.Rngs(0))


def dit(**options):
    sizes = {"image_size": 4, "in_channels": 1, "hidden": 8, "depth": 2, "num_heads": 2}
    return DiT(**sizes | {"num_classes": 3} | options, rngs=nnx.Rngs(0))


BUILDS = {"mlp": mlp, "unet": unet, "dit": dit}
each_network = pytest.mark.parametrize("name", BUILDS)


def example(network):
    return jnp.sin(jnp.arange(np.prod(network.shape))).reshape(network.shape)


@jax.jit
def call(network, x, cond):
    return network(x, T, cond)


@each_network
def test_a_label_is_an_integer_or_a_vector_in_its_place(name):
    network = with_random_weights(BUILDS[name])
    x = example(network)
    row = network.embedding.classes.embedding[...][2]
    plain = call(network, x, jnp.asarray(2))
    np.testing.assert_allclose(call(network, x, {"label": jnp.asarray(2)}), plain, rtol=1e-6)
    np.testing.assert_allclose(call(network, x, row), plain, rtol=1e-5, atol=1e-6)
    # Between two classes, which no integer is, and differentiable there.
    slope = jax.jit(jax.grad(lambda row: call(network, x, row).sum()))(row)
    assert np.all(np.isfinite(slope)) and np.any(slope)
    # Traced labels beyond the table are those of no class, and no NaN.
    for label in (-1, 4, 100):
        np.testing.assert_array_equal(
            call(network, x, jnp.asarray(label)), call(network, x, jnp.asarray(3))
        )
        with pytest.raises(ValueError, match=rf"Labels must lie in \[0, 2\].*got {label}"):
            network(x, T, label)
        with pytest.raises(ValueError, match="Labels must lie"):
            network.check_cond({"label": np.asarray([0, label])})


@each_network
def test_vectors_are_labels_too(name):
    network = with_random_weights(lambda: BUILDS[name](num_classes=None, label_size=5))
    x, vector = example(network), jnp.linspace(-1.0, 1.0, 5)
    found = call(network, x, vector)
    # Linear in it, before the network: by the projection's matrix.
    layer = network.embedding.vector
    shift = vector @ layer.kernel[...] + layer.bias[...]
    read = jax.jit(lambda vector: read_taps(network, ["emb"], x, T, vector)[1]["emb"])
    emb, none = read(vector), read(jnp.zeros(5))
    np.testing.assert_allclose(emb - none, shift - layer.bias[...], rtol=1e-4, atol=1e-5)
    assert not np.allclose(found, call(network, x, -vector))
    with pytest.raises(ValueError, match=r"a label, a vector \(5,\), for one|a label, a vector"):
        network(x, T, jnp.zeros(4))
    with pytest.raises(ValueError, match="two kinds of one label"):
        BUILDS[name](label_size=5)


@each_network
def test_scalars_start_without_effect_and_then_have_one(name):
    """A second time, a guidance weight: a network that gains one is the network it was."""
    plain = BUILDS[name]()
    wider = BUILDS[name](scalars=("s", "guidance"))
    x = example(plain)
    cond = {"label": jnp.asarray(1), "s": jnp.asarray(0.3), "guidance": jnp.asarray(4.0)}
    for key in ("s", "guidance"):
        assert not np.any(wider.embedding.scalars[key].kernel[...])
    # The old weights in the new network, all but those of the scalars.
    random = with_random_weights(BUILDS[name])
    old = dict(nnx.to_flat_state(nnx.state(random)))
    state = [(path, old.get(path, leaf)) for path, leaf in nnx.to_flat_state(nnx.state(wider))]
    grown = nnx.merge(nnx.graphdef(wider), nnx.from_flat_state(state))
    before = call(random, x, jnp.asarray(1))
    np.testing.assert_allclose(call(grown, x, cond), before, rtol=1e-6, atol=1e-7)
    trained = with_random_weights(lambda: BUILDS[name](scalars=("s", "guidance")))
    moved = [call(trained, x, {**cond, "s": jnp.asarray(s)}) for s in (0.3, 0.9)]
    assert not np.allclose(*moved)
    with pytest.raises(ValueError, match=r"`cond` must have 's', a scalar"):
        trained(x, T, {"label": 1, "guidance": 2.0})
    with pytest.raises(ValueError, match="an entry 'time' that nobody takes: this network takes"):
        trained(x, T, {**cond, "time": 2.0})


@each_network
def test_a_network_that_is_told_more_is_the_same_until_it_learns(name):
    network = with_random_weights(lambda: BUILDS[name](scalars=("s",)))
    told = with_scalars(network, "end", "scale")
    x, cond = example(network), {"label": jnp.asarray(1), "s": jnp.asarray(0.3)}
    more = {**cond, "end": jnp.asarray(0.2), "scale": jnp.asarray(3.0)}
    np.testing.assert_array_equal(call(told, x, more), call(network, x, cond))
    assert dict(told.arguments)["scalars"] == ("s", "end", "scale")
    slope = jax.grad(lambda n: jnp.sum(call(n, x, more) ** 2))(told)
    assert np.any(slope.embedding.scalars["end"].kernel[...] != 0)
    assert dict(network.arguments)["scalars"] == ("s",)  # the first is as it was
    with pytest.raises(ValueError, match="`names` must be new entries, got 's'"):
        with_scalars(network, "s")


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_tokens_are_attended_to_and_masked_ones_are_not(name):
    options = {"token_size": 6}
    network = with_random_weights(lambda: BUILDS[name](**options))
    x, tokens = example(network), jax.random.normal(jax.random.key(0), (5, 6))
    label = jnp.asarray(1)
    found = call(network, x, {"label": label, "tokens": tokens})
    assert not np.allclose(found, call(network, x, {"label": label, "tokens": 2 * tokens}))
    # Of no order; and those that do not count may be anything.
    shuffled = call(network, x, {"label": label, "tokens": tokens[::-1]})
    np.testing.assert_allclose(shuffled, found, rtol=1e-4, atol=1e-5)
    mask = jnp.asarray([True, True, False, True, False])
    masked = {"label": label, "tokens": tokens, "token_mask": mask}
    short = call(network, x, {"label": label, "tokens": tokens[mask]})
    np.testing.assert_allclose(call(network, x, masked), short, rtol=1e-4, atol=1e-5)
    # A fresh network does not hear them yet.
    fresh = BUILDS[name](**options)
    assert not any(
        np.any(module.kernel[...])
        for path, module in nnx.iter_graph(fresh)
        if path[-2:] == ("cross", "out")
    )
    names = tap_names(network, x, T, {"label": label, "tokens": tokens})
    weights = [n for n in names if n.endswith("cross.weights")]
    values = jax.jit(lambda cond: read_taps(network, weights, x, T, cond)[1])(masked)
    for value in values.values():
        np.testing.assert_allclose(value.sum(-1), 1, rtol=1e-5)
        assert np.all(value[..., ~mask] == 0)
    with pytest.raises(ValueError, match=r"'tokens', \(n, 6\), for one|'tokens', \(n, 6\)"):
        network(x, T, {"label": 1, "tokens": tokens[:, :5]})


def test_a_network_with_everything_is_guided_and_sampled():
    """Classifier-free guidance replaces what its null names, and leaves the scalar."""
    network = with_random_weights(lambda: dit(scalars=("w",), token_size=6))
    denoiser = jaxdiff.NetworkDenoiser(network, processes.Cosine())
    tokens = jax.random.normal(jax.random.key(0), (2, 5, 6))
    cond = {"label": jnp.asarray([0, 2]), "tokens": tokens, "w": jnp.asarray([1.0, 2.0])}
    guided = guidance.ClassifierFree(denoiser, {"label": 3, "tokens": 0.0}, 1.5)
    out = jaxdiff.sample(jax.random.key(0), guided, (4, 4, 1), 2, cond=cond, times=3)
    assert np.all(np.isfinite(out.x))
    x, t = example(network), jnp.asarray(0.4)
    one = jax.tree.map(lambda leaf: leaf[1], cond)
    null = one | {"label": jnp.asarray(3), "tokens": jnp.zeros((5, 6))}
    answer = jax.jit(lambda denoiser, cond: denoiser(x, t, cond))
    expected = answer(denoiser, null) + 1.5 * (answer(denoiser, one) - answer(denoiser, null))
    np.testing.assert_allclose(answer(guided, one), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["unet", "dit"])
@pytest.mark.parametrize("size", [(4, 8), (8, 4)])
def test_images_need_not_be_square(name, size):
    options = {"attention_resolutions": (size[0] // 2,)} if name == "unet" else {}
    network = with_random_weights(lambda: BUILDS[name](image_size=size, **options))
    x = jax.random.normal(jax.random.key(0), (*size, 1))
    out = call(network, x, jnp.asarray(0))
    assert out.shape == (*size, 1) and np.all(np.isfinite(out))
    if name == "unet":
        # Convolutions do not know which side is which, attention sees a set.
        turned = with_random_weights(lambda: BUILDS[name](image_size=size[::-1], **options | {
            "attention_resolutions": (size[1] // 2,)}))  # fmt: skip
        swap = lambda w: w.swapaxes(0, 1) if w.ndim == 4 else w
        turned = jax.tree.map(swap, turned)
        swapped = call(turned, x.swapaxes(0, 1), jnp.asarray(0)).swapaxes(0, 1)
        np.testing.assert_allclose(swapped, out, rtol=1e-3, atol=1e-4)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"heights of the levels, \[4, 2\], got \[16\]"):
        unet(attention_resolutions=(2, 16))
    for build in (unet, dit):
        with pytest.raises(ValueError, match="`image_size`"):
            build(image_size=(4, 7))
        with pytest.raises(ValueError, match=r"a size or \(height, width\)"):
            build(image_size=(4, 4, 4))
        with pytest.raises(ValueError, match="`remat` must be a bool or one of dots_saveable"):
            build(remat="dots")
        with pytest.raises(ValueError, match="`attention` must be one of plain, xla, cudnn"):
            build(attention="flash")
        with pytest.raises(ValueError, match="`dropout` must be at least 0 and below 1, got 1"):
            build(dropout=1.0)


@each_network
def test_the_embedding_is_a_tap(name):
    network = with_random_weights(BUILDS[name])
    x = example(network)

    @jax.jit
    def both(network):
        emb = read_taps(network, ["emb"], x, T, jnp.asarray(1))[1]["emb"]
        one = EditedNetwork(network, {"emb": lambda e: emb})
        return one(x, 9 * T, jnp.asarray(0)), network(x, T, jnp.asarray(1))

    np.testing.assert_allclose(*both(network), rtol=1e-5, atol=1e-6)


# --- how they are computed


def stack(network):
    """The weights of a list of blocks in a network that scans over them."""
    blocks = jax.tree.map(lambda *w: jnp.stack(w), *network.blocks)
    scanned = with_random_weights(lambda: dit(depth=len(network.blocks), stacked=True))
    leaves = {jax.tree_util.keystr(p): w for p, w in jax.tree_util.tree_leaves_with_path(network)}
    inside = {jax.tree_util.keystr(p): w for p, w in jax.tree_util.tree_leaves_with_path(blocks)}

    def find(path, leaf):
        name = jax.tree_util.keystr(path)
        local = name.removeprefix(".blocks")
        found = inside[local] if local != name else leaves[name]
        assert found.shape == leaf.shape
        return found

    return jax.tree_util.tree_map_with_path(find, scanned)


def test_stacked_blocks_are_the_same_network_with_the_same_taps():
    plain = with_random_weights(lambda: dit(depth=3, dropout=0.0))
    scanned = stack(plain)
    x, label = example(plain), jnp.asarray(1)
    assert tap_names(scanned, x, T, label) == tap_names(plain, x, T, label)
    names = ["patches", "block.0", "block.1.attn.weights", "block.2.attn"]
    read = jax.jit(lambda n: read_taps(n, names, x, T, label))
    for a, b in zip(jax.tree.leaves(read(scanned)), jax.tree.leaves(read(plain)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    class Add(eqx.Module):
        amount: jax.Array

        def __call__(self, value):
            return value + self.amount

    edits = {
        "block.1": Add(jnp.asarray(0.5)),
        "block.2.attn.weights": lambda w: jnp.broadcast_to(jnp.eye(w.shape[-1]), w.shape),
    }
    # Read through an edit of another layer, and differentiate by the edit in both modes.
    edited = jax.jit(lambda n: read_taps(EditedNetwork(n, edits), ["block.2"], x, T, label))
    for a, b in zip(jax.tree.leaves(edited(scanned)), jax.tree.leaves(edited(plain)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    def by_amount(network, amount):
        edit = {"block.1": Add(amount * jnp.arange(8.0))}
        return jnp.sin(EditedNetwork(network, edit)(x, T, label)).sum()

    @jax.jit
    def slopes(network):
        forward = jax.jvp(lambda a: by_amount(network, a), (0.2,), (1.0,))[1]
        return jax.grad(by_amount, argnums=1)(network, jnp.asarray(0.2)), forward

    for network in (scanned, plain):
        np.testing.assert_allclose(*slopes(network), rtol=1e-3)
    with pytest.raises(ValueError, match=r"\['block.3'\]"):
        read_taps(scanned, ["block.3"], x, T, label)
    with pytest.raises(ValueError, match=r"must return an activation of the shape"):
        EditedNetwork(scanned, {"block.1": lambda h: h[0]})(x, T, label)


def test_stacked_blocks_recompute_and_drop_out_like_others():
    networks = [with_random_weights(lambda r=r: dit(stacked=True, dropout=0.3, remat=r))
                for r in (False, True, "dots_saveable")]  # fmt: skip
    x, key = example(networks[0]), jax.random.key(1)
    grad = jax.jit(jax.grad(lambda n: (n(x, T, jnp.asarray(1), key=key) ** 2).sum()))
    first, *others = (jax.tree.leaves(grad(n)) for n in networks)
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(a).max() + 1e-9)
    out = jax.jit(lambda n: [n(x, T, jnp.asarray(1), key=k) for k in (None, key)])(networks[0])
    assert not np.allclose(*out)
    # The first weights are drawn, and differently in every block.
    kernel = dit(stacked=True, depth=3).blocks.first.kernel[...]
    assert kernel.shape[0] == 3 and not np.allclose(kernel[0], kernel[1])


@pytest.mark.parametrize("name", ["mlp", "unet", "dit"])
def test_policies_keep_what_they_say_and_change_no_gradient(name):
    label, key = jnp.asarray(1), jax.random.key(3, impl="rbg")
    grads, kept = [], []
    for remat in (False, True, "dots_saveable", "everything_saveable"):
        options = {"dropout": 0.2} | ({"attention_resolutions": ()} if name == "unet" else {})
        network = with_random_weights(lambda r=remat: BUILDS[name](remat=r, **options))  # noqa: B023
        x = example(network)
        loss = lambda n: (n(x, T, label, key=key) ** 2).sum()  # noqa: B023
        grads.append(jax.tree.leaves(jax.jit(jax.grad(loss))(network)))
        residuals = jax.eval_shape(lambda n: jax.vjp(loss, n)[1], network)  # noqa: B023
        kept.append(sum(np.prod(r.shape) for r in jax.tree.leaves(residuals)))
    largest = max(np.abs(a).max() for a in grads[0])
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            assert np.any(a)
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6 * largest)
    # Nothing kept, some of it, and all of it.
    assert kept[1] < kept[2] <= kept[3]


def test_fused_attention_agrees_and_gives_way_to_taps():
    plain = with_random_weights(lambda: dit(token_size=6))
    fused = with_attention(plain, "xla")
    x = example(plain)
    mask = jnp.asarray([True, False, True, True])
    cond = {"label": jnp.asarray(1), "tokens": jnp.ones((4, 6)), "token_mask": mask}
    np.testing.assert_allclose(call(fused, x, cond), call(plain, x, cond), rtol=1e-4, atol=1e-5)
    assert tap_names(fused, x, T, cond) == tap_names(plain, x, T, cond)
    name = "block.1.attn.weights"
    read = jax.jit(lambda n: read_taps(n, [name], x, T, cond)[1][name])
    np.testing.assert_allclose(read(fused), read(plain), rtol=1e-5)
    edit = {name: lambda w: jnp.broadcast_to(jnp.eye(w.shape[-1]), w.shape)}
    edited = jax.jit(lambda n: EditedNetwork(n, edit)(x, T, cond))
    np.testing.assert_allclose(edited(fused), edited(plain), rtol=1e-4, atol=1e-5)
    # Forward derivatives, and the way back to a network that has them everywhere.
    slope = [jax.jit(lambda n: jax.jvp(lambda x: n(x, T, cond), (x,), (x,))[1])(n)
             for n in (fused, plain)]  # fmt: skip
    np.testing.assert_allclose(*slope, rtol=1e-3, atol=1e-4)
    back = with_attention(fused, "plain")
    assert jax.tree.structure(back) == jax.tree.structure(plain)


def test_logits_of_attention_are_single_precision_before_the_softmax():
    """In half precision logits of 300 differ by 2 at least; in single precision by nothing."""
    from jaxdiff.networks import attend
    from jaxdiff.taps import Tap

    q = jnp.full((1, 4), 16.0, jnp.bfloat16)
    k = jnp.asarray([[18.75, 18.75, 18.75, 18.75], [18.75, 18.75, 18.75, 18.625]], jnp.bfloat16)
    tap = Tap(wanted=["a.weights"])
    attend(q, k, jnp.eye(2, 4, dtype=jnp.bfloat16), 1, "a", tap)
    gap = 16 * 0.125 / 2
    expected = 1 / (1 + np.exp(-gap))
    np.testing.assert_allclose(np.float32(tap.values["a.weights"][0, 0, 0]), expected, atol=4e-3)


def test_the_program_of_stacked_blocks_does_not_grow_with_the_depth():
    sizes = []
    for depth in (2, 24):
        network = nnx.eval_shape(lambda d=depth: dit(depth=d, stacked=True))
        x = jax.ShapeDtypeStruct((4, 4, 1), jnp.float32)
        text = jax.jit(lambda n, x: n(x, T, jnp.asarray(1))).lower(network, x).as_text()
        sizes.append(len(text))
    assert sizes[1] < 1.02 * sizes[0]

"""Adapters: algebra, training that leaves the base alone, files, and orthogonal ones."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import with_random_weights
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import jaxdiff
from jaxdiff import finetuning, guidance, losses, networks, parallel, processes
from jaxdiff.training import (
    CheckpointStore,
    ConstantEMA,
    Player,
    TrainState,
    init_train_state,
    make_train_step,
)

KEY = jax.random.key(0)


def mlp():
    return networks.MLP(2, hidden=16, num_blocks=1, num_classes=3, rngs=nnx.Rngs(0))


def unet():
    return networks.UNet(
        8, image_size=8, in_channels=1, channel_mults=(1, 1), num_res_blocks=1,
        attention_resolutions=(4,), num_classes=3, rngs=nnx.Rngs(0),
    )  # fmt: skip


def dit(stacked=True):
    return networks.DiT(
        image_size=8, in_channels=1, patch_size=4, hidden=16, depth=2, num_heads=2,
        num_classes=3, stacked=stacked, rngs=nnx.Rngs(0),
    )  # fmt: skip


NETWORKS = {"mlp": mlp, "unet": unet, "dit": dit}


def moved(adapter, seed=1):
    """An adapter that changes something."""
    leaves, structure = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape) if eqx.is_array(leaf) else leaf
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)


def outputs(network):
    shape = network.shape if hasattr(network, "shape") else network.network.shape
    x = jax.random.normal(jax.random.key(5), (4, *shape))
    run = lambda network, x, t, c: jax.vmap(lambda x, t, c: network(x, t, c))(x, t, c)  # noqa: E731
    return eqx.filter_jit(run)(network, x, jnp.linspace(1.0, 900.0, 4), jnp.arange(4) % 3)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_new_adapter_changes_nothing_and_a_merged_one_computes_the_same(name):
    network = with_random_weights(NETWORKS[name])
    adapter = finetuning.make_adapter(network, KEY, rank=3, alpha=6.0)
    plain = outputs(network)
    assert_array_equal(outputs(finetuning.AdaptedNetwork(network, (adapter,))), plain)
    one, two = moved(adapter), moved(adapter, 2)
    adapted = finetuning.AdaptedNetwork(network, (one, two))
    merged = finetuning.merge(finetuning.merge(network, one), two)
    found = outputs(adapted)
    assert np.abs(found - plain).max() > 1e-3
    assert_allclose(outputs(merged), found, rtol=1e-5, atol=1e-6)
    back = finetuning.merge(merged, two.scaled(-1.0), one.scaled(-1.0))
    assert_allclose(outputs(back), plain, rtol=1e-5, atol=2e-6)
    assert_array_equal(outputs(finetuning.AdaptedNetwork(network, (one.scaled(0.0),))), plain)


def test_changes_are_two_layers_beside_each_layer(x64):
    """W x + (alpha / r) B A x; of a filter, one of its size to r channels and one of size 1."""

    class Layers(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(5, 4, rngs=rngs, param_dtype=jnp.float64)
            self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs, param_dtype=jnp.float64)

    layers = Layers(nnx.Rngs(0))
    theirs = (eqx.nn.Linear(5, 4, key=KEY), eqx.nn.Conv2d(3, 4, 3, padding=1, key=KEY))
    x, image = (jax.random.normal(jax.random.key(i), s) for i, s in ((1, (5,)), (2, (6, 6, 3))))
    for tree in (layers, theirs):
        adapter = moved(finetuning.make_adapter(tree, KEY, rank=2, alpha=3.0))
        merged = finetuning.merge(tree, adapter)
        dense, filters = sorted(adapter.kernels.values(), key=lambda low: low.down.size)
        assert dense.down.shape == (5, 2) and filters.down.shape == (27, 2)
        extra = 1.5 * x @ dense.down @ dense.up
        if tree is layers:
            assert_allclose(merged.linear(x), layers.linear(x) + extra, rtol=1e-9)
            down = nnx.Conv(3, 2, (3, 3), use_bias=False, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
            down.kernel[...] = filters.down.reshape(3, 3, 3, 2)
            extra = 1.5 * down(image) @ filters.up
            assert_allclose(merged.conv(image), layers.conv(image) + extra, rtol=1e-9)
        else:
            assert_allclose(merged[0](x), theirs[0](x) + extra, rtol=1e-6)
            down = eqx.tree_at(
                lambda c: (c.weight, c.bias),
                eqx.nn.Conv2d(3, 2, 3, padding=1, key=KEY),
                (filters.down.T.reshape(2, 3, 3, 3), jnp.zeros((2, 1, 1))),
            )
            planes = jnp.moveaxis(image, -1, 0)
            extra = 1.5 * jnp.einsum("rhw,ro->ohw", down(planes), filters.up)
            assert_allclose(merged[1](planes), theirs[1](planes) + extra, rtol=1e-5, atol=1e-6)


def test_stacked_layers_are_adapted_each_by_itself():
    network = with_random_weights(dit)
    adapter = finetuning.make_adapter(network, KEY, rank=2, layers="attention/q")
    ((name, low),) = adapter.kernels.items()
    assert "attention/q" in name and low.down.shape == (2, 16, 2) and low.up.shape == (2, 2, 16)
    assert not np.allclose(low.down[0], low.down[1])


def test_stacked_layers_of_equinox_are_adapted_each_by_itself(x64):
    layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(5, 4, key=key))(jax.random.split(KEY, 3))
    adapter = moved(finetuning.make_adapter(layers, KEY, rank=1))
    (low,) = adapter.kernels.values()
    assert low.down.shape == (3, 5, 1) and low.up.shape == (3, 1, 4)
    merged = finetuning.merge(layers, adapter)
    for i in range(3):
        change = (low.down[i] @ low.up[i]).T
        assert_allclose(merged.weight[i], layers.weight[i] + change, rtol=1e-6)
    orthogonal = [finetuning.make_orthogonal_adapter(layers, KEY, i, rank=2) for i in range(2)]
    downs = [a.kernels["weight"].down for a in orthogonal]
    assert_allclose(jnp.einsum("lir,lis->lrs", *downs), jnp.zeros((3, 2, 2)), atol=1e-6)


def test_adapters_add_up_and_are_scaled():
    base = jaxdiff.NetworkDenoiser(with_random_weights(mlp), processes.VP())
    a, b = (moved(finetuning.make_adapter(base.network, KEY, rank=2), seed) for seed in (1, 2))
    x, t, cond = jnp.ones(2), jnp.asarray(0.5), jnp.asarray(1)
    twice = finetuning.adapt(finetuning.adapt(base, a), b)
    assert_allclose(twice(x, t, cond), finetuning.adapt(base, a, b)(x, t, cond), rtol=1e-6)
    forms = {jax.tree.structure(a.scaled(f)) for f in (0.3, np.float32(0.3), jnp.array(0.3))}
    leaves = [type(leaf) for leaf in jax.tree.leaves(a.scaled(jnp.array(0.3)))]
    assert len(forms) == 1 and float in leaves  # none of them compiles anew


def test_the_first_gradient_moves_up_alone(x64):
    """dA = 0 and dB = (alpha / r) A^T G at the start."""
    layer = nnx.Linear(5, 4, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    adapter = finetuning.make_adapter(layer, KEY, rank=2, alpha=3.0)
    x, way = jax.random.normal(KEY, (5,)), jnp.arange(4.0)
    loss = lambda adapter: finetuning.merge(layer, adapter)(x) @ way  # noqa: E731
    (low,) = eqx.filter_grad(loss)(adapter).kernels.values()
    (start,) = adapter.kernels.values()
    assert_array_equal(low.down, 0)
    assert_allclose(low.up, 1.5 * start.down.T @ jnp.outer(x, way), rtol=1e-12)


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_training_leaves_the_base_bit_for_bit(tmp_path, name):
    """Under weight decay, averages, a mesh and a checkpoint; the same numbers on any devices."""
    network = with_random_weights(NETWORKS[name])
    base = jaxdiff.NetworkDenoiser(network, processes.Cosine())
    adapter = finetuning.make_adapter(network, KEY, rank=2)
    model = finetuning.adapt(base, adapter)
    player = Player(
        model, losses.DenoisingLoss(), optax.adamw(1e-2, weight_decay=0.1), ConstantEMA(0.5),
        trainable=finetuning.adapter_weights,
    )  # fmt: skip
    players = {"model": player}
    mesh = parallel.make_mesh(data=2, fsdp=2, tensor=2)
    batch = {"x": jax.random.normal(KEY, (8, 8, 8, 1)), "cond": jnp.arange(8) % 3}
    ends = []
    for placing in ({}, {"mesh": mesh, "rules": networks.TENSOR_RULES, "min_size": 64}):
        state, step = init_train_state(players, KEY, **placing), make_train_step(players)
        placed = parallel.shard_batch(batch, mesh) if placing else batch
        for _ in range(3):
            state, metrics = step(state, placed)
        ends.append((state, metrics["loss"]))
    (state, loss), (other, other_loss) = ends
    assert_allclose(loss, other_loss, rtol=1e-5)
    trained = state.players["model"]
    assert len(trained.averages[0]) == 2 * len(adapter.kernels)
    for a, b in zip(
        jax.tree.leaves(trained.model.network.network), jax.tree.leaves(network), strict=True
    ):
        assert_array_equal(a, b)
    weights = [finetuning.adapter_weights(s.players["model"].model) for s in (state, other)]
    for a, b in zip(*weights, strict=True):
        assert_allclose(a, b, rtol=2e-3, atol=2e-5)
    assert any(np.abs(w).max() > 1e-3 for w in weights[0])
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(state.unpack(), step=3)
    restored = TrainState.pack(**store.restore_latest(init_train_state(players, KEY).unpack())[0])
    for a, b in zip(restored.arrays, state.arrays, strict=True):
        assert_array_equal(a, b)
    # Sampling from the averages is sampling from a plain network with them merged.
    tuned = trained.averaged()
    plain = finetuning.merged(tuned)
    assert type(plain.network) is type(network)
    draws = [
        jaxdiff.sample(KEY, m, (8, 8, 1), 2, cond=jnp.arange(2), times=2).x for m in (tuned, plain)
    ]
    assert_allclose(*draws, rtol=1e-4, atol=1e-5)


def test_adapters_are_small_files(tmp_path):
    network = with_random_weights(unet)
    adapter = moved(finetuning.make_adapter(network, KEY, rank=2, alpha=5.0, layers="attention"))
    path = tmp_path / "styles" / "one.npz"
    finetuning.save_adapter(path, adapter)
    finetuning.save_adapter(path, adapter)  # over the old one
    found = finetuning.load_adapter(path)
    assert jax.tree.structure(found) == jax.tree.structure(adapter)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(adapter), strict=True):
        assert_array_equal(a, b)
    assert [file.name for file in path.parent.iterdir()] == ["one.npz"]
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if eqx.is_array(a) else a, adapter)
    finetuning.save_adapter(path, half)
    for a, b in zip(
        *(jax.tree.leaves(a) for a in (finetuning.load_adapter(path), half)), strict=True
    ):
        assert_array_equal(a, b)
        assert jnp.result_type(a) == jnp.result_type(b)
    fixed = finetuning.make_orthogonal_adapter(network, KEY, 0, rank=2, layers="attention")
    finetuning.save_adapter(path, fixed)
    assert len(finetuning.load_adapter(path).learned) == len(fixed.kernels)


def test_orthogonal_adapters_do_not_see_each_others_inputs(x64):
    layer = nnx.Linear(12, 5, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    made = [finetuning.make_orthogonal_adapter(layer, KEY, i, rank=3) for i in range(4)]
    downs = [low.down for adapter in made for low in adapter.kernels.values()]
    assert_allclose(jnp.concatenate(downs, 1).T @ jnp.concatenate(downs, 1), jnp.eye(12), atol=1e-9)
    ups = [jax.random.normal(jax.random.key(i), (3, 5)) for i in range(4)]
    trained = [
        eqx.tree_at(lambda a: a.kernels["kernel"].up, adapter, up)
        for adapter, up in zip(made, ups, strict=True)
    ]
    x = downs[1] @ jnp.arange(3.0)
    both, alone = (finetuning.merge(layer, *a)(x) for a in (trained, trained[1:2]))
    assert_allclose(both, alone, atol=1e-9)
    assert len(made[0].learned) == 1  # `down` is fixed
    with pytest.raises(ValueError, match="`index` must be below 4"):
        finetuning.make_orthogonal_adapter(layer, KEY, 4, rank=3)


def test_inside_guidance_both_branches_are_adapted():
    base = jaxdiff.NetworkDenoiser(with_random_weights(mlp), processes.VP())
    adapter = moved(finetuning.make_adapter(base.network, KEY))
    guided = guidance.ClassifierFree(base, null_cond=3, scale=2.0)
    found = finetuning.adapt(guided, adapter)
    x, t, cond = jnp.ones(2), jnp.asarray(0.5), jnp.asarray(1)
    expected = guidance.ClassifierFree(finetuning.adapt(base, adapter), null_cond=3, scale=2.0)
    assert_allclose(found(x, t, cond), expected(x, t, cond), rtol=1e-6)
    assert not np.allclose(found(x, t, cond), guided(x, t, cond))


@pytest.mark.usefixtures("unchecked")
def test_errors(tmp_path):
    network = mlp()
    with pytest.raises(ValueError, match="`layers` must be found in .* got 'conv'"):
        finetuning.make_adapter(network, KEY, layers="conv")
    with pytest.raises(ValueError, match="`rank` must be at least 1"):
        finetuning.make_adapter(network, KEY, rank=0)
    adapter = finetuning.make_adapter(unet(), KEY)
    with pytest.raises(ValueError, match="`adapters` must be of this network"):
        finetuning.adapt(jaxdiff.NetworkDenoiser(network, processes.VP()), adapter)
    wider = networks.MLP(2, hidden=32, num_blocks=1, num_classes=3, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match="got one of .* inputs and .* outputs, in .* layers, for .*, which"
    ):
        finetuning.merge(wider, finetuning.make_adapter(network, KEY))
    turned = finetuning.make_adapter(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), KEY)
    for inputs, outputs in ((3, 4), (2, 6)):
        with pytest.raises(ValueError, match="got one of 4 inputs and 3 outputs"):
            finetuning.merge(nnx.Linear(inputs, outputs, rngs=nnx.Rngs(0)), turned)
    finetuning.save_adapter(tmp_path / "cut.npz", turned)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:200])
    with pytest.raises(ValueError, match="a file that `save_adapter` wrote"):
        finetuning.load_adapter(tmp_path / "cut.npz")
    (tmp_path / "no.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="a file that `save_adapter` wrote"):
        finetuning.load_adapter(tmp_path / "no.npz")
    with pytest.raises(FileNotFoundError):
        finetuning.load_adapter(tmp_path / "missing.npz")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import mixture

import jaxdiff
from jaxdiff import parallel, processes


def test_mesh_axes_multiply_to_the_devices():
    mesh = parallel.make_mesh(fsdp=2)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    with pytest.raises(ValueError, match="number of devices, 8"):
        parallel.make_mesh(3)


def test_batches_are_split_and_uneven_ones_refused():
    mesh = parallel.make_mesh(fsdp=2)
    x = np.arange(32.0, dtype=np.float32).reshape(16, 2)
    placed = parallel.shard_batch({"x": x}, mesh)["x"]
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(placed, x)
    with pytest.raises(ValueError, match="divisible by the 8 devices.*12"):
        parallel.shard_batch({"x": x[:12]}, mesh)


def test_params_are_split_along_their_largest_divisible_axis():
    mesh = parallel.make_mesh(data=2, fsdp=4)
    tree = {
        "wide": jnp.ones((64, 128)),
        "odd": jnp.ones((65, 127)),
        "small": jnp.ones(4),
        "tall": jnp.ones((128, 63)),
    }
    placed = parallel.shard_params(tree, mesh)
    shapes = {name: value.addressable_shards[0].data.shape for name, value in placed.items()}
    assert shapes == {"wide": (64, 32), "odd": (65, 127), "small": (4,), "tall": (32, 63)}


def test_split_weights_compute_the_same():
    mesh = parallel.make_mesh(data=2, fsdp=4)
    weights = jax.random.normal(jax.random.key(0), (64, 128))
    x = jax.random.normal(jax.random.key(1), (8, 64))
    gradient = jax.jit(jax.grad(lambda w, x: jnp.sum(jnp.tanh(x @ w))))
    split = gradient(parallel.shard_params(weights, mesh), parallel.shard_batch(x, mesh))
    np.testing.assert_allclose(split, gradient(weights, x), rtol=1e-5, atol=1e-5)


def test_replicated_trees_are_everywhere():
    placed = parallel.replicate({"a": jnp.arange(3)}, parallel.make_mesh())
    assert len(placed["a"].addressable_shards) == 8
    assert placed["a"].is_fully_replicated


def test_chunks_of_a_split_batch_stay_split(x64):
    """Every device computes its own examples, whatever their number at a time."""
    oracle, mesh = mixture(processes.VP()), parallel.make_mesh(devices=jax.devices())
    sharding, key = parallel.batch_sharding(mesh), jax.random.key(0)
    cond = jnp.arange(40) % 2
    whole = jaxdiff.sample(key, oracle, (2,), 40, cond=cond, times=4)
    for batch_size in (8, 16, 24, 3):
        options = {"cond": cond, "times": 4, "sharding": sharding, "batch_size": batch_size}
        out = jaxdiff.sample(key, oracle, (2,), 40, **options)
        np.testing.assert_allclose(out.x, whole.x, rtol=1e-9, atol=1e-9)
        assert out.x.sharding.is_equivalent_to(sharding, 2)
        assert out.nfe.sharding.is_equivalent_to(sharding, 1)
    split = jax.device_put(whole.x, sharding)
    there, back = (
        jaxdiff.invert(oracle, x, cond=cond, times=4, batch_size=8).x for x in (whole.x, split)
    )
    np.testing.assert_allclose(back, there, rtol=1e-9, atol=1e-9)
    assert back.sharding.is_equivalent_to(sharding, 2)
    with pytest.raises(ValueError, match=r"multiple of the 8 devices .* got 41. Draw 48"):
        jaxdiff.sample(key, oracle, (2,), 41, times=4, sharding=sharding)

"""Meshes: placements, and the same numbers on any of them."""

import dataclasses
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import mixture, with_random_weights
from flax import nnx

import jaxdiff
from jaxdiff import losses, networks, parallel, predictions, processes
from jaxdiff.costs import read_program
from jaxdiff.networks import TENSOR_RULES
from jaxdiff.training import (
    Follow,
    Player,
    PowerEMA,
    TrainState,
    init_train_state,
    make_train_step,
    next_phase,
    outline,
)


def test_mesh_axes_multiply_to_the_devices():
    mesh = parallel.make_mesh(fsdp=2)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    with pytest.raises(ValueError, match="number of devices, 8"):
        parallel.make_mesh(3)
    with pytest.raises(ValueError, match="number of devices, 0"):
        parallel.make_mesh(devices=[])
    with pytest.raises(TypeError, match="`fsdp` must be a whole number, got 2.0"):
        parallel.make_mesh(fsdp=2.0)


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


def denoiser():
    """A DiT whose outputs are not zero."""
    network = with_random_weights(
        lambda: networks.DiT(
            image_size=8, patch_size=4, in_channels=1, hidden=32, depth=1, num_heads=2,
            num_classes=3, rngs=nnx.Rngs(0),
        )
    )  # fmt: skip
    return jaxdiff.NetworkDenoiser(network, processes.Cosine(), predictions.V())


@pytest.fixture(scope="module")
def players():
    model = denoiser()
    # Adam would turn rounding into steps where gradients are nothing else.
    optimizer = optax.sgd(1e-2, momentum=0.9)
    return {"model": Player(model, losses.DenoisingLoss(null_cond=3), optimizer, PowerEMA())}


def test_specs_are_chosen_by_path_and_shape_alone(players):
    """Optimiser and averages like the weights; tables add up to what devices hold."""
    mesh = parallel.make_mesh(data=1, fsdp=4, tensor=2)
    state = init_train_state(players, jax.random.key(0)).unpack()
    shapes = jax.eval_shape(lambda: state)
    chosen = parallel.specs(shapes, mesh, rules=TENSOR_RULES, min_size=256)
    is_spec = {"is_leaf": lambda leaf: isinstance(leaf, jax.sharding.PartitionSpec)}
    named = {
        parallel.path_of(path): spec
        for path, spec in jax.tree_util.tree_leaves_with_path(chosen, **is_spec)
    }
    first = [spec for name, spec in named.items() if name.endswith("blocks/0/first/kernel")]
    assert (
        first == [jax.sharding.PartitionSpec("fsdp", "tensor")] * 4
    )  # weights, momentum, averages
    second = [spec for name, spec in named.items() if name.endswith("blocks/0/second/kernel")]
    assert second == [jax.sharding.PartitionSpec("tensor", "fsdp")] * 4
    assert chosen["step"] == chosen["key"] == jax.sharding.PartitionSpec()
    placed = parallel.shard_params(state, mesh, rules=TENSOR_RULES, min_size=256)
    held = sum(
        leaf.addressable_shards[0].data.nbytes
        for leaf in jax.tree.leaves(placed)
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )
    text = parallel.table(shapes, mesh, rules=TENSOR_RULES, min_size=256)
    assert text.splitlines()[-1].split() == ["all", f"{held + 8:,}"]
    (line,) = [row for row in text.splitlines() if "trace/blocks/0/first/kernel" in row]
    assert "(32, 128)" in line and "(fsdp, tensor)" in line and f"{4 * 32 * 128 // 8:,}" in line


@pytest.mark.parametrize(
    "rule",
    [("kernel$", "tensor"), ("kernel$",), ("(", (None,)), ("kernel$", ("fsdp",))],
    ids=["text", "no axes", "no pattern", "another axis"],
)
def test_rules_that_are_none_are_refused(rule):
    mesh = parallel.make_mesh(data=1, fsdp=4, tensor=2)
    with pytest.raises(ValueError, match="`rules` must be pairs"):
        parallel.specs({"kernel": jnp.ones((64, 64))}, mesh, rules=[rule])


def test_a_player_of_the_next_phase_is_split_as_the_others(players):
    mesh = parallel.make_mesh(data=2, fsdp=4)
    placing = {"mesh": mesh, "min_size": 256}
    state = init_train_state(players, jax.random.key(0), **placing)
    both = {**players, "second": players["model"]}
    after = next_phase(state, both, **placing)
    old, new = (after.players[name] for name in ("model", "second"))
    pairs = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    assert all(a.sharding == b.sharding for a, b in pairs)
    assert any("fsdp" in leaf.sharding.spec for leaf in jax.tree.leaves(new))


@pytest.mark.parametrize("axes", [(8, 1, 1), (2, 4, 1), (1, 8, 1), (2, 2, 2)])
def test_training_is_the_same_on_any_mesh_and_compiles_once(players, axes, caplog):
    data, fsdp, tensor = axes
    mesh, rng = parallel.make_mesh(data, fsdp=fsdp, tensor=tensor), np.random.default_rng(0)
    batches = [
        {"x": rng.normal(size=(8, 8, 8, 1)).astype(np.float32), "cond": np.arange(8) % 3}
        for _ in range(3)
    ]
    step, state = make_train_step(players), init_train_state(players, jax.random.key(0))
    whole = jax.tree.map(jnp.copy, state)
    parts = parallel.shard_params(state.unpack(), mesh, rules=TENSOR_RULES, min_size=256)
    state = TrainState.pack(**parts)
    before = [array.sharding for array in state.arrays]
    counts = []
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for batch in batches:
            caplog.clear()
            state, metrics = step(state, parallel.shard_batch(batch, mesh))
            counts.append(sum("Compiling jit(_run)" in r.getMessage() for r in caplog.records))
    assert counts == [1, 0, 0]
    for array, sharding in zip(state.arrays, before, strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
    for batch in batches:
        whole, expected = step(whole, batch)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    for mine, hers in zip(state.arrays, whole.arrays, strict=True):
        np.testing.assert_allclose(mine, hers, rtol=1e-4, atol=2e-6)


COLLECTIVES = r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("


def in_loops(text):
    """How many collectives stand inside loops of a compiled program, and how many outside."""
    bodies, current, counts = set(re.findall(r"body=%?([\w.\-]+)", text)), None, [0, 0]
    for line in text.splitlines():
        if match := re.match(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{", line):
            current = match.group(1)
        counts[current not in bodies] += bool(re.search(COLLECTIVES, line))
    return counts


def test_samplers_gather_split_weights_once_and_not_in_their_loops():
    mesh, model = parallel.make_mesh(data=2, fsdp=4), denoiser()
    split = parallel.shard_params(model, mesh, min_size=256)
    sharding = parallel.batch_sharding(mesh)

    def run(key, model, cond):
        return jaxdiff.sample(key, model, (8, 8, 1), 8, cond=cond, times=3, sharding=sharding).x

    cond = parallel.shard_batch(np.arange(8, dtype=np.int32) % 3, mesh)
    program = jax.jit(run).lower(jax.random.key(0), split, cond).compile()
    inside, outside = in_loops(program.as_text())
    assert inside == 0 and outside > 5
    found = run(jax.random.key(0), split, cond)
    expected = jaxdiff.sample(
        jax.random.key(0), model, (8, 8, 1), 8, cond=jnp.arange(8) % 3, times=3
    ).x
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_layers_split_over_tensor_communicate_as_often_as_expected(name):
    """One sum after attention, one after every two-layer part; nothing else moves."""
    if name == "dit":
        network, sums = denoiser().network, 2
    else:
        network = with_random_weights(
            lambda: networks.UNet(
                16, image_size=8, in_channels=1, channel_mults=(1,), num_res_blocks=1,
                attention_resolutions=(), num_classes=3, rngs=nnx.Rngs(0),
            )
        )  # fmt: skip
        blocks = sum("conv1/kernel" in n for n in names_of(network))
        attention = sum("out/kernel" in n for n in names_of(network))
        sums = blocks + attention
    mesh = parallel.make_mesh(data=4, tensor=2)
    split = parallel.shard_params(network, mesh, rules=TENSOR_RULES)
    rng = np.random.default_rng(0)
    x, t, cond = rng.normal(size=(8, 8, 8, 1)), np.linspace(0.1, 0.9, 8), np.arange(8) % 3
    batch = parallel.shard_batch((x.astype(np.float32), t.astype(np.float32), cond), mesh)
    forward = jax.jit(lambda network, x, t, cond: jax.vmap(network)(x, t, cond))
    text = forward.lower(split, *batch).compile().as_text()
    kinds = re.findall(
        r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(", text
    )
    assert kinds == ["all-reduce"] * sums
    np.testing.assert_allclose(
        forward(split, *batch), forward(network, *map(np.asarray, batch)), rtol=1e-4, atol=1e-5
    )


def names_of(tree):
    return [parallel.path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def test_processes_and_parts():
    mesh = parallel.make_mesh(data=2, fsdp=2, tensor=2)
    assert parallel.batch_part(mesh) == (0, 1) and parallel.is_first()
    tree = parallel.shard_params({"w": jnp.arange(4096.0), "k": jax.random.key(3)}, mesh)
    found = parallel.fetch(tree["w"])
    np.testing.assert_array_equal(found, np.arange(4096))
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(jax.random.key_data(tree["k"]), [0, 3])
    for wrong, message in (
        ({"num_processes": 2}, "must be given together"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, r"must lie in \[0, 2\)"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 1}, "address and a port"),
        (
            {"coordinator": "127.0.0.1:9", "num_processes": 2, "process_id": 1, "timeout": 0.2},
            "nothing answered at 127.0.0.1:9 in 0.2 s",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            parallel.initialize(**wrong)


def build():
    """A stacked network that recomputes its blocks, and a second player that follows it."""
    network = with_random_weights(
        lambda: networks.DiT(
            image_size=8, patch_size=2, in_channels=1, hidden=64, depth=3, num_heads=4,
            num_classes=3, stacked=True, remat=True, rngs=nnx.Rngs(0),
        )
    )  # fmt: skip
    model = jaxdiff.NetworkDenoiser(network, processes.Cosine(), predictions.V())
    slow = Follow("model", decay=0.9)
    return {
        "model": Player(model, consistent, optax.sgd(1e-2, momentum=0.9)),
        "slow": Player(model, slow),
    }


def consistent(model, key, batch, frozen):
    """A denoising loss, the derivative along time, and a distance to the other player."""
    x, cond = batch["x"], batch["cond"]
    times = jnp.linspace(0.2, 0.8, len(x))

    def one(x, t, cond):
        value, slope = jax.jvp(lambda x, t: model(x, t, cond), (x, t), (x, jnp.ones(())))
        return (value - x) ** 2 + 0.1 * slope**2 + (value - frozen["slow"](x, t, cond)) ** 2

    del key
    return jnp.mean(jax.vmap(one)(x, times, cond)), {}


def examples(mesh=None):
    rng = np.random.default_rng(0)
    batch = {"x": rng.normal(size=(8, 8, 8, 1)).astype(np.float32), "cond": np.arange(8) % 3}
    return batch if mesh is None else parallel.shard_batch(batch, mesh)


@pytest.mark.parametrize("axes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_players_are_made_in_parts_and_train_the_same(axes):
    """Never whole on one device; forward derivatives and following players pass the gathers."""
    mesh, key = parallel.make_mesh(axes[0], fsdp=axes[1], tensor=axes[2]), jax.random.key(0)
    state = init_train_state(build, key, mesh=mesh, rules=TENSOR_RULES)
    expected = init_train_state(build(), key)
    chosen = parallel.specs(state.unpack(), mesh, rules=TENSOR_RULES)
    for mine, hers in zip(state.arrays, expected.arrays, strict=True):
        np.testing.assert_array_equal(mine, hers)
    placed = parallel.shard_params(expected.unpack(), mesh, rules=TENSOR_RULES)
    assert parallel.specs(placed, mesh, rules=TENSOR_RULES) == chosen
    for mine, hers in zip(state.arrays, TrainState.pack(**placed).arrays, strict=True):
        assert mine.sharding.is_equivalent_to(hers.sharding, mine.ndim)
    step, whole = make_train_step(outline(build)), make_train_step(build())
    for _ in range(2):
        state, metrics = step(state, examples(mesh))
        expected, hers = whole(expected, examples())
    for name, value in metrics.items():
        np.testing.assert_allclose(value, hers[name], rtol=1e-5)
    for mine, hers in zip(state.arrays, expected.arrays, strict=True):
        np.testing.assert_allclose(mine, hers, rtol=1e-4, atol=2e-6)


def test_blocks_gather_their_weights_where_they_compute_and_nothing_else_moves():
    """Once forward, once where they are computed again; the program comes from shapes alone."""
    mesh, key = parallel.make_mesh(data=1, fsdp=8), jax.random.key(0)

    def pretraining():
        return {"model": dataclasses.replace(build()["model"], loss=losses.DenoisingLoss())}

    players = eqx.filter_eval_shape(pretraining)
    shapes = eqx.filter_eval_shape(init_train_state, players, key).unpack()
    state = TrainState.pack(**parallel.shard_params(shapes, mesh))
    step = make_train_step(players)
    lowered = step.lower(state, examples(mesh))
    arrays = init_train_state(pretraining, key, mesh=mesh)
    assert lowered.as_text() == step.lower(arrays, examples(mesh)).as_text()

    network = players["model"].model.network
    split = parallel.specs(network, mesh)
    blocks = zip(jax.tree.leaves(network.blocks), jax.tree.leaves(split.blocks), strict=True)
    weights = sum(4 * leaf.size for leaf, spec in blocks if "fsdp" in spec)
    found = read_program(lowered.compile().as_text()).collectives
    looped = sum(c.bytes * c.times for c in found if c.kind == "all-gather" and c.in_loop)
    assert looped == 2 * weights
    assert {c.times for c in found if c.kind == "all-gather" and c.in_loop} == {3}
    own = {4 * leaf.size // 3 for leaf in jax.tree.leaves(network.blocks)}
    assert {c.bytes for c in found if c.kind == "all-gather" and c.in_loop} <= own
    outside = sum(c.bytes for c in found if c.kind == "all-gather" and not c.in_loop)
    rest = sum(4 * leaf.size for leaf in jax.tree.leaves(network)) - weights
    assert outside <= rest
    assert not any(c.kind == "all-to-all" for c in found)


def test_masks_are_seen_and_weights_may_be_a_batch(x64):
    """What is not a model keeps its numbers in an outline; vmap passes the gathers."""
    mesh, key = parallel.make_mesh(data=2, fsdp=4), jax.random.key(0)

    def ensemble(model, key, batch, frozen):
        arrays, rest = eqx.partition(model, eqx.is_inexact_array)

        def one(size):
            moved = eqx.combine(jax.tree.map(lambda w: w * size, arrays), rest)
            times = jnp.linspace(0.2, 0.8, len(batch["x"]))
            return jnp.mean((jax.vmap(moved)(batch["x"], times, batch["cond"]) - batch["x"]) ** 2)

        return jnp.sum(jax.vmap(one)(jnp.array([0.9, 1.1]))), {}

    def wide(leaf):
        return leaf.astype(float) if eqx.is_inexact_array(leaf) else leaf

    def players():
        found = jax.tree.map(wide, build())
        part = found["model"].model.network
        mask = jax.tree.map(lambda w: jnp.arange(w.shape[-1]) % 2 == 0, part)
        found["model"] = dataclasses.replace(found["model"], loss=ensemble, mask=mask)
        return found

    state = init_train_state(players, key, mesh=mesh, rules=TENSOR_RULES)
    expected = init_train_state(players(), key)
    step, whole = make_train_step(outline(players)), make_train_step(players())
    begun = [np.array(array) for array in jax.tree.leaves(expected.players["model"].model)]
    state, _ = step(state, examples(mesh))
    expected, _ = whole(expected, examples())
    moved = zip(begun, jax.tree.leaves(state.players["model"].model), strict=True)
    changes = [np.asarray(after) - before for before, after in moved if before.ndim]
    assert all(not change[..., 1::2].any() for change in changes)
    assert any(change[..., ::2].any() for change in changes)
    for mine, hers in zip(state.arrays, expected.arrays, strict=True):
        np.testing.assert_allclose(mine, hers, rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match="must have numbers in its loss, mask.*outline"):
        make_train_step(eqx.filter_eval_shape(players))


def test_steps_run_within_a_loop(players):
    step, state = make_train_step(players), init_train_state(players, jax.random.key(0))
    looped, _ = jax.jit(
        lambda state: jax.lax.scan(lambda s, _: (step(s, examples())[0], None), state, None, 2)
    )(jax.tree.map(jnp.copy, state))
    for _ in range(2):
        state, _ = step(state, examples())
    for mine, hers in zip(looped.arrays, state.arrays, strict=True):
        np.testing.assert_allclose(mine, hers, rtol=1e-5, atol=1e-6)

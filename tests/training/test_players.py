"""What a player may be, and what a step promises of it."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxdiff.training import ConstantEMA, Player, PowerEMA, init_train_state, make_train_step


class Model(eqx.Module):
    """A network beside a schedule whose numbers must never learn."""

    network: eqx.Module
    slope: float = 2.0
    table: jax.Array = eqx.field(default_factory=lambda: jnp.arange(3.0))

    def __call__(self, x):
        return self.network(self.slope * x) + self.table[1]


class Net(nnx.Module):
    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.first, self.last = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.first(x)))


class Regression(eqx.Module):
    """Weighted regression with noise on the input; counts its traces."""

    weight: float = 1.0
    noise: float = 0.1
    traces: list = eqx.field(static=True, default_factory=list)

    def __call__(self, model, key, batch, frozen):
        self.traces.append(1)
        x = batch["x"] + self.noise * jax.random.normal(key, batch["x"].shape)
        error = jnp.mean((jax.vmap(model)(x) - batch["y"]) ** 2)
        return self.weight * error + frozen.get("offset", 0.0), {"error": error}


def batches(count, size=6):
    keys = jax.random.split(jax.random.key(7), count)
    return [{"x": jax.random.normal(k, (size, 3)), "y": jnp.ones((size, 2))} for k in keys]


def train(players, data, *, key=jax.random.key(3), constants=None):
    state, step, metrics = init_train_state(players, key), make_train_step(players), None
    for batch in data:
        state, metrics = step(state, batch, constants)
    return state, metrics


def test_what_does_not_learn_stays_bit_for_bit():
    optimizer = optax.adamw(1.0, weight_decay=0.5)
    state, _ = train({"model": Player(Model(Net()), Regression(), optimizer)}, batches(3))
    model = state.players["model"].model
    assert float(model.slope) == 2.0 and model.slope.weak_type
    np.testing.assert_array_equal(model.table, jnp.arange(3.0))
    assert not np.allclose(model.network.first.kernel[...], Net().first.kernel[...])


def test_nothing_recompiles_when_numbers_change():
    player = Player(Model(Net()), Regression(), optax.adam(1e-3), PowerEMA(), every=2)
    traces, (batch,) = player.loss.traces, batches(1)
    state = init_train_state({"m": player}, jax.random.key(0))
    step = make_train_step({"m": player})
    state, _ = step(state, batch, {"offset": 0.0})
    first = len(traces)
    for offset in (1.0, 2.0):
        state, _ = step(state, batch, {"offset": offset})
    heavier = dataclasses.replace(player, loss=dataclasses.replace(player.loss, weight=3.0))
    step = make_train_step({"m": heavier})
    state, metrics = step(state, batch, {"offset": 5.0})
    state, metrics = step(state, batch, {"offset": 5.0})
    assert len(traces) == first
    np.testing.assert_allclose(metrics["loss"], 3 * metrics["error"] + 5, rtol=1e-6)


def test_a_trained_number_does_not_recompile_either():
    def loss(model, key, batch, frozen):
        traces.append(1)
        return (model["network"] - batch) ** 2, {}

    traces = []
    player = Player({"network": 1.0}, loss, optax.sgd(0.25), trainable=lambda m: m["network"])
    state, _ = train({"m": player}, [jnp.zeros(())] * 3)
    assert float(state.players["m"].model["network"]) == 0.125
    assert len(traces) == 1


def test_state_is_donated_and_the_given_model_is_not():
    player = Player(Model(Net()), Regression(), optax.adam(1e-3), ConstantEMA())
    state = init_train_state({"m": player}, jax.random.key(0))
    after, _ = make_train_step({"m": player})(state, batches(1)[0])
    assert all(leaf.is_deleted() for leaf in state.arrays)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(eqx.filter(player, eqx.is_array)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


def test_players_update_in_turn_each_seeing_the_others():
    def follow(name):
        def loss(model, key, batch, frozen):
            return 0.5 * (model["network"] - frozen["rate"] * frozen[name]["network"]) ** 2, {}

        return loss

    def player(start, other, lr, every):
        return Player(
            {"network": jnp.asarray(start)},
            follow(other),
            optax.sgd(lr),
            PowerEMA((0.1,)),
            every=every,
            trainable=lambda m: m["network"],
        )

    # Named against the order of the alphabet: the order given counts.
    players = {"z": player(1.0, "a", 0.5, 1), "a": player(-2.0, "z", 0.25, 3)}
    z, a, updated = 1.0, -2.0, []
    state, step = init_train_state(players, jax.random.key(0)), make_train_step(players)
    for n in range(7):
        state, metrics = step(state, jnp.zeros(()), {"rate": 0.9})
        loss = 0.5 * (z - 0.9 * a) ** 2
        z = z - 0.5 * (z - 0.9 * a)
        a = a - 0.25 * (a - 0.9 * z) if n % 3 == 0 else a
        updated.append(float(metrics["a/updated"]))
        np.testing.assert_allclose(metrics["z/loss"], loss, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(state.players["z"].model["network"], z, rtol=1e-6)
        np.testing.assert_allclose(state.players["a"].model["network"], a, rtol=1e-6)
        if n == 0:  # at its first update an average is the weight itself
            np.testing.assert_allclose(state.players["a"].averages[0], a, rtol=1e-6)
    assert updated == [1, 0, 0, 1, 0, 0, 1]


def test_keys_are_of_the_step_and_the_player():
    def loss(model, key, batch, frozen):
        return model["network"], {"draw": jax.random.uniform(key)}

    player = Player(
        {"network": jnp.ones(())}, loss, optax.sgd(0.0), trainable=lambda m: m["network"]
    )
    _, metrics = train({"b": player, "a": player}, [jnp.zeros(())] * 3, key=jax.random.key(11))
    at = jax.random.fold_in(jax.random.key(11), 2)
    assert metrics["b/draw"] == jax.random.uniform(jax.random.fold_in(at, 0))
    assert metrics["a/draw"] == jax.random.uniform(jax.random.fold_in(at, 1))


def test_networks_may_hold_functions_and_integers():
    # An equinox MLP has activations among its leaves; so does its average.
    class Counted(eqx.Module):
        mlp: eqx.nn.MLP
        count: jax.Array

        def __call__(self, x):
            return self.mlp(x) * self.count

    network = Counted(eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)), jnp.asarray(1))
    state, _ = train(
        {"m": Player(Model(network), Regression(), optax.adam(0.1), ConstantEMA(0.0))}, batches(2)
    )
    got = state.players["m"]
    x = jnp.ones(3)
    np.testing.assert_allclose(got.averaged()(x), got.model(x), rtol=1e-6)
    assert not np.allclose(got.model(x), Model(network)(x))
    assert got.model.network.count.dtype == jnp.int32


def test_a_part_of_a_network_learns():
    def last(model):
        return model.network.last

    state, _ = train(
        {"m": Player(Model(Net()), Regression(), optax.sgd(0.1), trainable=last)}, batches(2)
    )
    network = state.players["m"].model.network
    np.testing.assert_array_equal(network.first.kernel[...], Net().first.kernel[...])
    assert not np.allclose(network.last.kernel[...], Net().last.kernel[...])


def test_a_model_may_learn_whole():
    def loss(model, key, batch, frozen):
        return jnp.mean(jax.vmap(model)(batch["x"]) ** 2), {}

    player = Player(Net(), loss, optax.sgd(0.1), ConstantEMA(0.0), trainable=lambda m: m)
    state, _ = train({"m": player}, batches(1))
    got = state.players["m"]
    np.testing.assert_allclose(
        got.averaged(lambda m: m).last.kernel[...], got.model.last.kernel[...], rtol=1e-6
    )


def test_dtypes_are_kept(x64):
    for dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
        params = jnp.ones((4,), dtype)

        def loss(model, key, batch, frozen):
            return jnp.sum((model["network"] * model["scale"]) ** 2), {}

        model = {"network": params, "scale": 2.0}
        player = Player(model, loss, optax.adam(1e-2), PowerEMA(), trainable=lambda m: m["network"])
        state, metrics = train({"m": player}, [jnp.zeros(())] * 2)
        got = state.players["m"]
        assert got.model["network"].dtype == metrics["loss"].dtype == dtype
        # Averages move by less than bfloat16 resolves.
        wide = jnp.promote_types(dtype, jnp.float32)
        assert [a.dtype for a in got.averages] == [wide, wide]


def test_bad_input():
    player = Player(Model(Net()), Regression(), optax.sgd(0.1))
    with pytest.raises(TypeError, match="`key` must be a typed PRNG key"):
        init_train_state({"m": player}, jax.random.key_data(jax.random.key(0)))
    with pytest.raises(ValueError, match="`every` must be at least 1, got 0"):
        Player(Model(Net()), Regression(), optax.sgd(0.1), every=0)

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from toy import Batches, Model, Regression, make_model

from jaxdiff import parallel
from jaxdiff.training import ConstantEMA, Player, TrainState, init_train_state, make_train_step


def train(players, steps, *, state=None, mesh=None, size=16):
    state = init_train_state(players, jax.random.key(1)) if state is None else state
    step = make_train_step(players)
    if mesh is not None:
        state = parallel.replicate(state, mesh)
    batches = Batches(size)
    for _ in range(steps):
        batch = next(batches)
        state, metrics = step(state, batch if mesh is None else parallel.shard_batch(batch, mesh))
    return state, metrics


def test_steps_equal_a_hand_written_optax_loop():
    optimizer = optax.chain(optax.clip_by_global_norm(0.05), optax.adamw(1e-2, weight_decay=0.1))
    player = Player(make_model(), Regression(), optimizer, ConstantEMA(0.5))
    state, metrics = train({"model": player}, 5)

    network = make_model().network
    opt_state, average = optimizer.init(network), network
    batches = Batches()
    for i in range(5):
        batch = next(batches)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), i), 0)
        objective = lambda n, k=key, b=batch: Regression()(Model(n), k, b, {})[0]
        value, grads = jax.value_and_grad(objective)(network)
        updates, opt_state = optimizer.update(grads, opt_state, network)
        network = optax.apply_updates(network, updates)
        decay = min(0.5, (2 + i) / (11 + i))
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, average, network)
    model = state.players["model"]
    for mine, hers in (
        (model.model.network, network),
        (model.averaged().network, average),
        (model.opt_state, opt_state),
    ):
        for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(hers), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)


def test_constants_of_the_model_never_learn():
    player = Player(make_model(), Regression(), optax.adamw(0.1, weight_decay=0.5))
    state, _ = train({"model": player}, 3)
    assert float(state.players["model"].model.schedule) == np.float32(0.1)


def test_accumulation_equals_the_larger_batch():
    batches = Batches()
    halves = [next(batches), next(batches)]
    whole = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *halves)

    class Quiet(Regression):
        def __call__(self, model, key, batch, frozen):
            error = jax.vmap(model.network)(batch["x"]) - batch["y"]
            return jnp.mean(error**2), {}

    accumulate = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    results = []
    for optimizer, parts in ((accumulate, halves), (optax.sgd(0.1), [whole])):
        players = {"model": Player(make_model(), Quiet(), optimizer)}
        state, step = init_train_state(players, jax.random.key(0)), make_train_step(players)
        for part in parts:
            state, _ = step(state, part)
        results.append(state.players["model"].model.network.kernel[...])
    np.testing.assert_allclose(*results, rtol=1e-6)


def test_state_is_donated_and_the_caller_keeps_its_model():
    model = make_model()
    players = {"model": Player(model, Regression(), optax.sgd(0.1))}
    state = init_train_state(players, jax.random.key(0))
    after, _ = make_train_step(players)(state, next(Batches()))
    assert all(array.is_deleted() for array in state.arrays if array.ndim)
    assert np.isfinite(model.network.kernel[...]).all()
    assert int(after.step) == 1


def test_weights_that_are_bound_to_a_device_compile_once(count_programs):
    """As those from a checkpoint are, while the key and the step are not."""
    bound = jax.device_put(make_model(), jax.devices()[0])
    players = {"model": Player(bound, Regression(), optax.adam(1e-3))}
    state, step = init_train_state(players, jax.random.key(0)), make_train_step(players)
    for batch in (next(Batches()), next(Batches())):
        state, _ = step(state, batch)
        assert count_programs("_run") == 1


def test_new_numbers_do_not_recompile():
    traces = []

    class Traced(Regression):
        def __call__(self, model, key, batch, frozen):
            traces.append(1)
            return super().__call__(model, key, batch, frozen)

    players = {"model": Player(make_model(), Traced(1.0), optax.sgd(0.1))}
    step, state = make_train_step(players), init_train_state(players, jax.random.key(0))
    batches = Batches()
    for value in (1.0, 2.0, 3.5):
        state, metrics = step(state, next(batches), {"strength": value})
    count = len(traces)
    assert count == 1
    # Another model of the same structure is only another argument.
    state = init_train_state(
        {"model": Player(make_model(5), Traced(1.0), optax.sgd(0.1))}, jax.random.key(3)
    )
    step(state, next(batches), {"strength": 1.0})
    assert len(traces) == count


class Scalar(eqx.Module):
    network: nnx.Param


def scalar(value):
    return Scalar(nnx.Param(jnp.asarray(value)))


def test_players_see_each_other_and_take_turns():
    """Gradient descent on (a - b)^2 / 2 and (b - c)^2 / 2, b moving every second step."""

    def chase(name):
        def loss(model, key, batch, frozen):
            other = frozen[name]
            other = other.network[...] if isinstance(other, Scalar) else other
            return 0.5 * (model.network[...] - other) ** 2, {}

        return loss

    players = {
        "a": Player(scalar(0.0), chase("b"), optax.sgd(0.5)),
        "b": Player(scalar(1.0), chase("c"), optax.sgd(0.5), every=2),
    }
    state, step = init_train_state(players, jax.random.key(0)), make_train_step(players)
    a, b, c = 0.0, 1.0, 3.0
    for i in range(5):
        state, metrics = step(state, {}, {"c": c})
        a += 0.5 * (b - a)
        loss_b = 0.5 * (b - c) ** 2
        b += 0.5 * (c - b) if i % 2 == 0 else 0.0
        np.testing.assert_allclose(state.players["a"].model.network[...], a, rtol=1e-6)
        np.testing.assert_allclose(state.players["b"].model.network[...], b, rtol=1e-6)
        np.testing.assert_allclose(metrics["b/loss"], loss_b if i % 2 == 0 else 0.0, rtol=1e-6)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_devices_do_not_change_the_result(devices):
    players = {"model": Player(make_model(), Regression(), optax.adam(1e-2), ConstantEMA(0.9))}
    alone, _ = train(players, 4)
    mesh = parallel.make_mesh(devices=jax.devices()[:devices])
    spread, _ = train(players, 4, mesh=mesh)
    for a, b in zip(alone.arrays, spread.arrays, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_unpack_and_pack_are_inverse():
    players = {"model": Player(make_model(), Regression(), optax.adam(1e-2), ConstantEMA(0.9))}
    state = init_train_state(players, jax.random.key(1))
    again = TrainState.pack(**state.unpack())
    assert again.structure == state.structure
    for a, b in zip(again.arrays, state.arrays, strict=True):
        assert a is b


def test_legacy_keys_are_refused():
    with pytest.raises(TypeError, match="typed PRNG key"):
        init_train_state({}, jax.random.PRNGKey(0))


def test_a_mask_of_weights_of_one_device_goes_with_a_state_on_a_mesh():
    """As made of a gradient at restored weights, which are bound to their device."""
    mesh = parallel.make_mesh(devices=jax.devices())
    model = make_model()
    bound = jax.device_put(jax.tree.map(jnp.ones_like, model.network), jax.devices()[0])
    mask = jax.tree.map(lambda leaf: leaf > 0, bound)
    players = {"model": Player(model, Regression(), optax.adam(1e-3), mask=mask)}
    state = init_train_state(players, jax.random.key(0), mesh=mesh)
    batch = parallel.shard_batch(next(Batches()), mesh)
    state, metrics = make_train_step(players)(state, batch)
    assert np.isfinite(metrics["loss"])

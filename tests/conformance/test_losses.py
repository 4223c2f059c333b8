"""What every training loss promises, the library's own and those that others write."""

import dataclasses
import inspect

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import outside
import pytest
from cases import with_random_weights
from flax import nnx

from jaxdiff import finetuning, guidance, losses, metrics, networks, parallel, processes
from jaxdiff._tree import jit
from jaxdiff.denoiser import LearnedVarianceDenoiser, NetworkDenoiser
from jaxdiff.training import (
    ConstantEMA,
    Frozen,
    Player,
    TrainState,
    init_train_state,
    make_train_step,
)

KEY = jax.random.key(0)
COUNT = 8
PROCESSES = (processes.VP(), processes.Cosine(), processes.RectifiedFlow())


def reward(x, cond):
    """Of one sample."""
    return -jnp.sum((x - cond) ** 2)


# Every loss, as somebody would use it.
LOSSES = {
    "DenoisingLoss": losses.DenoisingLoss(null_cond=2),
    "DenoisingLoss(ELBO)": losses.DenoisingLoss(losses.ELBO(), losses.UniformLogSNR(), null_cond=2),
    "DenoisingLoss(MinSNR)": losses.DenoisingLoss(losses.MinSNR(), losses.LogitNormal()),
    "NoisyClassifierLoss": losses.NoisyClassifierLoss(),
    "HybridLoss": losses.HybridLoss(num_steps=50, null_cond=2),
    "MMDLoss": finetuning.MMDLoss(times=2, features=jax.tree_util.Partial(jnp.sin)),
    "MMDLoss(classes)": finetuning.MMDLoss(
        times=2, features=jax.tree_util.Partial(jnp.sin), kernel=metrics.Energy(), num_classes=2
    ),
    "RewardLoss": finetuning.RewardLoss(times=2, reward=jax.tree_util.Partial(reward)),
    "RewardLoss(copies)": finetuning.RewardLoss(
        times=2, reward=jax.tree_util.Partial(reward), copies=2
    ),
    "Balanced": outside.Balanced(losses.DenoisingLoss(null_cond=2)),
    "TowardsAverage": outside.TowardsAverage(),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def model_of(name, process=PROCESSES[0]):
    if name == "NoisyClassifierLoss":
        build = lambda: networks.MLP(2, hidden=8, num_blocks=1, rngs=nnx.Rngs(0))
        return guidance.NoisyClassifier(with_random_weights(build), process)
    learned = name == "HybridLoss"
    options = {"hidden": 8, "num_blocks": 1, "num_classes": 2, "out_features": 4 if learned else 2}
    network = with_random_weights(lambda: networks.MLP(2, **options, rngs=nnx.Rngs(0)))
    return (LearnedVarianceDenoiser if learned else NetworkDenoiser)(network, process)


def player_of(model, loss):
    return Player(model, loss, optax.sgd(0.1), ema=ConstantEMA(0.9))


def started(players):
    """A state whose averages are no longer the model."""
    state = init_train_state(players, KEY)
    moved = {
        name: dataclasses.replace(p, averages=jax.tree.map(lambda w: 1.1 * w, p.averages))
        for name, p in state.players.items()
    }
    return TrainState.pack(step=state.step, key=state.key, players=moved)


def batch(dtype=jnp.float32):
    x = jnp.clip(jax.random.normal(jax.random.key(1), (COUNT, 2)), -1, 1)
    return {"x": x.astype(dtype), "cond": jnp.arange(COUNT) % 2}


def frozen_of(loss, model):
    """What a loss is given beside its model."""
    players = started({"model": player_of(model, loss)}).players
    return Frozen({}, jnp.asarray(3), jax.random.key(5), players, players["model"].loss_state)


def slope_of(loss, model, batch, frozen):
    """The loss, and its gradient by the weights of the network."""

    def total(network):
        found = loss(dataclasses.replace(model, network=network), KEY, batch, frozen)
        return found[0], found[1:]

    (value, rest), slope = jax.value_and_grad(total, has_aux=True)(model.network)
    return value, rest, slope


def numbers(loss):
    return [f.name for f in dataclasses.fields(loss) if isinstance(getattr(loss, f.name), float)]


def test_no_loss_is_missing():
    def is_loss(value):
        if not inspect.isclass(value) or "__call__" not in vars(value):
            return False
        return list(inspect.signature(value.__call__).parameters)[2:] == ["key", "batch", "frozen"]

    public = {
        value for part in (losses, finetuning) for value in vars(part).values() if is_loss(value)
    }
    assert losses.DenoisingLoss in public
    # A base, and one of images and a source, which has tests of its own.
    public -= {finetuning.ThroughSampler, finetuning.DomainStudioLoss}
    assert public <= {type(loss) for loss in LOSSES.values()}


@each_loss
def test_numbers_are_swept(x64, name):
    """Floats, integers, NumPy's and JAX's scalars do not trace anew; vmap is the loop."""
    loss, model, traces = LOSSES[name], model_of(name), []
    frozen, fields = frozen_of(loss, model), numbers(loss)

    @jit
    def value(loss, model, batch, frozen):
        traces.append(1)
        return loss(model, KEY, batch, frozen)[0]

    found = {}
    for field in fields:
        for number in (1, 0.25, np.float32(0.25), np.int64(0), jnp.float32(0.5)):
            changed = dataclasses.replace(loss, **{field: number})
            found[field, float(number)] = value(changed, model, batch(), frozen)
    if not fields:
        value(loss, model, batch(), frozen)
    assert len(traces) == 1
    for field in fields[:1]:
        points = (0.0, 0.25, 0.5, 1.0)
        one = lambda number: eqx.tree_at(lambda m: getattr(m, field), loss, number)  # noqa: B023
        swept = jax.jit(jax.vmap(lambda n: one(n)(model, KEY, batch(), frozen)[0]))  # noqa: B023
        np.testing.assert_allclose(
            swept(jnp.asarray(points)), [found[field, p] for p in points], rtol=1e-9
        )


@each_loss
def test_gradients_are_finite_in_any_precision_and_the_same_on_any_devices(name):
    """A batch in bfloat16, one over eight devices, and three processes."""
    loss, model = LOSSES[name], model_of(name)
    mesh = parallel.make_mesh(devices=jax.devices())
    spread = jax.device_put(batch(), parallel.batch_sharding(mesh))

    @jax.jit
    def found(weights, spread):
        def at(process, batch):
            changed = dataclasses.replace(model, network=weights, process=process)
            return slope_of(loss, changed, batch, frozen_of(loss, changed))

        low = at(PROCESSES[0], batch(jnp.bfloat16))
        return [at(process, batch()) for process in PROCESSES], low, at(PROCESSES[0], spread)

    whole, low, over = found(model.network, spread)
    for value, (logged, *_), slope in (*whole, low, over):
        assert value.dtype == jnp.float32 and value.shape == ()
        chex.assert_tree_all_finite((value, logged, slope))
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(slope))
        assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(slope))
    chex.assert_trees_all_close(over[2], whole[0][2], rtol=1e-4, atol=1e-6)


@each_loss
def test_a_step_follows_the_gradient_and_keeps_the_state(name):
    """Under the training step, whose key, averages and state it is given."""
    model = model_of(name)
    players = {"model": player_of(model, LOSSES[name])}
    state = started(players)
    before = jax.device_get(state.players["model"])
    after, metrics = make_train_step(players)(state, batch())
    told = jax.device_get(after.players["model"])
    moved = jax.tree.leaves(
        jax.tree.map(lambda a, b: a - b, told.model.network, before.model.network)
    )
    length = np.sqrt(sum(np.sum(leaf.astype(float) ** 2) for leaf in moved))
    np.testing.assert_allclose(length, 0.1 * metrics["grad_norm"], rtol=1e-3)
    if before.loss_state is not None:
        assert told.loss_state != before.loss_state

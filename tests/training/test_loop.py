import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy import Batches, Regression, make_model

from jaxdiff.training import (
    CheckpointStore,
    ConstantEMA,
    Hook,
    Interrupted,
    NonFiniteLossError,
    Player,
    TrainState,
    fit,
    init_train_state,
    make_train_step,
)


@pytest.fixture(scope="module")
def players():
    return {"model": Player(make_model(), Regression(), optax.adam(1e-2), ConstantEMA(0.9))}


@pytest.fixture(scope="module")
def step(players):
    return make_train_step(players)


def start(players):
    return init_train_state(players, jax.random.key(1))


def assert_bitwise(a: TrainState, b: TrainState):
    assert int(a.step) == int(b.step)
    for x, y in zip(a.arrays, b.arrays, strict=True):
        np.testing.assert_array_equal(x, y)


def test_hooks_see_means_at_their_steps_and_at_the_end(players, step):
    seen, losses = [], []

    def recording(state, batch, constants):
        state, metrics = step(state, batch, constants)
        losses.append(float(metrics["loss"]))
        return state, metrics

    hook = Hook(3, lambda index, state, metrics: seen.append((index, metrics["loss"])))
    fit(recording, start(players), Batches(), num_steps=7, hooks=[hook])
    assert [index for index, _ in seen] == [3, 6, 7]
    expected = [np.mean(losses[:3]), np.mean(losses[3:6]), losses[6]]
    np.testing.assert_allclose([value for _, value in seen], expected, rtol=1e-6)


def test_records_precede_the_checkpoint_of_their_step_and_other_hooks_follow(
    tmp_path, players, step
):
    store, order = CheckpointStore(tmp_path), []

    def note(name):
        return lambda index, state, metrics: order.append((name, index, store.steps()))

    hooks = [Hook(2, note("picture")), Hook(2, note("record"), before_checkpoint=True)]
    options = dict(hooks=hooks, store=store, checkpoint_every=2)
    fit(step, start(players), Batches(), num_steps=4, **options)
    assert order == [
        ("record", 2, []),
        ("picture", 2, [2]),
        ("record", 4, [2]),
        ("picture", 4, [2, 4]),
    ]


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path, players, step):
    whole = fit(step, start(players), Batches(), num_steps=20)
    store = CheckpointStore(tmp_path)
    fit(step, start(players), Batches(), num_steps=10, store=store, checkpoint_every=4)
    assert store.steps() == [4, 8, 10]
    unpacked, data_state, _ = store.restore_latest(start(players).unpack())
    batches = Batches()
    batches.set_state(data_state)
    state = TrainState.pack(**unpacked)
    assert_bitwise(fit(step, state, batches, num_steps=20), whole)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_stops(tmp_path, players, step, signum):
    store, before = CheckpointStore(tmp_path), signal.getsignal(signum)

    def kill(index, state, metrics):
        if index == 5:
            os.kill(os.getpid(), signum)

    with pytest.raises(Interrupted, match=signal.Signals(signum).name) as stop:
        fit(
            step,
            start(players),
            Batches(),
            num_steps=50,
            hooks=[Hook(1, kill)],
            store=store,
            checkpoint_every=40,
        )
    assert stop.value.signum == signum
    assert store.steps() == [5]
    assert signal.getsignal(signum) is before
    unpacked, data_state, _ = store.restore_latest(start(players).unpack())
    batches = Batches()
    batches.set_state(data_state)
    resumed = fit(step, TrainState.pack(**unpacked), batches, num_steps=12)
    assert_bitwise(resumed, fit(step, start(players), Batches(), num_steps=12))


def test_a_nan_stops_the_run_and_is_never_saved(tmp_path, players, step):
    class Poisoned(Batches):
        def __next__(self):
            batch = super().__next__()
            if self.next_index == 7:
                batch["y"] = batch["y"].at[0, 0].set(jnp.nan)
            return batch

    store = CheckpointStore(tmp_path)
    with pytest.raises(NonFiniteLossError, match=r"nan at step 6.*checkpoint 4 in"):
        fit(
            step, start(players), Poisoned(), num_steps=20, store=store, checkpoint_every=4,
            hooks=[Hook(10, lambda *args: None)],
        )  # fmt: skip
    assert store.steps() == [4]

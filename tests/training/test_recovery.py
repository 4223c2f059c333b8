"""What a run survives: damage, kills, overflow, and the end of the data."""

import json
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy import Batches, Regression, make_model

from jaxdiff import parallel
from jaxdiff.training import (
    CheckpointStore,
    ConstantEMA,
    Hook,
    NonFiniteLossError,
    Player,
    PlayerState,
    TrainState,
    fit,
    init_train_state,
    make_train_step,
)

FLAT = {"w": jnp.arange(4.0)}


def test_training_goes_on_past_a_damaged_checkpoint(tmp_path):
    # Steps 10 and 20 are there, 20 damaged: 15 and then 20 are written again, and count.
    for keep in (1, 3):
        store = CheckpointStore(tmp_path / str(keep), keep=keep)
        for step in (10, 20):
            store.save(FLAT, step=step, config=step)
        if keep == 1:
            store.save(FLAT, step=10, config=10)  # beside the damaged one
        (store.directory / "20" / "meta" / "metadata").write_text("{")
        store.save(FLAT, step=15, config=15)
        with pytest.warns(UserWarning, match="Checkpoint 20 .* skipped"):
            assert store.latest_config() == 15
        store.save(FLAT, step=20, config="again")
        assert store.latest_config() == "again"
        assert store.steps() == ([20] if keep == 1 else [10, 15, 20])


def test_a_kill_before_the_name_is_given_keeps_the_only_checkpoint(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, keep=1)
    store.save(FLAT, step=1, config="old")

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "_finish", killed)
        with pytest.raises(KeyboardInterrupt):
            store.save(FLAT, step=2)
    assert store.steps() == [1] and store.latest_config() == "old"
    store.save(FLAT, step=3)
    assert [p.name for p in tmp_path.iterdir()] == ["3"]


def test_what_is_not_json_is_refused(tmp_path):
    store = CheckpointStore(tmp_path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        store.save(FLAT, step=1, data_state={"position": {1, 2}})
    assert store.steps() == []


def test_the_first_difference_is_named(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save({"a": jnp.ones(2), "b": jnp.ones(2)}, step=1)
    for template, match in (
        ({"a": jnp.ones(2)}, r"also has \['b'\]"),
        ({"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(3)}, r"no \['c'\].*float32\[3\]"),
        ({"a": jnp.ones(2), "b": jnp.ones(2, int)}, r"\['b'\] is float32\[2\].*int32\[2\]"),
    ):
        with pytest.raises(ValueError, match=match):
            store.restore_latest(template)


@pytest.fixture(scope="module")
def traces():
    return []


@pytest.fixture(scope="module")
def players(traces):
    class Traced(Regression):
        def __call__(self, *args):
            traces.append(1)
            return super().__call__(*args)

    return {"m": Player(make_model(), Traced(), optax.adam(1e-2), ConstantEMA(0.9))}


@pytest.fixture(scope="module")
def step(players):
    return make_train_step(players)


def test_a_restored_state_does_not_recompile(tmp_path, players, step, traces):
    store, batch = CheckpointStore(tmp_path), next(Batches())
    state, _ = step(init_train_state(players, jax.random.key(1)), batch)
    store.save(state.unpack(), step=1)
    step(state, batch)
    template = init_train_state(players, jax.random.key(0)).unpack()
    restored = TrainState.pack(**store.restore_latest(template)[0])
    before = len(traces)
    assert restored.players["m"].model.schedule.weak_type
    step(restored, batch)
    assert len(traces) == before


def test_weights_alone_may_be_read(tmp_path, players, step):
    store = CheckpointStore(tmp_path)
    state, _ = step(init_train_state(players, jax.random.key(1)), next(Batches()))
    store.save(state.unpack(), step=1)
    empty = init_train_state(players, jax.random.key(0)).players["m"]
    template = {"players": {"m": PlayerState(empty.model, None, empty.averages)}}
    with pytest.raises(ValueError, match="it also has"):
        store.restore_latest(template)
    got = store.restore_latest(template, partial=True)[0]["players"]["m"]
    want = state.players["m"]
    for a, b in ((got.model, want.model), (got.averages, want.averages)):
        assert jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_overflowing_weights_are_never_saved(tmp_path):
    # The loss is still finite at the step that destroys the weights.
    optimizer = optax.chain(optax.scale(-1e30), optax.scale(1e30))
    players = {"m": Player(make_model(), Regression(), optimizer)}
    store, state = CheckpointStore(tmp_path), init_train_state(players, jax.random.key(0))
    with pytest.raises(NonFiniteLossError, match="A weight .* at step 1.* none yet"):
        fit(
            make_train_step(players), state, Batches(), num_steps=3, store=store, checkpoint_every=1
        )
    assert store.steps() == []


def test_batches_that_end_are_one_clear_error(players, step):
    few = iter([next(Batches())] * 2)
    with pytest.raises(ValueError, match="`batches` ended after step 2 of `num_steps` = 5"):
        fit(step, init_train_state(players, jax.random.key(0)), few, num_steps=5)


def test_any_thread_may_train(players, step):
    results = []

    def work():
        state = init_train_state(players, jax.random.key(0))
        results.append(int(fit(step, state, Batches(), num_steps=2).step))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [2]


def test_means_of_a_player_that_rests_are_over_its_updates():
    def loss(model, key, batch, frozen):
        return 0.0 * model["network"] + batch, {}

    def player(every):
        return Player(
            {"network": jnp.ones(())},
            loss,
            optax.sgd(0.1),
            every=every,
            trainable=lambda m: m["network"],
        )

    players, seen = {"always": player(1), "rests": player(3)}, []
    state = init_train_state(players, jax.random.key(0))
    batches = iter(jnp.arange(7.0))
    hook = Hook(4, lambda index, state, metrics: seen.append(metrics))
    fit(make_train_step(players), state, batches, num_steps=7, hooks=[hook])
    assert [m["always/loss"] for m in seen] == [1.5, 5.0]
    assert [m["rests/loss"] for m in seen] == [1.5, 6.0]  # steps 0, 3; step 6
    assert [m["rests/updated"] for m in seen] == [0.5, pytest.approx(1 / 3)]


def test_split_weights_train_as_whole_ones_and_resume_on_fewer_devices(tmp_path):
    traces = []

    class Traced(Regression):
        def __call__(self, *args):
            traces.append(1)
            return super().__call__(*args)

    players = {"m": Player(make_model(size=8), Traced(), optax.adam(1e-2), ConstantEMA(0.9))}
    step, store = make_train_step(players), CheckpointStore(tmp_path)

    def eight(index):
        key = jax.random.fold_in(jax.random.key(5), index)
        x = jax.random.normal(key, (16, 8))
        return {"x": x, "y": jnp.roll(x, 1, 1)}

    def train(state, mesh, first, last):
        for i in range(first, last):
            state, _ = step(state, parallel.shard_batch(eight(i), mesh))
        return state

    whole = init_train_state(players, jax.random.key(1))
    single = parallel.make_mesh(devices=jax.devices()[:1])
    whole = train(parallel.replicate(whole, single), single, 0, 6)
    mesh = parallel.make_mesh(2, fsdp=4)
    state = init_train_state(players, jax.random.key(1))
    state = parallel.shard_params(state, mesh, min_size=64)
    placed = [a.sharding for a in state.arrays]
    assert sum(not s.is_fully_replicated for s in placed) == 4  # kernel, its moments and average
    traces.clear()
    state = train(state, mesh, 0, 3)
    assert len(traces) == 1
    kept = zip(state.arrays, placed, strict=True)
    assert all(a.sharding.is_equivalent_to(s, a.ndim) for a, s in kept)
    store.save(state.unpack(), step=3)

    fewer = parallel.make_mesh(devices=jax.devices()[:2])
    template = parallel.replicate(init_train_state(players, jax.random.key(0)), fewer)
    state = TrainState.pack(**store.restore_latest(template.unpack())[0])
    state = train(state, fewer, 3, 6)
    for a, b in zip(state.arrays, whole.arrays, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


RUN = """
import json, sys
import jax, numpy as np, optax
sys.path.insert(0, sys.argv[2])
from toy import Batches, Regression, make_model
from jaxdiff.training import *

players = {"m": Player(make_model(), Regression(), optax.adam(1e-2), ConstantEMA(0.9))}
state, batches = init_train_state(players, jax.random.key(1)), Batches()
store = CheckpointStore(sys.argv[1])
restored = store.restore_latest(state.unpack())
if restored:
    state = TrainState.pack(**restored[0])
    batches.set_state(restored[1])
print("from", int(state.step), flush=True)
hook = Hook(1, lambda step, state, metrics: print("step", step, flush=True))
state = fit(make_train_step(players), state, batches, num_steps=int(sys.argv[3]), hooks=[hook],
            store=store, checkpoint_every=1)
print(json.dumps([np.asarray(a).tolist() for a in state.arrays]))
"""


@pytest.mark.slow  # the recipes are killed in every run of the suite
def test_a_killed_process_resumes_bit_for_bit(tmp_path, request):
    def start(directory, steps):
        return subprocess.Popen(
            [sys.executable, "-c", RUN, str(directory), str(request.path.parent), str(steps)],
            stdout=subprocess.PIPE,
            text=True,
        )

    process = start(tmp_path / "killed", 10_000)
    while process.stdout.readline() != "step 8\n":
        assert process.poll() is None
    process.kill()  # somewhere within the writing of the checkpoints that follow
    process.communicate()
    steps = CheckpointStore(tmp_path / "killed").steps()
    assert len(steps) in (2, 3, 4) and steps[-1] >= 8
    outputs = []
    for directory in ("killed", "whole"):
        process = start(tmp_path / directory, steps[-1] + 4)
        outputs.append(process.communicate(timeout=120)[0].splitlines())
        assert process.returncode == 0
    assert outputs[0][0] == f"from {steps[-1]}" and outputs[1][0] == "from 0"
    assert json.loads(outputs[0][-1]) == json.loads(outputs[1][-1])

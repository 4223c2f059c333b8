import json
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import optax
import pytest
from toy import Batches, Regression, make_model

from jaxdiff import parallel
from jaxdiff.training import (
    CheckpointError,
    CheckpointStore,
    ConstantEMA,
    Player,
    TrainState,
    init_train_state,
    make_train_step,
)


@pytest.fixture(scope="module")
def players():
    return {"model": Player(make_model(), Regression(), optax.adam(1e-2), ConstantEMA(0.9))}


@pytest.fixture(scope="module")
def step(players):
    return make_train_step(players)


def leaves(tree):
    return [
        np.asarray(jax.random.key_data(leaf))
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else np.asarray(leaf)
        for leaf in jax.tree.leaves(tree)
    ]


def assert_bitwise(a, b):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype


def three_checkpoints(directory, players, step):
    state, store = init_train_state(players, jax.random.key(1)), CheckpointStore(directory)
    batches, states = Batches(), {}
    for i in (1, 2, 3):
        state, _ = step(state, next(batches))
        store.save(state.unpack(), step=i, data_state=batches.get_state(), config={"i": i})
        states[i] = jax.tree.map(np.asarray, leaves(state.unpack()))
    return store, states, state


def test_everything_comes_back_bit_for_bit(tmp_path, players, step):
    store, _, state = three_checkpoints(tmp_path / "c", players, step)
    template = init_train_state(players, jax.random.key(77)).unpack()
    restored, data_state, config = store.restore_latest(template)
    assert_bitwise(restored, state.unpack())
    assert data_state == {"next_index": 3} and config == {"i": 3}
    assert store.latest_config() == {"i": 3}
    meta = json.loads((tmp_path / "c" / "3" / "meta" / "metadata").read_text())
    assert {"python", "jax", "flax", "jaxdiff"} <= set(meta["versions"])
    again = TrainState.pack(**restored)
    batch = next(Batches())
    assert_bitwise(step(again, batch)[0], step(state, batch)[0])


def test_the_oldest_are_removed_and_an_empty_store_is_none(tmp_path, players):
    store = CheckpointStore(tmp_path / "c", keep=2)
    state = init_train_state(players, jax.random.key(1)).unpack()
    assert store.restore_latest(state) is None and store.latest_config() is None
    for i in range(4):
        store.save(state, step=i)
    assert store.steps() == [2, 3]


def damage(path: Path, kind: str) -> None:
    data = path.read_bytes()
    half = len(data) // 2
    if kind == "truncated":
        path.write_bytes(data[:half])
    elif kind == "flipped":
        path.write_bytes(data[:half] + bytes([data[half] ^ 255]) + data[half + 1 :])
    else:
        path.unlink()


@pytest.mark.parametrize("kind", ["truncated", "flipped", "missing"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, players, step, kind):
    """Every file of the newest checkpoint in turn."""
    store, states, _ = three_checkpoints(tmp_path / "c", players, step)
    template = init_train_state(players, jax.random.key(1)).unpack()
    files = [p for p in sorted((tmp_path / "c" / "3").rglob("*")) if p.is_file()]
    assert len(files) > 5
    for path in files:
        data = path.read_bytes()
        damage(path, kind)
        if path.name == "manifest.json" and kind == "missing":
            assert store.steps() == [1, 2]  # as if killed before it was complete
            restored = store.restore_latest(template)[0]
        else:
            with pytest.warns(UserWarning, match="Checkpoint 3 .* is damaged and skipped"):
                restored = store.restore_latest(template)[0]
        for mine, hers in zip(leaves(restored), states[2], strict=True):
            np.testing.assert_array_equal(mine, hers)
        path.write_bytes(data)


def test_nothing_but_damaged_checkpoints_is_an_error(tmp_path, players):
    store = CheckpointStore(tmp_path / "c")
    state = init_train_state(players, jax.random.key(1)).unpack()
    store.save(state, step=1)
    damage(tmp_path / "c" / "1" / "meta" / "metadata", "truncated")
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"All checkpoints .* \[1\]"):
        warnings.simplefilter("ignore")
        store.restore_latest(state)


def test_another_model_is_named_and_not_skipped(tmp_path, players):
    store = CheckpointStore(tmp_path / "c")
    store.save(init_train_state(players, jax.random.key(1)).unpack(), step=1)
    wider = {"model": Player(make_model(size=4), Regression(), optax.adam(1e-2), ConstantEMA())}
    with pytest.raises(
        ValueError, match=r"network.bias.* is float32\[3\] there, expected float32\[4\]"
    ):
        store.restore_latest(init_train_state(wider, jax.random.key(1)).unpack())
    other = {"model": Player(make_model(), Regression(), optax.sgd(1e-2))}
    with pytest.raises(ValueError, match="of another model"):
        store.restore_latest(init_train_state(other, jax.random.key(1)).unpack())


def test_a_checkpoint_of_another_layout_is_refused_in_one_line(tmp_path, players, monkeypatch):
    store, state = CheckpointStore(tmp_path), init_train_state(players, jax.random.key(0))
    with monkeypatch.context() as earlier:
        earlier.setattr("jaxdiff.training._checkpoint.LAYOUT", 1)
        store.save(state, step=1)
    with pytest.raises(
        ValueError, match=r"written by jaxdiff 0\.\d.*laid out differently"
    ) as error:
        store.restore_latest(state)
    assert "\n" not in str(error.value)


def test_leftovers_of_a_kill_are_harmless(tmp_path, players, step):
    store, _, state = three_checkpoints(tmp_path / "c", players, step)
    (tmp_path / "c" / "4.orbax-checkpoint-tmp-0").mkdir()
    (tmp_path / "c" / "4").mkdir()  # renamed, killed before its manifest
    (tmp_path / "c" / "4" / "garbage").write_text("x")
    assert store.steps() == [1, 2, 3]
    store.save(state.unpack(), step=4)
    assert store.steps() == [2, 3, 4]
    assert_bitwise(store.restore_latest(state.unpack())[0], state.unpack())


def test_a_directory_that_cannot_be_written_is_one_clear_error(tmp_path, players):
    (tmp_path / "file").write_text("not a directory")
    store = CheckpointStore(tmp_path / "file" / "c")
    state = init_train_state(players, jax.random.key(1)).unpack()
    with pytest.raises(CheckpointError, match="Could not write checkpoint 1 to .*intact") as error:
        store.save(state, step=1)
    assert "\n" not in str(error.value)


FULL_DISK = """
import resource, signal, sys
import jax.numpy as jnp
from jaxdiff.training import CheckpointError, CheckpointStore

store, state = CheckpointStore(sys.argv[1]), {"weights": jnp.arange(100_000.0)}
store.save(state, step=1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    store.save({"weights": state["weights"] + 1}, step=2)
except CheckpointError as error:
    print(error)
restored = store.restore_latest(state)[0]["weights"]
print(bool((restored == state["weights"]).all()), store.steps())
"""


def test_a_full_disk_is_one_clear_error_and_harms_nothing(tmp_path):
    """A limit on the size of files stands for the full disk."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "c")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    error, restored = done.stdout.splitlines()
    assert error.startswith("Could not write checkpoint 2") and "[1] are intact" in error
    assert restored == "True [1]"


def test_restores_onto_another_number_of_devices(tmp_path, players, step):
    store, _, state = three_checkpoints(tmp_path / "c", players, step)
    mesh = parallel.make_mesh()
    template = parallel.replicate(init_train_state(players, jax.random.key(0)).unpack(), mesh)
    restored = store.restore_latest(template)[0]
    assert_bitwise(restored, state.unpack())
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(restored["players"]))


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, players, step, monkeypatch):
    """What is written is the state at the time of the save, though its arrays are donated since."""
    store, gate = CheckpointStore(tmp_path / "c"), threading.Event()
    finish = store._finish

    def late(*args):
        assert gate.wait(60)
        finish(*args)

    monkeypatch.setattr(store, "_finish", late)
    batches = Batches()
    state, _ = step(init_train_state(players, jax.random.key(0)), next(batches))
    expected = jax.tree.map(np.array, leaves(state.unpack()))
    store.save(state.unpack(), step=1, wait=False)
    for _ in range(3):
        state, _ = step(state, next(batches))
    # Where a kill would leave it: not there, and harmless to the next start.
    assert store.steps() == []
    assert CheckpointStore(tmp_path / "c").restore_latest(state.unpack()) is None
    gate.set()
    store.wait()
    found, _, _ = store.restore_latest(state.unpack())
    assert_bitwise(found, expected)


def test_a_checkpoint_that_could_not_be_written_is_told_at_the_next(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path / "c")
    store.save({"a": jax.numpy.arange(3)}, step=1)

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(store, "_finish", full)
    store.save({"a": jax.numpy.arange(3)}, step=2, wait=False)
    with pytest.raises(CheckpointError, match=r"checkpoint 2 .*No space left.*\[1\] are intact"):
        store.save({"a": jax.numpy.arange(3)}, step=3)
    assert store.steps() == [1] and not list((tmp_path / "c").glob("*.unfinished*"))


def test_shapes_are_templates_too(tmp_path, players, step):
    """Nothing is allocated but what is read, and on the devices that the shapes name."""
    store, _, state = three_checkpoints(tmp_path / "c", players, step)
    shapes = eqx.filter_eval_shape(init_train_state, players, jax.random.key(1)).unpack()
    assert_bitwise(store.restore_latest(shapes)[0], state.unpack())
    mesh = parallel.make_mesh(data=1, fsdp=3, devices=jax.devices()[:3])
    placed = parallel.shard_params(shapes, mesh, min_size=8)
    found = store.restore_latest(placed)[0]
    assert_bitwise(found, state.unpack())
    for leaf, like in zip(jax.tree.leaves(found), jax.tree.leaves(placed), strict=True):
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
    assert not all(leaf.is_fully_replicated for leaf in jax.tree.leaves(found))

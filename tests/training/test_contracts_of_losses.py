"""What a loss is given and may give back, and what a run makes of it."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from toy import Batches, Regression, make_model

from jaxdiff import losses, networks, oracles, parallel, processes
from jaxdiff.denoiser import NetworkDenoiser
from jaxdiff.training import (
    CheckpointStore,
    ConstantEMA,
    Follow,
    Frozen,
    Hook,
    NonFiniteLossError,
    Player,
    PowerEMA,
    TrainState,
    fit,
    init_train_state,
    make_train_step,
    next_phase,
)

KEY = jax.random.key(3)


def scalar(value, loss, optimizer=optax.sgd(0.5), **options):
    model = {"network": jnp.asarray(float(value))}
    return Player(model, loss, optimizer, trainable=lambda m: m["network"], **options)


def value_of(state, name):
    return float(state.players[name].model["network"])


def run(players, steps, constants=None, state=None):
    state = init_train_state(players, KEY) if state is None else state
    step, seen = make_train_step(players), []
    for _ in range(steps):
        state, metrics = step(state, jnp.zeros(()), constants)
        seen.append(jax.device_get(metrics))
    return state, seen


# --- what a loss is given


def test_a_loss_knows_the_step_the_averages_the_others_and_a_shared_key():
    def loss(model, key, batch, frozen):
        assert set(frozen) == {"b", "rate"} and len(frozen) == 2
        own = frozen.averaged("a")["network"]
        told = {
            "step": frozen.step.astype(float),
            "own_average": own,
            "other_average": frozen.averaged("b", 1)["network"],
            "shared": jax.random.uniform(frozen.key),
            "private": jax.random.uniform(key),
        }
        return (model["network"] - frozen["rate"]) ** 2, told

    def other(model, key, batch, frozen):
        told = {"shared": jax.random.uniform(frozen.key), "private": jax.random.uniform(key)}
        return (model["network"] - frozen["a"]["network"]) ** 2, told

    players = {
        "a": scalar(1.0, loss, ema=ConstantEMA(0.9)),
        "b": scalar(-1.0, other, ema=PowerEMA((0.05, 0.2))),
    }
    state, seen = run(players, 5, {"rate": 0.25})
    assert [float(m["a/step"]) for m in seen] == [0, 1, 2, 3, 4]
    for m in seen:
        assert m["a/shared"] == m["b/shared"]
        assert len({float(m[k]) for k in ("a/shared", "a/private", "b/private")}) == 3
    assert len({float(m["a/shared"]) for m in seen}) == 5
    # The averages that a step is given are those after the one before.
    again, before = run(players, 4, {"rate": 0.25})
    states = again.players
    np.testing.assert_allclose(seen[4]["a/own_average"], states["a"].averaged()["network"])
    np.testing.assert_allclose(seen[4]["a/other_average"], states["b"].averaged(index=1)["network"])


def test_frozen_is_a_mapping_that_names_what_it_has():
    frozen = Frozen({"teacher": 1}, step=2)
    assert frozen["teacher"] == 1 and "teacher" in frozen and frozen.get("other") is None
    with pytest.raises(KeyError, match=r"no player or constant 'x'; there are \['teacher'\]"):
        frozen["x"]


def test_a_denoising_loss_with_the_shared_key_is_the_same_for_two_players():
    """Two networks that must see the same times and noise."""
    oracle = oracles.gaussian(processes.VP(), jnp.zeros(2), jnp.eye(2))

    def loss(model, key, batch, frozen):
        error = losses.DenoisingLoss()(oracle, frozen.key, batch, frozen)[0]
        return 0 * model["network"] + error, {}

    players = {name: scalar(0.0, loss) for name in ("a", "b")}
    step = make_train_step(players)
    _, metrics = step(init_train_state(players, KEY), {"x": jnp.ones((8, 2))})
    assert metrics["a/loss"] == metrics["b/loss"]


# --- what a loss keeps


class Remembering(eqx.Module):
    """Distance to the mean of what it saw, a queue of it, and a count."""

    size: int = eqx.field(static=True, default=3)

    def init_state(self, model):
        return {"mean": 0.0, "queue": jnp.zeros(self.size), "count": jnp.zeros((), jnp.int32)}

    def __call__(self, model, key, batch, frozen):
        state, value = frozen.state, model["network"]
        queue = jnp.roll(state["queue"], 1).at[0].set(value)
        after = {
            "mean": 0.5 * state["mean"] + 0.5 * value,
            "queue": queue,
            "count": state["count"] + 1,
        }
        return (value - state["mean"] - 1) ** 2, {"queue": queue}, after


def test_a_loss_may_keep_a_state_and_vectors_are_metrics(tmp_path):
    players = {"m": scalar(2.0, Remembering(), optax.sgd(0.25), every=2)}
    value, mean, queue = 2.0, 0.0, np.zeros(3)
    state, step = init_train_state(players, KEY), make_train_step(players)
    for n in range(6):
        state, metrics = step(state, jnp.zeros(()))
        if n % 2 == 0:
            queue = np.r_[value, queue[:2]]
            np.testing.assert_allclose(metrics["queue"], queue, rtol=1e-6)
            mean, value = 0.5 * mean + 0.5 * value, value - 0.5 * (value - mean - 1)
        kept = state.players["m"].loss_state
        np.testing.assert_allclose(kept["mean"], mean, rtol=1e-6)
        np.testing.assert_allclose(value_of(state, "m"), value, rtol=1e-6)
        assert kept["count"] == n // 2 + 1 and kept["count"].dtype == jnp.int32
    # It is in the checkpoint, and a run goes on with it.
    store = CheckpointStore(tmp_path)
    whole, _ = run(players, 8)
    store.save(state.unpack(), step=6)
    restored = store.restore_latest(init_train_state(players, KEY).unpack())[0]
    resumed, _ = run(players, 2, state=TrainState.pack(**restored))
    for a, b in zip(whole.arrays, resumed.arrays, strict=True):
        np.testing.assert_array_equal(a, b)


def test_states_that_change_their_form_and_returns_without_one_are_named():
    class Growing(Remembering):
        def __call__(self, model, key, batch, frozen):
            value, metrics, state = super().__call__(model, key, batch, frozen)
            return value, metrics, {**state, "queue": jnp.zeros(self.size + 1)}

    class Silent(Remembering):
        def __call__(self, model, key, batch, frozen):
            return super().__call__(model, key, batch, frozen)[:2]

    with pytest.raises(ValueError, match=r"loss state of the player 'm' must keep its structure"):
        run({"m": scalar(0.0, Growing())}, 1)
    with pytest.raises(ValueError, match=r"'m' must return its next state third"):
        run({"m": scalar(0.0, Silent())}, 1)


# --- updates without a gradient, or with one's own


def test_rules_copy_follow_and_solve():
    def solve(model, key, batch, frozen):
        """A closed form: twice the other's value."""
        return {"network": 2 * frozen["a"]["network"]}, {"at": frozen["a"]["network"]}

    def pull(model, key, batch, frozen):
        return (model["network"] - 4.0) ** 2, {}

    players = {
        "a": scalar(0.0, pull, optax.sgd(0.25)),
        "copy": scalar(9.0, Follow("a", part=lambda m: m["network"]), None),
        "slow": scalar(9.0, Follow("a", 0.75, part=lambda m: m["network"]), None, ema=PowerEMA()),
        "solved": scalar(9.0, solve, None, every=3),
    }
    state, step = init_train_state(players, KEY), make_train_step(players)
    a, slow, solved = 0.0, 9.0, 9.0
    for n in range(5):
        state, metrics = step(state, jnp.zeros(()))
        a = a - 0.5 * (a - 4.0)
        slow = 0.75 * slow + 0.25 * a
        solved = 2 * a if n % 3 == 0 else solved
        assert value_of(state, "copy") == value_of(state, "a")
        np.testing.assert_allclose(value_of(state, "a"), a, rtol=1e-6)
        np.testing.assert_allclose(value_of(state, "slow"), slow, rtol=1e-6)
        np.testing.assert_allclose(value_of(state, "solved"), solved, rtol=1e-6)
        assert "copy/loss" not in metrics and metrics["solved/updated"] == (n % 3 == 0)
    assert state.players["solved"].updates == 2 and state.players["slow"].updates == 5

    def breaks(model, key, batch, frozen):
        return {"network": jnp.zeros(3)}, {}

    with pytest.raises(ValueError, match="model of the player 'x' must keep its structure"):
        run({"x": scalar(0.0, breaks, None)}, 1)


def test_a_rule_moves_a_network_of_many_arrays():
    players = {
        "student": Player(make_model(), Regression(), optax.adam(1e-2)),
        "teacher": Player(make_model(5), Follow("student"), every=3),
    }
    state, step = init_train_state(players, KEY), make_train_step(players)
    for batch, _ in zip(Batches(), range(4), strict=False):
        state, _ = step(state, batch)
        if int(state.step) % 3 == 1:
            expected = jax.tree.map(jnp.array, state.players["student"].model.network)
    found = state.players["teacher"].model.network
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_loss_may_make_its_own_gradient():
    """Gradient surgery: the part of one gradient that does not hurt another objective."""

    class Surgery(eqx.Module):
        def first(self, model):
            return jnp.sum((model["network"] - jnp.asarray([1.0, 0.0])) ** 2)

        def second(self, model):
            return jnp.sum((model["network"] - jnp.asarray([0.0, 1.0])) ** 2) * model["scale"]

        def gradient(self, model, key, batch, frozen):
            value, first = eqx.filter_value_and_grad(self.first)(model)
            second = eqx.filter_grad(self.second)(model)
            a, b = first["network"], second["network"]
            a = a - jnp.minimum(a @ b, 0) / (b @ b) * b
            return (value, {"overlap": a @ b}), {**first, "network": a}

        def __call__(self, model, key, batch, frozen):
            raise AssertionError("the gradient is its own")

    model = {"network": jnp.asarray([0.2, 0.1]), "scale": jnp.asarray(2.0)}
    player = Player(model, Surgery(), optax.sgd(0.1), trainable=lambda m: m["network"])
    state, seen = run({"m": player}, 1)
    x = np.asarray([0.2, 0.1])
    a, b = 2 * (x - [1, 0]), 4 * (x - [0, 1])
    assert a @ b < 0
    a = a - a @ b / (b @ b) * b
    np.testing.assert_allclose(state.players["m"].model["network"], x - 0.1 * a, rtol=1e-5)
    np.testing.assert_allclose(seen[0]["overlap"], 0, atol=1e-6)
    np.testing.assert_allclose(seen[0]["grad_norm"], np.linalg.norm(a), rtol=1e-5)


def test_players_update_at_steps_that_a_function_chooses():
    def loss(model, key, batch, frozen):
        return model["network"], {}

    class After(eqx.Module):
        start: float

        def __call__(self, step):
            return step >= self.start

    alternate = lambda step: step % 2 == 1
    players = {
        "late": scalar(0.0, loss, optax.sgd(1.0), every=After(4.0), ema=PowerEMA()),
        "odd": scalar(0.0, loss, optax.sgd(1.0), every=alternate),
    }
    state, seen = run(players, 6)
    assert [float(m["late/updated"]) for m in seen] == [0, 0, 0, 0, 1, 1]
    assert [float(m["odd/updated"]) for m in seen] == [0, 1, 0, 1, 0, 1]
    assert value_of(state, "late") == -2 and value_of(state, "odd") == -3
    # An average counts updates, and is the weight itself after the first of them.
    late, _ = run(players, 5)
    np.testing.assert_allclose(late.players["late"].averages[0], -1.0)


# --- parts that do not learn


def test_masked_entries_stay_bit_for_bit_and_the_mask_is_an_argument():
    """Under weight decay, momentum, clipping and averages; another mask is not another program."""
    traces = []

    class Traced(Regression):
        def __call__(self, model, key, batch, frozen):
            traces.append(1)
            return super().__call__(model, key, batch, frozen)

    model = make_model(size=64)
    weights = model.network
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.3))
    rows = jnp.arange(64)[:, None] < 20
    kept = jax.tree.map(lambda w: rows if w.ndim == 2 else jnp.zeros(64, bool), weights)

    def train(mask, steps=3):
        player = Player(model, Traced(), optimizer, ConstantEMA(0.5), mask=mask)
        step, state = make_train_step({"m": player}), init_train_state({"m": player}, KEY)
        batch = {"x": jnp.ones((4, 64)), "y": jnp.zeros((4, 64))}
        for _ in range(steps):
            state, metrics = step(state, batch)
        return state, metrics

    state, _ = train(kept)
    count = len(traces)
    got = state.players["m"]
    for network in (got.model.network, got.averaged().network):
        np.testing.assert_array_equal(network.kernel[...][20:], weights.kernel[...][20:])
        np.testing.assert_array_equal(network.bias[...], weights.bias[...])
        assert np.all(network.kernel[...][:20] != weights.kernel[...][:20])
    other = jax.tree.map(lambda m: ~m if m.ndim == 2 else m, kept)
    state, _ = train(other)
    assert len(traces) == count
    np.testing.assert_array_equal(
        state.players["m"].model.network.kernel[...][:20], weights.kernel[...][:20]
    )
    # The clip sees the entries that learn alone: the others have no gradient.
    nothing = jax.tree.map(lambda w: jnp.zeros_like(w, bool), weights)
    state, metrics = train(nothing)
    assert metrics["grad_norm"] == 0


@pytest.mark.parametrize(
    ("mask", "match"),
    [
        (lambda w: jax.tree.map(lambda a: jnp.ones((5, 7), bool), w), "must be boolean and broadc"),
        (lambda w: jax.tree.map(jnp.zeros_like, w), "must be boolean and broadcast"),
        (lambda w: [True, False, True], "must be a pytree of the structure"),
    ],
)
def test_masks_that_do_not_fit_are_named(mask, match):
    model = make_model()
    player = Player(model, Regression(), optax.sgd(0.1), mask=mask(model.network))
    with pytest.raises(ValueError, match=match):
        init_train_state({"m": player}, KEY)


def test_the_average_of_a_trained_part_needs_no_argument():
    denoiser = NetworkDenoiser(
        networks.MLP(2, hidden=16, num_blocks=1, rngs=nnx.Rngs(0)), processes.VP()
    )
    only = lambda m: m.network.embedding
    player = Player(
        denoiser, losses.DenoisingLoss(), optax.adam(1e-1), ConstantEMA(0.9), trainable=only
    )
    step, state = make_train_step({"m": player}), init_train_state({"m": player}, KEY)
    for _ in range(3):
        state, _ = step(state, {"x": jnp.ones((4, 2))})
    got = state.players["m"]
    for a, b in zip(
        jax.tree.leaves(got.averaged()), jax.tree.leaves(got.averaged(only)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    average = only(got.averaged())
    for a, b in zip(jax.tree.leaves(average), jax.tree.leaves(got.averages[0]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_model_with_nothing_to_learn_is_refused():
    def apply(weights, x, t, cond, *, key=None):
        return weights["w"] @ x

    weights = {"w": jnp.eye(2)}
    for network in (
        functools.partial(apply, weights),
        lambda x, t, cond, *, key=None: apply(weights, x, t, cond),
    ):
        model = NetworkDenoiser(network, processes.Cosine())
        player = Player(model, losses.DenoisingLoss(), optax.adam(1e-2))
        with pytest.raises(ValueError, match=r"'m' has nothing to learn.*jax.tree_util.Partial"):
            init_train_state({"m": player}, KEY)
    learns = NetworkDenoiser(jax.tree_util.Partial(apply, weights), processes.Cosine())
    player = Player(learns, losses.DenoisingLoss(), optax.adam(1e-2))
    step = make_train_step({"m": player})
    _, metrics = step(init_train_state({"m": player}, KEY), {"x": jnp.ones((8, 2))})
    assert metrics["grad_norm"] > 0


# --- phases


def phase(number, teacher):
    """Follow a teacher that is another one in every phase, with steps half as long."""

    def loss(model, key, batch, frozen):
        return (model["network"] - frozen["teacher"]["network"]) ** 2 / number, {}

    keep = lambda model, key, batch, frozen: (model, {})
    return {
        "student": scalar(0.0, loss, optax.adam(0.1), ema=ConstantEMA(0.5)),
        "teacher": scalar(teacher, keep, None),
    }


def test_phases_go_on_with_step_optimiser_and_checkpoints(tmp_path):
    def both(store, until):
        """A run of two phases that stops after `until` steps, or goes on where it stopped."""
        first = phase(1.0, 3.0)
        state = init_train_state(first, KEY)
        reached = store.steps()[-1] if store.steps() else 0
        if reached >= 5:  # a template of the second phase; its teacher is in the checkpoint
            state = next_phase(state, phase(2.0, 0.0), fresh=["teacher"])
        if reached:
            state = TrainState.pack(**store.restore_latest(state.unpack())[0])
        if reached < 5:
            state = fit(
                make_train_step(first), state, Endless(), num_steps=min(5, until), store=store
            )
        if until <= 5:
            return state
        if int(state.step) == 5:
            teacher = state.players["student"].averaged()["network"]
            second = phase(2.0, float(teacher) / 2)
            state = next_phase(state, second, fresh=["teacher"])
            assert int(state.step) == 5
        # The student stays with its optimiser; the teacher was given.
        assert state.players["student"].updates == int(state.step)
        return fit(make_train_step(phase(2.0, 0.0)), state, Endless(), num_steps=until, store=store)

    class Endless:
        def __next__(self):
            return jnp.zeros(())

        def get_state(self):
            return None

    whole = both(CheckpointStore(tmp_path / "whole"), 12)
    store = CheckpointStore(tmp_path / "pieces")
    for until in (3, 5, 8, 12):
        pieces = both(store, until)
    assert int(pieces.step) == 12
    for a, b in zip(whole.arrays, pieces.arrays, strict=True):
        np.testing.assert_array_equal(jax.random.key_data(a) if is_key(a) else a, b)
    # The second teacher is half of what the student had become.
    halfway = both(CheckpointStore(tmp_path / "half"), 5).players["student"].averaged()["network"]
    np.testing.assert_allclose(value_of(whole, "teacher"), halfway / 2, rtol=1e-6)


def is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def test_a_player_that_cannot_go_on_is_named_and_may_begin_anew():
    before, _ = run(phase(1.0, 3.0), 4)
    student = phase(1.0, 3.0)["student"]
    for change, part in (
        ({"optimizer": optax.sgd(0.1)}, "optimiser"),
        ({"ema": PowerEMA()}, "average"),
        ({"model": {"network": jnp.zeros(2)}}, "model"),
        ({"loss": Remembering()}, "loss's state"),
    ):
        other = {"student": dataclasses.replace(student, **change)}
        with pytest.raises(ValueError, match=f"'student' cannot go on: its {part} has another"):
            next_phase(before, other)
        after = next_phase(before, other, fresh=["student"])
        assert int(after.step) == 4 and set(after.players) == {"student"}
        assert np.all(after.players["student"].model["network"] == 0.0)
        assert after.players["student"].updates == 0


# --- the loop


def poisoned(bad):
    class Poisoned(Batches):
        def __next__(self):
            batch = super().__next__()
            if self.next_index - 1 in bad:
                batch["y"] = batch["y"].at[0, 0].set(jnp.inf)
            return batch

    return Poisoned()


def test_bad_batches_may_be_skipped_for_a_while(tmp_path):
    """By an optimiser that skips them; means leave them out, and the weights never see them."""
    optimizer = optax.apply_if_finite(optax.adam(1e-2), 5)
    players = {"m": Player(make_model(), Regression(), optimizer, ConstantEMA(0.9))}
    step, seen = make_train_step(players), []
    hook = Hook(4, lambda index, state, metrics: seen.append(metrics["loss"]))

    def train(bad, tolerance, num_steps=8, store=None):
        state = init_train_state(players, KEY)
        options = dict(num_steps=num_steps, hooks=[hook], tolerance=tolerance, store=store)
        return fit(step, state, poisoned(bad), **options)

    state = train({1, 2, 5}, 2, store=CheckpointStore(tmp_path))
    assert len(seen) == 2 and np.all(np.isfinite(seen))
    assert all(np.all(np.isfinite(a)) for a in state.arrays if not is_key(a) and a.ndim)
    with pytest.raises(NonFiniteLossError, match="for the 3th step in a row"):
        train({1, 2, 3}, 2)
    with pytest.raises(NonFiniteLossError, match="became inf at step 1; the run stops"):
        train({1}, 0)
    # An optimiser that does not skip loses its weights, which is never tolerated.
    plain = {"m": Player(make_model(), Regression(), optax.adam(1e-2))}
    with pytest.raises(NonFiniteLossError, match="A weight"):
        fit(
            make_train_step(plain), init_train_state(plain, KEY), poisoned({1}), num_steps=3,
            tolerance=5, hooks=[hook],
        )  # fmt: skip


def test_a_hook_may_end_the_run_with_a_checkpoint(tmp_path):
    players = {"m": Player(make_model(), Regression(), optax.adam(1e-2))}
    store = CheckpointStore(tmp_path)
    for before in (True, False):
        hook = Hook(3, lambda index, state, metrics: index >= 6, before_checkpoint=before)
        state = fit(
            make_train_step(players), init_train_state(players, KEY), Batches(), num_steps=100,
            hooks=[hook], store=store, checkpoint_every=50,
        )  # fmt: skip
        assert int(state.step) == 6 and store.steps() == [6]


def test_constants_are_placed_with_the_state_and_once():
    """On all devices, as batches are; and not sent again at every step."""
    mesh = parallel.make_mesh(devices=jax.devices())
    transfers = []

    class Watched(Regression):
        def __call__(self, model, key, batch, frozen):
            value, metrics = super().__call__(model, key, batch, frozen)
            return value + frozen["offset"].sum(), metrics

    players = {"m": Player(make_model(), Watched(), optax.sgd(0.1))}
    inner = make_train_step(players)

    def step(state, batch, constants):
        transfers.append(constants["offset"])
        return inner(state, batch, constants)

    state = parallel.replicate(init_train_state(players, KEY), mesh)
    state = fit(
        step, state, Batches(), num_steps=3, constants={"offset": np.ones(4)},
        place=lambda batch: parallel.shard_batch(batch, mesh),
    )  # fmt: skip
    assert all(constant is transfers[0] for constant in transfers)
    assert len(transfers[0].sharding.device_set) == 8


def test_vectors_are_averaged_like_numbers():
    def loss(model, key, batch, frozen):
        return model["network"] ** 2, {"both": jnp.stack([frozen.step * 1.0, 7.0])}

    players, seen = {"m": scalar(1.0, loss)}, []

    class Endless:
        def __next__(self):
            return jnp.zeros(())

    hook = Hook(4, lambda index, state, metrics: seen.append(metrics["both"]))
    fit(
        make_train_step(players), init_train_state(players, KEY), Endless(), num_steps=8,
        hooks=[hook],
    )  # fmt: skip
    np.testing.assert_allclose(seen, [[1.5, 7.0], [5.5, 7.0]])


def test_labels_that_are_no_class_stop_a_run_before_they_train():
    network = networks.MLP(2, hidden=8, num_blocks=1, num_classes=3, rngs=nnx.Rngs(0))
    players = {
        "m": Player(
            NetworkDenoiser(network, processes.VP()),
            losses.DenoisingLoss(null_cond=3),
            optax.sgd(0.1),
        )
    }
    batch = {"x": np.ones((4, 2), np.float32), "cond": np.asarray([0, 1, 2, 5])}
    with pytest.raises(ValueError, match=r"Labels must lie in \[0, 2\], or be 3 for none, got 5"):
        fit(make_train_step(players), init_train_state(players, KEY), iter([batch]), num_steps=1)

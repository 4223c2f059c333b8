"""What every loss of several networks promises, and players that learn from one another."""

import dataclasses
import inspect

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array

from jaxdiff import distillation, parallel, predictions, processes
from jaxdiff._tree import jit
from jaxdiff.conditions import as_entries
from jaxdiff.denoiser import NetworkDenoiser
from jaxdiff.guidance import ClassifierFree
from jaxdiff.solvers import DDIM
from jaxdiff.training import (
    CheckpointStore,
    ConstantEMA,
    Frozen,
    Player,
    PlayerState,
    TrainState,
    init_train_state,
    make_train_step,
)

KEY = jax.random.key(0)
COUNT = 8
SCALES = (1.0, 3.0)


class Small(eqx.Module):
    """A network that compiles in no time: tanh of the example, time, label and scalars."""

    weights: dict[str, Array]
    scalars: tuple[str, ...] = eqx.field(static=True, default=())

    def __call__(self, x, t, cond=None, *, key=None):
        del key
        entries = as_entries(cond)
        said = jnp.stack([t / 1000, *(jnp.asarray(entries[name]) for name in self.scalars)])
        h = self.weights["x"] @ x + self.weights["said"] @ jnp.sin(said.astype(x.dtype))
        if "label" in entries:
            h = h + self.weights["label"][entries["label"]]
        return self.weights["out"] @ jnp.tanh(h)


def small(seed, *scalars, out=2):
    shapes = {"x": (8, 2), "said": (8, 1 + len(scalars)), "label": (3, 8), "out": (out, 8)}
    draw = np.random.default_rng(seed).standard_normal
    weights = {name: jnp.asarray(0.5 * draw(s), jnp.float32) for name, s in shapes.items()}
    return Small(weights, scalars)


class Critic(eqx.Module):
    """The sum of what such a network says."""

    network: Small

    def __call__(self, x, t, cond=None):
        return self.network(x, t, cond).sum()


def denoiser(seed, *scalars, process=None, prediction=None):
    network, prediction = small(seed, *scalars), prediction or predictions.V()
    return NetworkDenoiser(network, process or processes.VP(), prediction)


def data():
    x, noise = np.random.default_rng(0).uniform(-1, 1, (2, COUNT, 2)).astype(np.float32)
    cond = np.arange(COUNT, dtype=np.int32) % 2
    return {"x": x, "noise": noise, "pair": np.sin(noise), "cond": cond}


BANK = distillation.TrajectoryBank.empty(data())
TRAJECTORY = distillation.ConsistencyTrajectory(
    solver=DDIM(), gan=0.1, adversarial=distillation.NonSaturating(), scales=SCALES
)
SINGLE = distillation.SingleTrajectory(BANK, scales=SCALES)
SUM = jax.tree_util.Partial(jnp.sin)

# What learns: a "jump" to data, one that is "told" where to, a "signal", a "denoiser", a "critic".
LOSSES = {
    "BOOT": (distillation.BOOT(scales=SCALES), "signal"),
    "Balanced": (distillation.Balanced(dataclasses.replace(TRAJECTORY, denoising=None)), "told"),
    "ConditionalDistillation": (distillation.ConditionalDistillation(), "jump"),
    "ConsistencyDistillation": (distillation.ConsistencyDistillation(scales=SCALES), "jump"),
    "ConsistencyTraining": (
        distillation.ConsistencyTraining(target="student", scales=SCALES),
        "jump",
    ),
    "ConsistencyTrajectory": (TRAJECTORY, "told"),
    "ContinuousConsistency": (
        distillation.ContinuousConsistency(teacher="teacher", scales=SCALES),
        "jump",
    ),
    "ContinuousConsistency(Weighted)": (distillation.ContinuousConsistency(), "weighted"),
    "CriticLoss": (distillation.CriticLoss(start=(0.9, 0.4), scales=SCALES), "critic"),
    "DMD": (distillation.DMD(regression=0.25), "jump"),
    "DMD2": (distillation.DMD2(gan=0.1, start=(0.9, 0.4), scales=SCALES), "jump"),
    "DiffInstruct": (distillation.DiffInstruct(scales=SCALES), "jump"),
    "ESD": (distillation.ESD(null_cond=2, scales=SCALES), "jump"),
    "EasyConsistencyTuning": (distillation.EasyConsistencyTuning(), "jump"),
    "FakeScoreLoss": (distillation.FakeScoreLoss(scales=SCALES), "denoiser"),
    "GuidedDistillation": (distillation.GuidedDistillation(scales=SCALES), "denoiser"),
    "InductiveMomentMatching": (
        distillation.InductiveMomentMatching(gap=0.5, sigma_data=2),
        "told",
    ),
    "MeanFlow": (distillation.MeanFlow(power=0.5, teacher="teacher", scales=SCALES), "told"),
    "MeanFlow(null_cond)": (
        distillation.MeanFlow(power=0.5, null_cond=2, omega=1.5, kappa=0.2),
        "told",
    ),
    "MomentMatchingAuxiliary": (distillation.MomentMatchingAuxiliary(), "denoiser"),
    "MultistepMomentMatching": (distillation.MultistepMomentMatching(), "jump"),
    "PairRegression": (distillation.PairRegression(), "jump"),
    "ProgressiveDistillation": (
        distillation.ProgressiveDistillation(scales=SCALES),
        "denoiser",
    ),
    "ReflowLoss": (distillation.ReflowLoss(), "denoiser"),
    "Repulsive": (
        distillation.Repulsive(features=SUM, sds=distillation.SDS(scales=SCALES)),
        "jump",
    ),
    "SDS": (distillation.SDS(scales=SCALES), "jump"),
    "ScoreIdempotent": (distillation.ScoreIdempotent(), "jump"),
    "Shortcut": (distillation.Shortcut(steps=8, teacher="teacher"), "told"),
    "Shortcut(null_cond)": (
        distillation.Shortcut(steps=8, null_cond=2, target="student"),
        "told",
    ),
    "SiD": (distillation.SiD(scales=SCALES), "jump"),
    "SingleTrajectory": (SINGLE, "told"),
    "SingleTrajectoryCritic": (distillation.SingleTrajectoryCritic(SINGLE), "critic"),
    "TrajectoryCritic": (distillation.TrajectoryCritic(TRAJECTORY), "critic"),
    "VSD": (distillation.VSD(scales=SCALES), "jump"),
}
# Whose examples see one another: in groups, as a population, by the balance of their terms.
TOGETHER = {"InductiveMomentMatching", "Repulsive", "Balanced"}


def setting(name):
    """What learns, and what is given beside it."""
    loss, kind = LOSSES[name]
    of = TRAJECTORY if name in ("Balanced", "TrajectoryCritic") else getattr(loss, "loss", loss)
    scales = getattr(getattr(of, "sds", of), "scales", None)
    process = processes.TrigFlow() if name.startswith("Continuous") else processes.VP()
    told = () if scales is None else ("scale",)

    def student(seed, kind):
        if kind in ("critic", "denoiser"):
            return (
                Critic(small(seed)) if kind == "critic" else denoiser(seed, *told, process=process)
            )
        scalars = (*told, "until") if kind == "told" else told
        prediction = predictions.X0() if kind == "signal" else None
        base = denoiser(seed, *scalars, process=process, prediction=prediction)
        if kind == "signal":
            return distillation.SignalMap(base)
        jump = distillation.Jump(base, "until" if kind == "told" else None)
        if kind == "weighted":
            return distillation.Weighted(jump, distillation.LogWeight(jnp.zeros(4)))
        return jump

    model = student(0, kind)
    teacher = denoiser(1, process=process)
    if scales is not None:
        teacher = ClassifierFree(teacher, null_cond=2, scale=2.0)
    other = student(2, "told" if "Trajectory" in name else "jump")
    entries = {
        "teacher": teacher,
        "fake": denoiser(3, *told, process=process),
        "critic": Critic(small(4)),
        "generator": other,
    }
    if kind == "critic":
        entries["student"] = other
    learner = other if kind == "critic" else model
    averages = [jax.tree.map(lambda w: 1.1 * w, learner.network)]
    players = {"student": PlayerState(learner, None, averages, loss_state=BANK)}
    frozen = Frozen(entries, jnp.asarray(3), jax.random.key(5), players, BANK)
    return loss, model, frozen


def test_no_loss_is_missing():
    public = {
        value
        for value in vars(distillation).values()
        if inspect.isclass(value)
        and "__call__" in dir(value)
        and list(inspect.signature(value.__call__).parameters)[2:] == ["key", "batch", "frozen"]
        and not inspect.isabstract(value)
        and not getattr(value, "__abstractvars__", ())
    }
    assert distillation.ConsistencyDistillation in public
    assert public == {type(loss) for loss, _ in LOSSES.values()}


def slopes_of(loss, model, batch, frozen):
    """The loss, its gradients by what learns, and by all that is given."""
    if hasattr(loss, "gradient"):  # of its own making
        (value, logged), slope = loss.gradient(model, KEY, batch, frozen)
        return value, logged, slope.network, None
    given, rest = eqx.partition(frozen, eqx.is_inexact_array)

    def total(weights, given):
        changed = eqx.tree_at(lambda m: m.network, model, weights)
        return loss(changed, KEY, batch, eqx.combine(given, rest))[:2]

    slopes = jax.value_and_grad(total, (0, 1), has_aux=True)
    (value, logged), (slope, others) = slopes(model.network, given)
    return value, logged, slope, others


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss(name):
    """Finite in any precision, the same on any devices, with one program for all numbers.

    No gradient reaches what is frozen. And a loss is a sum over examples: what changes by two of
    them is the sum of what changes by either.
    """
    loss, model, frozen = setting(name)
    traces = []

    @jit
    def found(loss, model, frozen, batch, spread):
        traces.append(1)
        low = {k: v.astype(jnp.bfloat16) if k != "cond" else v for k, v in batch.items()}
        run = jax.jit(lambda batch: slopes_of(loss, model, batch, frozen))
        return tuple(run(b) for b in (batch, low, spread))

    mesh = parallel.make_mesh(devices=jax.devices())
    spread = jax.device_put(data(), parallel.batch_sharding(mesh))
    run = lambda batch, loss=loss: found(loss, model, frozen, batch, spread)
    whole, low, over = run(data())
    for value, logged, slope, others in (whole, low, over):
        assert value.dtype == jnp.float32 and value.shape == ()
        chex.assert_tree_all_finite((value, logged, slope))
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(slope))
        assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(slope))
        assert jax.tree.leaves(others) or name == "Balanced"
        for leaf in jax.tree.leaves(others):
            np.testing.assert_array_equal(leaf, 0)
    size = max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole[2]))
    chex.assert_trees_all_close(over[2], whole[2], rtol=1e-3, atol=1e-5 * size)
    np.testing.assert_allclose(over[0], whole[0], rtol=1e-4)

    other = run(data(), jax.tree.map(lambda v: 0.9 * v if isinstance(v, float) else v, loss))[0]
    chex.assert_tree_all_finite((other[0], other[2]))

    def changed(*rows):
        batch = data()
        for row in rows:
            for k, v in batch.items():
                v[row] = 1 - v[row] if k == "cond" else v[row] + np.float32(0.3)
        return np.float64(run(batch)[0][0])

    first, second, both = changed(5), changed(7), changed(5, 7)
    assert first != whole[0] and second != whole[0]
    apart = np.abs(first + second - both - whole[0])
    size = 1e-5 * (1 + np.abs(np.asarray([first, second, both, whole[0]])).max())
    assert (apart <= size) == (name not in TOGETHER), apart
    assert len(traces) == 1


def same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    is_key = lambda v: jnp.issubdtype(jnp.result_type(v), jax.dtypes.prng_key)
    read = lambda v: jax.random.key_data(v) if is_key(v) else v
    return all(np.array_equal(read(x), read(y)) for x, y in pairs)


def test_three_players_learn_apart_and_go_on_bit_for_bit(tmp_path):
    """Fake score and critic at every step, the generator at every other."""
    teacher = denoiser(1)
    before = jax.device_get(teacher)

    def players(gan):
        loss, rate = distillation.DMD2(gan=gan), optax.adam(1e-2)
        generator = Player(
            distillation.Jump(denoiser(0)), loss, rate, ema=ConstantEMA(0.9), every=2
        )
        return {
            "fake": Player(denoiser(3), distillation.FakeScoreLoss(), rate),
            "critic": Player(Critic(small(4)), distillation.CriticLoss(), rate),
            "generator": generator,
        }

    def run(state, steps, gan=0.1):
        step = make_train_step(players(gan))
        for _ in range(steps):
            state, _ = step(state, data(), {"teacher": teacher})
        return state

    start = init_train_state(players(0.1), KEY)
    begin = lambda: jax.tree.map(jnp.array, start)
    first = begin().players["generator"]
    assert same(first.averaged(), first.model) and same(first.averages[0], first.model.network)

    # What the generator minimises is nothing to the others, whose own states go on.
    one, other = (jax.device_get(run(begin(), 1, gan).players) for gan in (0.1, 5.0))
    assert not same(one["generator"], other["generator"])
    for name in ("fake", "critic"):
        assert same(one[name], other[name])
        assert not same(one[name].opt_state, begin().players[name].opt_state)
    two = jax.device_get(run(begin(), 2).players)
    assert same(two["generator"], one["generator"]) and not same(two["fake"], one["fake"])
    assert same(two["generator"].averages[0], one["generator"].averages[0])
    assert not same(one["generator"].averages[0], one["generator"].model.network)

    store, middle = CheckpointStore(tmp_path / "c"), run(begin(), 3)
    store.save(middle.unpack(), step=3)
    restored, *_ = store.restore_latest(begin().unpack())
    last, again = run(middle, 2), run(TrainState.pack(**restored), 2)
    assert same(last, again)
    assert [int(last.players[name].updates) for name in ("fake", "critic", "generator")] == [
        5,
        5,
        3,
    ]
    assert same(jax.device_get(teacher), before)

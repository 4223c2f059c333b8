"""What every loss of several networks promises, and players that learn from one another."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import optax
import pytest
from promises import KEY, Critic, check_loss, data, denoiser, same, small

from jaxdiff import distillation, predictions, processes
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

SCALES = (1.0, 3.0)


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


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss(name):
    check_loss(*setting(name), alone=name not in TOGETHER)


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

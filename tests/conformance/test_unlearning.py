"""What every loss of unlearning promises, and that nothing changes where nothing is asked."""

import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from promises import COUNT, KEY, Critic, check_loss, data, denoiser, same, small

from jaxdiff import distillation, finetuning, losses, unlearning
from jaxdiff.training import (
    ConstantEMA,
    Frozen,
    Player,
    PlayerState,
    init_train_state,
    make_train_step,
)

NONE = 2
SEEN = unlearning.NoisedExamples()
RELABELLED = unlearning.Relabelled(unlearning.Always(1))
KEPT = losses.DenoisingLoss()
ANY = unlearning.AnyOf(jnp.asarray([1]))
CORRECTED = unlearning.DomainCorrection()
LOSSES = {
    "AdversarialErasing": unlearning.AdversarialErasing(
        unlearning.ErasedConcepts({"label": NONE}, states=SEEN), "style", steps=3
    ),
    "AllButOne": unlearning.AllButOne(NONE, 1, states=SEEN),
    "AntiEditing": unlearning.AntiEditing(NONE, correction=ANY, states=SEEN),
    "Apart": unlearning.Apart(RELABELLED),
    "Both": unlearning.Both(RELABELLED, KEPT, 0.1),
    "ConceptAblation": unlearning.ConceptAblation(),
    "ConceptAblation(by_model=False)": unlearning.ConceptAblation(by_model=False),
    "DomainCorrection": CORRECTED,
    "DomainCritic": unlearning.DomainCritic(CORRECTED),
    "EarlySteering": unlearning.EarlySteering(NONE, unlearning.Always(1), states=SEEN),
    "EraseDiff": unlearning.EraseDiff(RELABELLED, KEPT),
    "ErasedConcepts": unlearning.ErasedConcepts(NONE, states=SEEN),
    "ErasedConcepts(sampled)": unlearning.ErasedConcepts(
        NONE, states=unlearning.OnTrajectory(NONE, steps=4)
    ),
    "Flooding": unlearning.Flooding(jax.tree_util.Partial(lambda process, t: 0.1)),
    "GradientAscent": unlearning.GradientAscent(bound=1e3),
    "GradientSurgery": unlearning.GradientSurgery(RELABELLED, KEPT),
    "OnForgotten": unlearning.OnForgotten(KEPT),
    "PreferenceLoss": unlearning.PreferenceLoss(1.0, 0.1, NONE),
    "Relabelled": RELABELLED,
    "Repulsion": unlearning.Repulsion(),
    "SafeSelfDistillation": unlearning.SafeSelfDistillation(NONE, "student", SEEN),
    "ScoreForgetting": unlearning.ScoreForgetting(unlearning.Always(1), distillation.SiD()),
    "ScoreForgettingFake": unlearning.ScoreForgettingFake(),
    "SelectiveAmnesia": unlearning.SelectiveAmnesia(),
}


def batch():
    kept, other = data(), data()
    forget = {"x": other["pair"], "safe": other["noise"], "cond": np.zeros(COUNT, np.int32)}
    return {"x": kept["x"], "cond": kept["cond"], "forget": forget}


def styled():
    """With a number beside the class, which may be moved."""
    found = batch()
    forget = found["forget"]
    style = np.linspace(-1, 1, COUNT, dtype=np.float32)
    cond = {"label": forget["cond"], "style": style}
    return {"x": found["x"], "forget": {"x": forget["x"], "cond": cond}}


def adapter(seed):
    draw = np.random.default_rng(seed).standard_normal
    low = [jnp.asarray(draw(shape), jnp.float32) for shape in ((8, 1), (1, 2))]
    return finetuning.Adapter({"weights/x": finetuning.LowRank(*low)})


def setting(name):
    scalars = ("style",) if name == "AdversarialErasing" else ()
    model, teacher = denoiser(0, *scalars), denoiser(1, *scalars)
    fisher = jax.tree.map(jnp.ones_like, eqx.filter(teacher.network, eqx.is_inexact_array))
    jump = distillation.Jump(model)
    entries = {
        "teacher": teacher,
        "fake": denoiser(3),
        "generator": jump,
        "fisher": fisher,
        "adapted": denoiser(4),
        "critic": Critic(small(6)),
        "student": denoiser(7),
        "earlier": (adapter(0), adapter(1)),
    }
    averages = [jax.tree.map(lambda w: 1.1 * w, model.network)]
    players = {"student": PlayerState(model, None, averages)}
    learner = {
        "ScoreForgetting": jump,
        "DomainCritic": entries["critic"],
        "Apart": finetuning.adapt(model, adapter(2)),
    }.get(name, model)
    return LOSSES[name], learner, Frozen(entries, jnp.asarray(3), jax.random.key(5), players)


def test_no_loss_is_missing():
    public = {
        value
        for value in vars(unlearning).values()
        if inspect.isclass(value)
        and "__call__" in dir(value)
        and list(inspect.signature(value.__call__).parameters)[2:] == ["key", "batch", "frozen"]
    }
    assert public == {type(loss) for loss in LOSSES.values()}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss(name):
    check_loss(*setting(name), styled if name == "AdversarialErasing" else batch)


MASKED = {"label": True, "x": False, "said": False, "out": False}


def test_what_is_masked_stays_bit_for_bit():
    """Under weight decay and an average, too; SalUn and ESD's sets of parameters need no more."""
    base = denoiser(0)
    loss = unlearning.Relabelled(unlearning.Always(1))
    player = Player(
        base, loss, optax.adamw(1e-2, weight_decay=0.1), ConstantEMA(0.9),
        mask=eqx.tree_at(lambda n: n.weights, base.network, MASKED),
    )  # fmt: skip
    players = {"student": player}
    state, step = init_train_state(players, KEY), make_train_step(players)
    for _ in range(3):
        state, _ = step(state, batch(), {})
    for model in (state.players["student"].model, state.players["student"].averaged()):
        for name, weights in model.network.weights.items():
            assert same(weights, base.network.weights[name]) == (not MASKED[name]), name


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_without_what_is_asked_nothing_changes(scale):
    """An edit of no strength, a repulsion of none, a step of zero: the same model bit for bit."""
    base, tuned = denoiser(0), denoiser(1)
    assert same(unlearning.negate_task(base, tuned, scale), base) == (scale == 0)
    layer = "network/weights"
    slopes = jax.tree.map(jnp.ones_like, eqx.filter(base, eqx.is_inexact_array))
    moved = unlearning.move_layer(base, slopes, layer, scale)
    assert same(moved, base) == (scale == 0)
    mask = unlearning.saliency_mask(slopes.network)
    assert all(np.all(leaf) for leaf in jax.tree.leaves(mask))


def test_wrong_arguments():
    model = denoiser(0)
    loss = unlearning.ErasedConcepts(NONE, states=SEEN)
    frozen = Frozen({"teacher": denoiser(1)})
    with pytest.raises(ValueError, match="`batch` must have the examples to be forgotten as 'for"):
        loss(model, KEY, data(), frozen)
    with pytest.raises(ValueError, match=r"`batch\['forget'\]` must have conditions"):
        loss(model, KEY, {**data(), "forget": {"x": data()["x"]}}, frozen)
    with pytest.raises(ValueError, match="`frozen` must have a denoiser 'teacher'"):
        loss(model, KEY, batch(), Frozen({}))
    few = {**batch(), "forget": jax.tree.map(lambda v: v[:3], batch()["forget"])}
    with pytest.raises(ValueError, match="as many examples as there are to be forgotten, got 8"):
        unlearning.ConceptAblation()(model, KEY, few, frozen)
    for need, what in (
        (unlearning.Repulsion(), "adapted"),
        (unlearning.SelectiveAmnesia(), "fisher"),
    ):
        with pytest.raises(ValueError, match=f"as '{what}', got"):
            need(model, KEY, batch(), frozen)
    pairs = batch()
    del pairs["forget"]["safe"]
    with pytest.raises(ValueError, match="must have a safe version of every example"):
        unlearning.PreferenceLoss()(model, KEY, pairs, frozen)
    for kind in (
        unlearning.AllButOne, unlearning.AntiEditing, unlearning.ErasedConcepts,
        unlearning.SafeSelfDistillation,
    ):  # fmt: skip
        with pytest.raises(ValueError, match="`null_cond` must be the condition that means none"):
            kind(None, states=SEEN)
    with pytest.raises(ValueError, match="`null_cond` must be the condition that means none"):
        unlearning.PreferenceLoss(preserve=1.0)
    with pytest.raises(ValueError, match="`cond` must be what is said instead, got None"):
        unlearning.Always(None)
    forgetting = unlearning.ScoreForgetting(unlearning.Always(1))
    bare = {name: leaf for name, leaf in batch().items() if name != "cond"}
    with pytest.raises(ValueError, match="conditions of one form for what is kept and what is"):
        forgetting(distillation.Jump(model), KEY, bare, frozen)
    for labels in ([1.5], [], [[1]], [-1]):
        with pytest.raises(ValueError, match="`labels` must be classes"):
            unlearning.AnyOf(labels)
    with pytest.raises(TypeError, match="`matching` must be"):
        unlearning.ScoreForgetting(unlearning.Always(1), losses.DenoisingLoss())
    with pytest.raises(ValueError, match="`most`"):
        unlearning.OnTrajectory(NONE, most=0.0)
    with pytest.raises(ValueError, match="`share`"):
        unlearning.saliency_mask(model.network, 0.0)
    with pytest.raises(ValueError, match="`layer` must be one of"):
        unlearning.move_layer(model, model, "nowhere", 1.0)
    with pytest.raises(ValueError, match="`patterns` must be found in the paths"):
        unlearning.parameter_mask(model.network, "cross")
    with pytest.raises(ValueError, match="`model` must have attention to tokens"):
        unlearning.edit_cross_attention(model, jnp.ones((1, 2)), jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="`model` must have a table of classes"):
        unlearning.edit_classes(model, 0, 1)
    with pytest.raises(ValueError, match="`erase` and `into` must be as many rows, got 2 and 1"):
        unlearning.edited_kernel(jnp.eye(2), jnp.ones((2, 2)), jnp.ones((1, 2)))
    with pytest.raises(ValueError, match=r"`keep` must be rows of the kernel's 2 inputs"):
        unlearning.edited_kernel(jnp.eye(2), jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.ones((1, 3)))

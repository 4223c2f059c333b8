"""Each loss of a target, on a student that can say it: a blend of what oracles say."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import losses, oracles, processes, unlearning
from jaxdiff.denoiser import Denoiser
from jaxdiff.training import Frozen

KEY = jax.random.key(0)
COSINE = processes.Cosine()
with jax.enable_x64(True):
    MEANS = jnp.asarray([[-1.5, 0.0], [0.0, 1.0], [2.0, -0.5]])
    SPREADS = jnp.asarray([0.5, 0.3, 0.7])
    COVARIANCES = SPREADS[:, None, None] ** 2 * jnp.eye(2)
    CLASSES = oracles.gaussian_mixture(
        COSINE, MEANS, COVARIANCES, weights=[0.5, 0.2, 0.3], labels=[0, 1, 2]
    )
    KEPT = oracles.gaussian_mixture(
        COSINE, MEANS[1:], COVARIANCES[1:], weights=[0.4, 0.6]
    )  # without class 0
FORGET, NONE, COUNT = 0, 3, 64
ROWS = np.eye(5)  # class 0, 1, 2, none, and what is kept


class Blend(Denoiser):
    """D(x, t, c) = sum_j weights[c, j] D_j(x, t), D_j oracles: every blend has one table."""

    network: jax.Array
    process: processes.GaussianProcess = COSINE

    def __call__(self, x, t, cond=None, *, key=None):
        del key
        said = [CLASSES(x, t, jnp.int32(c)) for c in range(4)]
        return jnp.tensordot(self.network[cond], jnp.stack([*said, KEPT(x, t)]), 1)


with jax.enable_x64(True):
    TEACHER = Blend(jnp.asarray(ROWS[:4]))


def examples(cond):
    """Examples of classes, `(count, 2)`."""
    cond = np.asarray(cond)
    noise = np.random.default_rng(0).standard_normal((len(cond), 2))
    return jnp.asarray(np.asarray(MEANS)[cond] + np.asarray(SPREADS)[cond][:, None] * noise)


def batch_of(kept, count=COUNT):
    forget = np.full(count, FORGET, np.int32)
    return {
        "x": examples(kept),
        "cond": jnp.asarray(kept),
        "forget": {"x": examples(forget), "cond": jnp.asarray(forget)},
    }


def learned(loss, rows, batch):
    """The rows of the table at the loss's minimum, of which it is a quadratic; and its value."""
    frozen = Frozen({"teacher": TEACHER}, 0, None, {})
    begin = TEACHER.network[rows, :]

    def value(part):
        model = eqx.tree_at(lambda m: m.network, TEACHER, TEACHER.network.at[rows, :].set(part))
        return loss(model, KEY, batch, frozen)[0]

    slope, curve = jax.grad(value)(begin), jax.hessian(value)(begin)
    size = begin.size
    step = jnp.linalg.solve(curve.reshape(size, size), slope.reshape(size))
    found = begin - step.reshape(begin.shape)
    assert jnp.linalg.cond(curve.reshape(size, size)) < 1e11
    return np.asarray(found), float(value(found))


SEEN = unlearning.NoisedExamples()
one = np.full(COUNT, 1, np.int32)
minus = lambda scale: ROWS[NONE] - scale * (ROWS[FORGET] - ROWS[NONE])
TARGETS = {
    "erased": (unlearning.ErasedConcepts(NONE, states=SEEN), {FORGET: minus(1)}),
    "erased, scale 0": (unlearning.ErasedConcepts(NONE, 0.0, states=SEEN), {FORGET: ROWS[NONE]}),
    "erased, own": (
        unlearning.ErasedConcepts(NONE, 2.0, own=True, states=SEEN),
        {FORGET: 2 * ROWS[NONE] - ROWS[FORGET]},
    ),
    "erased on trajectories": (
        unlearning.ErasedConcepts(NONE, states=unlearning.OnTrajectory(NONE, steps=8)),
        {FORGET: minus(1)},
    ),
    "all but one": (
        unlearning.AllButOne(NONE, 1, states=SEEN),
        {FORGET: ROWS[1], NONE: ROWS[NONE]},
    ),
    "all but one, no anchor": (
        unlearning.AllButOne(NONE, states=SEEN),
        {FORGET: ROWS[NONE], NONE: ROWS[NONE]},
    ),
    "self-distilled": (unlearning.SafeSelfDistillation(NONE, states=SEEN), {FORGET: ROWS[NONE]}),
    "ablated": (unlearning.ConceptAblation(prior=0.0), {FORGET: ROWS[1]}),
    "relabelled": (unlearning.Relabelled(unlearning.NextClass(3)), {FORGET: ROWS[1]}),
    "anti-edited": (
        unlearning.AntiEditing(
            NONE, 3.0, unlearning.Always(2), likeness=0.5, share=0.5, states=SEEN
        ),
        {
            FORGET: minus(3),
            NONE: ROWS[NONE] + 3 * (ROWS[FORGET] - ROWS[NONE]) - 1.5 * (ROWS[2] - ROWS[NONE]),
        },
    ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_the_target_is_the_minimum(x64, name):
    loss, target = TARGETS[name]
    rows = np.asarray(list(target))
    found, value = learned(loss, rows, batch_of(one))
    np.testing.assert_allclose(found, list(target.values()), atol=1e-5)
    assert abs(value) < 1e-12


@pytest.mark.parametrize("kept", [1, None])
def test_renaming_examples_learns_their_denoiser(x64, kept):
    """Of one class, or of all that is kept: then it is the model without the class."""
    count = 20_000
    rng = np.random.default_rng(1)
    labels = np.full(count, 1) if kept else rng.choice([1, 2], count, p=[0.4, 0.6])
    loss = unlearning.ConceptAblation(by_model=False, prior=0.0)
    found, _ = learned(loss, np.asarray([FORGET]), batch_of(labels.astype(np.int32), count))
    x, t = examples([1, 2] * 10), jnp.float64(0.5)
    model = eqx.tree_at(lambda m: m.network, TEACHER, jnp.asarray(found))
    answer = jax.vmap(lambda x: model(x, t, 0))(x)
    goal = jax.vmap(lambda x: CLASSES(x, t, jnp.int32(1)) if kept else KEPT(x, t))(x)
    np.testing.assert_allclose(answer, goal, atol=0.05)


def test_guidance_of_an_anti_edited_model_is_pushed_away(x64):
    """By (1 - w) scale (D_f - D_0) for every condition asked for: from w = 1 on."""
    loss = unlearning.AntiEditing(NONE, 3.0, share=1.0, erase=1.0, states=SEEN)
    (none,), _ = learned(loss, np.asarray([NONE]), batch_of(one))
    for w in (0.0, 1.0, 3.0):
        guided = none + w * (ROWS[1] - none)
        plain = ROWS[NONE] + w * (ROWS[1] - ROWS[NONE])
        np.testing.assert_allclose(
            guided - plain, (1 - w) * 3 * (ROWS[FORGET] - ROWS[NONE]), atol=1e-5
        )


def test_states_of_sampling_stop_anywhere(x64):
    """The first is noise; those of a step are what a sampler makes of it in as many steps."""
    states = unlearning.OnTrajectory(NONE, scale=2.0, steps=4)
    seen = states(KEY, batch_of(one)["forget"], TEACHER)
    times = np.asarray(losses.UniformTime().quantile(COSINE, jnp.arange(4, -1, -1) / 4))
    stops = np.argmin(np.abs(np.asarray(seen.t)[:, None] - times), axis=1)
    assert set(stops) == {0, 1, 2, 3}
    first = np.asarray(seen.x)[stops == 0]
    assert abs(first.std() - 1) < 0.5
    early = unlearning.OnTrajectory(NONE, scale=2.0, steps=4, most=0.5)
    assert set(np.unique(early(KEY, batch_of(one)["forget"], TEACHER).t)) <= set(times[:2])
    # The law of what has gone far is that of the guided class: below its own mean.
    late = np.asarray(seen.x)[stops == 3]
    assert late[:, 0].mean() < -1.0


def test_a_preference_is_log_two_at_first_and_pulls_by_both_errors(x64):
    pair = batch_of(one)
    pair["forget"]["safe"] = pair["x"]
    loss = unlearning.PreferenceLoss(2.0)
    frozen = Frozen({"teacher": TEACHER}, 0, None, {})
    value, logged = loss(TEACHER, KEY, pair, frozen)
    np.testing.assert_allclose([value, logged["margin"]], [np.log(2), 0], atol=1e-12)

    def slope(loss, batch):
        def total(table):
            model = eqx.tree_at(lambda m: m.network, TEACHER, table)
            return loss(model, KEY, batch, frozen)

        return jax.grad(lambda table: total(table)[0])(TEACHER.network)

    same = {**pair, "forget": {**pair["forget"], "safe": pair["forget"]["x"]}}
    value, _ = loss(
        eqx.tree_at(lambda m: m.network, TEACHER, 2 * TEACHER.network), KEY, same, frozen
    )
    np.testing.assert_allclose(value, np.log(2), atol=1e-12)  # both errors cancel
    np.testing.assert_allclose(
        slope(unlearning.PreferenceLoss(2.0), pair), 2 * slope(unlearning.PreferenceLoss(1.0), pair)
    )


def test_early_steering_has_a_constant_pull_and_ends(x64):
    """Of unsafe - safe, whatever the student says; none once the margin is reached."""
    batch = batch_of(one)
    frozen = Frozen({"teacher": TEACHER}, 0, None, {})

    def pull(table, margin):
        loss = unlearning.EarlySteering(
            NONE, unlearning.Always(1), scale=1.0, margin=margin, preserve=0.0, states=SEEN
        )

        def total(table):
            return loss(eqx.tree_at(lambda m: m.network, TEACHER, table), KEY, batch, frozen)

        (_, logged), slope = jax.value_and_grad(total, has_aux=True)(table)
        return np.asarray(slope), float(logged["active"])

    first, active = pull(TEACHER.network, 1e3)
    second, _ = pull(TEACHER.network.at[FORGET, 1].add(0.5), 1e3)
    assert active == 1
    np.testing.assert_allclose(first, second, rtol=1e-9)
    there = TEACHER.network.at[jnp.asarray([FORGET, NONE])].set(2 * ROWS[1] - ROWS[NONE])
    slope, active = pull(there, 0.0)
    assert active == 0 and not np.any(slope)


def test_flooding_climbs_below_the_level(x64):
    batch = batch_of(one)
    slopes = []
    for level in (0.0, 1e3):
        loss = unlearning.Flooding(jax.tree_util.Partial(lambda level, p, t: level, level))

        def total(table, loss=loss):
            model = eqx.tree_at(lambda m: m.network, TEACHER, table)
            return loss(model, KEY, batch, Frozen({}))

        (_, logged), slope = jax.value_and_grad(total, has_aux=True)(1.1 * TEACHER.network)
        slopes.append(np.asarray(slope))
        assert float(logged["below"]) == (level > 0)
    np.testing.assert_allclose(slopes[0], -slopes[1], rtol=1e-9)
    assert np.any(slopes[0])

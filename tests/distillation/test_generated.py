import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from generators import Affine, Posterior, counted, law, learned

from jaxdiff import distillation, guidance, losses, oracles, processes
from jaxdiff._tree import jit
from jaxdiff.distillation._generated import begin, finish
from jaxdiff.flow_map import FlowMap
from jaxdiff.training import Player, init_train_state, make_train_step

KEY = jax.random.key(0)


class Scaled(FlowMap):
    """x -> weight x, whatever the times."""

    process: processes.EDM
    weight: jax.Array

    def __call__(self, x, t, s, cond=None, *, key=None):
        return self.weight * x


@pytest.mark.parametrize("process", [processes.EDM(0.01, 30.0), processes.Cosine()])
def test_stages_are_the_states_that_sampling_meets(x64, process):
    """With the exact flow map every one of them has the noised law, and is drawn as often."""
    oracle = oracles.gaussian(process, jnp.full(1, 0.3), 0.25 * jnp.eye(1))
    generator, passes = counted(oracles.GaussianFlowMap(oracle))
    top = float(process.t_max)
    times = (top, 0.6 * top, 0.2 * top, 0.02 * top)
    batch = {"x": jnp.zeros((20000, 1))}

    @jit
    def draw(times):
        begun = begin(generator, KEY, batch, times)
        return begun, finish(generator, begun)

    begun, made = draw(times)
    assert len(passes) == 2  # a scan over the first three, and the last
    for t in times:
        here = np.isclose(begun.t, t, rtol=1e-12)
        np.testing.assert_allclose(here.mean(), 0.25, atol=0.015)
        alpha, sigma = process.alpha(t), process.sigma(t)
        std = np.sqrt(0.25 * alpha**2 + sigma**2)
        # The prior has no signal: its mean is off at the first time, for an EDM by 0.01 std.
        state = (np.asarray(begun.x)[here] - 0.3 * alpha) / std
        np.testing.assert_allclose([state.mean(), state.std()], [0, 1], atol=0.06)
        there = np.asarray(made)[here]
        np.testing.assert_allclose([there.mean(), there.std()], [0.3, 0.5], atol=0.03)


def test_only_the_last_jump_has_a_gradient(x64):
    generator = Scaled(processes.EDM(0.01, 4.0), jnp.asarray(0.7))
    batch, times = {"x": jnp.zeros((5, 2))}, (4.0, 2.0, 0.5)

    @jit
    def slope(model):
        made = lambda model: finish(model, begin(model, KEY, batch, times))
        return jax.jacobian(made)(model).weight

    begun = jit(begin)(generator, KEY, batch, times)
    np.testing.assert_allclose(slope(generator), begun.x, rtol=1e-12)
    assert len(set(begun.t.tolist())) > 1


def test_an_example_draws_from_its_own_key(x64):
    generator = Scaled(processes.EDM(0.01, 4.0), jnp.asarray(0.7))
    few, many = (
        jit(begin)(generator, KEY, {"x": jnp.zeros((n, 2))}, (4.0, 1.0), (1.0, 3.0)) for n in (3, 7)
    )
    for a, b in zip(jax.tree.leaves(few), jax.tree.leaves(many), strict=True):
        np.testing.assert_array_equal(a, b[:3])
    assert np.all((many.scale > 1) & (many.scale < 3))
    np.testing.assert_array_equal(many.told["scale"], many.scale)


def test_the_fake_score_is_that_of_what_is_made(x64):
    process = processes.EDM(0.05, 5.0)
    generator = law(Affine, process, [0.8, -1.0], [0.3, 1.2])
    fake = law(Posterior, process, [0.0, 0.0], [1.0, 1.0])
    time_law = losses.LogNormal(-0.5, 0.7)
    loss = distillation.FakeScoreLoss(losses.DenoisingLoss(time_law=time_law), start=3.0)
    players = {
        "fake": Player(
            fake, loss, optax.adam(optax.cosine_decay_schedule(0.1, 400)), trainable=learned
        )
    }
    state, step = init_train_state(players, KEY), make_train_step(players)
    batch = {"x": jnp.zeros((128, 1)), "cond": jnp.arange(128) % 2}
    for _ in range(400):
        state, _ = step(state, batch, {"generator": generator})
    found = state.players["fake"].model
    np.testing.assert_allclose(found.mean, generator.mean, atol=0.06)
    np.testing.assert_allclose(np.abs(found.std), generator.std, atol=0.06)

    @jit
    def theirs(generator):
        return jax.grad(lambda g: loss(fake, KEY, batch, {"generator": g})[0])(generator)

    for leaf in jax.tree.leaves(theirs(generator)):
        np.testing.assert_array_equal(leaf, 0)


def test_weights_and_other_conditions_of_the_teacher(x64):
    """One fused batch: some examples towards their own class, some towards another one."""
    process = processes.EDM(0.05, 5.0)
    generator = law(Affine, process, [0.8, -1.0, np.nan], [0.3, 1.2, 1.0])
    fake = law(Posterior, process, [0.5, -0.5, 0.0], [1.0, 1.0, 1.0])
    teacher = law(Posterior, process, [0.2, 0.9, 0.0], [0.5, 0.7, 1.0])
    swapped = law(Posterior, process, [0.9, 0.2, 0.0], [0.7, 0.5, 1.0])
    cond, weight = jnp.asarray([0, 1, 1, 2]), jnp.asarray([1.0, 0.5, 0.0, 0.0])
    batch = {"x": jnp.zeros((4, 1)), "cond": cond}

    for loss in (distillation.DiffInstruct(), distillation.SiD()):

        @jit
        def matched(teacher, other, weight, loss=loss):
            frozen = {"teacher": teacher, "fake": fake}
            return loss.matched(generator, KEY, batch, frozen, teacher_cond=other, weight=weight)[0]

        value = matched(teacher, 1 - cond, weight)
        assert np.isfinite(value)  # the example of weight 0 is not
        np.testing.assert_allclose(matched(swapped, cond, weight), value, rtol=1e-12)
        np.testing.assert_allclose(matched(teacher, 1 - cond, 2 * weight), 2 * value, rtol=1e-12)
        assert not np.isclose(matched(teacher, cond, weight), value)

    loss = distillation.FakeScoreLoss()
    frozen, ones = {"generator": generator}, jnp.asarray([1.0, 1.0, 1.0, 0.0])
    assert np.isfinite(loss.weighted(fake, KEY, batch, frozen, ones)[0])
    assert np.isnan(loss(fake, KEY, batch, frozen)[0])


def test_a_range_of_guidance_is_told_to_generator_and_fake_score(x64):
    process = processes.EDM(0.05, 5.0)
    heard = []

    class Listening(Posterior):
        def __call__(self, x, t, cond=None, *, key=None):
            heard.append(cond["scale"])
            return super().__call__(x, t, cond["label"])

    teacher = guidance.ClassifierFree(law(Posterior, process, [0.1, 0.9], [1.0, 0.5]), 1)

    class Told(Affine):
        def __call__(self, x, t, s, cond=None, *, key=None):
            heard.append(cond["scale"])
            return super().__call__(x, t, s, cond["label"])

    loss = distillation.DiffInstruct(scales=(1, 4))
    batch = {"x": jnp.zeros((3, 1)), "cond": jnp.zeros(3, int)}
    frozen = {"teacher": teacher, "fake": law(Listening, process, [0.0, 0.0], [1.0, 1.0])}
    value, _ = jit(loss)(Told(process, jnp.zeros(2), jnp.ones(2)), KEY, batch, frozen)
    assert np.isfinite(value) and len(heard) == 2 and heard[0].shape == ()
    with pytest.raises(ValueError, match="need a teacher with a `scale`"):
        loss(
            Told(process, jnp.zeros(2), jnp.ones(2)),
            KEY,
            batch,
            {**frozen, "teacher": teacher.base},
        )


def test_wrong_arguments(x64):
    process = processes.EDM()
    fake, batch = law(Posterior, process, 0.0, 1.0), {"x": jnp.zeros((2, 1))}
    loss = distillation.FakeScoreLoss()
    with pytest.raises(ValueError, match="`frozen` must have a generator 'generator', got \\[\\]"):
        loss(fake, KEY, batch, {})
    with pytest.raises(TypeError, match="`generator` must be a map from one time to another"):
        loss(fake, KEY, batch, {"generator": fake})
    other = law(Affine, processes.Cosine(), 0.0, 1.0)
    with pytest.raises(ValueError, match=r"beside it, EDM\(\), got Cosine"):
        loss(fake, KEY, batch, {"generator": other})
    with pytest.raises(TypeError, match="`denoising` must be a DenoisingLoss"):
        distillation.FakeScoreLoss(3.0)
    generator = law(Affine, process, 0.0, 1.0)
    for matching in (distillation.DiffInstruct(), distillation.SiD(), distillation.VSD()):
        with pytest.raises(ValueError, match="`frozen` must have a denoiser 'fake', got"):
            matching(generator, KEY, batch, {"teacher": fake})
        with pytest.raises(TypeError, match="`model` must be a map from one time to another"):
            matching(fake, KEY, batch, {"teacher": fake, "fake": fake})
    with pytest.raises(ValueError, match="`start` must decrease"):
        distillation.SiD(start=(1.0, 2.0))
    with pytest.raises(ValueError, match="`start` must be above 0"):
        distillation.SiD(start=0.0)
    with pytest.raises(ValueError, match="`start` must be a time, or several, got none"):
        distillation.SiD(start=())

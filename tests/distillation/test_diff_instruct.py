import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from generators import Affine, Flat, Posterior, counted, law, learned, mean_gradient, noised_kl

from jaxdiff import distillation, losses, oracles, predictions, processes
from jaxdiff._tree import jit
from jaxdiff.training import Player, init_train_state, make_train_step

KEY = jax.random.key(0)
MEAN, STD = 0.3, 0.5  # of the teacher


@pytest.mark.parametrize(
    ("a", "s", "factor", "eps_factor"),
    [(1.0, 0.9, 0.81, 0.9), (0.6, 0.8, 1.777778, 1.333333)],
)
def test_the_mean_gradient_is_that_of_kl(x64, a, s, factor, eps_factor):
    """(sigma / alpha)^2 d KL in x0, sigma / alpha in the noise; and 0 if and only if equal."""
    process, t = Flat(a, s), jnp.asarray(0.5)
    generator, teacher = law(Affine, process, -0.4, 1.3), law(Posterior, process, MEAN, STD)
    fake = law(Posterior, process, -0.4, 1.3)
    args = (generator, fake, teacher, t)

    @jit
    def slopes():
        kl = jax.grad(lambda m, s: noised_kl(process, t, m, s, MEAN, STD), argnums=(0, 1))
        return jnp.stack(kl(jnp.asarray(-0.4), jnp.asarray(1.3)))

    found = mean_gradient(distillation.DiffInstruct(), *args)
    np.testing.assert_allclose(found, factor * slopes(), rtol=1e-6)
    np.testing.assert_allclose(found / slopes(), (s / a) ** 2, rtol=1e-9)
    # The same in the noise: the weight sigma / alpha times as much.
    eps = distillation.DiffInstruct(lambda process, t, _: process.alpha(t) / process.sigma(t))
    np.testing.assert_allclose(mean_gradient(eps, *args) / slopes(), eps_factor, rtol=1e-6)
    same = law(Affine, process, MEAN, STD)
    zero = mean_gradient(
        distillation.DiffInstruct(), same, law(Posterior, process, MEAN, STD), *args[2:]
    )
    np.testing.assert_allclose(zero, 0, atol=1e-14)


def test_gradients_reach_the_generator_alone(x64):
    process = processes.EDM(0.02, 5.0)
    generator, passes = counted(law(Affine, process, [-0.4, 0.2], [1.3, 0.6]))
    fake, fake_passes = counted(law(Posterior, process, [0.1, 0.2], [0.7, 0.8]))
    teacher, teacher_passes = counted(law(Posterior, process, [0.5, -1.0], [0.5, 0.9]))
    batch = {"x": jnp.zeros((6, 1)), "cond": jnp.asarray([0, 1, 0, 1, 0, 1])}
    loss = distillation.DiffInstruct()

    @jit
    def grads(model, frozen):
        scalar = lambda model, frozen: loss(model, KEY, batch, frozen)[0]
        return jax.grad(scalar, argnums=(0, 1))(model, frozen)

    own, theirs = grads(generator, {"teacher": teacher, "fake": fake})
    assert np.all(np.asarray(own.mean) != 0) and np.all(np.asarray(own.std) != 0)
    for leaf in jax.tree.leaves(theirs):
        np.testing.assert_array_equal(leaf, 0)
    assert [len(passes), len(fake_passes), len(teacher_passes)] == [1, 1, 1]
    # Each label by itself: the gradient of one does not know of the other's teacher.
    moved = law(Posterior, process, [0.5, 3.0], [0.5, 0.9])
    again, _ = grads(generator, {"teacher": moved, "fake": fake})
    assert again.mean[0] == own.mean[0] and again.mean[1] != own.mean[1]


def test_a_generator_and_its_fake_score_learn_the_teacher(x64):
    process = processes.EDM(0.05, 5.0)
    teacher = oracles.gaussian(process, jnp.full(1, MEAN), STD**2 * jnp.eye(1))
    time_law = losses.LogNormal(-0.5, 0.7)
    weighting = losses.Uniform(predictions.F(0.5))
    players = {
        "fake": Player(
            law(Posterior, process, 1.0, 1.0),
            distillation.FakeScoreLoss(losses.DenoisingLoss(weighting, time_law)),
            optax.adam(optax.cosine_decay_schedule(0.05, 1000), b1=0.0), trainable=learned,
        ),
        "generator": Player(
            law(Affine, process, 1.0, 1.0), distillation.DiffInstruct(weighting, time_law),
            optax.adam(optax.cosine_decay_schedule(0.02, 1000), b1=0.0), trainable=learned,
        ),
    }  # fmt: skip
    state, step = init_train_state(players, KEY), make_train_step(players)
    batch = {"x": jnp.zeros((128, 1))}
    for _ in range(1000):
        state, metrics = step(state, batch, {"teacher": teacher})
    for name in players:
        model = state.players[name].model
        found = [model.mean[0], abs(model.std[0])]
        np.testing.assert_allclose(found, [MEAN, STD], atol=0.02)
    assert metrics["generator/gap"] < 1e-3

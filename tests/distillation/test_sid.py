import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from generators import Affine, Flat, Posterior, counted, law, learned, mean_gradient, quadrature

from jaxdiff import distillation, losses, oracles, predictions, processes
from jaxdiff._tree import jit
from jaxdiff.training import Player, init_train_state, make_train_step

KEY = jax.random.key(0)
MEAN, STD = 0.3, 0.5
ALPHAS = [0.5, 1.0, 1.2]


def plain(alpha):
    return distillation.SiD(alpha, normalise=False)


def gain(a, b, std):
    return a * std**2 / (a**2 * std**2 + b**2)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(("a", "b"), [(1.0, 0.9), (0.6, 0.8)])
def test_gradients_of_gaussian_laws(x64, alpha, a, b):
    """The mean loss is a polynomial in the generator's mean h and deviation q; see the formula."""
    process, t = Flat(a, b), jnp.asarray(0.5)
    teacher, fake = law(Posterior, process, MEAN, STD), law(Posterior, process, -0.2, 1.1)
    k_p, k_q = gain(a, b, STD), gain(a, b, 1.1)

    def expected(h, q):
        c1, c0 = k_p - k_q, MEAN * (1 - a * k_p) + 0.2 * (1 - a * k_q)
        f1, f0 = k_p - alpha * c1, MEAN * (1 - a * k_p) - alpha * c0
        square = a**2 * q**2 + b**2 + a**2 * h**2
        first = c0 * (f0 + f1 * a * h - h)
        return first + c1 * (f0 * a * h + f1 * square - a * (q**2 + h**2))

    for h, q in ((0.7, 0.4), (-0.2, 1.1)):
        found = mean_gradient(plain(alpha), law(Affine, process, h, q), fake, teacher, t)
        slopes = jax.grad(expected, argnums=(0, 1))(h, q)
        np.testing.assert_allclose(found, slopes, rtol=1e-9)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_equal_widths_move_the_mean_whatever_alpha(x64, alpha):
    """d loss / dm = -(1 - a k)^2 (mu - m)."""
    a, b, m = 0.6, 0.8, -0.4
    process, t = Flat(a, b), jnp.asarray(0.5)
    teacher, fake = law(Posterior, process, MEAN, STD), law(Posterior, process, m, STD)
    found = mean_gradient(plain(alpha), law(Affine, process, m, STD), fake, teacher, t)
    kept = 1 - a * gain(a, b, STD)
    np.testing.assert_allclose(found[0], -(kept**2) * (MEAN - m), rtol=1e-9)


@pytest.mark.parametrize(
    ("alpha", "std", "level", "sign"),
    [(0.5, 1.2, 0.9, 1), (1.0, 1.2, 0.9, 1), (1.2, 1.2, 0.9, 1), (1.2, 0.2, 0.9, -1),
     (1.0, 20.0, 1.5, 1), (1.2, 20.0, 1.5, -1)],
)  # fmt: skip
def test_the_width_moves_the_right_way_but_for_alpha_above_one_and_much_too_wide(
    x64, alpha, std, level, sign
):
    """d loss / ds = -2 s D ((1 - a_tau) + alpha D), D = a_tau - a_s; tau = 0.05 in the last two.

    A descent takes s down where it is positive. The last of them is the wrong sign.
    """
    tau = 0.05 if std > 10 else STD
    process, t = Flat(1.0, level), jnp.asarray(0.5)
    teacher, fake = law(Posterior, process, MEAN, tau), law(Posterior, process, MEAN, std)
    found = mean_gradient(plain(alpha), law(Affine, process, MEAN, std), fake, teacher, t)[1]
    a_tau = gain(1, level, tau)
    apart = a_tau - gain(1, level, std)
    np.testing.assert_allclose(found, -2 * std * apart * (1 - a_tau + alpha * apart), rtol=1e-6)
    assert np.sign(found) == sign


def test_with_an_exact_fake_score_the_value_is_a_share_of_fishers_divergence(x64):
    """(1 - alpha) E |p - s|^2, the residual of a regression being orthogonal to what regresses."""
    process, t = Flat(0.6, 0.8), jnp.asarray(0.5)
    teacher, fake = law(Posterior, process, MEAN, STD), law(Posterior, process, -0.4, 1.3)

    (z, eps), weights = quadrature()[0].T, quadrature()[1]

    @jit
    def means(alpha):
        one = lambda z, eps: plain(alpha).per_example(
            fake, teacher, (-0.4 + 1.3 * z)[None], eps[None], t
        )
        return [weights @ each for each in jax.vmap(one)(z, eps)]

    for alpha in ALPHAS:
        value, gap = means(alpha)
        np.testing.assert_allclose(value, (1 - alpha) * gap, atol=1e-12)


def test_the_normaliser_is_a_constant_of_each_example(x64):
    process, t = processes.EDM(0.02, 5.0), jnp.asarray(0.8)
    teacher, fake = law(Posterior, process, MEAN, STD), law(Posterior, process, -0.4, 1.3)
    x0, eps = jax.random.normal(KEY, (2, 4))

    def slope(loss):
        return jax.grad(lambda x0: loss.per_example(fake, teacher, x0, eps, t)[0])(x0)

    off = np.mean(np.abs(teacher(x0 + 0.8 * eps, t) - x0))
    np.testing.assert_allclose(slope(distillation.SiD()), slope(plain(1.2)) / off, rtol=1e-12)
    floored = distillation.SiD(floor=100.0)
    np.testing.assert_allclose(slope(floored), slope(plain(1.2)) / 100, rtol=1e-12)


def test_gradients_go_through_the_scores_to_the_generator_alone(x64):
    process = processes.EDM(0.02, 5.0)
    generator, passes = counted(law(Affine, process, -0.4, 1.3))
    teacher, teacher_passes = counted(law(Posterior, process, MEAN, STD))
    fake, fake_passes = counted(law(Posterior, process, 0.1, 0.7))
    loss, batch = distillation.SiD(start=2.5), {"x": jnp.zeros((6, 1))}

    @jit
    def grads(model, frozen):
        scalar = lambda model, frozen: loss(model, KEY, batch, frozen)[0]
        return jax.grad(scalar, argnums=(0, 1))(model, frozen)

    own, theirs = grads(generator, {"teacher": teacher, "fake": fake})
    assert own.mean[0] != 0 and own.std[0] != 0
    for leaf in jax.tree.leaves(theirs):
        np.testing.assert_array_equal(leaf, 0)
    assert [len(passes), len(teacher_passes), len(fake_passes)] == [1, 1, 1]


@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_a_generator_and_its_fake_score_learn_the_teacher(x64, alpha):
    """From a step of the teacher itself, at a noise level of 2.5: two classes."""
    process = processes.EDM(0.05, 10.0)
    teacher = oracles.gaussian_mixture(
        process, jnp.asarray([[MEAN], [-1.0]]), jnp.asarray([[[STD**2]], [[1.0]]]), labels=[0, 1]
    )
    time_law = losses.LogNormal(-0.3, 0.8)
    denoising = losses.DenoisingLoss(losses.Uniform(predictions.F(0.5)), time_law)
    rate = lambda most: optax.adam(optax.cosine_decay_schedule(most, 800), b1=0.0, b2=0.999)
    players = {
        "fake": Player(
            law(Posterior, process, [0.0, 0.0], [1.0, 1.0]),
            distillation.FakeScoreLoss(denoising, start=2.5), rate(0.05), trainable=learned,
        ),
        "generator": Player(
            law(Affine, process, [0.0, -0.6], [0.8, 0.7]),
            distillation.SiD(alpha, time_law, start=2.5), rate(0.03), trainable=learned,
        ),
    }  # fmt: skip
    state, step = init_train_state(players, KEY), make_train_step(players)
    batch = {"x": jnp.zeros((128, 1)), "cond": jnp.arange(128) % 2}
    for _ in range(800):
        state, metrics = step(state, batch, {"teacher": teacher})
    found = state.players["generator"].model
    np.testing.assert_allclose(found.mean, [MEAN, -1.0], atol=0.05)
    np.testing.assert_allclose(np.abs(found.std), [STD, 1.0], atol=0.06)
    assert metrics["generator/gap"] < 5e-3


def test_wrong_arguments():
    with pytest.raises(ValueError, match="`floor` must be above 0"):
        distillation.SiD(floor=-1.0)
    with pytest.raises(TypeError, match="`time_law` must be a TimeLaw"):
        distillation.SiD(time_law=3.0)

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from generators import Affine, Flat, Posterior, counted, law, learned, mean_gradient

from jaxdiff import distillation, guidance, losses, predictions, processes
from jaxdiff._tree import jit
from jaxdiff.denoiser import Denoiser
from jaxdiff.flow_map import FlowMap
from jaxdiff.processes import GaussianProcess
from jaxdiff.training import Player, init_train_state, make_train_step

KEY = jax.random.key(0)
MEAN, STD = 0.3, 0.5


class Point(FlowMap):
    """The same example from any noise."""

    process: GaussianProcess
    x: jax.Array

    def __call__(self, x, t, s, cond=None, *, key=None):
        return self.x


class Known(Denoiser):
    """The denoiser of point masses mean + std c, whose condition is c; of N(mean, std^2) for null.

    What a fake score with views learns exactly.
    """

    process: GaussianProcess
    mean: jax.Array
    std: jax.Array

    def __call__(self, x, t, cond=None, *, key=None):
        law = Posterior(self.process, self.mean[None], self.std[None])
        seen = self.mean + self.std * cond["view"]
        return jnp.where(cond["seen"], seen * jnp.ones_like(x), law(x, t))


class Views(FlowMap):
    """mean + std c for a condition c, whatever the noise."""

    process: GaussianProcess
    mean: jax.Array
    std: jax.Array

    def __call__(self, x, t, s, cond=None, *, key=None):
        return (self.mean + self.std * cond["view"]) * jnp.ones_like(x)


def test_sds_seeks_the_mode(x64):
    """Mean gradient w sigma alpha (theta - mu) / S_t in the noise; at its zero no width is left."""
    process, t = Flat(0.6, 0.8), jnp.asarray(0.5)
    teacher = law(Posterior, process, MEAN, STD)
    total = 0.6**2 * STD**2 + 0.8**2
    for m, s in ((1.1, 1e-12), (-0.2, 0.4)):
        generator = law(Affine, process, m, s)
        found = mean_gradient(distillation.SDS(), generator, None, teacher, t)
        # sigma^2 (eps_hat - eps): to the mean, and every width to 0.
        expected = 0.8**2 * 0.8 * 0.6 * np.array([m - MEAN, s]) / total
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_sds_converges_to_the_mean_whatever_the_variance(x64):
    process = processes.Cosine()
    generator = law(Affine, process, [1.0, -1.0], [1.0, 0.5])
    teacher, passes = counted(law(Posterior, process, [MEAN, 0.7], [STD, 1.5]))
    players = {
        "generator": Player(
            generator, distillation.SDS(),
            optax.adam(optax.cosine_decay_schedule(0.02, 600)), trainable=learned,
        )
    }  # fmt: skip
    state, step = init_train_state(players, KEY), make_train_step(players)
    batch = {"x": jnp.zeros((64, 1)), "cond": jnp.arange(64) % 2}
    for _ in range(600):
        state, _ = step(state, batch, {"teacher": teacher})
    found = state.players["generator"].model
    np.testing.assert_allclose(found.mean, [MEAN, 0.7], atol=0.04)
    np.testing.assert_allclose(found.std, 0, atol=0.04)
    assert len(passes) == 1


def test_noise_in_a_score_is_minus_eps_over_sigma(x64):
    """(x_g - D) alpha / sigma^2 = -eps / sigma - score."""
    process, t = Flat(0.6, 0.8), jnp.asarray(0.5)
    teacher = law(Posterior, process, MEAN, STD)
    x0, eps = jax.random.normal(KEY, (2, 1))

    def slope(loss):
        return jax.grad(lambda x0: loss.per_example(None, teacher, x0, eps, t)[0])(x0)

    x = process.marginal(x0, eps, t)
    score = teacher.predict(predictions.Score(), x, t)
    in_scores = distillation.SDS(lambda process, t, _: process.alpha(t) / process.sigma(t) ** 2)
    np.testing.assert_allclose(slope(in_scores), -eps / 0.8 - score, rtol=1e-9)
    eps_hat = teacher.predict(predictions.Eps(), x, t)
    np.testing.assert_allclose(slope(distillation.SDS()), 0.8**2 * (eps_hat - eps), rtol=1e-9)
    # Trap: eps beside a score is another sign, and on average drives away from the mean.
    off, signs = jnp.full(1, MEAN + 0.5), jnp.asarray([[-1.0], [1.0]])
    noisy = jax.vmap(lambda eps: process.marginal(off, eps, t))(signs)
    scores = jax.vmap(lambda x: teacher.predict(predictions.Score(), x, t))(noisy)
    away = 0.6 * 0.5 / (0.6**2 * STD**2 + 0.8**2)
    np.testing.assert_allclose(jnp.mean(-signs / 0.8 - scores), away, rtol=1e-9)
    np.testing.assert_allclose(jnp.mean(scores - signs), -away, rtol=1e-9)


def test_vsd_is_sds_for_a_fake_score_that_knows_the_example(x64):
    process = processes.Cosine()
    teacher = guidance.ClassifierFree(
        law(Posterior, process, [MEAN, 0.1, 0.0], [STD, 0.7, 1.0]), 2, scale=7.5
    )
    x = jnp.asarray([0.4, -1.2])
    generator = Point(process, x)
    point = law(Posterior, process, 0.0, 0.0)

    class Mass(Posterior):
        def __call__(self, x_t, t, cond=None, *, key=None):
            return x + 0 * point(x_t, t)

    frozen = {"teacher": teacher, "fake": Mass(process, point.mean, point.std)}
    batch = {"x": jnp.zeros((5, 2)), "cond": jnp.asarray([0, 1, 1, 0, 1])}

    def grads(loss):
        return jit(jax.grad(lambda model: loss(model, KEY, batch, frozen)[0]))(generator).x

    np.testing.assert_array_equal(grads(distillation.VSD()), grads(distillation.SDS()))
    assert np.all(np.asarray(grads(distillation.SDS())) != 0)


def test_vsd_has_no_gradient_where_the_laws_are_one(x64):
    process, t = Flat(0.6, 0.8), jnp.asarray(0.5)
    teacher = law(Posterior, process, MEAN, STD)
    same = law(Affine, process, MEAN, STD)
    zero = mean_gradient(distillation.VSD(), same, teacher, teacher, t)
    np.testing.assert_array_equal(zero, 0)


@pytest.mark.parametrize("lam", [0.0, 0.25, 0.6, 1.0])
def test_esd_keeps_the_variance_that_its_entropy_pays_for(x64, lam):
    """s^2 = max(0, lam tau^2 - (1 - lam) sigma^2 / alpha^2), the fake score exact at every step."""
    process, t, tau = Flat(0.9, 0.5), jnp.asarray(0.5), 1.2
    teacher = law(Posterior, process, MEAN, tau)
    loss = distillation.ESD(lam, null_cond={"seen": False})
    views, weights = np.polynomial.hermite_e.hermegauss(8)
    weights = jnp.asarray(weights / weights.sum())

    @jit
    def descended(m, s):
        def move(parameters, _):
            fake = Known(process, *parameters)

            def mean(parameters):
                def one(view, eps):
                    x0 = (parameters[0] + parameters[1] * view)[None]
                    cond = {"view": view, "seen": jnp.asarray(True)}
                    return loss.per_example(fake, teacher, x0, eps[None], t, cond)[0]

                each = jax.vmap(jax.vmap(one, (None, 0)), (0, None))
                return weights @ each(jnp.asarray(views), jnp.asarray(views)) @ weights

            slope = jax.grad(mean)(parameters)
            return tuple(p - g for p, g in zip(parameters, slope, strict=True)), None

        return jax.lax.scan(move, (m, s), None, length=1500)[0]

    m, s = descended(jnp.asarray(-0.5), jnp.asarray(0.8))
    expected = max(0.0, lam * tau**2 - (1 - lam) * (0.5 / 0.9) ** 2)
    np.testing.assert_allclose([m, s], [MEAN, np.sqrt(expected)], atol=1e-6)


def test_esd_is_between_vsd_with_and_without_views(x64):
    """By one pass of the fake score over both conditions."""
    process = processes.EDM(0.02, 5.0)
    fake, passes = counted(Known(process, jnp.asarray(0.2), jnp.asarray(1.3)))
    generator = Views(process, jnp.asarray(0.2), jnp.asarray(1.3))
    view = jax.random.normal(KEY, (4,))
    teacher = Blind(process, jnp.full(1, MEAN), jnp.full(1, STD))
    frozen = {"teacher": teacher, "fake": fake}

    def grads(loss, seen):
        batch = {"x": jnp.zeros((4, 1)), "cond": {"view": view, "seen": jnp.full(4, seen)}}
        return np.array(
            jit(jax.grad(lambda model: loss(model, KEY, batch, frozen)[0]))(generator).std
        )

    esd = lambda lam: distillation.ESD(lam, null_cond={"seen": False})
    passes.clear()
    half = grads(esd(0.5), True)
    assert len(passes) == 1
    with_views, without = (grads(distillation.VSD(), seen) for seen in (True, False))
    np.testing.assert_allclose(grads(esd(0.0), True), with_views, rtol=1e-10)
    np.testing.assert_allclose(grads(esd(1.0), True), without, rtol=1e-10)
    np.testing.assert_allclose(half, (with_views + without) / 2, rtol=1e-10)
    np.testing.assert_allclose(with_views, grads(distillation.SDS(), True), rtol=1e-10)


class Blind(Posterior):
    """A teacher without conditions."""

    def __call__(self, x, t, cond=None, *, key=None):
        return super().__call__(x, t)


def test_wrong_arguments():
    process = processes.EDM()
    generator, batch = law(Affine, process, 0.0, 1.0), {"x": jnp.zeros((2, 1))}
    with pytest.raises(ValueError, match="`frozen` must have a denoiser 'teacher', got \\[\\]"):
        distillation.SDS()(generator, KEY, batch, {})
    with pytest.raises(ValueError, match="`lam` must be at least 0 and at most 1, got 2"):
        distillation.ESD(2.0, null_cond=1)
    with pytest.raises(TypeError, match="`weighting` must be a function, got the class"):
        distillation.SDS(losses.Uniform)
    with pytest.raises(TypeError, match="`time_law` must be a TimeLaw"):
        distillation.VSD(time_law="uniform")

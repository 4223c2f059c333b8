import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generators import Affine, Flat, Posterior, counted, law, mean_gradient

from jaxdiff import distillation, processes
from jaxdiff._tree import jit

KEY = jax.random.key(0)
MEAN, STD = 0.3, 0.5


def test_without_the_normaliser_it_is_diff_instruct(x64):
    process, t = Flat(0.6, 0.8), jnp.asarray(0.5)
    args = (
        law(Affine, process, -0.4, 1.3), law(Posterior, process, -0.2, 1.1),
        law(Posterior, process, MEAN, STD), t,
    )  # fmt: skip
    plain = mean_gradient(distillation.DMD(normalise=False), *args)
    np.testing.assert_allclose(plain, mean_gradient(distillation.DiffInstruct(), *args), rtol=1e-12)
    # A floor above all of the normaliser is a constant one, and one below it is none.
    floored = mean_gradient(distillation.DMD(floor=1e6), *args)
    np.testing.assert_allclose(floored, 1e-6 * plain, rtol=1e-9)


def test_the_normaliser_turns_the_gradient_of_the_scale_but_keeps_the_zero(x64):
    """Sixteen numbers, N(1, 0.7^2) and N(-0.3, 1.2^2), noise of 5: raw (-20.4, 0.675) in all."""
    d, t, count = 16, jnp.asarray(0.5), 40000
    process = Flat(1.0, 5.0)
    teacher = law(Posterior, process, 1.0, 0.7)
    half = jax.random.normal(KEY, (2, count, d))
    z, eps = jnp.concatenate([half, -half], axis=1)

    @jit
    def slopes(loss, m, s, fake):
        def mean(m, s):
            one = lambda z, eps: loss.per_example(fake, teacher, m + s * z, eps, t)[0]
            return d * jax.vmap(one)(z, eps).mean()  # of sums over numbers

        return jnp.stack(jax.grad(mean, argnums=(0, 1))(m, s))

    fake = law(Posterior, process, -0.3, 1.2)
    args = jnp.asarray(-0.3), jnp.asarray(1.2), fake
    raw = slopes(distillation.DMD(normalise=False), *args)
    normalised = slopes(distillation.DMD(), *args)
    np.testing.assert_allclose(raw, [-20.40, 0.675], rtol=0.01, atol=0.04)
    np.testing.assert_allclose(normalised, [-14.54, -0.076], rtol=0.01, atol=0.03)
    assert raw[1] > 0 > normalised[1]
    same = jnp.asarray(1.0), jnp.asarray(0.7), teacher
    np.testing.assert_array_equal(slopes(distillation.DMD(), *same), 0)


def test_pairs_hold_the_generator_to_the_teachers_samples(x64):
    """By one pass over both halves; the gradient is the sum of that of either."""
    process = processes.EDM(0.02, 5.0)
    generator, passes = counted(law(Affine, process, [-0.4, 0.2], [1.3, 0.6]))
    frozen = {
        "teacher": law(Posterior, process, [0.5, -1.0], [0.5, 0.9]),
        "fake": law(Posterior, process, [0.1, 0.2], [0.7, 0.8]),
    }
    noise = jax.random.normal(KEY, (6, 1))
    cond = jnp.asarray([0, 1, 0, 1, 0, 1])
    batch = {"x": jnp.zeros((6, 1)), "cond": cond, "noise": noise, "pair": jnp.sin(noise)}

    def grads(loss):
        return jit(jax.grad(lambda model: loss(model, KEY, batch, frozen)[0]))(generator)

    both, alone = grads(distillation.DMD(regression=0.25)), grads(distillation.DMD())
    passes.clear()
    value, metrics = jit(distillation.DMD(regression=0.25))(generator, KEY, batch, frozen)
    assert len(passes) == 1

    def apart(model):
        start = jnp.sin(noise) + 5.0 * noise  # alpha pair + sigma noise
        made = model.mean[cond][:, None] + model.std[cond][:, None] * start / 5.0
        return jnp.mean((made - jnp.sin(noise)) ** 2)

    np.testing.assert_allclose(metrics["regression"], apart(generator), rtol=1e-12)
    pulled = jax.grad(apart)(law(Affine, process, [-0.4, 0.2], [1.3, 0.6]))
    np.testing.assert_allclose(both.mean, alone.mean + 0.25 * pulled.mean, rtol=1e-10)
    np.testing.assert_allclose(both.std, alone.std + 0.25 * pulled.std, rtol=1e-10)


def test_wrong_arguments():
    process = processes.EDM()
    generator, fake = law(Affine, process, 0.0, 1.0), law(Posterior, process, 0.0, 1.0)
    frozen, batch = {"teacher": fake, "fake": fake}, {"x": jnp.zeros((2, 1))}
    with pytest.raises(ValueError, match="needs pairs.*got none of \\['noise', 'pair'\\]"):
        distillation.DMD(regression=1.0)(generator, KEY, batch, frozen)
    with pytest.raises(ValueError, match="must have the shape of batch\\['x'\\]"):
        pairs = {"noise": jnp.zeros((1, 1)), "pair": jnp.zeros((2, 1))}
        distillation.DMD(regression=1.0)(generator, KEY, {**batch, **pairs}, frozen)
    with pytest.raises(ValueError, match="pairs of one guidance scale, got `scales` too"):
        distillation.DMD(regression=1.0, scales=(1, 3))
    with pytest.raises(ValueError, match="`floor` must be above 0"):
        distillation.DMD(floor=0.0)

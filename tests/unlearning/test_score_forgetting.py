"""Score forgetting on Gaussian classes, where the fake score of a generator is known."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import distillation, processes, unlearning
from jaxdiff.denoiser import Denoiser
from jaxdiff.flow_map import FlowMap
from jaxdiff.training import Frozen

KEY = jax.random.key(0)
EDM = processes.EDM(0.137, 13.0)  # the levels of the paper
MEANS, STDS = np.asarray([-2.0, 0.5, 1.5]), np.asarray([0.5, 0.3, 0.8])
FORGET, OTHER = 0, 2


class Classes(Denoiser):
    """The denoiser of N(means[c], stds[c]^2) for every class c."""

    means: jax.Array
    stds: jax.Array
    process: processes.EDM = EDM

    def __call__(self, x, t, cond=None, *, key=None):
        del key
        mean, variance = self.means[cond], self.stds[cond] ** 2
        return mean + variance / (variance + t**2) * (x - mean)


class Affine(FlowMap):
    """means[c] + stds[c] z of noise z at the last level."""

    means: jax.Array
    stds: jax.Array
    process: processes.EDM = EDM

    def __call__(self, x, t, s, cond=None, *, key=None):
        del s, key
        return self.means[cond] + self.stds[cond] * x / t


def batch(count, kept=(1, 2)):
    cond = np.resize(np.asarray(kept, np.int32), count)
    forget = {"x": np.zeros((count, 1)), "cond": np.full(count, FORGET, np.int32)}
    return {"x": np.zeros((count, 1)), "cond": cond, "forget": forget}


def slope(loss, model, batch, frozen, key=KEY):
    def total(model):
        return loss(model, key, batch, frozen)[0]

    return eqx.filter_value_and_grad(total)(model)


@pytest.mark.parametrize("matching", [distillation.SiD(), distillation.SiD(1.0)], ids=str)
def test_without_forgetting_it_is_the_distillation_of_what_is_kept(x64, matching):
    """The same draws, to rounding: the generator's loss, its gradient, and the fake score's."""
    teacher, fake = Classes(*map(jnp.asarray, (MEANS, STDS))), Classes(jnp.zeros(3), jnp.ones(3))
    generator = Affine(jnp.asarray([0.1, 0.2, 0.3]), jnp.asarray([0.9, 1.0, 1.1]))
    frozen = Frozen({"teacher": teacher, "fake": fake, "generator": generator})
    both = batch(16)
    kept = {"x": both["x"], "cond": both["cond"]}
    loss = unlearning.ScoreForgetting(unlearning.Always(OTHER), matching, forget=0.0)
    for ours, plain, model in (
        (loss, matching, generator),
        (unlearning.ScoreForgettingFake(forget=0.0), distillation.FakeScoreLoss(), fake),
    ):
        found, expected = (
            slope(loss, model, rows, frozen) for loss, rows in ((ours, both), (plain, kept))
        )
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-12)
        for a, b in zip(*map(jax.tree.leaves, (found[1], expected[1])), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_the_mean_moves_to_the_overrides_whatever_alpha_is(x64):
    """d l / d mean = -k^2 (mu_o - m) / omega with one spread, k = 1 - a k_p; no mean of f in it."""
    stds = jnp.full(3, 0.5)
    teacher = Classes(jnp.asarray(MEANS), stds)
    t = 0.7
    fake = Classes(jnp.asarray(MEANS), stds)

    for alpha in (0.5, 1.0, 1.2):
        loss = distillation.SiD(alpha, normalise=False)

        def total(mean, loss=loss):
            z = jax.random.normal(KEY, (2000, 1), jnp.float64)

            def one(z, eps):
                x0 = mean + stds[FORGET] * z
                return loss.per_example(fake, teacher, x0, eps, t, FORGET, OTHER)[0]

            return jax.vmap(one)(z, jax.random.normal(jax.random.key(1), z.shape)).mean()

        kappa = 1 - 0.25 / (0.25 + t**2)
        expected = -(kappa**2) * (MEANS[OTHER] - MEANS[FORGET])
        found = jax.grad(total)(jnp.asarray(MEANS[FORGET]))
        np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize(
    "matching", [distillation.SiD(), distillation.SiD(1.0), distillation.DiffInstruct()], ids=str
)
@pytest.mark.parametrize("override", [OTHER, FORGET])
def test_with_an_exact_fake_score_it_ends_at_the_overrides_law(matching, override):
    """Kept classes at their own laws; with the class itself as override nothing is forgotten."""
    teacher = Classes(*(jnp.asarray(v, jnp.float32) for v in (MEANS, STDS)))
    loss = unlearning.ScoreForgetting(unlearning.Always(override), matching, forget=1.0)
    rows = jax.tree.map(jnp.asarray, batch(512))
    rows = jax.tree.map(lambda v: v.astype(jnp.float32) if v.dtype == jnp.float64 else v, rows)

    @jax.jit
    def run(table):
        def step(n, table):
            frozen = Frozen({"teacher": teacher, "fake": Classes(*table)})

            def total(table):
                return loss(Affine(*table), jax.random.fold_in(KEY, n), rows, frozen)[0]

            g = jax.grad(total)(table)
            # Steps of one length: the loss is steep at small levels.
            return table - 0.03 * 0.998**n * g / (jnp.abs(g) + 1e-3)

        return jax.lax.fori_loop(0, 3000, step, table)

    means, stds = run(jnp.stack([jnp.asarray(MEANS, jnp.float32), jnp.ones(3)]))
    law = [override, 1, 2]
    np.testing.assert_allclose(means, MEANS[law], atol=0.05)
    np.testing.assert_allclose(stds, STDS[law], atol=0.05)


def test_overrides():
    cond = jnp.zeros(600, jnp.int32)
    x = jnp.asarray(np.resize([[-1.0], [1.0]], (600, 1)))
    other = unlearning.AnyOf([1, 4])(KEY, cond, x)
    assert set(np.asarray(other)) == {1, 4} and abs((np.asarray(other) == 1).mean() - 0.5) < 0.1
    assert other.dtype == jnp.int32
    logits = lambda x: jnp.stack([100.0, x[0], -x[0], 0.0])
    alike = unlearning.MostAlike(logits, [1, 2])(KEY, cond, x)
    np.testing.assert_array_equal(alike, np.resize([2, 1], 600))  # and never 0 itself
    many = {"label": jnp.asarray([2, 1, 0]), "size": jnp.ones(3)}
    after = unlearning.NextClass(3)(KEY, many, x[:3])
    np.testing.assert_array_equal(after["label"], [0, 2, 1])
    np.testing.assert_array_equal(after["size"], 1)
    always = unlearning.Always({"label": 3})(KEY, many, x[:3])
    np.testing.assert_array_equal(always["label"], 3)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxdiff import distillation
from jaxdiff.distillation._adversarial import critic_of, logits


@pytest.mark.parametrize("level", [0.0, 1.0, 4.0])
def test_the_best_critics_measure_total_variation_and_jensen_shannon(x64, level):
    """Of N(0, 1) and N(1/2, 1), both noised to a level: any other logit at any x is worse."""
    x = jnp.linspace(-30, 30, 20001)
    std, width = np.hypot(1.0, level), x[1] - x[0]
    p, q = stats.norm.pdf(x, 0, std), stats.norm.pdf(x, 0.5, std)

    def total(adversarial, logit):
        real = adversarial.critic(logit, jnp.full_like(logit, -1e9))
        fake = adversarial.critic(jnp.full_like(logit, 1e9), logit)
        return jnp.sum(p * real + q * fake) * width

    apart = 2 * stats.norm.cdf(0.25 / std) - 1
    best = total(distillation.Hinge(), jnp.sign(p - q))
    np.testing.assert_allclose(best, 2 - 2 * apart, rtol=1e-4)
    known = {0.0: 1.6052, 1.0: 1.7194, 4.0: 1.9033}
    np.testing.assert_allclose(best, known[level], atol=1e-4)
    ratio = stats.norm.logpdf(x, 0, std) - stats.norm.logpdf(x, 0.5, std)
    half = (p + q) / 2
    both = jnp.sum(p * jnp.log(p / half) + q * jnp.log(q / half)) * width / 2
    soft = total(distillation.NonSaturating(), jnp.asarray(ratio))
    np.testing.assert_allclose(soft, 2 * np.log(2) - 2 * both, rtol=1e-9)
    for shift in (-0.3, 0.3):
        assert total(distillation.Hinge(), jnp.sign(p - q) + shift) >= best
        assert total(distillation.NonSaturating(), ratio + shift) > soft


def test_a_maker_of_examples_climbs_the_logit():
    logit = jnp.linspace(-3, 3, 7)
    for adversarial, slope in (
        (distillation.Hinge(), -jnp.ones(7)),
        (distillation.NonSaturating(), -jax.nn.sigmoid(-logit)),
    ):
        found = jax.grad(lambda v, a=adversarial: a.generator(v).sum())(logit)
        np.testing.assert_allclose(found, slope, rtol=1e-6)


def test_wrong_critics():
    with pytest.raises(ValueError, match="`frozen` must have a critic 'critic'.*got \\['a'\\]"):
        critic_of({"a": 1})
    with pytest.raises(TypeError, match="critic"):
        critic_of({"critic": 3.0})
    with pytest.raises(ValueError, match=r"a scalar logit for an example, got shape \(2,\)"):
        logits(lambda x, t, cond: x, jnp.ones((3, 2)), jnp.ones(3), None)

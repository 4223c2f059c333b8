import jax
import jax.numpy as jnp
import numpy as np
from cases import mixture

from jaxdiff import guidance, processes
from jaxdiff.predictions import Score


def test_scale_one_is_conditional_and_zero_unconditional(x64):
    oracle = mixture(processes.VP())
    x, t, cond = jnp.asarray([0.3, -0.8]), jnp.asarray(0.4), jnp.asarray(1)
    at = lambda scale: guidance.ClassifierFree(oracle, null_cond=2, scale=scale)(x, t, cond)
    np.testing.assert_allclose(at(1.0), oracle(x, t, cond), rtol=1e-12)
    np.testing.assert_allclose(at(0.0), oracle(x, t), rtol=1e-12)


def test_guided_score_adds_the_class_gradient(x64):
    """score = grad log p_t(x) + scale * grad log p(c | x_t), with both known exactly."""
    oracle = mixture(processes.RectifiedFlow())
    x, t = jnp.asarray([0.3, -0.8]), jnp.asarray(0.5)
    guided = guidance.ClassifierFree(oracle, null_cond=2, scale=3.5)
    class_gradient = jax.grad(lambda x: oracle.class_log_posterior(x, t)[1])(x)
    expected = jax.grad(oracle.log_prob)(x, t) + 3.5 * class_gradient
    np.testing.assert_allclose(guided.predict(Score(), x, t, jnp.asarray(1)), expected, rtol=1e-9)

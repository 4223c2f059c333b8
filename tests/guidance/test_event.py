"""Events with the covariance of Tweedie's formula: exact on Gaussians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import gaussian, mixture
from numpy.testing import assert_allclose
from scipy.integrate import quad
from scipy.stats import norm, truncnorm

import jaxdiff
from jaxdiff import guidance, processes

KEY = jax.random.key(0)
MATRIX = np.array([[1.0, -0.5, 0.3], [0.2, 0.4, 1.0]])


def linear(x0):
    return jnp.asarray(MATRIX) @ x0


def first(x0):
    return x0[:1]


@pytest.mark.parametrize("process", [processes.VP(), processes.RectifiedFlow()])
@pytest.mark.parametrize("std", [0.0, 0.4])
def test_numbers_that_are_known_are_conditioned_on_exactly(x64, process, std):
    laws, t = gaussian(process), jnp.asarray(0.6)
    x, y = jnp.asarray([0.3, -0.2, 0.9]), jnp.asarray([0.7, -0.3])
    guided = guidance.EventGuidance(laws, jax.tree_util.Partial(linear), std=std)
    found = jax.jit(lambda g, x: g(x, t, {"y": y}))(guided, x)
    exact = laws.condition(jnp.asarray(MATRIX), y, max(std, 1e-7))
    assert_allclose(found, exact(x, t), rtol=1e-6 if std == 0 else 1e-9)


def test_a_half_space_is_conditioned_on_exactly(x64):
    """E[x0 | x_t, x0_1 > y] by an integral over the first coordinate."""
    process, t = processes.VP(), jnp.asarray(0.6)
    laws, x = gaussian(process), jnp.asarray([0.3, -0.2, 0.9])
    factor = float(process.sigma(t) ** 2 / process.alpha(t))
    covariance = factor * np.asarray(jax.jacfwd(lambda x: laws(x, t))(x))
    mean = np.asarray(laws(x, t))
    for y in (mean[0] + 0.1, mean[0] + 30 * covariance[0, 0] ** 0.5):  # and in the far tail
        guided = guidance.EventGuidance(laws, jax.tree_util.Partial(first), above=True)
        found = guided(x, t, {"y": jnp.asarray([y])})
        std = covariance[0, 0] ** 0.5
        low = (y - mean[0]) / std
        if low < 5:
            weight = quad(lambda u: norm.pdf(u), low, np.inf)[0]
            z = quad(lambda u: u * norm.pdf(u), low, np.inf)[0] / weight
        else:
            z = truncnorm.mean(low, np.inf)
        expected = mean + covariance[:, 0] / std * z
        assert_allclose(found, expected, rtol=1e-6)


def test_samples_are_of_the_half_space():
    """Of a correlated Gaussian in the plane: its truncated law, in both coordinates."""
    laws = jaxdiff.oracles.gaussian(
        processes.VP(), jnp.zeros(2), jnp.asarray([[1.0, 0.8], [0.8, 1.0]])
    )
    guided = guidance.EventGuidance(laws, jax.tree_util.Partial(first), above=True)
    cond = {"y": jnp.full((4000, 1), 0.5)}
    x = np.asarray(jaxdiff.sample(KEY, guided, (2,), 4000, cond=cond, times=150).x)
    law = truncnorm(0.5, np.inf)
    assert (x[:, 0] > 0.45).mean() > 0.99
    assert_allclose(x[:, 0].mean(), law.mean(), atol=0.03)
    assert_allclose(x[:, 0].std(), law.std(), atol=0.03)
    assert_allclose(x[:, 1].mean(), 0.8 * law.mean(), atol=0.03)


@pytest.mark.usefixtures("unchecked")
def test_errors():
    laws = mixture(processes.VP(), jnp.float32)
    x, t = jnp.ones(2), jnp.asarray(0.5)
    guided = guidance.EventGuidance(laws, jax.tree_util.Partial(first))
    with pytest.raises(ValueError, match="`y` must have the shape of what `function` returns"):
        guided(x, t, {"y": jnp.ones(2)})
    with pytest.raises(ValueError, match="the entries 'y'"):
        guided(x, t)
    with pytest.raises(ValueError, match="`std` must be at least 0"):
        guidance.EventGuidance(laws, jax.tree_util.Partial(first), std=-1.0)

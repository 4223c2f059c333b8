"""The loss of a classifier of noisy examples, on laws whose posterior is known."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import bimodal
from flax import nnx
from numpy.testing import assert_allclose

from jaxdiff import guidance, losses, networks, oracles, processes
from jaxdiff._tree import jit

KEY = jax.random.key(0)
COUNT = 40_000
PRIOR = np.array([0.35, 0.65])


class Known(eqx.Module):
    """The exact posterior of a mixture, warmer, shifted, or that of another time."""

    oracle: oracles.GaussianMixture
    sharpness: jax.Array
    shift: jax.Array
    late: jax.Array

    @property
    def process(self):
        return self.oracle.process

    def logits(self, x, t, *, key=None):
        seen = jnp.clip(self.late * t, self.process.t_min, self.process.t_max)
        values = self.sharpness * self.oracle.class_log_posterior(x, seen)
        return values + self.shift * jnp.arange(2)


def laws():
    """Two overlapping Gaussians on the line, each a class."""
    return oracles.gaussian_mixture(
        processes.VP(), jnp.asarray([[-1.0], [0.8]]), jnp.asarray([[[0.3]], [[0.5]]]),
        weights=jnp.asarray(PRIOR), labels=[0, 1],
    )  # fmt: skip


def conditional_entropy(oracle):
    """H(y | x_t), the mean over times, by quadrature."""
    process = oracle.process
    nodes, weights = np.polynomial.legendre.leggauss(48)
    times = process.t_min + (nodes + 1) / 2 * (process.t_max - process.t_min)
    x = jnp.linspace(-8, 8, 2001)

    def at(t):
        density = jax.vmap(lambda x: jnp.exp(oracle.log_prob(x[None], t)))(x)
        logs = jax.vmap(lambda x: oracle.class_log_posterior(x[None], t))(x)
        return jnp.trapezoid(density * -jnp.sum(jnp.exp(logs) * logs, 1), x)

    return float(jnp.vdot(jnp.asarray(weights) / 2, jax.vmap(at)(jnp.asarray(times))))


def test_the_exact_posterior_is_the_minimiser(x64):
    """Its loss is the conditional entropy, and any change of it is worse, with one noise."""
    oracle = laws()
    labels = (jax.random.uniform(KEY, (COUNT,)) > PRIOR[0]).astype(jnp.int32)
    x = jax.vmap(oracle.sample_data)(jax.random.split(KEY, COUNT), labels)
    batch = {"x": x, "cond": labels}
    changes = jnp.asarray(
        [(1, 0, 1), (0.7, 0, 1), (1.4, 0, 1), (1, 0.3, 1), (1, -0.3, 1), (1, 0, 0.7), (1, 0, 1.3)]
    )
    loss = losses.NoisyClassifierLoss()

    @jit
    def values(oracle, changes):
        def one(change):
            found, logged = loss(Known(oracle, *change), jax.random.key(2), batch, {})
            return found, logged["accuracy"]

        return jax.vmap(one)(changes)

    found, accuracy = values(oracle, changes)
    assert_allclose(found[0], conditional_entropy(oracle), atol=0.01)
    assert np.all(found[1:] > found[0] + 0.002)
    assert 0.7 < accuracy[0] < 0.9 and accuracy[0] >= accuracy.max()


def test_a_classifier_is_what_guidance_follows(x64):
    """Of logits that are the exact posterior, the guided denoiser is the conditional one."""
    oracle = bimodal(processes.VP())
    exact = Known(oracle, *map(jnp.asarray, (1.0, 0.0, 1.0)))
    factor = exact.process.t_max

    def network(x, label, *, key=None):  # which sees the label t / t_max, and x scaled by 1
        return exact.logits(x, factor * label)

    preconditioning = guidance.NoisyClassifier.__dataclass_fields__["preconditioning"].default
    assert preconditioning.factor == 1000
    classifier = guidance.NoisyClassifier(
        jax.tree_util.Partial(network), oracle.process, type(preconditioning)(1 / factor)
    )
    guided = guidance.ClassifierGuidance(oracle, classifier)
    x, t = jnp.asarray([0.3]), jnp.asarray(0.4)
    found = guided(x, t, {"y": jnp.asarray(1)})
    assert_allclose(found, oracle(x, t, 1), rtol=1e-9)


def test_bad_input_is_named():
    network = networks.ConvClassifier(
        image_size=4, in_channels=1, num_classes=2, channels=4, noise_label=True, rngs=nnx.Rngs(0)
    )
    classifier = guidance.NoisyClassifier(network, processes.VP())
    loss, x = losses.NoisyClassifierLoss(), jnp.zeros((3, 4, 4, 1))
    for cond, got in ((None, "got none"), (jnp.zeros((3, 2)), "got float32 of 2 axes")):
        with pytest.raises(ValueError, match=r"`batch\['cond'\]` must be the class.*" + got):
            loss(classifier, KEY, {"x": x, "cond": cond}, {})
    with pytest.raises(TypeError, match="`time_law`"):
        losses.NoisyClassifierLoss(0.5)
    with pytest.raises(TypeError, match="`process`"):
        guidance.NoisyClassifier(network, 3)

"""Control at inference: negative guidance by the posterior odds, and safe latent diffusion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import jaxdiff
from jaxdiff import guidance, oracles, processes
from jaxdiff.stepwise import at_step, init_notes

KEY = jax.random.key(0)
VP = processes.VP()
MEANS, SPREADS = np.asarray([[-1.5, 0.0], [0.0, 1.0], [2.0, -0.5]]), np.asarray([0.5, 0.3, 0.7])
SHARES = np.asarray([0.5, 0.2, 0.3])


def mixture(kept=(0, 1, 2)):
    kept = list(kept)
    covariances = SPREADS[kept, None, None] ** 2 * np.eye(2)
    return oracles.gaussian_mixture(
        VP, MEANS[kept], covariances, weights=SHARES[kept], labels=np.arange(len(kept))
    )


def log_odds(laws, x, t):
    """Of class 0 given x_t, from the densities of the classes."""
    alpha, sigma = VP.alpha(t), VP.sigma(t)
    variances = alpha**2 * SPREADS**2 + sigma**2
    squares = jnp.sum((x - alpha * jnp.asarray(MEANS)) ** 2, axis=1)
    logs = jnp.log(SHARES) - squares / (2 * variances) - jnp.log(variances)
    return logs[0] - jax.nn.logsumexp(logs[1:])


def test_the_odds_are_the_scale_without_the_class(x64):
    """Exactly, where a constant scale is not; and a classifier of "not f" says the same."""
    laws, kept = mixture(), mixture((1, 2))
    odds = jax.tree_util.Partial(log_odds, laws)
    exact = guidance.PosteriorOdds(laws, 0, odds)
    kernel = lambda x, t, y: jax.nn.log_sigmoid(-log_odds(laws, x, t))
    classified = guidance.ClassifierGuidance(laws, jax.tree_util.Partial(kernel), 1.0)
    constant = guidance.ClassifierFree(laws, 3, -1.0)
    x = jnp.asarray(np.random.default_rng(0).uniform(-2, 2, (40, 2)))
    far = []
    for t in (0.2, 0.5, 0.9):
        t = jnp.asarray(t)
        goal = jax.vmap(lambda x, t=t: kept(x, t, 2))(x)
        found = jax.vmap(lambda x, t=t: exact(x, t, 3))(x)
        sure = np.asarray(jax.vmap(lambda x, t=t: log_odds(laws, x, t))(x)) < np.log(1e4)
        assert_allclose(found[sure], goal[sure], atol=1e-8)
        label = {"label": jnp.full(len(x), 3), "y": jnp.zeros(len(x), int)}
        same = jax.vmap(lambda x, c, t=t: classified(x, t, c))(x, label)
        assert_allclose(same, goal, atol=1e-8)
        guess = jax.vmap(lambda x, t=t: constant(x, t, jnp.asarray(0)))(x)
        far.append(float(jnp.abs(guess - goal).max()))
    assert min(far) > 0.1


def test_samples_without_a_class():
    """Of the classes that are left, each with its share."""
    laws = mixture()
    odds = jax.tree_util.Partial(log_odds, laws)
    without = guidance.PosteriorOdds(laws, 0, odds)
    cond = jnp.full(2000, 3, jnp.int32)
    x = jaxdiff.sample(KEY, without, (2,), 2000, cond=cond, times=60).x
    nearest = np.argmin(np.linalg.norm(np.asarray(x)[:, None] - MEANS, axis=2), axis=1)
    counts = np.bincount(nearest, minlength=3) / 2000
    assert counts[0] < 0.03  # tails of the others
    assert_allclose(counts[1:], [0.4, 0.6], atol=0.05)


class Pictures(jaxdiff.Denoiser):
    """One picture for each condition, whatever the state."""

    process: processes.VP
    pictures: jax.Array

    def __call__(self, x, t, cond=None, *, key=None):
        return self.pictures[cond] * self.process.sigma(t) / self.process.alpha(t)


NOISES = np.asarray([[0.3, -0.2, 0.1], [0.0, 0.4, -0.1], [0.2, 0.1, 0.5]])  # asked, unsafe, none
PICTURES = Pictures(VP, jnp.asarray(-NOISES))
NONE, UNSAFE, ASKED = 2, 1, 0


def noise_of(safe, index, memory=None):
    """What guidance says of the noise, and v after it."""
    x, t = jnp.zeros(3), jnp.asarray(0.5)
    notes = init_notes(safe, x)
    if memory is not None:
        notes = jax.tree.map(lambda leaf: jnp.asarray(memory, leaf.dtype), notes)
    step = jaxdiff.Step(t, t / 2, KEY, index=jnp.asarray(index), notes=notes)
    found = at_step(safe, step).estimate(x, t, jnp.asarray(ASKED))
    return np.asarray(-VP.alpha(t) / VP.sigma(t) * found.x0), found


@pytest.mark.parametrize("warmup", [0.0, 2.0])
def test_safe_latent_diffusion_in_closed_form(x64, warmup):
    asked, unsafe, none = NOISES
    scale, free = 3.0, {"momentum": 0.0, "warmup": 0.0}
    plain = none + scale * (asked - none)
    off, _ = noise_of(guidance.SafeLatent(PICTURES, NONE, UNSAFE, scale, safety=0.0, **free), 0)
    assert_allclose(off, plain, atol=1e-12)
    # mu of 1 everywhere: the prompt is not looked at.
    full = guidance.SafeLatent(PICTURES, NONE, UNSAFE, scale, safety=1e9, threshold=1e9, **free)
    assert_allclose(noise_of(full, 0)[0], none + scale * (asked - unsafe), atol=1e-12)
    safe = guidance.SafeLatent(
        PICTURES, NONE, UNSAFE, scale, warmup, safety=2.0, threshold=0.05, momentum=0.3, decay=0.4
    )
    near = asked - unsafe
    mu = np.where(near < 0.05, np.minimum(2 * np.abs(near), 1), 0)
    v = np.asarray([0.1, 0.2, -0.3])
    g = mu * (unsafe - none) + 0.3 * v
    found, _ = noise_of(safe, 1, v)
    shown = g if warmup == 0 else 0 * g
    assert_allclose(found, none + scale * (asked - none - shown), atol=1e-12)


def test_the_momentum_of_safety_gathers_during_the_warmup(x64):
    """v after n steps of a g without momentum is (1 - decay^n) g."""
    asked, unsafe, none = NOISES
    safe = guidance.SafeLatent(
        PICTURES, NONE, UNSAFE, 2.0, 100.0, safety=1e9, threshold=1e9, momentum=0.0, decay=0.4
    )
    late = guidance.SafeLatent(
        PICTURES, NONE, UNSAFE, 2.0, 5.0, safety=0.0, threshold=0.0, momentum=1.0, decay=0.4
    )
    steps = 6
    x = jaxdiff.sample(KEY, safe, (3,), 2, cond=jnp.zeros(2, int), times=steps).x
    t = jnp.linspace(1.0, 0.0, steps + 1)[-2]
    ratio = VP.sigma(t) / VP.alpha(t)
    # Never shown: classifier-free guidance to the end, which is the last estimate.
    assert_allclose(x[0], -ratio * (none + 2.0 * (asked - none)), atol=1e-9)
    assert late.needs_signal and safe.evaluations == 3
    with pytest.raises(ValueError, match="`decay`"):
        guidance.SafeLatent(PICTURES, NONE, UNSAFE, decay=1.0)

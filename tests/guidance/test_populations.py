"""Several states at once: the best of them, and populations that keep apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import gaussian, mixture
from numpy.testing import assert_allclose

import jaxdiff
from jaxdiff import guidance, oracles, processes, solvers

KEY = jax.random.key(0)
SLOPE = np.array([1.0, -0.5])


def reward(x0):
    return jnp.vdot(jnp.asarray(SLOPE, x0.dtype), x0)


REWARD = jax.tree_util.Partial(reward)


def plane():
    covariance = jnp.asarray([[1.0, 0.3], [0.3, 0.5]])
    return oracles.gaussian(processes.VP(), jnp.zeros(2), covariance), np.asarray(covariance)


def test_a_linear_reward_tilts_a_gaussian(x64):
    """N(C b / temperature, C) as the number of children grows; nearer with more of them."""
    laws, covariance = plane()
    run = lambda count: np.asarray(
        jaxdiff.sample(
            KEY, laws, (2,), 3000, solver=guidance.SVDD(count=count, reward=REWARD), times=60
        ).x
    )
    expected = covariance @ SLOPE
    few, x = run(2), run(32)
    errors = [np.abs(found.mean(0) - expected).max() for found in (few, x)]
    assert errors[1] < 0.2 < errors[0] and errors[1] < errors[0] / 3
    # A linear tilt moves a chain of Gaussians, and leaves its covariance.
    plain = jaxdiff.sample(KEY, laws, (2,), 3000, solver=solvers.Ancestral(), times=60).x
    assert_allclose(np.cov(x.T), np.cov(np.asarray(plain).T), atol=0.08)


def test_a_reward_may_know_what_each_example_wants(x64):
    """With the same draws, that of two examples of their own is each one's reward alone."""
    laws, _ = plane()
    signs = jnp.repeat(jnp.asarray([1.0, -1.0]), 20)
    of = lambda sign: jax.tree_util.Partial(lambda x0: sign * reward(x0))
    draw = lambda solver, cond=None: (
        jaxdiff.sample(KEY, laws, (2,), 40, cond=cond, solver=solver, times=5).x
    )
    own = guidance.SVDD(
        count=3, temperature=0.0, reward=jax.tree_util.Partial(lambda x0, y: y * reward(x0)),
        of_example=True,
    )  # fmt: skip
    x = draw(own, {"y": signs})
    up, down = (
        draw(guidance.SVDD(count=3, temperature=0.0, reward=of(sign))) for sign in (1.0, -1.0)
    )
    assert_allclose(x, jnp.where(signs[:, None] > 0, up, down), rtol=1e-9)
    assert jax.vmap(reward)(x[:20]).mean() > jax.vmap(reward)(x[20:]).mean() + 1
    with pytest.raises(ValueError, match="must have the entries 'y' for SVDD"):
        draw(own)


def test_the_best_of_several_and_of_one():
    laws, _ = plane()
    solver = guidance.SVDD(count=4, temperature=0.0, reward=REWARD)
    best = jaxdiff.sample(KEY, laws, (2,), 200, solver=solver, times=10)
    assert best.nfe[0] == 10 * 5
    plain = jaxdiff.sample(KEY, laws, (2,), 200, solver=solvers.Ancestral(), times=10)
    assert jax.vmap(reward)(best.x).mean() > jax.vmap(reward)(plain.x).mean() + 1
    one = jaxdiff.sample(
        KEY, laws, (2,), 4000, solver=guidance.SVDD(count=1, reward=REWARD), times=40
    )
    assert abs(float(jax.vmap(reward)(one.x).mean())) < 0.1  # no choice, no tilt


def test_particles_keep_apart(x64):
    laws = gaussian(processes.VP())
    run = lambda solver, **options: (
        jaxdiff.sample(KEY, laws, (3,), 8, solver=solver, times=6, **options).x
    )
    plain = run(solvers.DDIM())
    for still in (
        guidance.ParticleGuidance(size=4, strength=0.0),
        guidance.ParticleGuidance(size=1, strength=9.0),
        guidance.ParticleGuidance(size=4, strength=9.0, least=1e9),
    ):
        assert_allclose(run(still), plain, rtol=1e-9)

    def spread(x):
        return np.mean(
            [np.linalg.norm(a - b) for g in np.split(np.asarray(x), 2) for a in g for b in g]
        )

    pushed = guidance.ParticleGuidance(size=4, strength=0.5)
    assert spread(run(pushed)) > 1.05 * spread(plain)
    named = guidance.ParticleGuidance(
        size=4, strength=0.5, features=jax.tree_util.Partial(jnp.ravel)
    )
    assert spread(run(named)) > 1.05 * spread(plain)
    # Forces add up to 0, and follow the particles.
    x = jax.random.normal(KEY, (4, 3))
    force = jax.grad(pushed.potential)
    assert_allclose(force(x).sum(0), 0, atol=1e-12)
    order = jnp.asarray([2, 0, 3, 1])
    assert_allclose(force(x[order]), force(x)[order], rtol=1e-9)


def test_a_reward_on_the_host_sees_a_population_once_a_step():
    laws, _ = plane()
    calls = []

    def on_host(x):
        calls.append(x.shape)
        return x @ SLOPE

    asked = jaxdiff.HostFunction(on_host)
    run = lambda reward: (
        jaxdiff.sample(KEY, laws, (2,), 6, solver=guidance.SVDD(count=5, reward=reward), times=4).x
    )
    assert_allclose(run(asked), run(REWARD), rtol=1e-5)
    assert calls == [(30, 2)] * 4
    tree = lambda reward: (
        guidance.tree_sample(KEY, laws, (2,), reward, rollouts=3, num_trees=6, times=2).x
    )
    assert_allclose(tree(asked), tree(REWARD), rtol=1e-5)
    assert calls[4:] == [(6, 2)] * 3


@pytest.mark.parametrize("process", [processes.VP(), processes.Cosine(), processes.EDM()])
def test_what_pushes_by_noise_starts_where_alpha_is_not_lost(x64, process):
    """On customary grids a force, or a slope that does not vanish, moves samples by its size."""
    laws = mixture(process)
    run = lambda denoiser, **options: np.asarray(
        jaxdiff.sample(KEY, denoiser, (2,), 64, times=20, **options).x
    )
    plain = run(laws)
    size = np.abs(plain).max()
    apart = run(laws, solver=guidance.ParticleGuidance(size=8, strength=0.1))
    assert 1 < np.abs(apart).max() / size < 1.5
    constant = jax.tree_util.Partial(lambda x, t, y: 0.02 * x[0])
    sloping = jaxdiff.Clipped(guidance.ClassifierGuidance(laws, constant), -50.0, 50.0)
    pushed = run(sloping, cond={"y": jnp.zeros(64), "label": jnp.full(64, 2)})
    assert not np.allclose(pushed, plain) and np.abs(pushed).max() < 1.2 * size


@pytest.mark.usefixtures("unchecked")
def test_errors():
    laws = mixture(processes.VP(), jnp.float32)
    asked = jaxdiff.HostFunction(lambda x: x.sum(-1))
    mesh = jaxdiff.parallel.make_mesh()
    sharding = jaxdiff.parallel.batch_sharding(mesh)
    with pytest.raises(ValueError, match="A HostFunction runs on one host"):
        solver = guidance.SVDD(reward=asked)
        jaxdiff.sample(KEY, laws, (2,), 8, solver=solver, times=2, sharding=sharding)
    spread = jax.device_put(jnp.zeros((8, 2)), sharding)
    with pytest.raises(ValueError, match="A HostFunction runs on one host"):
        jaxdiff.denoise(KEY, laws, spread, solver=solver, times=jnp.asarray([0.5, 0.1]))
    with pytest.raises(jax.errors.JaxRuntimeError, match="must return one number an example"):
        jax.block_until_ready(jaxdiff.HostFunction(lambda x: x)(jnp.ones(2)))
    with pytest.raises(TypeError, match="A HostFunction has no derivative"):
        guide = guidance.ManifoldPreserving(laws, lambda x0, y: asked(x0))
        jaxdiff.sample(KEY, guide, (2,), 2, cond={"y": jnp.zeros((2, 2))}, times=2)
    with pytest.raises(ValueError, match="`base` of SVDD must draw its steps, got DDIM"):
        guidance.SVDD(solvers.DDIM(), reward=REWARD)
    with pytest.raises(ValueError, match="`reward` must return a floating scalar"):
        solver = guidance.SVDD(reward=jax.tree_util.Partial(lambda x0: x0))
        jaxdiff.sample(KEY, laws, (2,), 1, solver=solver, times=2)

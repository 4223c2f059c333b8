"""The asymmetric reverse process, against DDIM and the recursion of a linear network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Counting, gaussian, mixture, walk
from geometry.linear import linear_denoiser

import jaxdiff
from jaxdiff import oracles, processes, solvers
from jaxdiff.denoiser import edit_taps
from jaxdiff.geometry._asyrp import Asyrp, asyrp_times
from jaxdiff.geometry._features import Offset
from jaxdiff.guidance import ClassifierFree
from jaxdiff.sampling import Trajectory

KEY, TIMES = jax.random.key(0), np.array([1.0, 0.8, 0.6, 0.4, 0.2, 0.05])


def run(denoiser, solver, shape=(2,), count=3, **options):
    times = jnp.asarray(TIMES)
    return jaxdiff.sample(KEY, denoiser, shape, count, solver=solver, times=times, **options)


def test_without_an_edit_it_is_ddim():
    """In float32: the same program up to the order of rounding."""
    oracle = mixture(processes.VP(), jnp.float32)
    plain = run(oracle, solvers.DDIM())
    same = jax.vmap(lambda t_edit: run(oracle, Asyrp(oracle, t_edit)).x)
    for x in same(jnp.asarray([0.0, 0.5, jnp.inf])):
        np.testing.assert_allclose(x, plain.x, rtol=2e-6)
    boosted = run(oracle, Asyrp(oracle, t_boost=float("inf"), eta=0.7)).x
    np.testing.assert_allclose(boosted, run(oracle, solvers.DDIM(0.7)).x, rtol=2e-6)


def test_noise_is_injected_below_t_boost_alone(x64):
    """The first steps are DDIM's, the last ones those of ancestral sampling with its keys."""
    oracle, times = mixture(processes.VP()), jnp.asarray(TIMES)
    x = jax.random.normal(jax.random.key(4), (2,))
    states = walk(Asyrp(oracle, t_boost=0.5), oracle, times, x)
    first = walk(solvers.DDIM(), oracle, times, x)
    np.testing.assert_allclose(states[:4], first[:4], rtol=1e-12)
    last = walk(solvers.DDIM(1.0), oracle, times, states[3], start=3)
    np.testing.assert_allclose(states[3:], last, rtol=1e-12)
    assert jnp.abs(states[4:] - first[4:]).min() > 1e-3


@pytest.mark.parametrize("t_edit", [0.0, 0.5])
def test_a_linear_network_moves_in_closed_form(x64, t_edit):
    """x0_hat moves by -sigma / alpha B dh while eps_hat stays."""
    denoiser, dh = linear_denoiser(), jnp.asarray([1.0, -0.5, 2.0])
    edited = edit_taps(denoiser, {"mid": Offset(dh)})
    x = jax.random.normal(jax.random.key(1), (2, 4))
    out = jaxdiff.denoise(
        KEY, denoiser, x, solver=Asyrp(edited, t_edit), times=jnp.asarray(TIMES)
    ).x  # fmt: skip
    network, process = denoiser.network, denoiser.process
    matrix = network.decoder @ network.encoder
    for t, s in zip(TIMES[:-1], TIMES[1:], strict=True):
        eps = x @ matrix.T
        clean = (x - process.sigma(t) * eps) / process.alpha(t)
        if t >= t_edit:
            clean = clean - process.sigma(t) / process.alpha(t) * (network.decoder @ dh)
        x = process.alpha(s) * clean + process.sigma(s) * eps
    np.testing.assert_allclose(out, x, rtol=1e-12)


def test_editing_both_terms_moves_less(x64):
    """The reason for the asymmetry: in one step the shared edit nearly cancels."""
    denoiser, dh = linear_denoiser(), jnp.ones(3)
    edited = edit_taps(denoiser, {"mid": Offset(dh)})
    x, times = jnp.ones((1, 4)), jnp.asarray([0.62, 0.6])
    plain, both = (jaxdiff.denoise(KEY, d, x, times=times).x for d in (denoiser, edited))
    one = jaxdiff.denoise(KEY, denoiser, x, solver=Asyrp(edited), times=times).x
    process, (t, s) = denoiser.process, times
    ratio = 1 - process.sigma(s) * process.alpha(t) / (process.alpha(s) * process.sigma(t))
    np.testing.assert_allclose(both - plain, ratio * (one - plain), rtol=1e-9)
    assert ratio < 0.15


def test_evaluations_are_counted_and_saved():
    plain, edited = Counting(gaussian(processes.VP())), Counting(gaussian(processes.VP()))
    out = run(plain, Asyrp(edited, t_edit=0.6), (3,), 1)
    jax.effects_barrier()
    assert (len(plain.calls), len(edited.calls), int(out.nfe[0])) == (5, 3, 8)
    # Guided, the edited one alone costs two.
    oracle = mixture(processes.VP(), jnp.float32)
    guided = ClassifierFree(oracle, null_cond=2, scale=2.0)
    cond = jnp.zeros(3, jnp.int32)
    assert run(oracle, Asyrp(guided, 0.6), cond=cond).nfe.tolist() == [11] * 3
    assert run(guided, Asyrp(oracle, 0.6), cond=cond).nfe.tolist() == [13] * 3


def test_numbers_may_be_differentiated(x64):
    """The sample is affine in the edit."""
    denoiser = linear_denoiser()

    @jax.jit
    def final(scale):
        edited = edit_taps(denoiser, {"mid": Offset(scale * jnp.ones(3))})
        return run(denoiser, Asyrp(edited, 0.5), (4,), 1).x[0]

    slope = jax.jacrev(final)(0.3)
    np.testing.assert_allclose(slope, final(1.0) - final(0.0), rtol=1e-10)


def test_times_from_distances(x64):
    """An isotropic Gaussian, where x0_hat is the state times a known factor."""
    process = processes.VP()
    oracle = oracles.gaussian(process, jnp.zeros(3), 0.5 * jnp.eye(3))
    times = jnp.linspace(process.t_min, process.t_max, 2001)
    images = jax.random.normal(jax.random.key(0), (2, 1, 3))
    path = Trajectory(jnp.stack([times, times]), images * (1 - 0.8 * times[:, None]))

    def relative(x, y):
        return jnp.linalg.norm(x - y) / jnp.linalg.norm(x)

    t_edit, t_boost = asyrp_times(oracle, path, relative, strength=0.3, deficiency=0.5)
    shrunk = (1 - 0.8 * t_boost) / (1 - 0.8 * process.t_min)
    np.testing.assert_allclose(1 - shrunk, 0.5, rtol=1e-6)
    alpha, sigma = process.alpha(t_edit), process.sigma(t_edit)
    gain = 0.5 * alpha / (0.5 * alpha**2 + sigma**2)
    kept = gain * (1 - 0.8 * t_edit) / (1 - 0.8 * process.t_min)
    np.testing.assert_allclose(1 - kept, 0.3, rtol=1e-5)
    never, always = asyrp_times(oracle, path, relative, strength=2.0, deficiency=-1.0)
    assert never == jnp.inf and always == times[0]


def test_it_does_not_invert():
    oracle = gaussian(processes.VP())
    with pytest.raises(ValueError, match="no inverse"):
        jaxdiff.invert(oracle, jnp.ones((1, 3)), solver=Asyrp(oracle), times=4)
    with pytest.raises(ValueError, match="must be deterministic"):
        jaxdiff.invert(oracle, jnp.ones((1, 3)), solver=Asyrp(oracle, t_boost=0.2), times=4)

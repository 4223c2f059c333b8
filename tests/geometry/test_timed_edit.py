"""Edits at chosen times, against the recursion of a linear network."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Counting, gaussian, mixture
from geometry.linear import linear_denoiser

import jaxdiff
from jaxdiff import processes, solvers
from jaxdiff.denoiser import Clipped, edit_taps, find_network
from jaxdiff.geometry._features import Offset, TapFeature
from jaxdiff.geometry._timed_edit import EditedBetween, TimedOffset
from jaxdiff.guidance import CFGPlusPlus, ClassifierFree


def recursion(denoiser, x, times, offset):
    """DDIM of the linear network with h moved by offset(t), in numpy."""
    network, process = denoiser.network, denoiser.process
    for t, s in zip(times[:-1], times[1:], strict=True):
        eps = network.decoder @ (network.encoder @ x + offset(t))
        clean = (x - process.sigma(t) * eps) / process.alpha(t)
        x = np.asarray(process.alpha(s) * clean + process.sigma(s) * eps)
    return x


TIMES = np.array([1.0, 0.8, 0.6, 0.4, 0.2, 0.05])


def test_edit_in_an_interval_follows_the_closed_form(x64):
    denoiser, dh = linear_denoiser(), jnp.asarray([1.0, -2.0, 0.5])
    edited = edit_taps(denoiser, {"mid": Offset(dh)})
    x = jax.random.normal(jax.random.key(0), (2, 4))
    times = jnp.asarray(TIMES)

    def run(low, high):
        timed = EditedBetween(denoiser, edited, low, high)
        return jaxdiff.denoise(jax.random.key(1), timed, x, times=times).x

    def within(low, high):
        return lambda t: dh * (low <= t <= high)

    for low, high in ((0.4, 0.8), (0.9, 0.95), (0.5, float("inf"))):
        for one, start in zip(run(low, high), x, strict=True):
            inside = recursion(denoiser, start, TIMES, within(low, high))
            np.testing.assert_allclose(one, inside, rtol=1e-12)


def test_only_the_denoiser_in_use_is_evaluated():
    base, edited = Counting(gaussian(processes.VP())), Counting(gaussian(processes.VP()))
    timed = EditedBetween(base, edited, 0.5, 0.9)
    out = jaxdiff.sample(jax.random.key(0), timed, (3,), 1, times=jnp.asarray(TIMES))
    jax.effects_barrier()
    assert (len(base.calls), len(edited.calls), int(out.nfe[0])) == (3, 2, 5)
    guided = ClassifierFree(base, null_cond=0)
    assert EditedBetween(base, guided).evaluations == 2
    assert EditedBetween(guided, base).evaluations == 2


def test_one_that_states_its_noise_beside_one_that_does_not(x64):
    base = mixture(processes.VP())
    plus = CFGPlusPlus(base, null_cond=2, scale=0.5)
    x, times = jax.random.normal(jax.random.key(0), (2, 2)), jnp.asarray(TIMES)
    cond = jnp.asarray([0, 1])
    run = lambda d: jaxdiff.denoise(jax.random.key(1), d, x, times=times, cond=cond).x
    for timed in (EditedBetween(base, plus), EditedBetween(plus, base, 2.0)):
        np.testing.assert_allclose(run(timed), run(plus), rtol=1e-12)
    for timed in (EditedBetween(base, plus, 2.0), EditedBetween(plus, base)):
        np.testing.assert_allclose(run(timed), run(base), rtol=1e-12)


@pytest.mark.parametrize("solver", [solvers.EDMHeun(), diffrax.Heun()], ids=str)
def test_intervals_that_cover_all_or_nothing_are_the_denoisers_themselves(x64, solver):
    base = linear_denoiser()

    def edited(scale):
        return edit_taps(base, {"mid": Offset(scale * jnp.ones(3))})

    def final(denoiser):
        return jaxdiff.sample(jax.random.key(0), denoiser, (4,), 2, solver=solver, times=4).x

    plain = jax.vmap(lambda scale: final(edited(scale)))(jnp.asarray([1.0, 0.0]))
    ends = jnp.asarray([[0.0, jnp.inf], [2.0, 3.0]])
    timed = jax.vmap(lambda ends: final(EditedBetween(base, edited(1.0), *ends)))(ends)
    np.testing.assert_allclose(timed, plain, rtol=1e-12)


def test_derivatives_through_a_timed_edit(x64):
    """By the edit's offset: through the chain of steps, against a difference quotient."""
    base = linear_denoiser()

    @jax.jit
    def energy(scale):
        edited = edit_taps(base, {"mid": Offset(scale * jnp.ones(3))})
        timed = EditedBetween(base, edited, 0.3, 0.7)
        return jnp.sum(jaxdiff.sample(jax.random.key(0), timed, (4,), 2, times=4).x ** 2)

    slope = jax.grad(energy)(0.7)
    quotient = (energy(0.7 + 1e-6) - energy(0.7 - 1e-6)) / 2e-6
    np.testing.assert_allclose(slope, quotient, rtol=1e-7)


def test_offsets_that_differ_from_step_to_step(x64):
    denoiser = linear_denoiser()
    offsets = jax.random.normal(jax.random.key(5), (5, 3))
    x = jax.random.normal(jax.random.key(0), (1, 4))
    order = jnp.asarray([3, 0, 4, 1, 2])
    shuffled = TimedOffset(denoiser, jnp.asarray(TIMES)[:-1][order], offsets[order])
    out = jaxdiff.denoise(jax.random.key(1), shuffled, x, times=jnp.asarray(TIMES)).x[0]
    expected = recursion(denoiser, x[0], TIMES, lambda t: offsets[list(TIMES).index(t)])
    np.testing.assert_allclose(out, expected, rtol=1e-12)


def test_edits_and_features_find_the_network_inside(x64):
    base = linear_denoiser()
    edited = edit_taps(base, {"mid": Offset(jnp.ones(3))})
    timed = EditedBetween(Clipped(base), edited, 0.5, 1.0)
    assert find_network(timed) is base
    x, low, high = jnp.linspace(-0.1, 0.1, 4), jnp.asarray(0.2), jnp.asarray(0.7)
    for t, offset in ((low, 0), (high, 1)):  # what is read is what is used
        feature = TapFeature(timed, t)(x)
        np.testing.assert_allclose(feature, base.network.encoder @ x + offset, rtol=1e-12)
    moved = edit_taps(timed, {"mid": Offset(jnp.full(3, 2.0))})
    other = edit_taps(base, {"mid": Offset(jnp.full(3, 2.0))})
    both = edit_taps(base, {"mid": Offset(jnp.full(3, 3.0))})
    np.testing.assert_allclose(moved(x, low), Clipped(other)(x, low), rtol=1e-12)
    np.testing.assert_allclose(moved(x, high), both(x, high), rtol=1e-12)


def test_bad_offsets_are_rejected():
    denoiser = linear_denoiser()
    with pytest.raises(ValueError, match="one offset per entry of `times`"):
        TimedOffset(denoiser, jnp.ones(4), jnp.ones((5, 3)))
    with pytest.raises(TypeError, match="network with taps"):
        TimedOffset(gaussian(processes.VP()), jnp.ones(5), jnp.ones((5, 3)))
    wrong = TimedOffset(denoiser, jnp.ones(5), jnp.ones((5, 3)), "down")
    with pytest.raises(ValueError, match="does not have"):
        wrong(jnp.ones(4), jnp.asarray(0.5))

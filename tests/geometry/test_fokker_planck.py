import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PROCESSES, mixture, with_random_weights
from flax import nnx

from jaxdiff import processes
from jaxdiff.denoiser import NetworkDenoiser
from jaxdiff.geometry._fokker_planck import (
    fokker_planck_penalty,
    fokker_planck_residual,
    log_density_residual,
)
from jaxdiff.networks import MLP
from jaxdiff.predictions import Score
from jaxdiff.traces import ExactTrace, Hutchinson, HutchPlusPlus

KEY = jax.random.key(0)
residual_of = jax.jit(fokker_planck_residual, static_argnames="trace")


def network_denoiser(process, dtype=jnp.float64):
    build = lambda: MLP(3, hidden=8, num_blocks=1, param_dtype=dtype, rngs=nnx.Rngs(0))
    return NetworkDenoiser(with_random_weights(build), process)


@jax.jit
def literal(denoiser, x, t):
    """The score's equation by dense derivatives of the score."""
    process = denoiser.process
    score = lambda x, t: denoiser.predict(Score(), x, t)
    square = process.diffusion(t) ** 2

    def bracket(x):
        s = score(x, t)
        divergence = jnp.trace(jax.jacfwd(lambda x: score(x, t))(x))
        return square / 2 * (divergence + s @ s) - process.drift(t) * (x @ s)

    return jax.jacfwd(score, 1)(x, t) - jax.grad(bracket)(x)


@pytest.mark.parametrize("name", ["VP", "SubVP", "EDM", "Cosine", "RectifiedFlow", "TrigFlow"])
def test_exact_scores_solve_the_equation(x64, name):
    process, x = PROCESSES[name](), jnp.asarray([0.4, -0.3])
    oracle, t = mixture(process), process.time(jnp.asarray(0.5))

    @jax.jit
    def both():
        score = jax.jacfwd(lambda t: oracle.predict(Score(), x, t))(t)
        density = jax.grad(lambda t: oracle.log_prob(x, t))(t)
        residual = fokker_planck_residual(oracle, x, t)
        log_residual = log_density_residual(process, oracle.log_prob, x, t)
        return score, density, residual, log_residual

    score, density, residual, log_residual = both()
    assert np.abs(score).max() > 0.1
    np.testing.assert_allclose(residual, 0, atol=1e-9 * np.abs(score).max())
    np.testing.assert_allclose(log_residual, 0, atol=1e-9 * np.abs(density))


@pytest.mark.parametrize("process", [processes.VP, processes.EDM])
def test_it_is_the_equation_of_the_score_for_any_field(x64, process):
    denoiser = network_denoiser(process())
    x, t = jnp.asarray([0.4, -0.3, 0.8]), jnp.asarray(0.3)
    expected = literal(denoiser, x, t)
    assert jnp.abs(expected).min() > 1e-3
    np.testing.assert_allclose(residual_of(denoiser, x, t), expected, rtol=1e-8)


def test_a_gauge_field_shows_in_closed_form(x64):
    process, spread = processes.VP(), 0.6
    turn = jnp.asarray([[0.0, 1.0, -0.5], [-1.0, 0.0, 0.3], [0.5, -0.3, 0.0]])

    class Turned(eqx.Module):
        turn: jax.Array

        def __call__(self, x, label, cond, *, key):
            t = label / 1000
            variance = process.alpha(t) ** 2 * spread + process.sigma(t) ** 2
            return (self.turn @ x - x) / variance

    x, t = jnp.asarray([0.4, -0.3, 0.8]), jnp.asarray(0.3)
    variance = process.alpha(t) ** 2 * spread + process.sigma(t) ** 2
    square = process.diffusion(t) ** 2
    for strength in (0.0, 1.0):
        denoiser = NetworkDenoiser(Turned(strength * turn), process, Score())
        residual = residual_of(denoiser, x, t)
        # For scores M x, R is (M' - g^2 M^T M + f (M + M^T)) x.
        growth = 2 * process.drift(t) * variance + square
        expected = (square * turn @ turn * strength**2 - growth * strength * turn) @ x
        np.testing.assert_allclose(residual, expected / variance**2, rtol=1e-8, atol=1e-9)


def test_random_probes_are_unbiased(x64):
    denoiser = network_denoiser(processes.VP())
    x, t = jnp.asarray([0.4, -0.3, 0.8]), jnp.asarray(0.3)
    exact = residual_of(denoiser, x, t, trace=ExactTrace(chunk=1))
    for trace in (Hutchinson(2, "gaussian"), HutchPlusPlus(3)):
        draw = jax.jit(jax.vmap(lambda key: residual_of(denoiser, x, t, key=key, trace=trace)))  # noqa: B023
        draws = draw(jax.random.split(KEY, 2000))
        error = draws.std(0, ddof=1) / np.sqrt(2000)
        assert np.all(np.abs(draws.mean(0) - exact) < 4 * error)
        assert np.all(error < 0.2 * np.abs(exact).max())


def test_the_penalty_trains(x64):
    denoiser = network_denoiser(processes.VP())
    x, t = jnp.asarray([0.4, -0.3, 0.8]), jnp.asarray(0.3)

    @jax.jit
    def penalty(denoiser):
        return fokker_planck_penalty(denoiser, x, t, weight=0.5)

    residual = literal(denoiser, x, t)
    np.testing.assert_allclose(penalty(denoiser), 0.5 * jnp.sum(residual**2) / 3, rtol=1e-8)

    # The derivative along a direction in the weights, by differences of the literal equation.
    moved = jax.tree.map(lambda leaf: jnp.ones_like(leaf), denoiser.network)
    walk = lambda h: eqx.tree_at(
        lambda d: d.network, denoiser, jax.tree.map(lambda w, v: w + h * v, denoiser.network, moved)
    )
    slope = jax.jit(jax.grad(lambda h: penalty(walk(h))))(jnp.zeros(()))
    values = [0.5 * jnp.mean(literal(walk(h), x, t) ** 2) for h in (-1e-5, 1e-5)]
    np.testing.assert_allclose(slope, (values[1] - values[0]) / 2e-5, rtol=1e-5)


def test_float32():
    oracle = mixture(processes.VP(), jnp.float32)
    x, t = jnp.asarray([-1.4, 0.6]), oracle.process.time(jnp.asarray(3.0))
    change = jax.jit(jax.jacfwd(lambda t: oracle.predict(Score(), x, t)))(t)
    residual = residual_of(oracle, x, t)
    assert residual.dtype == jnp.float32
    np.testing.assert_allclose(residual, 0, atol=1e-4 * np.abs(change).max())


def test_errors():
    oracle = mixture(processes.VP(), jnp.float32)
    with pytest.raises(ValueError, match="`key` must be given to Hutchinson"):
        fokker_planck_residual(oracle, jnp.ones(2), 0.3, trace=Hutchinson())

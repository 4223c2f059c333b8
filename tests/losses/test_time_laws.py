import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import mixture

from jaxdiff import losses, processes

LAWS = [
    losses.UniformTime(),
    losses.UniformLogSNR(),
    losses.LogNormal(),
    losses.LogitNormal(0.5, 0.8),
    losses.Karras(),
]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("process", [processes.RectifiedFlow(), processes.VP(), processes.EDM()])
def test_density_is_the_derivative_of_the_inverse_quantile(x64, law, process):
    if isinstance(process, processes.EDM) and isinstance(law, losses.LogitNormal):
        with pytest.raises(ValueError, match=r"`LogitNormal` is a law on \[0, 1\], got .* EDM"):
            law.quantile(process, jnp.asarray(0.5))
        return
    for u in (0.1, 0.45, 0.8):
        t, slope = jax.jvp(lambda u: law.quantile(process, u), (u,), (1.0,))
        if process.t_min < t < process.t_max:
            np.testing.assert_allclose(law.density(process, t) * slope, 1, rtol=1e-8)
            np.testing.assert_allclose(law.level(process, t), u, rtol=1e-9)


def test_levels_of_a_karras_law_are_edms_grid(x64):
    process = processes.EDM()
    grid = losses.Karras().quantile(process, jnp.linspace(1, 0, 19))
    np.testing.assert_allclose(grid, process.times(18, t_end=process.t_min), rtol=1e-9)


def test_the_level_of_an_end_is_the_share_of_the_law_below_it(x64):
    law, process = losses.LogNormal(-1.1, 2.0), processes.EDM()
    share = law.level(process, jnp.asarray([process.t_min, process.t_max]))
    np.testing.assert_allclose(share, [0.0052743, 0.9969375], atol=1e-6)


def test_edm_law_is_log_normal_in_sigma(x64):
    sigma = losses.LogNormal(-1.2, 1.2).quantile(processes.EDM(), jnp.asarray([0.5, 0.841344746]))
    np.testing.assert_allclose(np.log(sigma), [-1.2, 0.0], atol=1e-7)


@pytest.mark.parametrize("law", LAWS)
def test_every_level_gives_a_time_inside_the_process(law):
    for process in (processes.RectifiedFlow(), processes.Cosine(), processes.VP()):
        t = law.quantile(process, jnp.asarray([0.0, 1e-7, 0.5, 1.0], jnp.float32))
        assert np.all((t >= process.t_min - 1e-7) & (t <= process.t_max + 1e-7))
        assert np.all(np.isfinite(law.density(process, t[1:3])))


def test_no_level_is_one_and_no_draw_is_nan():
    """The last stratum rounds up to one at this key; the law of it is infinite there."""
    key = jax.random.split(jax.random.key(23154))[0]
    assert losses.stratified_uniform(key, 2048).max() < 1
    oracle = mixture(processes.VP(), jnp.float32)
    loss = losses.DenoisingLoss(losses.MinSNR(), losses.LogNormal())
    value, _ = loss(oracle, jax.random.key(23154), {"x": jnp.zeros((2048, 2))}, {})
    assert np.isfinite(value)


def test_strata_lower_the_variance_and_keep_the_law():
    draws = jax.vmap(lambda key: losses.stratified_uniform(key, 32))(
        jax.random.split(jax.random.key(0), 4000)
    )
    assert np.all(np.sort(np.floor(draws * 32), axis=1) == np.arange(32))
    for column in (0, 17):
        # Kolmogorov-Smirnov against the uniform law, at the 1e-3 level.
        ordered = np.sort(draws[:, column])
        distance = np.abs(ordered - (np.arange(4000) + 0.5) / 4000).max()
        assert distance < 1.95 / np.sqrt(4000)
    independent = jax.random.uniform(jax.random.key(1), (4000, 32))
    f = lambda u: np.exp(3 * u).mean(1)
    # 1/n^2 of the variance for a smooth function: .0015 against .84 in theory for this one.
    assert f(draws).var() < f(independent).var() / 300
    assert abs(f(draws).mean() - (np.exp(3) - 1) / 3) < 4 * f(draws).std() / np.sqrt(4000)

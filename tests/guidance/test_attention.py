"""Guidance by attention, noisy embeddings and noisy conditions: what taps must do, exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import mixture, with_random_weights
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal
from scipy.ndimage import gaussian_filter1d

import jaxdiff
from jaxdiff import guidance, networks, processes
from jaxdiff.denoiser import edit_taps, reading
from jaxdiff.guidance._blur import blur, blur_matrix
from jaxdiff.stepwise import at_step

KEY = jax.random.key(0)
LAYER = "mid.attn"


@pytest.fixture(scope="module")
def base():
    network = with_random_weights(
        lambda: networks.UNet(
            8, image_size=8, in_channels=1, num_classes=3, channel_mults=(1, 2), num_heads=2,
            attention_resolutions=(4,), rngs=nnx.Rngs(0),
        )
    )  # fmt: skip
    return jaxdiff.NetworkDenoiser(network, processes.Cosine())


@pytest.fixture(scope="module")
def point():
    x = jax.random.normal(jax.random.key(1), (8, 8, 1))
    return x, jnp.asarray(0.6), jnp.asarray(1)


def once(denoiser, *point):
    return jax.jit(lambda denoiser, *point: denoiser(*point))(denoiser, *point)


@pytest.mark.parametrize("size", [1, 4, 9])
@pytest.mark.parametrize("width", [0.0, 0.5, 1.3, 6.0, np.inf])
def test_blur_is_a_gaussian_filter_that_reflects(x64, size, width):
    matrix = blur_matrix(size, jnp.asarray(width))
    assert_allclose(matrix.sum(1), 1, rtol=1e-12)
    if width == 0:
        assert_array_equal(matrix, np.eye(size))
    elif np.isinf(width):
        assert_allclose(matrix, np.full((size, size), 1 / size))
    elif 3 * width < 4 * size:
        radius = int(3 * width)
        expected = gaussian_filter1d(np.eye(size), width, axis=0, mode="mirror", radius=radius)
        assert_allclose(matrix, expected, atol=1e-12)


def test_perturbed_attention_lets_tokens_see_themselves_alone(base, point):
    found = once(guidance.PerturbedAttention(base, 2.0), *point)
    # Then what comes out of the layer is what its values are.
    node = lambda weights: jnp.broadcast_to(jnp.eye(weights.shape[-1]), weights.shape)
    other = once(edit_taps(base, {f"{LAYER}.weights": jax.tree_util.Partial(node)}), *point)
    plain = once(base, *point)
    assert_allclose(found, plain + 2 * (plain - other), rtol=1e-4, atol=1e-5)
    assert not np.allclose(plain, other)
    assert_allclose(once(guidance.PerturbedAttention(base, 0.0), *point), plain, atol=1e-6)


def test_a_blur_of_queries_is_one_of_logits(base, point):
    width = jnp.asarray(0.8)
    read = reading(base, (f"{LAYER}.q", f"{LAYER}.k", f"{LAYER}.weights"))
    taps = jax.jit(lambda d, *p: d.estimate(*p).taps)(read, *point)
    blurred = guidance.SmoothedEnergy(base, 1.0, width)
    from jaxdiff.guidance._smoothed_energy import _Blurred

    edits = {f"{LAYER}.q": _Blurred(width, point[0].shape)}
    weights = jax.jit(lambda d, *p: d.estimate(*p).taps)(edit_taps(read, edits), *point)
    q, k = (taps[f"{LAYER}.{part}"].reshape(16, 2, -1) for part in "qk")
    logits = jnp.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    smooth = jax.vmap(lambda logit: blur(logit.reshape(4, 4, -1), width).reshape(16, 16))(logits)
    assert_allclose(weights[f"{LAYER}.weights"], jax.nn.softmax(smooth), rtol=1e-4, atol=1e-5)
    plain = once(base, *point)
    other = once(edit_taps(base, edits), *point)
    assert_allclose(once(blurred, *point), 2 * plain - other, rtol=1e-4, atol=1e-5)
    still = guidance.SmoothedEnergy(base, 5.0, width=0.0)
    assert_allclose(once(still, *point), plain, rtol=1e-5, atol=1e-5)


def test_self_attention_guidance(base, point):
    plain = once(base, *point)
    # Nobody attends enough: nothing is blurred, and both evaluations are one.
    calm = guidance.SelfAttention(base, 3.0, width=1.0, threshold=1e6)
    assert_allclose(once(calm, *point), plain, rtol=1e-3, atol=1e-4)
    # Everybody does: by hand.
    x, t, cond = point
    alpha, sigma = base.process.alpha(t), base.process.sigma(t)
    eps = (x - alpha * plain) / sigma
    moved = alpha * blur(plain, 0.7) + sigma * eps
    other = (moved - alpha * once(base, moved, t, cond)) / sigma
    expected = (x - sigma * (other + 3.0 * (eps - other))) / alpha
    found = once(guidance.SelfAttention(base, 2.0, width=0.7, threshold=-1.0), *point)
    assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def bound(denoiser, t):
    return at_step(denoiser, jaxdiff.Step(t, t / 2, KEY))


def test_time_step_guidance(base, point):
    plain = once(base, *point)
    still = bound(guidance.TimeStepGuidance(base, 4.0, size=0.0), point[1])
    assert_allclose(once(still, *point), plain, rtol=1e-5, atol=1e-5)
    away, twice = (
        once(bound(guidance.TimeStepGuidance(base, s), point[1]), *point) - plain
        for s in (2.0, 3.0)
    )
    assert np.abs(away).max() > 1e-3
    assert_allclose(twice, 2 * away, rtol=1e-3, atol=1e-4)  # (scale - 1)(D - D')


def test_annealed_conditions_keep_their_moments(base, point):
    x, t, cond = point
    plain = once(base, *point)
    late = bound(guidance.ConditionAnnealed(base, 0.5, t_low=0.7, t_high=0.9), t)
    assert_allclose(once(late, *point), plain, rtol=1e-5, atol=1e-6)
    early = bound(guidance.ConditionAnnealed(base, 0.5, t_low=0.1, t_high=0.5), t)
    assert np.abs(once(early, *point) - plain).max() > 1e-4
    nobody = jnp.asarray(3)
    assert_allclose(once(early, x, t, nobody), once(base, x, t, nobody), rtol=1e-5, atol=1e-6)

    class Shown(jaxdiff.Denoiser):
        """Shows its condition."""

        process: processes.GaussianProcess

        def __call__(self, x, t, cond=None, *, key=None):
            return cond

    c = jnp.linspace(-1.0, 2.0, 64)
    shown = once(bound(guidance.ConditionAnnealed(Shown(base.process), 0.3), 0.8 + 0 * t), c, t, c)
    assert_allclose([shown.mean(), shown.std()], [c.mean(), c.std()], rtol=1e-5)
    assert 0.3 < np.corrcoef(shown, c)[0, 1] < 0.99
    # The same share of the way of a process whose time is its noise level.
    level = jnp.tan(jnp.pi / 2 * 0.8)
    same = once(bound(guidance.ConditionAnnealed(Shown(processes.EDM()), 0.3), level), c, level, c)
    assert_allclose(same, shown, rtol=1e-4, atol=1e-5)


class Stated(jaxdiff.DenoiserMap):
    """States the noise that x0 implies."""

    base: jaxdiff.Denoiser

    def estimate(self, x, t, cond=None, *, key=None):
        found = self.base.estimate(x, t, cond, key=key)
        return found.replace(eps=found.noise(self.process, x, t))


@pytest.mark.parametrize(
    "make", [guidance.PerturbedAttention, guidance.SelfAttention, guidance.TimeStepGuidance]
)
def test_a_noise_that_the_base_states_is_guided_with_x0(base, point, make):
    x, t, cond = point

    @jax.jit
    def noise(denoiser):
        found = bound(denoiser, t).estimate(x, t, cond)
        return found.x0, found.noise(base.process, x, t)

    found, expected = noise(make(Stated(base), 2.0)), noise(make(base, 2.0))
    for one, other in zip(found, expected, strict=True):
        assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("unchecked")
def test_errors(base, point):
    for build in (guidance.PerturbedAttention, guidance.SmoothedEnergy):
        with pytest.raises(ValueError, match="`layers` must be self-attentions of the network"):
            build(base, layers=("up.0.0.attn",))(*point)
        with pytest.raises(ValueError, match="`layers` must be a tuple of attention taps"):
            build(base, layers="mid.attn")
        with pytest.raises(TypeError, match="must hold a network with taps"):
            build(mixture(processes.VP(), jnp.float32))
    flat = networks.MLP(2, hidden=8, num_blocks=1, rngs=nnx.Rngs(0))
    without = jaxdiff.NetworkDenoiser(flat, processes.Cosine())
    with pytest.raises(ValueError, match="which has none, got 'mid.attn'"):
        guidance.PerturbedAttention(without)(jnp.zeros(2), point[1])
    inside = guidance.ConditionAnnealed(guidance.ClassifierFree(base, null_cond=3))
    with pytest.raises(ValueError, match="`null_cond` must be a vector, or 0"):
        bound(inside, point[1])(*point)
    with pytest.raises(ValueError, match="`cond` must have the entry 'label'"):
        bound(guidance.ConditionAnnealed(base), point[1])(*point[:2])

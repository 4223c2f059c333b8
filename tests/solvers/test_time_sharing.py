import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import losses, predictions, processes
from jaxdiff.denoiser import LogNoiseLabel, NetworkDenoiser, TimeLabel
from jaxdiff.solvers._time_sharing import SharedTimes

PROCESS = processes.VP()


def network(x, label, cond=None, *, key=None):
    """Smooth, and sensitive to its label."""
    return x * jnp.sin(label / 100) + jnp.cos(label / 30)


def denoiser(preconditioning):
    return NetworkDenoiser(network, PROCESS, preconditioning=preconditioning)


@pytest.mark.parametrize("base", [TimeLabel(), LogNoiseLabel()])
def test_times_from_the_threshold_on_keep_their_label(x64, base):
    t = jnp.linspace(0.1, 1.0, 91)
    shared = SharedTimes(base).label(PROCESS, t)
    np.testing.assert_array_equal(shared, base.label(PROCESS, t))


def test_a_label_is_that_of_the_left_end_of_its_interval(x64):
    shared = SharedTimes()
    t = jnp.asarray([0.0, 0.0199, 0.0201, 0.039, 0.041, 0.0799, 0.081, 0.0999])
    first = 1000 * PROCESS.t_min
    expected = [first, first, 20, 20, 40, 60, 80, 80]
    np.testing.assert_allclose(shared.label(PROCESS, t), expected, rtol=1e-12)
    # Left ends are their own left ends, in single precision too.
    for dtype in (jnp.float32, jnp.float64):
        once = shared.shared_time(PROCESS, jnp.linspace(0.0, 0.2, 1000, dtype=dtype))
        assert once.dtype == dtype
        np.testing.assert_array_equal(shared.shared_time(PROCESS, once), once)


def test_labels_of_every_process_are_finite_down_to_zero():
    for process in (PROCESS, processes.EDM(), processes.Cosine(), processes.RectifiedFlow()):
        label = SharedTimes(LogNoiseLabel()).label(process, jnp.linspace(0.0, 0.05, 9))
        assert np.all(np.isfinite(label))


def test_a_table_shares_its_timesteps():
    """The paper's intervals [0, 20), [20, 40)... of timesteps from 0, one timestep lower."""
    table = processes.Tabulated(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    t = (jnp.arange(1000) + 1) / 1000
    label = np.asarray(SharedTimes(TimeLabel(1000.0, -1.0)).label(table, t)).round(3)
    values, counts = np.unique(label[:99], return_counts=True)
    np.testing.assert_allclose(values, [0, 19, 39, 59, 79], atol=1e-3)
    assert counts.max() <= 21 and counts.min() >= 18  # edges in float32 fall on either side
    np.testing.assert_allclose(label[100:], np.arange(100, 1000), atol=1e-3)


def test_the_label_does_not_change_inside_an_interval(x64):
    """Its Lipschitz constant is 0 there, the base's above; so is the network's at a fixed x."""
    slope = jax.vmap(jax.grad(lambda t: SharedTimes().label(PROCESS, t)))
    t = jnp.asarray([1e-4, 0.01, 0.03, 0.05, 0.07, 0.095, 0.11, 0.7])
    np.testing.assert_array_equal(slope(t), [0, 0, 0, 0, 0, 0, 1000, 1000])

    def output(t):
        return network(jnp.asarray([0.3, -1.0]), SharedTimes().label(PROCESS, t))

    np.testing.assert_array_equal(jax.jacobian(output)(t[2]), 0.0)
    assert np.all(np.abs(jax.jacobian(output)(t[6])) > 0)


def test_the_schedule_keeps_the_true_time(x64):
    """x0_hat = (x - sigma(t) eps_hat) / alpha(t), eps_hat alone being that of the shared t."""
    x, t, left = jnp.asarray([0.3, -1.0]), jnp.asarray(0.037), jnp.asarray(0.02)
    shared = denoiser(SharedTimes())
    eps = shared.predict(predictions.Eps(), x, t)
    np.testing.assert_allclose(eps, network(x, 1000 * left), rtol=1e-10)
    expected = (x - PROCESS.sigma(t) * network(x, 1000 * left)) / PROCESS.alpha(t)
    np.testing.assert_allclose(shared(x, t), expected, rtol=1e-12)
    scale = LogNoiseLabel().scale(PROCESS, t)
    np.testing.assert_array_equal(SharedTimes(LogNoiseLabel()).scale(PROCESS, t), scale)


def test_the_divergence_of_the_exact_eps_in_t_is_removed(x64):
    """For a point mass at 0, eps = x / sigma(t): its slope grows like sigma^-3 without sharing."""

    def exact(x, label, cond=None, *, key=None):
        return x / PROCESS.sigma(label / 1000)

    def largest_slope(preconditioning):
        def output(t):
            return exact(jnp.asarray(1.0), preconditioning.label(PROCESS, t))

        return np.abs(jax.vmap(jax.grad(output))(jnp.geomspace(1e-4, 0.0999, 400))).max()

    assert largest_slope(TimeLabel()) > 1e5
    assert largest_slope(SharedTimes()) == 0


class Embedding(eqx.Module):
    """A network with one weight per percent of time."""

    weights: jax.Array

    def __call__(self, x, label, cond=None, *, key=None):
        return x * self.weights[jnp.clip(label // 10, 0, 99).astype(int)]


def test_the_loss_and_its_gradient_are_the_plain_ones_above_the_threshold(x64):
    x0, key, loss = jnp.asarray([0.3, -1.0]), jax.random.key(0), losses.DenoisingLoss()
    weights = jnp.linspace(-0.1, 0.1, 100)

    def value_and_grad(preconditioning, t):
        def error(weights):
            denoiser = NetworkDenoiser(Embedding(weights), PROCESS, preconditioning=preconditioning)
            return loss.per_example(denoiser, key, x0, jnp.asarray(t))[0]

        return jax.value_and_grad(error)(weights)

    shared, plain = value_and_grad(SharedTimes(), 0.25), value_and_grad(TimeLabel(), 0.25)
    np.testing.assert_array_equal(shared[0], plain[0])
    np.testing.assert_array_equal(shared[1], plain[1])
    # Below it, one weight learns for its whole interval.
    weight = lambda t: np.flatnonzero(value_and_grad(SharedTimes(), t)[1])
    assert weight(0.041) == weight(0.059) == 4
    assert np.flatnonzero(value_and_grad(TimeLabel(), 0.059)[1]) == 5


def test_training_and_sampling_use_it_alike():
    """Trained to convergence, a shared weight is the regression over its whole interval."""
    loss = losses.DenoisingLoss(weighting=losses.Uniform(predictions.Eps()))
    batch = {"x": jnp.zeros((512, 1))}  # eps = x / sigma: each weight learns 1 / sigma

    def objective(weights, key):
        denoiser = NetworkDenoiser(Embedding(weights), PROCESS, preconditioning=SharedTimes())
        return loss(denoiser, key, batch, {})[0]

    @jax.jit
    def train(weights):
        def step(weights, key):
            gradient = jax.grad(objective)(weights, key)
            return weights - 10.0 * gradient, None

        return jax.lax.scan(step, weights, jax.random.split(jax.random.key(0), 2000))[0]

    weights = train(jnp.zeros(100))
    t = jnp.linspace(0.04, 0.06, 1001)
    optimum = PROCESS.sigma(t).mean() / (PROCESS.sigma(t) ** 2).mean()
    np.testing.assert_allclose(weights[4], optimum, rtol=0.05)
    assert weights[5] == weights[7] == 0  # never seen
    np.testing.assert_allclose(weights[50], 1 / PROCESS.sigma(jnp.asarray(0.505)), rtol=0.05)
    denoiser = NetworkDenoiser(Embedding(weights), PROCESS, preconditioning=SharedTimes())
    for time in (0.043, 0.057):
        eps = denoiser.predict(predictions.Eps(), jnp.ones(1), jnp.asarray(time))
        np.testing.assert_allclose(eps, weights[4], rtol=1e-3)


def test_sharing_nothing_is_said_otherwise():
    with pytest.raises(ValueError, match="`num_intervals` must be at least 1, got 0"):
        SharedTimes(num_intervals=0)

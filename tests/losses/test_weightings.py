import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import losses, predictions, processes
from jaxdiff.denoiser import NetworkDenoiser
from jaxdiff.losses import DenoisingLoss, Uniform


def weight(weighting, process, t, density=1.0):
    return jax.vmap(lambda t: weighting(process, t, density))(t)


def test_published_weights_in_x0_space(x64):
    """The table of weights on eps, on v and on the flow velocity, each derived on its own."""
    process = processes.VP()
    t = jnp.linspace(0.01, 1.0, 40)
    snr = process.alpha(t) ** 2 / process.sigma(t) ** 2
    sigma = 1 / jnp.sqrt(snr)  # EDM's noise level
    expected = {
        Uniform(predictions.X0()): jnp.ones_like(snr),
        Uniform(predictions.Eps()): snr,
        Uniform(predictions.V()): snr + 1,
        losses.TruncatedSNR(): jnp.maximum(snr, 1),
        losses.TruncatedSNR(0.0): snr,
        losses.MinSNR(): jnp.minimum(snr, 5),
        losses.P2(): snr / (1 + snr),
        losses.P2(1.0, 0.5): snr / jnp.sqrt(1 + snr),
    }
    for weighting, value in expected.items():
        np.testing.assert_allclose(weight(weighting, process, t), value, rtol=1e-9)
    edm = Uniform(predictions.F(0.5))
    np.testing.assert_allclose(
        weight(edm, processes.EDM(), sigma), (sigma**2 + 0.25) / (0.5 * sigma) ** 2, rtol=1e-9
    )
    flow = Uniform(predictions.Velocity())
    inner = t[:-1]
    np.testing.assert_allclose(
        weight(flow, processes.RectifiedFlow(), inner), 1 / inner**2, rtol=1e-9
    )


def test_likelihood_weight_is_half_g_squared_on_the_score(x64):
    for process in (processes.VP(), processes.RectifiedFlow(), processes.VE(), processes.SubVP()):
        t = jnp.linspace(0.05, 0.95, 20)
        # A score error e is an x0 error sigma^2 e / alpha.
        on_score = process.diffusion(t) ** 2 / 2
        on_x0 = on_score * (process.alpha(t) / process.sigma(t) ** 2) ** 2
        np.testing.assert_allclose(weight(losses.ELBO(), process, t), on_x0, rtol=1e-9)


@pytest.mark.parametrize(
    "law", [losses.UniformTime(), losses.LogNormal(0.0, 2.0), losses.LogitNormal(0.3, 1.2)]
)
@pytest.mark.parametrize("weighting", [losses.Sigmoid(), losses.ELBO()])
def test_integral_weightings_do_not_depend_on_the_time_law(x64, law, weighting):
    """E_law[w(t) err(t)] = 1/2 int w(lambda) eps_err dlambda, by quadrature over levels u."""
    process = processes.RectifiedFlow()
    u = (jnp.arange(200_000) + 0.5) / 200_000
    t = law.quantile(process, u)

    def integrand(t):
        # An error in eps that is smooth in lambda and vanishes at both ends of the range.
        log_snr = process.log_snr(t)
        eps_error = jnp.exp(-(log_snr**2) / 8)
        w = weighting(process, t, law.density(process, t))
        return w * eps_error / jnp.exp(log_snr)

    value = jax.vmap(integrand)(t).mean()
    log_snr = jnp.linspace(-18, 18, 20_001)
    w = jax.nn.sigmoid(2 - log_snr) if isinstance(weighting, losses.Sigmoid) else 1.0
    exact = 0.5 * jnp.sum(w * jnp.exp(-(log_snr**2) / 8)) * (log_snr[1] - log_snr[0])
    np.testing.assert_allclose(value, exact, rtol=2e-4)


@pytest.mark.parametrize(
    "prediction",
    [
        predictions.X0(),
        predictions.Eps(),
        predictions.V(),
        predictions.Velocity(),
        predictions.F(0.7),
    ],
)
@pytest.mark.parametrize("process", [processes.VP(), processes.RectifiedFlow()])
def test_uniform_weight_on_a_prediction_is_its_own_regression(x64, prediction, process):
    """Value and gradient equal those of regressing the output on its target directly."""
    x0 = jax.random.normal(jax.random.key(0), (6,))
    t, key = jnp.asarray(0.4), jax.random.key(1)
    matrix = jax.random.normal(jax.random.key(2), (6, 6)) / 3

    def through_x0(matrix):
        denoiser = NetworkDenoiser(lambda x, t, cond, key: matrix @ x, process, prediction)
        return DenoisingLoss(Uniform(prediction)).per_example(denoiser, key, x0, t)[0]

    eps = None

    def recover(x, t, cond, key):
        nonlocal eps
        eps = (x - process.alpha(0.4) * x0) / process.sigma(0.4)
        return x

    DenoisingLoss().per_example(NetworkDenoiser(recover, process), key, x0, t)
    alpha, sigma = process.alpha(t), process.sigma(t)
    x = alpha * x0 + sigma * eps
    slopes = jax.jvp(process.alpha, (t,), (1.0,))[1], jax.jvp(process.sigma, (t,), (1.0,))[1]
    total = (0.7 * alpha) ** 2 + sigma**2
    target = {
        "X0": x0,
        "Eps": eps,
        "V": (alpha * eps - sigma * x0),
        "Velocity": slopes[0] * x0 + slopes[1] * eps,
        "F": (x0 - alpha * 0.49 / total * x) * jnp.sqrt(total) / (0.7 * sigma),
    }[type(prediction).__name__]
    direct = lambda matrix: jnp.mean((target - matrix @ x) ** 2)
    np.testing.assert_allclose(through_x0(matrix), direct(matrix), rtol=1e-9)
    np.testing.assert_allclose(jax.grad(through_x0)(matrix), jax.grad(direct)(matrix), rtol=1e-8)


def test_all_predictions_with_matched_weights_give_one_gradient(x64):
    """The gradient with respect to the denoiser's answer depends on the x0-weight alone."""
    process = processes.VP()
    x0, t = jax.random.normal(jax.random.key(0), (6,)), jnp.asarray(0.3)
    outputs = jax.random.normal(jax.random.key(1), (6,))
    weightings = [
        Uniform(),
        losses.MinSNR(),
        losses.P2(),
        losses.Sigmoid(),
        losses.ELBO(),
        losses.TruncatedSNR(),
    ]
    kinds = [predictions.X0(), predictions.Eps(), predictions.V(), predictions.Velocity()]
    for weighting in weightings:
        gradients = []
        for prediction in kinds:

            def loss(shift, prediction=prediction, weighting=weighting):
                # The same answer in every parameterisation, moved by `shift` in x0.
                def network(x, label, cond, key):
                    return prediction.from_x0(process, x, t, outputs + shift)

                denoiser = NetworkDenoiser(network, process, prediction)
                return DenoisingLoss(weighting).per_example(denoiser, jax.random.key(2), x0, t)[0]

            gradients.append(jax.grad(loss)(jnp.zeros(6)))
        for gradient in gradients[1:]:
            np.testing.assert_allclose(gradient, gradients[0], rtol=1e-8)

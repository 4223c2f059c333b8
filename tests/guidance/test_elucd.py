"""Guidance by classifiers of clean examples, and how far to trust them: against closed forms."""

import dataclasses

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import gaussian, mixture
from flax import nnx
from numpy.testing import assert_allclose

import jaxdiff
from jaxdiff import guidance, metrics, networks, oracles, processes, solvers
from jaxdiff.guidance import EluCD, EluCDSteps
from jaxdiff.predictions import Score
from jaxdiff.solvers import Ancestral, GaussianSolver

KEY = jax.random.key(0)
INFINITE = {"low": -np.inf, "high": np.inf}
WEIGHTS = np.array([[1.0, -0.5, 0.3], [-0.7, 0.2, 0.1], [0.4, 0.8, -0.6]])
BIAS = np.array([0.1, -0.3, 0.2])
Partial = jax.tree_util.Partial


def linear(weights, x):
    return weights @ x + jnp.asarray(BIAS, x.dtype)[: len(weights)]


def quadratic(x):
    """Logits whose gradient depends on x."""
    return jnp.stack([jnp.sum(x), jnp.sum(x**2), -jnp.sum(x * jnp.roll(x, 1))])


LINEAR = Partial(linear, jnp.asarray(WEIGHTS, jnp.float32))


def softmax(f):
    return np.exp(f - f.max()) / np.exp(f - f.max()).sum()


def test_linear_logits_have_their_gradient_in_closed_form(x64):
    x, y = np.array([0.3, -0.2, 0.9]), 1
    slope = jax.jit(
        jax.grad(
            lambda x, tau1, tau2: guidance.tempered_log_prob(
                linear(jnp.asarray(WEIGHTS), x), jnp.asarray(y), tau1, tau2
            )
        )
    )
    for tau1, tau2 in ((1.0, 1.0), (1.0, 0.5), (2.0, 0.3)):
        expected = tau1 * WEIGHTS[y] - tau2 * WEIGHTS.T @ softmax(tau2 * (WEIGHTS @ x + BIAS))
        assert_allclose(slope(x, tau1, tau2), expected, rtol=1e-12)
    assert_allclose(slope(x, 1.0, 0.0), WEIGHTS[y], rtol=1e-12)


def test_a_temperature_is_the_classifier_of_tempered_logits(x64):
    """tau1 = tau2 = 1 of tau f is tau1 = tau2 = tau of f; tau1 alone scales the joint direction."""
    laws, y = gaussian(processes.VP()), {"y": jnp.asarray(2)}
    x, t = jnp.asarray([0.3, -0.2, 0.9]), jnp.asarray(0.6)
    hot = Partial(lambda x: 1.7 * quadratic(x))
    look = jax.jit(lambda d: d(x, t, y) - laws(x, t))
    options = {"shift": "score", "wrt": "xt", **INFINITE}
    tempered = EluCD(laws, Partial(quadratic), tau1=1.7, tau2=1.7, **options)
    assert_allclose(look(tempered), look(EluCD(laws, hot, tau2=1.0, **options)), rtol=1e-12)
    joint = dataclasses.replace(tempered, tau1=1.0, tau2=0.0)
    twice = dataclasses.replace(joint, tau1=2.0)
    assert_allclose(look(twice), 2 * look(joint), rtol=1e-12)


class MeanShift(GaussianSolver):
    """The published step: the mean of q(x_s | x_t, x0_hat), moved by (Var + A_t) g."""

    direction: Partial
    gamma: float
    variance: float
    classes: jax.Array
    stochastic = True

    def transition(self, problem, x, step, estimate):
        process, t, s = problem.process, step.t, step.s
        ratio = process.alpha(t) / process.alpha(s)
        beta = process.sigma(t) ** 2 - ratio**2 * process.sigma(s) ** 2
        small = beta * process.sigma(s) ** 2 / process.sigma(t) ** 2
        mean = process.alpha(s) * beta / process.sigma(t) ** 2 * estimate.x0
        mean += ratio * process.sigma(s) ** 2 / process.sigma(t) ** 2 * x
        spread = jnp.where(s > 0, small ** (1 - self.variance) * beta**self.variance, 0)
        first, second = problem.times[:2]
        ratio = process.alpha(first) / process.alpha(second)
        largest = process.sigma(first) ** 2 - ratio**2 * process.sigma(second) ** 2
        steps = problem.num_steps
        left = steps - 1 - step.index  # the respaced step's number, T' - 1 to 0
        sine = jnp.maximum(self.gamma * jnp.sin(jnp.pi * left / steps) * largest, 0)
        moved = mean + (spread + sine) * self.direction(estimate.x0)
        return moved, jnp.sqrt(spread)


@pytest.mark.parametrize("process", [processes.VP(), processes.Cosine()])
def test_a_shift_of_x0_is_the_shift_of_an_ancestral_mean(x64, process):
    """With the schedule by the number of steps, of a uniform grid, and the input clipped."""
    laws, steps = gaussian(process), 7
    times = jnp.linspace(0.95, 0.0, steps + 1)

    def slope(x0):
        value = lambda u: guidance.tempered_log_prob(quadratic(u), 1, 0.9, 0.4)
        return 1.3 * jax.grad(value)(jnp.clip(x0, -0.5, 0.6))

    @jax.jit
    def both(gamma, variance):
        guided = EluCD(
            laws, Partial(quadratic), 1.3, tau1=0.9, tau2=0.4, gamma=gamma, variance=variance,
            low=-0.5, high=0.6,
        )  # fmt: skip
        cond = {"y": jnp.ones(4, int)}
        ours = jaxdiff.sample(
            KEY, guided, (3,), 4, cond=cond, solver=Ancestral(variance), times=times
        )
        shifted = MeanShift(Partial(slope), gamma, variance, jnp.ones(()))
        theirs = jaxdiff.sample(KEY, laws, (3,), 4, solver=shifted, times=times)
        return ours.x, theirs.x

    ours, theirs = jax.vmap(both)(jnp.asarray([0.0, 0.3, 0.3]), jnp.asarray([0.0, 0.0, 0.7]))
    assert_allclose(ours, theirs, rtol=1e-9)
    assert not np.allclose(ours[0], ours[1], atol=1e-3)


def test_a_learned_variance_is_the_variance_of_the_shift(x64):
    """With LearnedAncestral; of a constant variance it is Ancestral's."""

    class Learned(jaxdiff.DenoiserMap):
        base: jaxdiff.Denoiser

        def estimate(self, x, t, cond=None, *, key=None):
            return self.base.estimate(x, t, cond, key=key).replace(variance=jnp.full(x.shape, 0.4))

    laws, options = gaussian(processes.VP()), {"times": 5, "cond": {"y": jnp.zeros(2, int)}}
    run = lambda base, solver, variance: (
        jaxdiff.sample(
            KEY,
            EluCD(base, Partial(quadratic), variance=variance),
            (3,),
            2,
            solver=solver,
            **options,
        ).x
    )
    learned = run(Learned(laws), solvers.LearnedAncestral(), 0.0)
    assert_allclose(learned, run(laws, Ancestral(0.4), 0.4), rtol=1e-9)


def test_linear_energies_of_clean_examples_tilt_a_gaussian(x64):
    """p(x0) exp(w x0) is N(m + C w, C): the joint direction through the denoiser samples it."""
    laws = gaussian(processes.VP())
    mean, covariance = laws.moments()
    tilted = oracles.gaussian(processes.VP(), mean + covariance @ WEIGHTS[1], covariance)
    weights = Partial(linear, jnp.asarray(WEIGHTS))
    options = {"shift": "score", "tau2": 0.0, **INFINITE}
    guided = EluCD(laws, weights, wrt="xt", **options)
    rough = EluCD(laws, weights, **options)
    run = lambda d, cond=None: jaxdiff.sample(KEY, d, (3,), 3, cond=cond, times=8).x
    found = run(guided, {"y": jnp.ones(3, int)})
    assert_allclose(found, run(tilted), rtol=1e-9)
    # By x0 the derivative dx0 / dx_t is missing.
    assert np.abs(run(rough, {"y": jnp.ones(3, int)}) - found).max() > 0.1


class Exact(jaxdiff.DenoiserMap):
    """EluCD with the exact classifier of noisy examples, one for each t."""

    base: oracles.GaussianMixture
    scale: float = 1.0

    def __call__(self, x, t, cond=None, *, key=None):
        logits = Partial(lambda t, x: self.base.class_log_posterior(x, t), t)
        guided = EluCD(self.base, logits, self.scale, tau2=1.0, input="xt", wrt="xt", shift="score")
        return guided(x, t, cond)


def test_the_exact_classifier_gives_the_conditional_law(x64):
    """Pointwise at every time and scale, and in samples."""
    laws = mixture(processes.VP())
    x, cond = jnp.asarray([0.3, -0.8]), {"y": jnp.asarray(1)}

    @jax.jit
    def at(t, scale):
        slope = jax.grad(lambda x: laws.class_log_posterior(x, t)[1])(x)
        expected = jax.grad(laws.log_prob)(x, t) + scale * slope
        score = Exact(laws, scale).predict(Score(), x, t, cond)
        return score, expected, Exact(laws)(x, t, cond), laws(x, t, jnp.asarray(1))

    times = jnp.asarray([0.05, 0.3, 0.6, 0.95])
    found = jax.vmap(at)(times, jnp.asarray([1.0, 2.5, 0.5, 0.0]))
    assert_allclose(found[0], found[1], rtol=1e-9)
    assert_allclose(found[2], found[3], rtol=1e-9)
    run = lambda d, cond: jaxdiff.sample(KEY, d, (2,), 2000, cond=cond, times=200).x
    ours, theirs = run(Exact(laws), {"y": jnp.ones(2000, int)}), run(laws, jnp.ones(2000, int))
    assert_allclose(ours, theirs, atol=1e-6)
    mean, covariance = laws.moments(jnp.asarray(1))
    assert_allclose(ours.mean(0), mean, atol=0.06)
    assert_allclose(np.cov(np.asarray(ours).T), covariance, atol=0.08)


def test_steps_of_edm_move_by_the_published_weights(x64):
    """w_0 = G, w_N-1 = 2 G / (N + 1) + G a sin(pi / N), and the sums over steps."""
    problem = lambda steps: solvers.Problem(None, None, None, jnp.linspace(1.0, 0.0, steps + 1), -1)
    solver = EluCDSteps(logits=LINEAR)
    for steps, total in ((10, 0.031), (18, 0.054), (36, 0.103)):
        w = solver.own_plan(problem(steps))
        assert w.shape == (steps,)
        assert_allclose(w[0], 0.004, rtol=1e-12)
        last = 0.008 / (steps + 1) + 0.0012 * np.sin(np.pi / steps)
        assert_allclose(w[-1], last, rtol=1e-9)
        assert_allclose(w.sum(), total, atol=5e-4)
    w = dataclasses.replace(solver, scale=0.0).own_plan(problem(5))
    assert_allclose(w, 1e-5, rtol=1e-12)


def test_steps_of_edm_are_euler_and_heun_from_the_moved_state(x64):
    """Against the loop in numpy; the gradient's length does not matter."""
    process = processes.EDM()
    laws = gaussian(process)
    times = jnp.asarray([20.0, 4.0, 0.7, 0.0])
    run = jax.jit(
        lambda logits: jaxdiff.sample(
            KEY, laws, (3,), 2, cond={"y": jnp.ones(2, int)}, times=times,
            solver=EluCDSteps(logits=logits, scale=0.3, tau2=0.7),
        )
    )  # fmt: skip
    out = run(Partial(linear, jnp.asarray(WEIGHTS)))
    assert out.nfe[0] == 5
    mean, covariance = (np.asarray(part) for part in laws.moments())
    start = jaxdiff.sample(
        KEY, laws, (3,), 2, times=times, saveat=diffrax.SaveAt(t0=True)
    ).trajectory.x

    def denoised(x, t):
        gain = covariance @ np.linalg.inv(covariance + t**2 * np.eye(3))
        return mean + gain @ (x - mean)

    for found, x in zip(out.x, np.asarray(start)[:, 0], strict=True):
        for i, (t, s) in enumerate(zip(np.asarray(times[:-1]), np.asarray(times[1:]), strict=True)):
            size = np.sqrt(np.mean(x**2))
            logits = 0.7 * (WEIGHTS @ (x / max(size, 1)) + BIAS)
            g = WEIGHTS[1] - 0.7 * WEIGHTS.T @ softmax(logits)
            w = max(0.3 / 4 * (4 - i), 1e-5) + 0.09 * np.sin(np.pi * i / 3)
            x = x + w * size * g / np.sqrt(np.mean(g**2))
            slope = (x - denoised(x, t)) / t
            end = x + (s - t) * slope
            x = end if s == 0 else x + (s - t) * (slope + (end - denoised(end, s)) / s) / 2
        assert_allclose(found, x, rtol=1e-8)


def test_the_length_of_gradients_does_not_matter(x64):
    """Of steps as in EDM's code, and of normalised maps; a gradient of 0 is none."""
    laws = gaussian(processes.VP())
    cond = {"y": jnp.ones(2, int)}

    @jax.jit
    def both(factor):
        # tau2 = 0: the factor is one on the gradient alone.
        logits = Partial(lambda f, x: f * quadratic(x), factor)
        steps = EluCDSteps(solvers.DDIM(), logits=logits, scale=0.05)
        map_ = EluCD(laws, logits, 0.2, tau2=0.0, normalise="rms", input="rms")
        run = lambda d, s: jaxdiff.sample(KEY, d, (3,), 2, cond=cond, times=4, solver=s).x
        return run(laws, steps), run(map_, Ancestral())

    for ours in jax.vmap(both)(jnp.asarray([1.0, 1e-6, 1e6, 0.0])):
        assert_allclose(ours[1:3], ours[:1].repeat(2, 0), rtol=1e-9)
        assert not np.allclose(ours[0], ours[3], atol=1e-4)
        assert np.all(np.isfinite(ours))


def test_softplus_is_near_to_relu(x64):
    z = jnp.linspace(-3, 3, 601)

    def furthest(beta):
        return jnp.max(jnp.abs(networks.Softplus(beta)(z) - jax.nn.relu(z)))

    beta = jnp.asarray([1.0, 3.0, 5.0, 40.0])
    assert_allclose(jax.vmap(furthest)(beta), np.log(2) / beta, rtol=1e-9)


def test_softened_classifiers_keep_their_weights_and_do_not_recompile():
    make = lambda activation: networks.ConvClassifier(
        image_size=4, in_channels=1, num_classes=3, channels=2, features=4, activation=activation,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    sharp, traces = make(jax.nn.relu), []

    @jax.jit
    def logits(network, x):
        traces.append(1)
        return network(x)

    x = jnp.linspace(-1, 1, 16).reshape(4, 4, 1)
    hard = logits(sharp, x)
    soft = [logits(networks.softened(sharp, beta), x) for beta in (1.0, 5.0, 1e4)]
    assert len(traces) == 2  # one of ReLU, one of every beta
    assert_allclose(soft[2], hard, atol=1e-3)
    assert np.abs(soft[0] - hard).max() > np.abs(soft[1] - hard).max() > 1e-3
    assert_allclose(logits(make(networks.Softplus(5.0)), x), soft[1], rtol=1e-6)
    assert sharp.convs[0].kernel[...] is networks.softened(sharp, 2.0).convs[0].kernel[...]
    with pytest.raises(TypeError, match="`network` must have an `activation`"):
        networks.softened(networks.MLP(2, hidden=4, num_blocks=1, rngs=nnx.Rngs(0)), 3.0)
    with pytest.raises(ValueError, match="`beta`"):
        networks.Softplus(0.0)


MU, STD = 1.0, 0.5


def gap(process, t, of_x0):
    """E |confidence - accuracy| of the clean classifier of two Gaussians, by quadrature."""
    a, b = (float(f(jnp.asarray(t))) for f in (process.alpha, process.sigma))
    spread = a**2 * STD**2 + b**2
    x = np.linspace(-8, 8, 40001)
    density = sum(
        np.exp(-((x - a * m) ** 2) / (2 * spread)) / np.sqrt(8 * np.pi * spread) for m in (MU, -MU)
    )
    exact = 1 / (1 + np.exp(-2 * a * MU * x / spread))
    pull = a * STD**2 / spread
    x0 = sum(p * (m + pull * (x - a * m)) for p, m in ((exact, MU), (1 - exact, -MU)))
    clean = 1 / (1 + np.exp(-2 * MU * (x0 if of_x0 else x) / STD**2))
    return np.trapezoid(np.abs(clean - exact) * density, x)


def test_calibration_along_sampling_is_the_quadrature(x64):
    """A clean classifier is the better one of x0_hat in much noise, and of x_t in little."""
    process = processes.VP()
    laws = oracles.gaussian_mixture(
        process, jnp.asarray([[-MU], [MU]]), STD**2 * jnp.ones((2, 1, 1)), labels=[0, 1]
    )
    predictor = Partial(lambda laws, x, t, cond: laws(x, t), laws)
    classifier = Partial(lambda x: jnp.stack([0 * x[0], 2 * MU * x[0] / STD**2]))
    times = jnp.asarray([*np.linspace(1.0, 0.0, 41)])
    count = 20_000
    labels = jnp.arange(count) % 2
    found = metrics.trajectory_calibration(
        KEY, laws, classifier, (1,), labels, predictor=predictor, times=times,
        metric=lambda logits, labels: metrics.calibration_error(logits, labels, num_bins=60),
    )  # fmt: skip
    assert found.of_x0.shape == found.times.shape == (40,)
    rows = np.array([8, 16, 24, 32, 38])  # t = .8, .6, .4, .2, .05
    for of_x0, values in ((True, found.of_x0), (False, found.of_xt)):
        expected = [gap(process, t, of_x0) for t in np.asarray(found.times)[rows]]
        assert_allclose(values[rows], expected, atol=0.012)
    assert np.all(found.of_x0[8:24] < found.of_xt[8:24])
    assert found.of_x0[34] > found.of_xt[34]


def drawn(count, temperature):
    """Logits of two classes, those of the truth times a temperature; and labels of the truth."""
    z = 2 * jax.random.normal(KEY, (count,))
    labels = jax.random.bernoulli(jax.random.key(1), jax.nn.sigmoid(z)).astype(int)
    return jnp.stack([jnp.zeros(count), temperature * z], 1), labels


def test_calibrated_logits_have_no_calibration_error(x64):
    """Up to the bias of bins; those of another temperature have that of quadrature."""
    z = np.linspace(-16, 16, 40001)
    density = np.exp(-(z**2) / 8) / np.sqrt(8 * np.pi)
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    right = np.trapezoid(sigmoid(np.abs(z)) * density, z)
    for bins in ("width", "mass"):
        error = jax.jit(lambda *pair, bins=bins: metrics.calibration_error(*pair, bins=bins))
        for count in (1_000, 40_000):
            bound = np.sqrt(2 * 15 * right * (1 - right) / (np.pi * count))
            assert error(*drawn(count, 1.0)) < 1.5 * bound
        hot = np.trapezoid((sigmoid(3 * np.abs(z)) - sigmoid(np.abs(z))) * density, z)
        assert_allclose(error(*drawn(40_000, 3.0)), hot, atol=0.01)


def test_proper_scores_are_their_quadratures(x64):
    z = np.linspace(-16, 16, 40001)
    density = np.exp(-(z**2) / 8) / np.sqrt(8 * np.pi)
    p, q = (1 / (1 + np.exp(-c * z)) for c in (1.0, 2.0))
    for score, value in (
        (metrics.brier_score, 2 * (p * (1 - q) ** 2 + (1 - p) * q**2)),
        (metrics.negative_log_likelihood, -(p * np.log(q) + (1 - p) * np.log1p(-q))),
    ):
        found, error = score(*drawn(40_000, 2.0))
        assert abs(found - np.trapezoid(value * density, z)) < 4 * error < 0.05
        # Proper: the truth is best.
        assert score(*drawn(40_000, 1.0))[0] < found


@pytest.mark.usefixtures("unchecked")
def test_errors():
    laws = mixture(processes.VP(), jnp.float32)
    plain = Partial(lambda x: jnp.stack([x[0], x[1]]))
    x, t = jnp.zeros(2), jnp.asarray(0.5)
    for argument in ("input", "wrt", "shift", "normalise"):
        with pytest.raises(ValueError, match=f"`{argument}` must be one of"):
            EluCD(laws, plain, **{argument: "else"})
    with pytest.raises(TypeError, match="was called outside of one"):
        EluCD(laws, plain)(x, t, {"y": jnp.asarray(0)})
    guided = EluCD(laws, plain, shift="score")
    with pytest.raises(ValueError, match="the entries 'y' for EluCD"):
        guided(x, t)
    with pytest.raises(ValueError, match="`y` must be an integer class"):
        guided(x, t, {"y": jnp.asarray(0.5)})
    with pytest.raises(ValueError, match=r"`logits` must be \(classes,\)"):
        EluCD(laws, Partial(jnp.sum), shift="score")(x, t, {"y": jnp.asarray(0)})
    with pytest.raises(TypeError, match="`logits` must be a function"):
        EluCDSteps(logits=3.0)
    # Of a whole batch, before anything is drawn; around another solver, too.
    steps = EluCDSteps(solvers.DDIM(), logits=nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    wanted = {"y": jnp.asarray([0, 3])}
    for solver in (steps, guidance.Recurrence(steps, 2)):
        with pytest.raises(ValueError, match="`y` must .*at most 2"):
            jaxdiff.sample(KEY, laws, (2,), 2, solver=solver, times=2, cond=wanted)
    logits, labels = jnp.zeros((4, 2)), jnp.zeros(4, int)
    with pytest.raises(ValueError, match='`bins` must be "width" or "mass"'):
        metrics.calibration_error(logits, labels, bins="other")
    with pytest.raises(ValueError, match="must lie in"):
        metrics.brier_score(logits, labels + 2)

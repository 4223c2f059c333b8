"""Guidance by small networks that are trained for it, where what they learn is known."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import gaussian, with_random_weights
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

import jaxdiff
from jaxdiff import (
    finetuning,
    guidance,
    losses,
    networks,
    oracles,
    parallel,
    predictions,
    processes,
)
from jaxdiff.training import Player, init_train_state, make_train_step

KEY = jax.random.key(0)


# --- groups, and models that are no worse on one of them


class Gain(jaxdiff.Denoiser):
    """D = gain x: a model of one weight."""

    network: jax.Array
    process: processes.GaussianProcess = processes.VP()

    def __call__(self, x, t, cond=None, *, key=None):
        return self.network.astype(x.dtype) * x


def grouped(count=8):
    x = jax.random.normal(jax.random.key(1), (count, 2)) * jnp.linspace(0.5, 2, count)[:, None]
    return {"x": x, "index": jnp.arange(count)[::-1]}


def test_losses_of_groups_are_reduced_exactly(x64):
    """Against the examples' own losses and slopes: equal groups, two of any weights, known ones."""
    batch, plain = grouped(), losses.DenoisingLoss()
    logits = jax.random.normal(KEY, (8, 2))
    known = jnp.where(jnp.arange(8)[:, None] % 2 == jnp.arange(2), 0.0, -jnp.inf)
    one = jnp.stack([jnp.zeros(8), jnp.full(8, -jnp.inf)], 1)

    @jax.jit
    def found(gain):
        def loss(gain, logits, variance):
            frozen = {"groups": guidance.GroupWeights(logits)}
            return guidance.InvariantLoss(variance)(Gain(gain), KEY, batch, frozen)[0]

        slope = jax.value_and_grad(loss)
        stacked = jnp.stack([jnp.zeros((8, 2)), logits, known, one])
        by_groups = jax.vmap(lambda logits: slope(gain, logits, 0.7))(stacked)

        def each(gain):
            def of(key, u, x0, cond):
                t = plain.time_law.quantile(processes.VP(), u)
                return plain.per_example(Gain(gain), key, x0, t, cond)[0]

            return losses.each_example(of, KEY, batch)

        whole = jax.value_and_grad(lambda gain: plain(Gain(gain), KEY, batch, {})[0])(gain)
        alone = slope(gain, jnp.zeros((8, 1)), 0.7)
        return by_groups, (each(gain), jax.jacfwd(each)(gain)), whole, alone

    (values, slopes), (own, own_slopes), whole, alone = found(jnp.asarray(0.3))
    # Groups that are the same, one group, and one that nobody is in: the plain loss.
    for i in (0, 3):
        assert_allclose((values[i], slopes[i]), whole, rtol=1e-12)
    assert_allclose(alone, whole, rtol=1e-12)
    for i, rows in ((1, logits), (2, known)):
        weights = np.asarray(jax.nn.softmax(rows, 1))[::-1]  # the order of "index"
        weights = weights / weights.sum(0)
        means, steps = np.asarray(own) @ weights, np.asarray(own_slopes) @ weights
        apart = means[0] - means[1]
        assert_allclose(values[i], means.mean() + 0.7 * apart**2 / 2, rtol=1e-12)
        assert_allclose(slopes[i], steps.mean() + 0.7 * apart * (steps[0] - steps[1]), rtol=1e-12)
        assert abs(apart) > 0.01


def test_planted_groups_are_found(x64):
    """Two halves of the data that a model knows well and badly: the best cut there is."""
    laws = oracles.gaussian(processes.VP(), jnp.zeros(2), 0.25 * jnp.eye(2))
    rng = np.random.default_rng(0)
    planted = rng.permutation(np.arange(24) % 2)
    x = 0.2 * rng.normal(size=(24, 2)) + 3 * planted[:, None]
    batch = {"x": jnp.asarray(x), "index": jnp.arange(24)}
    optimizer = optax.adam(0.1)

    @jax.jit
    def learn(batch):
        own = guidance.example_losses(laws, KEY, batch, draws=16)
        start = guidance.group_weights(KEY, 24, 2)
        batch = batch | {"loss": own}

        def step(carry, _):
            groups, state = carry
            loss = lambda groups: guidance.GroupingLoss()(groups, KEY, batch, {})
            slope, metrics = jax.grad(loss, has_aux=True)(groups)
            updates, state = optimizer.update(slope, state)
            return (optax.apply_updates(groups, updates), state), metrics["spread"]

        (groups, _), spread = jax.lax.scan(step, (start, optimizer.init(start)), length=300)
        # The numbers of examples, and not their places, decide what they draw.
        turned = jax.tree.map(lambda leaf: leaf[::-1], {k: batch[k] for k in ("x", "index")})
        return own, guidance.example_losses(laws, KEY, turned, draws=16), groups, spread

    own, turned, groups, spread = learn(batch)
    assert_allclose(turned[::-1], own, rtol=1e-12)
    ordered = np.sort(own)
    cuts = [ordered[k:].mean() - ordered[:k].mean() for k in range(1, 24)]
    best = max(cuts) / np.sqrt(2)
    assert spread[0] < 0.2 * best
    assert_allclose(spread[-1], best, rtol=0.01)
    weights = np.asarray(groups(jnp.arange(24)))
    high = np.argsort(own)[1 + int(np.argmax(cuts)) :]
    assert set(np.argmax(weights, 1)[high]) == {np.argmax(weights[high[0]])}
    agree = np.mean(np.argmax(weights, 1) == planted)
    assert max(agree, 1 - agree) == 1.0
    assert_allclose(weights.sum(1), 1, rtol=1e-12)


def test_a_floor_of_shares_hides_groups_that_differ_little(x64):
    """Of two values a < b, shares p in the other's group: linear in p, as said."""
    low, high, count = 1.0, 1.5, 4
    batch = {"index": jnp.arange(2 * count), "loss": jnp.repeat(jnp.asarray([low, high]), count)}

    @jax.jit
    def loss(floor, share):
        rows = jnp.log(jnp.asarray([[1 - share, share], [share, 1 - share]]))
        groups = guidance.GroupWeights(jnp.repeat(rows, count, axis=0))
        return guidance.GroupingLoss(floor)(groups, KEY, batch, {})[0]

    shares = jnp.asarray([0.01, 0.2, 0.4])
    for floor in (0.0, 0.5, 3.0):
        found = jax.vmap(loss, (None, 0))(floor, shares)
        expected = -(1 - 2 * shares) * (high - low) / 2**0.5 - floor * shares * low
        assert_allclose(found, expected, rtol=1e-12)
        assert np.all((np.diff(found) > 0) == (floor < 2**0.5 * (high / low - 1)))

    @jax.jit
    @jax.vmap
    def along_a_row(key):
        rows = jax.random.dirichlet(key, jnp.ones(2), (6,))
        batch = {"index": jnp.arange(6), "loss": jax.random.uniform(key, (6,))}

        def at(share):
            groups = guidance.GroupWeights(jnp.log(rows.at[0].set([share, 1 - share])))
            return guidance.GroupingLoss()(groups, KEY, batch, {})[0]

        return jax.vmap(at)(jnp.linspace(0, 1, 51))

    found = np.asarray(along_a_row(jax.random.split(KEY, 200)))
    assert np.all(np.minimum(found[:, 0], found[:, -1]) <= found.min(1) + 1e-12)


@pytest.mark.parametrize("process", [processes.VP(), processes.RectifiedFlow()])
def test_blends_of_gaussians_are_gaussians(x64, process):
    one = gaussian(process)
    other = oracles.gaussian(process, jnp.asarray([1.0, 0.2, -0.7]), one.covariances()[0])
    x, t = jnp.asarray([0.3, -0.2, 0.9]), jnp.asarray(0.6)
    between = oracles.gaussian(
        process, 0.7 * one.means[0] + 0.3 * other.means[0], one.covariances()[0]
    )

    @jax.jit
    def answers(ratio):
        blended = guidance.Autoguidance(other, one, ratio)
        product = guidance.Product([one, other], [1 - ratio, ratio])
        kinds = (predictions.X0(), predictions.Eps(), predictions.V(), predictions.Score())
        found = [blended.predict(kind, x, t) for kind in kinds]
        parts = [[d.predict(kind, x, t) for kind in kinds] for d in (one, other, between, product)]
        silent = jaxdiff.NetworkDenoiser(jax.tree_util.Partial(nothing), process)
        zero = guidance.Autoguidance(silent, one, ratio).predict(predictions.Eps(), x, t)
        return found, parts, zero

    found, (first, second, exact, product), zero = answers(0.3)
    for i in range(4):
        assert_allclose(found[i], 0.7 * first[i] + 0.3 * second[i], rtol=1e-12)
        assert_allclose(found[i], exact[i], rtol=1e-9)
        assert_allclose(found[i], product[i], rtol=1e-9)
    # A network that answers no noise is not no change.
    assert_allclose(zero, 0.7 * first[1], rtol=1e-12)
    assert_array_equal(answers(0.0)[0][0], first[0])


def nothing(x, t, cond=None, *, key=None):
    return jnp.zeros_like(x)


def test_a_delta_learns_alone_on_any_devices():
    batch = grouped(16)
    groups = guidance.group_weights(KEY, 16, 3, size=1.0)
    model = guidance.Autoguidance(Gain(jnp.asarray(0.0)), Gain(jnp.asarray(0.5)), 0.5)
    player = Player(
        model, guidance.InvariantLoss(2.0), optax.sgd(0.1), trainable=lambda m: m.base.network
    )
    step, constants = make_train_step({"model": player}), {"groups": groups}
    mesh = parallel.make_mesh(devices=jax.devices())
    spread = jax.device_put(batch, parallel.batch_sharding(mesh))
    states = [init_train_state({"model": player}, KEY, mesh=m) for m in (None, mesh)]
    after = [step(s, b, constants) for s, b in zip(states, (batch, spread), strict=True)]
    deltas = [s.players["model"].model.base.network for s, _ in after]
    assert_allclose(deltas[0], deltas[1], rtol=1e-5)
    assert deltas[0] != 0 and after[0][0].players["model"].model.weak.network == 0.5
    assert_allclose(after[0][1]["spread"], after[1][1]["spread"], rtol=1e-5)


def test_errors_of_groups():
    batch, key = grouped(), KEY
    loss, model = guidance.InvariantLoss(), Gain(jnp.asarray(0.5))
    groups = guidance.group_weights(key, 8, 2)
    with pytest.raises(ValueError, match="'groups'"):
        loss(model, key, batch, {})
    with pytest.raises(ValueError, match="'index'"):
        loss(model, key, {"x": batch["x"]}, {"groups": groups})
    with pytest.raises(ValueError, match="'index'"):
        guidance.example_losses(model, key, {"x": batch["x"]})
    with pytest.raises(ValueError, match="'loss'"):
        guidance.GroupingLoss()(groups, key, batch, {})
    with pytest.raises(TypeError, match="`weak` must be a denoiser"):
        guidance.Autoguidance(model, lambda x: x)
    with pytest.raises(TypeError, match="`scale` must be a number"):
        guidance.Autoguidance(model, model, "half")
    for make in (guidance.InvariantLoss, guidance.GroupingLoss):
        with pytest.raises(ValueError, match="at least 0"):
            make(-1.0)


# --- a clean classifier's experts

TABLE = processes.Tabulated(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
EDGES = np.arange(6) / 5


def exact_slope(t):
    """Of the log-odds of two classes N(+-1, 1/4), of which x_t at time t is seen."""
    alpha, sigma = np.asarray(TABLE.alpha(t)), np.asarray(TABLE.sigma(t))
    return 2 * alpha / (alpha**2 / 4 + sigma**2)


def clean_classifier():
    """log-odds 8 x, exact at t = 0."""
    linear = eqx.nn.Linear(1, 2, key=KEY)
    return eqx.tree_at(
        lambda m: (m.weight, m.bias), linear, (jnp.asarray([[4.0], [-4.0]]), jnp.zeros(2))
    )


def two_classes(key, count):
    signs = jnp.where(jnp.arange(count) % 2, 1.0, -1.0)
    return (signs + 0.5 * jax.random.normal(key, (count,)))[:, None]


@pytest.fixture(scope="module")
def trained():
    """Experts after training, and the loss on the way."""
    experts = guidance.make_experts(clean_classifier(), TABLE, KEY, rank=1)
    player = Player(
        experts,
        guidance.PlugAndPlayLoss(),
        optax.adam(optax.cosine_decay_schedule(0.1, 300)),
        trainable=lambda experts: experts.learned,
    )
    step, state = make_train_step({"model": player}), init_train_state({"model": player}, KEY)
    x = jax.vmap(two_classes, (0, None))(jax.random.split(KEY, 300), 2000)
    seen = []
    for batch in x:
        state, metrics = step(state, {"x": batch})
        seen.append(metrics["loss"])
    return state.players["model"].model, np.asarray(seen)


def best_slope(low, high):
    """Of one linear classifier for a range of times, and its cross-entropy, by quadrature."""
    points, weights = np.polynomial.hermite_e.hermegauss(60)
    t = low + (high - low) * (np.arange(100) + 0.5) / 100
    alpha, sigma = np.asarray(TABLE.alpha(t)), np.asarray(TABLE.sigma(t))
    x = alpha[:, None] + np.sqrt(alpha**2 / 4 + sigma**2)[:, None] * points

    def cross_entropy(slope):  # of the class of +1; that of -1 is its mirror image
        return np.logaddexp(0, -slope * x).mean(0) @ weights / weights.sum()

    found = minimize_scalar(cross_entropy, bounds=(0, 10), method="bounded")
    return found.x, found.fun


def test_experts_learn_the_best_classifier_of_their_range(trained):
    experts, seen = trained
    middles = (EDGES[1:] + EDGES[:-1]) / 2
    logits = jax.jit(jax.vmap(experts, (None, 0)))(jnp.ones(1), jnp.asarray(middles))
    zero = jax.jit(jax.vmap(experts, (None, 0)))(jnp.zeros(1), jnp.asarray(middles))
    slopes = (logits - zero) @ np.array([1.0, -1.0])
    best = np.array([best_slope(*ends) for ends in zip(EDGES[:-1], EDGES[1:], strict=True)])
    assert_allclose(slopes, best[:, 0], rtol=0.04, atol=0.03)
    # The clean classifier's is the entropy that the teacher has.
    clean = best_slope(0.0, 0.0)
    assert_allclose(clean[0], 8, rtol=1e-3)
    assert_allclose(seen[-50:].mean(), best[:, 1].mean() - clean[1], rtol=0.01)
    assert seen[0] > 3 * seen[-50:].mean()
    # Off by the ratio of slopes in a range at most; the clean classifier by 25 at step 600.
    at = exact_slope(np.array([0, 101, 201, 401, 601, 801, 1000]) / 1000)
    assert_allclose(at, [8.0, 5.76, 3.19, 1.03, 0.326, 0.078, 0.013], rtol=0.03)
    assert_allclose(exact_slope(0.601), exact_slope(0.6), rtol=0.01)
    assert 24 < 8 / at[4] < 25.5
    ends = exact_slope(EDGES)
    assert np.all((slopes < ends[:-1])[:4] & (slopes > ends[1:])[:4])
    # What learned is the adapters and biases alone.
    assert_array_equal(experts.classifier.weight, clean_classifier().weight)


def test_guidance_by_experts_is_nearer_to_the_conditional_law(trained):
    """At step 600, the estimate under a class; the clean classifier's is off many times more."""
    experts, _ = trained
    laws = oracles.gaussian_mixture(
        TABLE, jnp.asarray([[1.0], [-1.0]]), jnp.full((2, 1, 1), 0.25), labels=[0, 1]
    )
    t, x = jnp.asarray(0.601), jnp.linspace(-1.5, 1.5, 7)[:, None]
    clean = eqx.tree_at(lambda e: e.learned, experts, replace_fn=jnp.zeros_like)

    @jax.jit
    def errors(experts):
        guided = guidance.ClassifierGuidance(laws, experts.log_prob)
        exact = jax.vmap(lambda x: laws(x, t, 0))(x)
        found = jax.vmap(lambda x: guided(x, t, {"y": jnp.asarray(0)}))(x)
        return jnp.max(jnp.abs(found - exact))

    assert errors(experts) < 0.1 * errors(clean)


def test_ranges_of_experts_have_their_lower_end():
    experts = guidance.make_experts(clean_classifier(), TABLE, KEY, count=5)
    t = jnp.concatenate([experts.edges, jnp.nextafter(experts.edges, 0.0), jnp.asarray([0, 1.0])])
    assert_array_equal(experts.index(t), [1, 2, 3, 4, 0, 1, 2, 3, 0, 4])
    assert_allclose(experts.edges, EDGES[1:-1], rtol=1e-6)
    alone = guidance.make_experts(clean_classifier(), TABLE, KEY, count=1)
    assert_array_equal(alone.index(t), np.zeros(10))


def test_divergences_of_experts_are_exact(x64):
    """Of a convolutional classifier, against its own answers with each expert's weights by hand."""
    rng = np.random.default_rng(0)
    network = with_random_weights(
        lambda: networks.ConvClassifier(
            image_size=4, in_channels=1, num_classes=3, channels=2, features=4,
            param_dtype=jnp.float64, rngs=nnx.Rngs(0),
        )
    )  # fmt: skip
    experts = guidance.make_experts(network, processes.VP(), KEY, count=3, rank=2)
    x = jnp.asarray(rng.normal(size=(6, 4, 4, 1)))

    def drawn(key, u, x0, cond):
        t = losses.UniformTime().quantile(processes.VP(), u)
        return t, processes.VP().noise(key, x0, t), network(x0)

    @jax.jit
    def run(experts, temperature):
        loss = guidance.PlugAndPlayLoss(temperature)
        times, noisy, teacher = losses.each_example(drawn, KEY, {"x": x})
        adapters = [jax.tree.map(lambda leaf, i=i: leaf[i], experts.adapters) for i in range(3)]
        answers = []
        for i, adapter in enumerate(adapters):
            own = finetuning.merge(network, adapter)
            own.last.bias = nnx.Param(own.last.bias[...] + experts.biases["last/bias"][i])
            answers.append(jax.vmap(own)(noisy))
        return loss(experts, KEY, {"x": x}, {}), times, teacher, jnp.stack(answers)

    moved = jax.tree.map(lambda w: jnp.asarray(0.3 * rng.normal(size=w.shape)), experts.learned)
    moved = eqx.tree_at(lambda e: e.learned, experts, moved)
    other = {name: 0 * shift for name, shift in moved.biases.items() if name != "last/bias"}
    moved = dataclasses.replace(moved, biases=moved.biases | other)
    (value, metrics), times, teacher, answers = run(moved, 0.25)
    log = lambda logits: logits - logsumexp(logits, -1, keepdims=True)
    expert = np.digitize(times, [1 / 3, 2 / 3])
    assert set(expert) == {0, 1, 2}
    p, q = log(teacher / 0.25), log(np.asarray(answers)[expert, np.arange(6)])
    assert_allclose(value, np.sum(np.exp(p) * (p - q), 1).mean(), rtol=1e-9)
    assert_allclose(metrics["agreement"], np.mean(p.argmax(1) == q.argmax(1)))
    # New experts are the classifier.
    assert_allclose(run(experts, 1.0)[3], jnp.broadcast_to(run(experts, 1.0)[3][0], (3, 6, 3)))


def test_errors_of_experts():
    loss = guidance.PlugAndPlayLoss()
    with pytest.raises(ValueError, match="above 0"):
        guidance.PlugAndPlayLoss(0.0)
    with pytest.raises(TypeError, match="`experts` must be a Experts"):
        loss(clean_classifier(), KEY, {"x": jnp.zeros((2, 1))}, {})
    with pytest.raises(ValueError, match="`count` must be at least 1"):
        guidance.make_experts(clean_classifier(), TABLE, KEY, count=0)
    with pytest.raises(ValueError, match="`layers` must be found"):
        guidance.make_experts(clean_classifier(), TABLE, KEY, layers="blocks")


# --- images read out of activations

MATRIX = np.array([[1.0, -0.5, 0.3], [0.2, 0.4, 1.0]])
POINT = np.array([0.3, -0.2, 0.9])


class Open(eqx.Module):
    """A linear network whose activation is what it is given."""

    matrix: jax.Array

    def __call__(self, x, t, cond=None, *, key=None, tap=None):
        h = x if tap is None else tap("in", x)
        h = self.matrix.astype(x.dtype) @ h
        return h if tap is None else tap("out", h)


class Reader(eqx.Module):
    """A linear aligner."""

    matrix: jax.Array

    def __call__(self, taps, t):
        return self.matrix.astype(taps["in"].dtype) @ taps["in"]


def opened(process=None):
    network = Open(jnp.asarray(np.random.default_rng(0).normal(size=(3, 3))))
    return jaxdiff.NetworkDenoiser(network, processes.VP() if process is None else process)


def test_late_constraints_are_steps_of_their_length(x64):
    """The rule in eps, by hand; classifier guidance; and that of another frame of x."""
    base, aligner = opened(), Reader(jnp.asarray(MATRIX))
    x, t, y = jnp.asarray(POINT), jnp.asarray(0.6), jnp.asarray([0.7, -0.3])
    alpha, sigma = (float(f(t)) for f in (base.process.alpha, base.process.sigma))
    assert_allclose(alpha**2 + sigma**2, 1)
    log_prob = jax.tree_util.Partial(lambda x, t, y: -jnp.mean((y - jnp.asarray(MATRIX) @ x) ** 2))
    traces = []

    @jax.jit
    def answers(scale, weight):
        traces.append(1)
        guided = guidance.LateConstraint(base, aligner, ("in",), scale)
        other = guidance.ClassifierGuidance(base, log_prob, weight)
        cond = {"y": y}
        return base.predict(predictions.Eps(), x, t), guided(x, t, cond), other(x, t, cond)

    eps = np.asarray(base.network.matrix) @ POINT
    slope = -MATRIX.T @ (np.asarray(y) - MATRIX @ POINT)  # of a mean of two squares
    for scale in (2.0, 0.5, 0.0):
        length = scale * np.linalg.norm(eps - POINT) / np.linalg.norm(slope)
        found_eps, found, other = answers(scale, length / sigma)
        assert_allclose(found_eps, eps, rtol=1e-12)
        assert_allclose(found, (POINT - sigma * (eps + length * slope)) / alpha, rtol=1e-9)
        assert_allclose(other, found, rtol=1e-9)
    assert len(traces) == 1

    @jax.jit
    def in_frames():
        """Of networks that see x in the frame of `process`, but are the same model."""
        flow = processes.RectifiedFlow()
        s = flow.time(base.process.log_snr(t))
        spread = jnp.hypot(flow.alpha(s), flow.sigma(s))
        same = opened(flow)
        same = eqx.tree_at(lambda d: d.network.matrix, same, same.network.matrix / spread)
        reader = Reader(jnp.asarray(MATRIX) / spread)
        guided = guidance.LateConstraint(same, reader, ("in",), t_low=0.0)
        first = guidance.LateConstraint(base, aligner, ("in",))
        return guided(spread * x, s, {"y": y}), first(x, t, {"y": y})

    assert_allclose(*in_frames(), rtol=1e-9)


def test_late_constraints_end(x64):
    """At t_low the base's own answer, to the last bit, and no aligner is asked, in a sampler."""
    base, seen = opened(), []

    def asked(taps, t):
        jax.debug.callback(lambda t: seen.append(np.asarray(t).ravel()), t)
        return Reader(jnp.asarray(MATRIX))(taps, t)

    guided = guidance.LateConstraint(base, jax.tree_util.Partial(asked), ("in",))
    cond = {"y": jnp.tile(jnp.asarray([0.7, -0.3]), (3, 1))}
    x, one = jnp.asarray(POINT), {"y": cond["y"][0]}
    call = jax.jit(lambda denoiser, t, cond: denoiser(x, t, cond))
    for t, same in ((0.5, True), (0.3, True), (np.nextafter(0.5, 1), False)):
        found, plain = call(guided, t, one), call(base, t, None)
        assert np.array_equal(found, plain) == same
    jax.effects_barrier()
    assert len(seen) == 1
    seen.clear()
    out = jaxdiff.sample(KEY, guided, (3,), 3, cond=cond, times=jnp.linspace(0.9, 0.0, 10))
    jax.effects_barrier()
    assert_allclose(np.unique(np.concatenate(seen)), 1000 * np.array([0.6, 0.7, 0.8, 0.9]))
    assert np.all(out.nfe == 9)


def test_activations_that_others_read_come_along(x64):
    """And guidance goes around it and inside; in any precision."""
    base = opened()
    make = lambda base: guidance.LateConstraint(base, Reader(jnp.asarray(MATRIX)), ("in",))
    x, cond = jnp.asarray(POINT), {"y": jnp.asarray([0.7, -0.3])}

    @jax.jit
    def run(t):
        read = jaxdiff.reading(make(base), ("out",)).estimate(x, t, cond)
        inside = make(guidance.CFGPlusPlus(base, null_cond={}))(x, t, cond)
        low = make(base)(x.astype(jnp.bfloat16), t.astype(jnp.bfloat16), cond)
        return make(base)(x, t, cond), read, inside, low, make(base).estimate(x, t, cond).taps

    for t in (0.6, 0.4):
        plain, read, inside, low, taps = run(jnp.asarray(t))
        assert_allclose(read.x0, plain, rtol=1e-12)
        assert list(read.taps) == ["out"] and not taps
        assert_allclose(read.taps["out"], np.asarray(base.network.matrix) @ POINT, rtol=1e-12)
        assert_allclose(inside, plain, rtol=1e-12)
        assert low.dtype == jnp.bfloat16
        assert_allclose(low.astype(float), plain, rtol=0.1, atol=0.1)


class At(losses.TimeLaw):
    """One time."""

    t: float

    def quantile(self, process, u):
        return jnp.full_like(u, self.t)

    def density(self, process, t):
        return jnp.ones_like(t)


def test_aligners_learn_the_conditional_mean():
    """y = B x0 + n of x0 ~ N(0, I / 4): the mean and variance of y given x_t, at one time."""
    base, t = opened(), jnp.asarray(0.15)
    alpha, sigma = base.process.alpha(t), base.process.sigma(t)
    gain = float(alpha / 4 / (alpha**2 / 4 + sigma**2))
    left = float(sigma**2 / 4 / (alpha**2 / 4 + sigma**2))
    floor = left * np.mean(np.sum(MATRIX**2, 1)) + 0.1**2
    player = Player(
        Reader(jnp.zeros((2, 3))),
        guidance.LateConstraintLoss(("in",), At(0.15)),
        optax.adam(optax.cosine_decay_schedule(0.05, 200)),
        trainable=lambda reader: reader,
    )
    step, state = make_train_step({"model": player}), init_train_state({"model": player}, KEY)
    seen = []
    for n in range(200):
        x_key, y_key = jax.random.split(jax.random.key(n))
        x = jax.random.normal(x_key, (2000, 3)) / 2
        y = x @ jnp.asarray(MATRIX, x.dtype).T + 0.1 * jax.random.normal(y_key, (2000, 2))
        state, metrics = step(state, {"x": x, "cond": {"y": y}}, {"base": base})
        seen.append(float(metrics["loss"]))
    assert_allclose(state.players["model"].model.matrix, gain * MATRIX, atol=0.02)
    assert_allclose(np.mean(seen[-50:]), floor, rtol=0.02)
    assert_allclose(seen[0], np.mean(np.sum(MATRIX**2, 1)) / 4 + 0.1**2, rtol=0.05)
    assert seen[0] > 1.8 * floor


class Pyramid(eqx.Module):
    """Activations of two sizes: x, and its means over blocks of 2 x 2."""

    def __call__(self, x, t, cond=None, *, key=None, tap=None):
        tap = networks.Tap() if tap is None else tap
        tap("coarse", x.reshape(4, 2, 4, 2, 1).mean((1, 3)))
        return tap("fine", x)


def test_an_aligner_reads_activations_of_several_sizes():
    """Means over blocks of white images, which one of the activations has: to their variance."""
    base, t = jaxdiff.NetworkDenoiser(Pyramid(), processes.VP()), jnp.asarray(0.15)
    alpha, sigma = base.process.alpha(t), base.process.sigma(t)
    floor = float(sigma**2 / (alpha**2 + sigma**2)) / 4
    taps = ("coarse", "fine")
    aligner = networks.TapAligner(
        {name: 1 for name in taps}, image_size=4, out_channels=1, hidden=8, rngs=nnx.Rngs(0)
    )
    player = Player(
        aligner,
        guidance.LateConstraintLoss(taps, At(0.15)),
        optax.adam(optax.cosine_decay_schedule(0.03, 150)),
        trainable=lambda aligner: aligner,
    )
    step, state = make_train_step({"model": player}), init_train_state({"model": player}, KEY)
    seen = []
    for n in range(150):
        x = jax.random.normal(jax.random.key(n), (128, 8, 8, 1))
        y = x.reshape(-1, 4, 2, 4, 2, 1).mean((2, 4))
        state, metrics = step(state, {"x": x, "cond": {"y": y}}, {"base": base})
        seen.append(float(metrics["loss"]))
    assert 0.98 * floor < np.mean(seen[-20:]) < 1.1 * floor
    assert seen[0] > 1.8 * floor
    guided = guidance.LateConstraint(base, state.players["model"].model, taps, t_low=0.1)
    found = jax.jit(lambda g, x, y: (g(x, t, {"y": y}), g.base(x, t)))(guided, x[0], y[1])
    means = [image.reshape(4, 2, 4, 2).mean((1, 3)) for image in found]
    assert np.mean((means[0] - y[1, ..., 0]) ** 2) < np.mean((means[1] - y[1, ..., 0]) ** 2)


def test_errors_of_late_constraints():
    base, reader = opened(), Reader(jnp.asarray(MATRIX))
    x, t, key = jnp.zeros(3), jnp.asarray(0.6), KEY
    with pytest.raises(ValueError, match="entries 'y' for LateConstraint"):
        guidance.LateConstraint(base, reader, ("in",))(x, t)
    with pytest.raises(ValueError, match="`y` must have the shape"):
        guidance.LateConstraint(base, reader, ("in",))(x, t, {"y": jnp.zeros(3)})
    with pytest.raises(ValueError, match="taps that the network does not have"):
        guidance.LateConstraint(base, reader, ("mid",))(x, t, {"y": jnp.zeros(2)})
    with pytest.raises(ValueError, match="`taps` must be a tuple"):
        guidance.LateConstraint(base, reader, "in")
    with pytest.raises(TypeError, match="must hold a network"):
        guidance.LateConstraint(gaussian(processes.VP()), reader, ("in",))
    with pytest.raises(ValueError, match="'base'"):
        guidance.LateConstraintLoss(("in",))(reader, key, {"x": x[None]}, {})
    with pytest.raises(ValueError, match="'y' for LateConstraintLoss"):
        guidance.LateConstraintLoss(("in",))(reader, key, {"x": x[None]}, {"base": base})
    with pytest.raises(ValueError, match="one activation at least"):
        networks.TapAligner({}, image_size=4, out_channels=1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="even and at least 4"):
        networks.TapAligner({"in": 1}, image_size=4, out_channels=1, hidden=5, rngs=nnx.Rngs(0))
    aligner = networks.TapAligner({"in": 3}, image_size=4, out_channels=1, rngs=nnx.Rngs(0))
    for taps in ({"out": jnp.zeros((4, 4, 3))}, {"in": x}):
        with pytest.raises(ValueError, match="`taps` must have 'in', an image"):
            aligner(taps, t)

"""Guidance by small networks that are trained for it, where what they learn is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import gaussian
from numpy.testing import assert_allclose, assert_array_equal

import jaxdiff
from jaxdiff import guidance, losses, oracles, parallel, predictions, processes
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
        blended = guidance.Blended(one, other, ratio)
        product = guidance.Product([one, other], [1 - ratio, ratio])
        kinds = (predictions.X0(), predictions.Eps(), predictions.V(), predictions.Score())
        found = [blended.predict(kind, x, t) for kind in kinds]
        parts = [[d.predict(kind, x, t) for kind in kinds] for d in (one, other, between, product)]
        silent = jaxdiff.NetworkDenoiser(jax.tree_util.Partial(nothing), process)
        zero = guidance.Blended(one, silent, ratio).predict(predictions.Eps(), x, t)
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
    model = guidance.Blended(Gain(jnp.asarray(0.5)), Gain(jnp.asarray(0.0)))
    player = Player(
        model, guidance.InvariantLoss(2.0), optax.sgd(0.1), trainable=lambda m: m.delta.network
    )
    step, constants = make_train_step({"model": player}), {"groups": groups}
    mesh = parallel.make_mesh(devices=jax.devices())
    spread = jax.device_put(batch, parallel.batch_sharding(mesh))
    states = [init_train_state({"model": player}, KEY, mesh=m) for m in (None, mesh)]
    after = [step(s, b, constants) for s, b in zip(states, (batch, spread), strict=True)]
    deltas = [s.players["model"].model.delta.network for s, _ in after]
    assert_allclose(deltas[0], deltas[1], rtol=1e-5)
    assert deltas[0] != 0 and after[0][0].players["model"].model.base.network == 0.5
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
    with pytest.raises(TypeError, match="`delta` must be a denoiser"):
        guidance.Blended(model, lambda x: x)
    with pytest.raises(TypeError, match="`ratio` must be a number"):
        guidance.Blended(model, model, "half")
    for make in (guidance.InvariantLoss, guidance.GroupingLoss):
        with pytest.raises(ValueError, match="at least 0"):
            make(-1.0)

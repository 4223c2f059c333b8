"""MMD and reward losses through samplers: the affine oracle, gradients, memory and meshes."""

import dataclasses

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import with_random_weights
from flax import nnx
from jax.flatten_util import ravel_pytree
from numpy.testing import assert_allclose

import jaxdiff
from jaxdiff import finetuning, metrics, networks, parallel, predictions, processes, solvers
from jaxdiff.training import Player, init_train_state, make_train_step

KEY = jax.random.key(0)
MEAN, STD = 0.2, 0.5


def identity(x):
    return x.reshape(-1)


def linear_schedule():
    return processes.Tabulated(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))


def reference_grid(steps):
    """0, k, 2 k, ... below 1000 with k = 1000 // steps, from the last to clean data."""
    entries = np.arange(0, 1000, 1000 // steps)
    return jnp.asarray(np.append((entries[::-1] + 1) / 1000, 0.0))


class Affine(jaxdiff.Denoiser):
    """D = gain x + shift, with numbers of its own at every time of a grid."""

    process: processes.GaussianProcess
    times: jax.Array
    gains: jax.Array
    shifts: jax.Array

    @classmethod
    def ideal(cls, process, times):
        """That of N(MEAN, STD^2): mean + kappa (x - alpha mean)."""
        alpha, sigma = process.alpha(times), process.sigma(times)
        kappa = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        return cls(process, times, kappa, MEAN * (1 - kappa * alpha))

    def __call__(self, x, t, cond=None, *, key=None):
        place = jnp.argmin(jnp.abs(self.times - t))
        return self.gains[place] * x + self.shifts[place]


def end_of(model, grid, solver=None):
    """The sampler is x = B + A z: (B, A)."""
    ends = jaxdiff.denoise(
        KEY, model, jnp.array([[0.0], [1.0]]), solver=solver or solvers.DDIM(), times=grid
    ).x[:, 0]
    return ends[0], ends[1] - ends[0]


@pytest.mark.parametrize(
    ("steps", "evaluations", "expected"),
    [
        (5, 5, (0.19791, 0.26933)),
        (10, 10, (0.19877, 0.37413)),
        (15, 16, (0.19942, 0.41407)),
        (20, 20, (0.19911, 0.43373)),
    ],
)
def test_few_steps_lose_spread_as_the_oracle_says(x64, steps, evaluations, expected):
    """ "15 steps" of the reference's grid are 16 calls."""
    grid = reference_grid(steps)
    assert len(grid) - 1 == evaluations
    start = jnp.sqrt(1 - 0.0)  # z itself is taken for x at the first time
    model = Affine.ideal(linear_schedule(), grid[:-1])
    assert_allclose(np.asarray(end_of(model, grid)) * start, expected, atol=6e-5)


KERNELS = {"degree 3": metrics.Polynomial(), "energy": metrics.Energy()}


@pytest.mark.parametrize("name", KERNELS)
def test_fine_tuning_drives_the_sampler_to_the_truth(x64, name):
    """From (0.198, 0.269) at five steps to (0.2, 0.5), by the loss alone."""
    grid, process = reference_grid(5), linear_schedule()
    model = Affine.ideal(process, grid[:-1])
    loss = finetuning.MMDLoss(
        times=grid, features=jax.tree_util.Partial(identity), kernel=KERNELS[name], clip=None
    )
    optimizer, count = optax.adam(optax.cosine_decay_schedule(0.03, 250)), 256
    part = lambda model: (model.gains, model.shifts)  # noqa: E731
    player = Player(model, loss, optimizer, trainable=part)
    step, state = make_train_step({"model": player}), init_train_state({"model": player}, KEY)

    @jax.jit
    def run(state):
        def one(state, key):
            batch = {"x": MEAN + STD * jax.random.normal(key, (count, 1))}
            return step(state, batch)

        return jax.lax.scan(one, state, jax.random.split(jax.random.key(1), 250))

    state, logged = run(state)
    found = end_of(state.players["model"].model, grid)
    assert_allclose(found, (MEAN, STD), atol=0.02)
    assert np.mean(logged["mmd2"][-100:]) < 0.05 * logged["mmd2"][0]


def network():
    return with_random_weights(lambda: networks.MLP(2, hidden=16, num_blocks=1, rngs=nnx.Rngs(0)))


def in_double(tree):
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.float64) if eqx.is_inexact_array(leaf) else leaf, tree
    )


def bounded(net):
    """A model whose samples stay where kernels see them."""
    return jaxdiff.NetworkDenoiser(in_double(net), processes.VP(), predictions.X0())


def feature(x):
    return jnp.stack([x[0], jnp.sin(x[1]), x[0] * x[1]])


def value_and_slope(loss, model, batch):
    """The loss, and its gradient by the weights as a vector."""

    def total(weights):
        return loss(eqx.tree_at(lambda m: m.network, model, weights), KEY, batch, {})[0]

    value, slope = jax.jit(jax.value_and_grad(total))(model.network)
    return value, ravel_pytree(slope)[0]


CASES = {
    "last two steps": {"times": 4, "last_k": 2},
    "dpm-solver++, clipped": {
        "sampled": lambda d: jaxdiff.Clipped(d, -3.0, 3.0),
        "solver": solvers.DPMSolverMultistep(order=2),
        "times": 4,
    },
    "heun": {"solver": solvers.EDMHeun(), "times": 3},
    "ancestral": {"solver": solvers.DDIM(eta=1.0), "times": 4},
    "v-statistic": {"times": 3, "unbiased": False},
    "classes": {"times": 3, "num_classes": 2},
}


@pytest.fixture
def batch():
    x = np.random.default_rng(0).normal(size=(12, 2))
    return {"x": jnp.asarray(x), "cond": None}


@pytest.mark.parametrize("name", CASES)
def test_gradients_through_the_sampler(x64, name, batch):
    """Against finite differences; and the same from micro-batches, to rounding."""
    options = CASES[name]
    model = bounded(network())
    if name == "classes":
        net = with_random_weights(
            lambda: networks.MLP(
                2, hidden=16, num_blocks=1, num_classes=2, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
            )
        )
        model = bounded(net)
        batch = {**batch, "cond": jnp.arange(12) % 2}
    loss = finetuning.MMDLoss(
        features=jax.tree_util.Partial(feature), kernel=metrics.RBF(1.0), **options
    )
    value, slope = value_and_slope(loss, model, batch)
    parts = dataclasses.replace(loss, micro_batch=4)
    again, pieces = value_and_slope(parts, model, batch)
    assert_allclose(again, value, rtol=1e-9)
    assert_allclose(pieces, slope, rtol=1e-6, atol=1e-9 * np.abs(slope).max())
    if name == "last two steps":
        full = value_and_slope(dataclasses.replace(loss, last_k=None), model, batch)
        assert_allclose(value, full[0], rtol=1e-9)
        assert not np.allclose(slope, full[1], rtol=1e-2)
        return
    way = np.random.default_rng(1).normal(size=slope.shape)
    way = jnp.asarray(way / np.linalg.norm(way))
    weights, back = ravel_pytree(model.network)
    # The clip is straight through: its derivative is not that of what it does.
    plain = dataclasses.replace(loss, clip=None)
    _, slope = value_and_slope(plain, model, batch)

    @jax.jit
    def at(s):
        moved = eqx.tree_at(lambda m: m.network, model, back(weights + s * way))
        return plain(moved, KEY, batch, {})[0]

    step = 1e-5
    assert_allclose(slope @ way, (at(step) - at(-step)) / (2 * step), rtol=2e-5)


def test_the_gradient_is_that_of_an_unrolled_loop(x64, batch):
    """Written by hand, without a solver or recomputation."""
    model = bounded(network())
    grid, process = jnp.array([1.0, 0.7, 0.4, 0.15, 0.0]), processes.VP()
    loss = finetuning.MMDLoss(times=grid, features=jax.tree_util.Partial(feature), clip=None)
    starts = jaxdiff.sample(
        KEY, model, (2,), 12, times=grid, saveat=diffrax.SaveAt(t0=True)
    ).trajectory.x[:, 0]

    def by_hand(weights):
        d = eqx.tree_at(lambda m: m.network, model, weights)
        x = starts
        for t, s in zip(grid[:-1], grid[1:], strict=True):
            x0 = jax.vmap(lambda x: d(x, t))(x)  # noqa: B023
            eps = (x - process.alpha(t) * x0) / process.sigma(t)
            x = process.alpha(s) * x0 + process.sigma(s) * eps
        real = jax.vmap(feature)(batch["x"])
        return metrics.mmd2_unbiased(jax.vmap(feature)(x), real, paired=True)

    value, slope = jax.value_and_grad(by_hand)(model.network)
    found = value_and_slope(loss, model, batch)
    assert_allclose(found[0], value, rtol=1e-9)
    assert_allclose(found[1], ravel_pytree(slope)[0], rtol=1e-7, atol=1e-12)


def test_a_reference_of_all_data_is_the_limit_of_batches(x64, batch):
    model = bounded(network())
    kernel = metrics.Polynomial(2)
    loss = finetuning.MMDLoss(times=3, features=jax.tree_util.Partial(feature), kernel=kernel)
    known = jax.vmap(feature)(batch["x"])
    for embedding in (
        metrics.mean_embedding(known, kernel),
        metrics.sample_embedding(known, kernel),
    ):
        exact = dataclasses.replace(loss, kernel=None, reference=embedding)
        # Of the same examples the V-statistics are the same.
        (value, slope), (other, expected) = (
            value_and_slope(dataclasses.replace(one, unbiased=False), model, batch)
            for one in (exact, loss)
        )
        assert_allclose(value, other, rtol=1e-8)
        assert_allclose(slope, expected, rtol=1e-8, atol=1e-12)
    with pytest.raises(ValueError, match="`reference` has a kernel of its own, got `kernel` too"):
        dataclasses.replace(loss, reference=embedding)
    classes = metrics.class_embedding(known, jnp.arange(12) % 2, kernel, num_classes=2)
    with pytest.raises(ValueError, match="`reference` of classes goes with the unbiased"):
        dataclasses.replace(loss, kernel=None, reference=classes, unbiased=False)


def test_a_model_that_is_right_has_no_loss_on_average_whatever_its_conditions(x64):
    """Real examples and samples of the same classes; with their own pairs it would be -0.1."""

    class Exact(jaxdiff.Denoiser):
        """Two classes with a point each: its samples are the data, in one step."""

        process: processes.GaussianProcess

        def __call__(self, x, t, cond=None, *, key=None):
            return jnp.where(cond == 0, -1.0, 1.0) * jnp.ones_like(x)

    loss = finetuning.MMDLoss(
        times=1, features=jax.tree_util.Partial(identity), kernel=metrics.RBF(1.0)
    )
    known = jnp.asarray([[-1.0], [1.0], [1.0]])
    classes = metrics.class_embedding(known, (known[:, 0] > 0) + 0, loss.kernel, num_classes=2)
    by_class = dataclasses.replace(loss, kernel=None, reference=classes)

    @jax.jit
    @jax.vmap
    def value(key):
        cond = jax.random.bernoulli(key, shape=(12,)).astype(jnp.int32)
        x = jnp.where(cond == 0, -1.0, 1.0)[:, None]
        found, other = (
            one(Exact(processes.VP()), key, {"x": x, "cond": cond}, {})[0]
            for one in (loss, by_class)
        )
        return found, other, metrics.mmd2_unbiased(x, x, loss.kernel)

    values, others, naive = value(jax.random.split(KEY, 2000))
    assert np.abs(values).max() < 1e-12  # x_i = y_i: every term cancels
    assert np.abs(others).max() < 1e-12  # and whatever the proportions of the known examples
    assert naive.mean() < -0.05


def test_on_a_mesh_every_device_draws_its_part(x64, batch):
    model = bounded(network())
    loss = finetuning.MMDLoss(times=3, features=jax.tree_util.Partial(feature))
    batch = {"x": jnp.concatenate([batch["x"], batch["x"] + 1])}
    mesh = parallel.make_mesh(data=2, fsdp=4)
    for micro_batch in (None, 8):
        own = dataclasses.replace(loss, micro_batch=micro_batch)
        players = {"model": Player(model, own, optax.sgd(0.1))}
        ends = []
        for placing in ({}, {"mesh": mesh, "min_size": 64}):
            state, step = init_train_state(players, KEY, **placing), make_train_step(players)
            placed = parallel.shard_batch(batch, mesh) if placing else batch
            text = step.lower(state, placed).compile().as_text() if placing else ""
            state, metrics_ = step(state, placed)
            ends.append((state.arrays, metrics_["mmd2"]))
        assert_allclose(ends[1][1], ends[0][1], rtol=1e-9)
        for a, b in zip(ends[1][0], ends[0][0], strict=True):
            if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                assert_allclose(a, b, rtol=1e-7, atol=1e-10)
        # The network computes three rows of 24, or one of 8, and never all of them.
        rows = 3 if micro_batch is None else 1
        assert "f64[24,16]" not in text and "f64[8,16]" not in text and f"f64[{rows},16]" in text


class TestReward:
    """DRaFT on a Gaussian of variance 1/4 with a shift of the denoiser, or of its noise."""

    class Shifted(jaxdiff.DenoiserMap):
        base: jaxdiff.Denoiser
        shift: jax.Array
        of_noise: bool = eqx.field(static=True, default=False)

        def __call__(self, x, t, cond=None, *, key=None):
            p = self.base.process
            factor = -p.sigma(t) / p.alpha(t) if self.of_noise else 1.0
            return self.base(x, t, cond, key=key) + factor * self.shift

    @pytest.mark.parametrize(
        ("steps", "of_noise", "expected"),
        [(10, False, (0.366, 0.949, 1.0)), (10, True, (0.003, 0.332, 1.0))],
    )
    def test_how_much_of_the_gradient_the_last_steps_see(self, x64, steps, of_noise, expected):
        process = linear_schedule()
        base = jaxdiff.oracles.gaussian(process, jnp.zeros(1), jnp.eye(1) / 4)
        rounded = np.round(np.linspace(999, 0, steps))
        grid = jnp.asarray(np.append((rounded + 1) / 1000, 0.0))
        model = self.Shifted(base, jnp.zeros(()), of_noise)
        batch = {"x": jnp.zeros((2, 1))}

        def slope(last_k):
            loss = finetuning.RewardLoss(
                times=grid, reward=lambda x, cond: x[0], clip=None, last_k=last_k
            )
            value = lambda s: loss(eqx.tree_at(lambda m: m.shift, model, s), KEY, batch, {})[0]  # noqa: E731
            return jax.grad(value)(model.shift)

        whole = slope(None)
        shares = [slope(k) / whole for k in (1, 5, 10)]
        assert_allclose(shares, expected, atol=1.5e-3)

    def test_copies_have_the_mean_gradient_of_the_last_step(self, x64):
        process = processes.VP()
        base = jaxdiff.oracles.gaussian(process, jnp.zeros(2), jnp.eye(2) / 4)
        grid, count = jnp.array([1.0, 0.6, 0.3, 0.0]), 400
        batch = {"x": jnp.zeros((count, 2))}

        def slopes(**options):
            loss = finetuning.RewardLoss(
                times=grid, reward=lambda x, cond: -jnp.sum((x - 1) ** 2), clip=None, **options
            )

            def value(shift):
                return loss(self.Shifted(base, shift), KEY, batch, {})[0]

            return jax.jit(jax.value_and_grad(value))(jnp.zeros(()))

        plain, many = slopes(last_k=1), slopes(copies=3)
        # D(x_t) = kappa x_t: the slope is 2 mean sum (D - 1), of samples and of copies alike.
        t = grid[-2]
        kappa = process.alpha(t) / 4 / (process.alpha(t) ** 2 / 4 + process.sigma(t) ** 2)
        samples = jaxdiff.sample(KEY, base, (2,), count, times=grid).x
        expected = 2 * jnp.mean(jnp.sum(samples - 1, 1))
        assert_allclose(plain[1], expected, rtol=1e-9)
        error = 2 * (2 * kappa**2 * (process.sigma(t) ** 2)) ** 0.5 / count**0.5
        assert abs(many[1] - plain[1]) < 4 * error
        assert many[1] != plain[1]
        assert finetuning.RewardLoss(times=grid, reward=lambda x, cond: 0.0, copies=2).copies == 2


def test_the_clip_is_straight_through():
    x = jnp.array([-2.0, 0.3, 1.5])
    assert_allclose(finetuning.straight_through_clip(x), [-1.0, 0.3, 1.0])
    slope = jax.grad(lambda x: jnp.sum(finetuning.straight_through_clip(x) ** 2))(x)
    assert_allclose(slope, [-2.0, 0.6, 2.0])


def test_a_clip_in_the_sampler_hides_no_gradient(x64):
    base = jaxdiff.oracles.gaussian(processes.VP(), jnp.full(2, 3.0), jnp.eye(2) / 4)
    x, t = jnp.ones(2), jnp.asarray(0.3)
    plain, through = (jaxdiff.Clipped(base, straight_through=flag) for flag in (False, True))
    assert_allclose(through(x, t), plain(x, t), rtol=1e-12)
    slopes = [jax.jacfwd(lambda x, d=d: d(x, t))(x) for d in (plain, through, base)]
    assert_allclose(slopes[0], 0)
    assert_allclose(slopes[1], slopes[2], rtol=1e-12)


def test_memory_grows_by_states_alone():
    """Of a 32 x 32 UNet: four times the steps, and less than one more evaluation's memory."""
    net = networks.UNet(
        16, image_size=16, in_channels=3, channel_mults=(1, 2), num_res_blocks=1, rngs=nnx.Rngs(0)
    )
    model = jaxdiff.NetworkDenoiser(net, processes.VP())
    batch = {"x": jax.ShapeDtypeStruct((8, 16, 16, 3), jnp.float32)}

    def temporary(steps):
        loss = finetuning.MMDLoss(times=steps, features=jax.tree_util.Partial(identity))
        players = {"model": Player(model, loss, optax.sgd(0.1))}
        state, step = init_train_state(players, KEY), make_train_step(players)
        return step.lower(state, batch).compile().memory_analysis().temp_size_in_bytes

    state = 8 * 16 * 16 * 3 * 4
    small, large = temporary(5), temporary(20)
    assert large - small < 15 * 3 * state < 0.2 * small


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": None}, "`features` must be a function"),
        ({"kernel": metrics.RBF}, "`kernel` must be a Kernel"),
        ({"micro_batch": 0}, "`micro_batch` must be at least 1"),
        ({"num_classes": 2, "unbiased": False}, "`num_classes` goes with the unbiased"),
    ],
)
def test_errors(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        finetuning.MMDLoss(**{"features": identity, **options})


@pytest.mark.usefixtures("unchecked")
def test_errors_of_a_batch():
    model = jaxdiff.NetworkDenoiser(network(), processes.VP())
    loss = finetuning.MMDLoss(features=identity, micro_batch=5)
    with pytest.raises(ValueError, match="`micro_batch` must divide the batch, 12, got 5"):
        loss(model, KEY, {"x": jnp.zeros((12, 2))}, {})
    with pytest.raises(TypeError, match="must be floats of one example at least, got int32"):
        loss(model, KEY, {"x": jnp.zeros((12, 2), jnp.int32)}, {})
    for cond in (None, {"label": jnp.zeros(12, jnp.int32)}, jnp.zeros(12)):
        by_class = finetuning.MMDLoss(features=identity, times=2, num_classes=2)
        with pytest.raises(ValueError, match="by class needs the labels of the batch|label"):
            by_class(model, KEY, {"x": jnp.zeros((12, 2)), "cond": cond}, {})
    loss = finetuning.MMDLoss(features=lambda x: x[None], times=2)
    with pytest.raises(ValueError, match="`features` must return a vector"):
        loss(model, KEY, {"x": jnp.zeros((4, 2))}, {})
    loss = finetuning.RewardLoss(reward=lambda x, cond: x, times=2)
    with pytest.raises(ValueError, match="`reward` must return a scalar"):
        loss(model, KEY, {"x": jnp.zeros((4, 2))}, {})
    with pytest.raises(ValueError, match="`last_k` must be 1 or left out with `copies`"):
        finetuning.RewardLoss(reward=identity, copies=1, last_k=2)
    with pytest.raises(ValueError, match="at least 2 samples"):
        finetuning.MMDLoss(features=identity)(model, KEY, {"x": jnp.zeros((1, 2))}, {})

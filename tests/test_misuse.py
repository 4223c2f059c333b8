"""What would be wrong in silence is one clear error."""

import dataclasses

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import gaussian, mixture
from flax import nnx
from outside import Momentum

import jaxdiff
from jaxdiff import data, guidance, losses, metrics, networks, oracles, processes, solvers
from jaxdiff.denoiser import Estimate
from jaxdiff.training import (
    CheckpointStore,
    ConstantEMA,
    Follow,
    Player,
    PowerEMA,
    fit,
    init_train_state,
    make_train_step,
    next_phase,
    save_model,
)

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def oracle():
    return mixture(processes.VP(), jnp.float32)


def run(denoiser, count=4, **options):
    options = {"times": 4} | options
    return jaxdiff.sample(KEY, denoiser, (2,), count, **options)


class Returning(jaxdiff.DenoiserMap):
    """Whatever it is given, as x0 or as the estimate."""

    base: jaxdiff.Denoiser
    value: object = None
    whole: bool = False

    def estimate(self, x, t, cond=None, *, key=None):
        return self.value if self.whole else Estimate(self.value)


@pytest.mark.parametrize("value", [0.0, jnp.zeros(1), jnp.zeros((1, 2)), jnp.zeros(2, int)])
def test_estimates_are_floats_of_the_shape_of_x(oracle, value):
    with pytest.raises(ValueError, match=r"`x0` of Returning must be floats of the shape of x"):
        run(Returning(oracle, value))


def test_estimates_are_estimates(oracle):
    with pytest.raises(TypeError, match="`estimate` of Returning must return an Estimate, got"):
        run(Returning(oracle, jnp.zeros(2), True))


def test_labels_of_closed_forms_are_numbers_of_classes_they_have(oracle):
    for wrong in (jnp.eye(2, dtype=int)[jnp.zeros(4, int)], jnp.full(4, 0.5), np.ones(4, bool)):
        with pytest.raises(ValueError, match="takes an integer class for each example, got"):
            run(oracle, cond=wrong)
    means, spread = jnp.zeros((2, 2)), jnp.stack([jnp.eye(2)] * 2)
    sparse = oracles.gaussian_mixture(processes.VP(), means, spread, labels=[0, 2])
    with pytest.raises(ValueError, match=r"no component of class 1\. Pass one of \[0, 2\]"):
        run(sparse, cond=jnp.ones(4, int))


def test_null_conditions_are_conditions(oracle):
    label = jnp.zeros(4, int)
    with pytest.raises(ValueError, match=r"Labels must lie in \[0, 1\], or be 2 for none, got 99"):
        run(guidance.ClassifierFree(oracle, 99, 2.0), cond=label)
    with pytest.raises(ValueError, match="must be of integers where the condition is, got float32"):
        run(guidance.ClassifierFree(oracle, 3.0), cond=label)
    with pytest.raises(ValueError, match="`null_cond` must be the condition that means none"):
        guidance.ClassifierFree(oracle, None, 2.0)
    batch = {"x": jnp.zeros((4, 2)), "cond": label}
    for loss in (losses.DenoisingLoss(null_cond=99), losses.HybridLoss(null_cond=99)):
        with pytest.raises(ValueError, match="or be 2 for none, got 99"):
            loss(oracle, KEY, batch, {})


def test_denoisers_of_one_map_are_of_one_process(oracle):
    other = mixture(processes.Cosine(), jnp.float32)
    slower = mixture(processes.VP(beta_max=10.0), jnp.float32)
    classifier = guidance.NoisyClassifier(lambda x, label, *, key=None: x, processes.Cosine())
    experts = guidance.Experts(lambda x: x, None, {}, jnp.ones(3), processes.Cosine())
    for argument, make in {
        r"bases\[1\]": lambda: guidance.Product([oracle, other], [1.0, 1.0]),
        r"bases\[2\]": lambda: guidance.Mixture([oracle, oracle, slower], [0.2, 0.4, 0.4]),
        "weak": lambda: guidance.Autoguidance(oracle, slower),
        "small": lambda: guidance.UpsampleGuidance(oracle, other),
        "log_prob": lambda: guidance.ClassifierGuidance(oracle, classifier),
        "log_prob ": lambda: guidance.ClassifierGuidance(oracle, experts.log_prob),
    }.items():
        with pytest.raises(ValueError, match=f"`{argument.strip()}` must be of the process of"):
            make()
    # The same process made twice is one, and what is traced passes.
    guidance.Autoguidance(oracle, mixture(processes.VP(), jnp.float32))
    # As it comes out of a compiled step, rounded.
    rounded = jax.tree.map(jnp.float32, processes.VP())
    guidance.Autoguidance(oracle, dataclasses.replace(oracle, process=rounded))
    rounded = eqx.tree_at(lambda p: p.beta_min, processes.VP(), jnp.float32(0.1))
    guidance.Autoguidance(oracle, dataclasses.replace(oracle, process=rounded))

    def traced(beta):
        pair = [oracle, mixture(processes.VP(beta_max=beta), jnp.float32)]
        return guidance.Product(pair, [0.5, 0.5])(jnp.zeros(2), jnp.asarray(0.5))

    assert np.all(np.isfinite(jax.jit(traced)(10.0)))


@pytest.mark.parametrize(
    "wrong, error",
    [
        (7, "classes of the classifier, at least 0 and at most 1, got 7"),
        (-1, "classes of the classifier, at least 0 and at most 1, got -1"),
        (1.0, "an integer class for each example, got float32"),
        (True, "an integer class for each example, got bool"),
    ],
)
def test_classes_are_those_of_the_classifier(oracle, unchecked, wrong, error):
    class Two(eqx.Module):
        num_classes = 2

        def __call__(self, x):
            return x

    network = networks.MLP(2, hidden=8, num_blocks=1, out_features=2, rngs=nnx.Rngs(0))
    noisy = guidance.NoisyClassifier(network, oracle.process)
    guided = guidance.ClassifierGuidance(oracle, noisy)
    for denoiser in (guided, guidance.EluCD(oracle, Two(), shift="score", wrt="xt")):
        with pytest.raises(ValueError, match=f"`y` must be {error}"):
            run(denoiser, 2, cond={"y": jnp.asarray([wrong, wrong])})
        with pytest.raises(ValueError, match=f"`y` must be {error}"):
            denoiser(jnp.zeros(2), jnp.asarray(0.5), {"y": jnp.asarray(wrong)})
    assert np.all(np.isfinite(run(guided, 2, cond={"y": jnp.asarray([0, 1])}).x))


def test_numbers_of_denoisers_and_solvers_are_scalars(oracle):
    guided = guidance.ClassifierFree(oracle, 2, jnp.asarray([1.0, 5.0]))
    with pytest.raises(ValueError, match=r"`scale` of ClassifierFree must be a scalar, got .*\(2,"):
        run(guided, cond=jnp.zeros(4, int))
    with pytest.raises(ValueError, match="`eta` of DDIM must be a scalar"):
        run(oracle, solver=solvers.DDIM(jnp.asarray([0.5, 0.5])))
    with pytest.raises(ValueError, match="`low` of Clipped must be a scalar, got shape"):
        run(jaxdiff.Clipped(oracle, np.asarray([-1.0, -2.0]), 1.0))
    with pytest.raises(ValueError, match="`low` of Clipped must be a scalar, got shape"):
        clipped = jaxdiff.Clipped(oracle, jnp.asarray([-1.0, -2.0]), 1.0)
        jaxdiff.log_likelihood(clipped, jnp.zeros((1, 2)))
    weighting = losses.MinSNR(jnp.asarray([1.0, 5.0]))
    with pytest.raises(ValueError, match="`gamma` of MinSNR must be a scalar"):
        make_train_step({"a": Player(oracle, losses.DenoisingLoss(weighting), optax.sgd(0.1))})
    # Inside a sweep it is one.
    sweep = jax.vmap(lambda s: run(dataclasses.replace(guided, scale=s), cond=jnp.zeros(4, int)).x)
    assert sweep(guided.scale).shape == (2, 4, 2)


@pytest.mark.parametrize(
    "wrong",
    [None, [1.0, 2.0], (2.0,), {}, abs, guidance.LinearScale, 1j, np.True_, jnp.asarray(True), "2"],
)
def test_scales_are_numbers_or_schedules(oracle, unchecked, wrong):
    for make in (
        lambda scale: guidance.ClassifierFree(oracle, 2, scale),
        lambda scale: guidance.Autoguidance(oracle, oracle, scale),
    ):
        with pytest.raises(
            TypeError, match="`scale` must be a number, got .* or a schedule such as"
        ):
            make(wrong)
    if wrong is not None:
        with pytest.raises(TypeError, match="`mix` must be a number, got"):
            guidance.RescaledClassifierFree(oracle, 2, mix=wrong)


def test_an_array_of_scales_is_refused_in_an_estimate_too(oracle):
    guided = guidance.ClassifierFree(oracle, 2, jnp.asarray([1.0, 5.0]))
    with pytest.raises(ValueError, match=r"`scale` must be a scalar, got shape \(2,\)"):
        guided(jnp.zeros(2), jnp.asarray(0.5), jnp.asarray(0))


@pytest.mark.parametrize("kind", [int, float, np.float32, np.int64, jnp.float32])
def test_numbers_of_functions_are_checked_whatever_their_kind(oracle, unchecked, kind):
    def grow(**options):
        reward = jax.tree_util.Partial(lambda x0: x0[0])
        return guidance.tree_sample(KEY, oracle, (2,), reward, rollouts=2, times=2, **options)

    def search(**options):
        options = {"scale": 2.0, "target": 3, "times": 2, "num_iterations": 1, **options}
        return guidance.search_policy(KEY, oracle, 2, (2,), 2, cond=jnp.zeros(2, int), **options)

    for name, value in (("temperature", 0), ("temperature", -1), ("widening", -3), ("exponent", 2)):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            grow(**{name: kind(value)})
    for name, value in (("coldest", 0), ("learning_rate", 0), ("penalty", -1)):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            search(**{name: kind(value)})
    with pytest.raises(ValueError, match="`scale` must be finite, got nan"):
        search(scale=np.float32("nan"))
    with pytest.raises(ValueError, match="`temperature` must be above 0, got nan"):
        grow(temperature=jnp.float32("nan"))
    with pytest.raises(ValueError, match="`order` must be at least 0, got -1"):
        metrics.vendi_score(jnp.ones((3, 2)), order=kind(-1))
    assert grow(widening=kind(2), exponent=kind(1)).x.shape == (1, 1, 2)


def test_ranges_of_guidance_are_not_empty(oracle):
    with pytest.raises(ValueError, match=r"`high` must be at least 2, got 0\.5"):
        guidance.LimitedInterval(oracle, 2, low=2.0, high=0.5)
    with pytest.raises(ValueError, match="`count` must be at least 1, got 0"):
        guidance.Composable(oracle, 2, count=0)
    with pytest.raises(TypeError, match="`count` must be a whole number, got True"):
        guidance.Composable(oracle, 2, count=True)
    with pytest.raises(ValueError, match=r"`weights` must be finite, got \[nan, 1\.0\]"):
        guidance.GuidancePolicy(oracle, 2, [jnp.nan, 1.0])


def test_counts_are_whole_and_states_are_real(oracle):
    for wrong in (1.5, -1, True):
        with pytest.raises((TypeError, ValueError), match="`first_index` must be"):
            run(oracle, first_index=wrong)
    with pytest.raises(TypeError, match="`num_samples` must be a whole number, got True"):
        run(oracle, count=True)
    with pytest.raises(TypeError, match="Expected real numbers, got complex64"):
        jaxdiff.denoise(KEY, oracle, jnp.zeros((1, 2), complex), times=2)


@pytest.mark.parametrize("t", [2.0, 0.1])
def test_states_are_saved_where_the_run_was(oracle, t):
    saveat = diffrax.SaveAt(ts=jnp.asarray([t]))
    with pytest.raises(ValueError, match=r"`saveat.ts` must lie on the grid, between 0.3 and 1"):
        run(oracle, times=jnp.asarray([1.0, 0.6, 0.3]), saveat=saveat)


@pytest.mark.parametrize("steps", [5, 20])
def test_restarts_of_coarse_grids_begin_above_zero(steps):
    """Momentum answers in proportion to what the noise level of a pass does to it."""
    oracle = mixture(processes.VP(), jnp.float32)
    cond = jnp.zeros(64, int)
    guided = Momentum(oracle, scale=1.5)
    plain = run(guided, 64, cond=cond, times=steps, solver=solvers.EDMHeun())
    again = run(guided, 64, cond=cond, times=steps, solver=solvers.Restart())
    assert np.abs(again.x).max() < 2 * np.abs(plain.x).max()


class Travel(solvers.SolverWrapper):
    """Each step twice; says nothing of inserted steps."""

    base: solvers.DiffusionSolver

    def update(self, problem, x, step):
        self.move_base(problem, x, step)
        return self.repeat_base(problem, x, dataclasses.replace(step, key=step.key))


def test_steps_are_not_inserted_into_a_memory(oracle):
    assert np.all(np.isfinite(run(oracle, solver=Travel(solvers.DDIM())).x))
    with pytest.raises(ValueError, match="`base` of Travel must be a solver of single steps"):
        run(oracle, solver=Travel(solvers.UniPC(2)))


def test_consistency_steps_have_a_derivative_by_their_noise():
    flow = oracles.GaussianFlowMap(gaussian(processes.VP(), 2))

    def total(gamma):
        solver = solvers.FlowMapSteps(gamma)
        return jaxdiff.sample(KEY, flow, (2,), 4, solver=solver, times=3).x.sum()

    assert np.isfinite(jax.grad(total)(1.0))


def scalar(value, loss, **options):
    options = {"optimizer": optax.sgd(0.5)} | options
    model = {"network": jnp.asarray(value)}
    return Player(model, loss, trainable=lambda m: m["network"], **options)


def square(model, key, batch, frozen):
    return model["network"] ** 2, {}


@pytest.mark.parametrize(
    ("returned", "error", "match"),
    [
        ((), TypeError, r"must return \(scalar, metrics\)"),
        (({}, None, 3), TypeError, "must return .*got .scalar, dict, NoneType, int"),
        ((jnp.ones(()),), TypeError, "metrics a dict"),
        (({"loss": 1.0},), ValueError, "names a metric 'loss', which the step reports itself"),
    ],
)
def test_losses_return_what_a_step_reads(returned, error, match):
    players = {"a": scalar(1.0, lambda model, *_: (model["network"] ** 2, *returned))}
    with pytest.raises(error, match=match):
        make_train_step(players)(init_train_state(players, KEY), 0.0)


def test_players_are_those_of_the_state():
    players = {"a": scalar(1.0, square), "b": scalar(2.0, square)}
    state = init_train_state(players, KEY)
    with pytest.raises(ValueError, match=r"trains the players \['a'\], got a state of \['a', 'b'"):
        make_train_step({"a": players["a"]})(state, 0.0)
    for wrong in (("modle",), "a"):
        with pytest.raises(ValueError, match="`fresh` must name players"):
            next_phase(state, players, fresh=wrong)


def test_a_player_that_follows_compiles_one_program(count_programs):
    network = networks.MLP(2, hidden=10, num_blocks=1, rngs=nnx.Rngs(0))
    model = jaxdiff.NetworkDenoiser(network, processes.VP())
    players = {
        "student": Player(model, losses.DenoisingLoss(), optax.sgd(0.1)),
        "target": Player(model, Follow("student", 0.9)),
    }
    state, step = init_train_state(players, KEY), make_train_step(players)
    for _ in range(3):
        state, _ = step(state, {"x": jnp.ones((4, 2))})
    assert count_programs("_run") == 1


class Remembers(jaxdiff.Stepwise):
    """Something that may not be what it began with."""

    base: jaxdiff.Denoiser
    first: object = None
    then: object = 0.0

    def init_memory(self, x):
        return self.first

    def estimate(self, x, t, cond=None, *, key=None):
        return self.remember(self.base.estimate(x, t, cond, key=key), self.then)


@pytest.mark.parametrize(
    ("first", "then"),
    [(None, jnp.zeros(2)), (jnp.zeros((), int), jnp.zeros(())), (jnp.zeros(()), jnp.zeros(2))],
)
def test_memories_keep_their_form(oracle, first, then):
    with pytest.raises(ValueError, match="What `Remembers` remembers must keep the structure"):
        run(Remembers(oracle, first, then))


@pytest.mark.parametrize("base", ["ddim", solvers.DDIM, diffrax.Euler()])
def test_bases_are_solvers(base):
    for build in (solvers.Restart, solvers.PredictorCorrector):
        with pytest.raises(TypeError, match="`base` of .* must be a solver of this library, got"):
            build(base)


class Moves(solvers.DiffusionSolver):
    """A step that returns what it is given."""

    returned: object = None

    @property
    def stochastic(self):
        return False

    def update(self, problem, x, step):
        return self.returned


def test_steps_and_solvers_are_what_they_should_be(oracle):
    with pytest.raises(TypeError, match=r"got the class DDIM\. Pass DDIM\(\)"):
        run(oracle, solver=solvers.DDIM)
    with pytest.raises(TypeError, match=r"`update` of Moves must return Moved\(x, memory, nfe"):
        run(oracle, solver=Moves(jnp.zeros(2)))
    with pytest.raises(ValueError, match=r"A step of Moves must keep the shape of x, \(2,\), got"):
        run(oracle, solver=Moves((jnp.zeros(3), None, 1, {})))


def test_forgotten_optimisers_and_positions_are_named(tmp_path):
    players = {"a": scalar(1.0, square, optimizer=None)}
    with pytest.raises(TypeError, match="has no optimiser, .* Pass `optimizer` to minimise"):
        make_train_step(players)(init_train_state(players, KEY), 0.0)
    players = {"a": scalar(1.0, lambda model, *_: (model["network"] * jnp.ones(3), {}))}
    with pytest.raises(TypeError, match=r"must be a scalar of floats, got float32 of shape \(3,\)"):
        make_train_step(players)(init_train_state(players, KEY), 0.0)
    players = {"a": scalar(1.0, lambda model, *_: model["network"] ** 2)}
    with pytest.raises(TypeError, match=r"must return \(scalar, metrics\).*got \(scalar\)"):
        make_train_step(players)(init_train_state(players, KEY), 0.0)
    players = {"a": scalar(1.0, square)}
    step, state = make_train_step(players), init_train_state(players, KEY)
    with pytest.raises(TypeError, match="`batches` must have get_state"):
        fit(step, state, iter([0.0]), num_steps=1, store=CheckpointStore(tmp_path))


def slips():
    """What somebody passes by mistake, and the one line that says so."""
    oracle = mixture(processes.VP(), jnp.float32)
    key = jax.random.key(0)
    network = jax.tree_util.Partial(lambda w, x, t, c, *, key=None: w * x, jnp.ones(2))
    model = jaxdiff.NetworkDenoiser(network, processes.VP())
    loss, adam = losses.DenoisingLoss(), optax.adam(1e-3)
    players = {"m": Player(model, loss, adam)}

    def run(batches, **options):
        state = init_train_state(players, key)
        return fit(make_train_step(players), state, batches, num_steps=1, **options)

    def sample(shape=(2,), **options):
        return jaxdiff.sample(key, oracle, shape, 2, times=2, **options)

    batch = {"x": jnp.ones((2, 2))}
    return {
        "`shape` must be that of an example": lambda: sample(2),
        "`dtype` must be of floats, got int32": lambda: sample(dtype=jnp.int32),
        "`x` must hold examples": lambda: jaxdiff.denoise(key, oracle, 1.0, times=2),
        "`process` must be a GaussianProcess, got the class VP. Pass VP()": (
            lambda: jaxdiff.NetworkDenoiser(network, processes.VP)
        ),
        "`prediction` must be a Prediction, got 'eps'": (
            lambda: jaxdiff.NetworkDenoiser(network, processes.VP(), "eps")
        ),
        "`network` must be a function, got None": (
            lambda: jaxdiff.NetworkDenoiser(None, processes.VP())
        ),
        "`optimizer` must be an optax transformation or None, got 0.001": (
            lambda: Player(model, loss, 1e-3)
        ),
        "`optimizer` must be .*function adam": lambda: Player(model, loss, optax.adam),
        "`ema` must be a .*EMA, got 0.99": lambda: Player(model, loss, adam, 0.99),
        "`loss` must be a function, got the class DenoisingLoss": (
            lambda: Player(model, losses.DenoisingLoss, adam)
        ),
        "`players` must be a dict of players": lambda: init_train_state(players["m"], key),
        "`weighting` must be a Weighting, got the class MinSNR": (
            lambda: losses.DenoisingLoss(losses.MinSNR)
        ),
        "`time_law` must be a TimeLaw, got 'uniform'": (
            lambda: losses.DenoisingLoss(time_law="uniform")
        ),
        "`batch` must be a dict": lambda: loss(model, key, batch["x"], {}),
        "`batches` must be an iterator, got list": lambda: run([batch]),
        "`store` must be a CheckpointStore, got 'runs'": lambda: run(iter([batch]), store="runs"),
        "`keep` must be at least 1": lambda: CheckpointStore("runs", keep=0),
        "`saveat.ts` must decrease": (
            lambda: sample(saveat=diffrax.SaveAt(ts=jnp.asarray([0.2, 0.8])))
        ),
        "`network` must take .x, label, cond=None, .*, key=None., got .x, t, c": (
            lambda: jaxdiff.NetworkDenoiser(lambda x, t, c: x, processes.VP())
        ),
        "`cond` must be an array, got .0, 1": lambda: sample(cond=[0, 1]),
        "`cond` must have a leading axis": (
            lambda: loss(model, key, batch | {"cond": jnp.zeros(3)}, {})
        ),
        "must be floats .*uint8 .*Scale pixels": (
            lambda: loss(model, key, {"x": jnp.zeros((2, 2), jnp.uint8)}, {})
        ),
        "one example at least, got float32": lambda: loss(model, key, {"x": jnp.zeros((0, 2))}, {}),
        "`hooks` must be a Hook, got <function": lambda: run(iter([batch]), hooks=[print_nothing]),
        "`players` must have one player": lambda: make_train_step({}),
        "`players` must be .* got NetworkDenoiser": lambda: make_train_step(model),
        "`players` must be .* got dict of .'NetworkDenoiser'": (
            lambda: save_model("runs", {"m": model})
        ),
        "`index` must be below 1, the number of averages, got 3": (
            lambda: (
                init_train_state({"m": Player(model, loss, adam, ConstantEMA())}, key)
                .players["m"]
                .averaged(index=3)
            )
        ),
        "`sigma_rels` must have one width": lambda: PowerEMA(()),
        "`step` must be at least 0, got -1": lambda: CheckpointStore("runs").save({}, step=-1),
        "`step` must be a whole number, got 1.5": lambda: CheckpointStore("runs").save(
            {}, step=1.5
        ),
        "`num_steps` must be at least 1, got 0": lambda: solvers.karras_times(processes.VP(), 0),
        "`num_steps` must be a whole number": lambda: solvers.uniform_times(processes.VP(), 2.5),
        "`process` must be .*class EDM": lambda: solvers.quadratic_times(processes.EDM, 3),
        "`kernel` must be a Kernel, got the class RBF": (
            lambda: metrics.mmd2_unbiased(jnp.ones((3, 2)), jnp.ones((3, 2)), metrics.RBF)
        ),
        "`labels` must lie in .0, 2., the classes of `logits`": (
            lambda: metrics.accuracy(jnp.zeros((3, 2)), jnp.full(3, 9))
        ),
        "`batch_size` must be a whole number, got 2.5": (
            lambda: data.make_loader(data.array_source(np.zeros((4, 2))), 2.5, seed=0)
        ),
        "`source` must be a source, got ndarray": lambda: data.split(np.zeros((4, 2)), 0.5),
        "`labels` must be 2 integers from 0": (
            lambda: data.save_images("runs", np.zeros((2, 4, 4, 1)), [-1, 0])
        ),
        "`x` must be finite, got images": (
            lambda: data.save_images("runs", np.full((2, 4, 4, 1), np.nan))
        ),
    }


def print_nothing(step, state, metrics):
    """A hook that is not one."""


def test_slips_are_named_before_any_work(unchecked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for message, call in slips().items():
        with pytest.raises((TypeError, ValueError), match=message.replace("()", r"\(\)")):
            call()
    assert not any(tmp_path.iterdir())


def test_what_is_not_finite_has_no_distance(unchecked):
    """NaN is no zero, and named where it can be seen; and lists are arrays."""
    x = jax.random.normal(KEY, (8, 2))
    bad = x.at[0, 0].set(jnp.nan)
    for metric in (
        lambda x, y: metrics.sliced_wasserstein(KEY, x, y),
        metrics.frechet_distance,
        metrics.mmd2_unbiased,
    ):
        with pytest.raises(ValueError, match="`x` must be finite, got NaN or infinity in 1 of 8"):
            metric(bad, x)
        assert jnp.isnan(jax.jit(metric)(bad, x)) and jnp.isfinite(metric(x + 1, x))
    assert jnp.isnan(metrics.wasserstein_1d(bad[:, 0], x[:, 0]))
    assert metrics.wasserstein_1d([1.0], [3.0]) == 2
    assert float(metrics.accuracy([[1.0, 2.0]], [1])[0]) == 1


def test_a_file_is_no_directory_of_checkpoints(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="`directory` must be a directory, got a file"):
        CheckpointStore(tmp_path / "file").steps()
    with pytest.raises(OSError, match="`directory` must be a directory, got a file"):
        CheckpointStore(tmp_path / "file").save({"a": jnp.ones(1)}, step=1)
    assert (tmp_path / "file").read_text() == "mine"

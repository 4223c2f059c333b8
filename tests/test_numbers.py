"""Numbers of every kind, and numbers that are none."""

import dataclasses
import inspect

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PROCESSES, gaussian
from flax import nnx

import jaxdiff
from jaxdiff import (
    distillation,
    geometry,
    guidance,
    losses,
    metrics,
    networks,
    oracles,
    predictions,
    processes,
    solvers,
    traces,
    training,
    unlearning,
)

MODULES = (
    jaxdiff, distillation, geometry, guidance, losses, metrics, predictions, processes, unlearning,
    solvers, traces, training,
)  # fmt: skip
# What fields without a default are given; of one class alone, by its name and theirs.
REQUIRED = {
    # A network, because some maps look into it.
    "base": lambda: jaxdiff.NetworkDenoiser(
        networks.MLP(2, hidden=8, num_blocks=1, rngs=nnx.Rngs(0)), processes.VP()
    ),
    "weak": lambda: gaussian(processes.VP(), 2),
    "small": lambda: gaussian(processes.VP(), 2),
    "delta": lambda: gaussian(processes.VP(), 2),
    "taps": lambda: ("block.0",),
    # Of three steps, and one that is past.
    "of_cond": lambda: jnp.zeros((3, 2)),
    "of_null": lambda: jnp.zeros((3, 1)),
    "kinds": lambda: jnp.asarray([0, 1, 2]),
    "power": lambda: jnp.ones(2),
    "groups": lambda: jnp.ones((1, 2)),
    "count": lambda: 2,
    **dict.fromkeys(
        (
            "log_prob",
            "operator",
            "energy",
            "reward",
            "function",
            "draw",
            "likeness",
            "logits",
            "aligner",
            "log_odds",
            "forget",
            "retain",
            "level",
        ),
        lambda: jax.tree_util.Partial(jnp.sum),
    ),
    "denoiser": lambda: gaussian(processes.VP(), 2),
    "edited": lambda: gaussian(processes.VP(), 2),
    "null_cond": lambda: 0,
    "forget_cond": lambda: 0,
    "unsafe_cond": lambda: 0,
    "override": lambda: unlearning.Always(1),
    "OnForgotten.loss": lambda: losses.DenoisingLoss(),
    "solver": diffrax.Euler,
    "player": lambda: "other",
    "numbers": lambda: jnp.zeros(4),
    "bank": lambda: distillation.TrajectoryBank.empty({"x": jnp.zeros((2, 3))}),
    "erased": lambda: unlearning.ErasedConcepts(0),
    "Apart.loss": lambda: losses.DenoisingLoss(),
    "Balanced.loss": lambda: distillation.ConsistencyTrajectory(),
    "PreferenceLoss.null_cond": lambda: 0,
    "SingleTrajectoryCritic.loss": lambda: distillation.SingleTrajectory(REQUIRED["bank"]()),
}


def classes():
    found = {
        value for module in MODULES for value in vars(module).values() if inspect.isclass(value)
    }
    for value in sorted(found, key=lambda c: c.__name__):
        if issubclass(value, eqx.Module) and not inspect.isabstract(value):
            names = [f.name for f in dataclasses.fields(value) if f.metadata.get("number")]
            if names and not getattr(value, "__abstractvars__", ()):
                yield value, names


def build(kind, **given):
    for field in dataclasses.fields(kind):
        default = (field.default, field.default_factory)
        own = f"{kind.__name__}.{field.name}"
        required = field.init and default == (dataclasses.MISSING,) * 2
        if (required or own in REQUIRED) and field.name not in given:
            given[field.name] = (
                solvers.DDIM()
                if issubclass(kind, solvers.DiffusionSolver) and field.name == "base"
                else REQUIRED.get(own, REQUIRED.get(field.name))()
            )
    return kind(**given)


@pytest.mark.parametrize("kind, names", [pytest.param(*c, id=c[0].__name__) for c in classes()])
def test_every_public_number_is_checked_and_may_be_of_any_kind(kind, names):
    plain = build(kind)
    for name in names:
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            build(kind, **{name: float("nan")})
        with pytest.raises(TypeError, match=f"`{name}` must be a number, got '1'"):
            build(kind, **{name: "1"})
        value = getattr(plain, name)
        if value is None or not np.isfinite(value):
            continue
        for same in (np.float64(value), np.asarray(value), jnp.asarray(value, jnp.float32)):
            again = build(kind, **{name: same})
            found = getattr(again, name)
            # A Python float, whatever it came as: no other program for it.
            assert type(found) is float
            np.testing.assert_allclose(found, value, rtol=1e-6)
            assert jax.tree.structure(again) == jax.tree.structure(plain)
        # Arrays and traced values pass: they are swept.
        swept = jax.vmap(lambda v, name=name: getattr(build(kind, **{name: v}), name))(
            jnp.full(2, value)
        )
        np.testing.assert_allclose(swept, value, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: processes.VP(beta_min=20.0, beta_max=0.1), "`beta_max` must be above 20, got 0.1"),
        (lambda: processes.VE(sigma_min=5.0, sigma_max=1), "`sigma_max` must be above 5, got 1"),
        (lambda: processes.EDM(t_min=3.0, t_max=2.0), "`t_max` must be above 3, got 2"),
        (lambda: processes.Cosine(t_max=1.5), "`t_max` must be at most 1, got 1.5"),
        (lambda: processes.Cosine(offset=-0.1), "`offset` must be at least 0, got -0.1"),
        (lambda: predictions.F(0), "`sigma_data` must be above 0, got 0"),
        (lambda: training.ConstantEMA(1.0), "`decay` must be at least 0 and below 1, got 1"),
        (lambda: training.Follow("a", 1), "`decay` must be at least 0 and below 1, got 1"),
        (lambda: training.PowerEMA((0.05, 0.5)), "`sigma_rel` must lie in"),
        (lambda: losses.LogNormal(std=0), "`std` must be above 0, got 0"),
        (lambda: losses.DenoisingLoss(label_dropout=1.1), "`label_dropout` must be at least 0 and"),
        (lambda: metrics.RBF(-1), "`bandwidth` must be above 0, got -1"),
        (lambda: metrics.Polynomial(0), "`degree` must be at least 1, got 0"),
        (lambda: solvers.DDIM(-0.5), "`eta` must be at least 0, got -0.5"),
        (lambda: solvers.EDMHeun(s_churn=-1), "`s_churn` must be at least 0, got -1"),
        (lambda: solvers.FlowMapSteps(1.5), "`gamma` must be at least 0 and at most 1, got 1.5"),
        (lambda: solvers.PredictorCorrector(snr=0), "`snr` must be above 0, got 0"),
        (lambda: jaxdiff.Clipped(REQUIRED["base"](), 1, -1), "`high` must be above 1, got -1"),
        (lambda: oracles.gaussian(processes.VP(), [0.0], [[-1.0]]), "positive semi-definite"),
        (lambda: oracles.gaussian(processes.VP(), [0, 0], [[1, 2], [0, 1]]), "must be symmetric"),
        (
            lambda: oracles.gaussian_mixture(processes.VP(), [[0]], [[[1]]], weights=[-1.0]),
            "`weights` must be positive",
        ),
        (
            lambda: oracles.gaussian_mixture(processes.VP(), [[0]], [[[1]]], labels=[-1]),
            "`labels` must not be negative",
        ),
        (
            lambda: oracles.low_rank_mixture(
                processes.VP(), [[0]], jnp.ones((1, 1, 1)), noise_std=-1
            ),
            "`noise_std` must be at least 0",
        ),
    ],
)
def test_numbers_out_of_range_are_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize("make", PROCESSES.values(), ids=list(PROCESSES))
def test_times_outside_the_range_are_its_nearer_end(make):
    process = make()
    low, high = float(process.t_min), float(process.t_max)
    for log_snr, end in ((-100.0, high), (-np.inf, high), (100.0, low), (np.inf, low)):
        np.testing.assert_allclose(process.time(jnp.float32(log_snr)), end, rtol=1e-6)
    # With a derivative that is none, and no NaN.
    slopes = jax.vmap(jax.grad(process.time))(jnp.asarray([-100.0, 100.0]))
    np.testing.assert_array_equal(slopes, 0)
    inside = jnp.asarray((low + high) / 2, jnp.float32)
    np.testing.assert_allclose(process.time(process.log_snr(inside)), inside, rtol=1e-4)


def test_integers_are_promoted_and_never_truncated():
    process = processes.VP()
    pairs = [
        (
            oracles.gaussian_mixture(process, means, [[[1]]] * 2, weights=[0.9, 0.1]),
            oracles.low_rank_mixture(process, means, [[[1]], [[2]]], noise_std=0.5),
            oracles.empirical(process, means),
        )
        for means in ([[0], [4]], [[0.0], [4.0]])
    ]
    for whole, decimal in zip(*pairs, strict=True):
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(decimal), strict=True):
            np.testing.assert_array_equal(a, b)
    oracle = oracles.gaussian(process, jnp.zeros(2), jnp.eye(2) * 0.5)
    whole, decimal = jnp.asarray([[1, 2]]), jnp.asarray([[1.0, 2.0]])
    for call in (
        lambda x: jaxdiff.invert(oracle, x, times=5).x,
        lambda x: jaxdiff.denoise(jax.random.key(0), oracle, x, times=5).x,
        lambda x: jaxdiff.log_likelihood(oracle, x).latent,
        lambda x: jaxdiff.log_likelihood(oracle, x).log_prob,
        lambda x: jaxdiff.dequantize(jax.random.key(0), x, low=0, high=4, levels=5),
    ):
        np.testing.assert_array_equal(call(whole), call(decimal))
        assert jnp.issubdtype(call(whole).dtype, jnp.floating)


@pytest.mark.parametrize("times", [np.int64(5), np.int32(5), jnp.asarray(5), np.asarray(5)])
def test_numbers_of_steps_may_be_of_any_kind(times):
    oracle = gaussian(processes.VP(), 2)
    run = lambda times: jaxdiff.sample(jax.random.key(0), oracle, (2,), 2, times=times).x
    np.testing.assert_array_equal(run(times), run(5))
    for bad, error in ((5.5, TypeError), (np.float32(5.0), TypeError), (0, ValueError)):
        with pytest.raises(error, match="`times` must be"):
            run(bad)


@pytest.mark.parametrize("final", [True, False])
def test_grids_that_end_without_noise_end_without_nan(final):
    """A corrector of the last step has nothing to correct there."""
    from jaxdiff.predictions import Eps

    oracle = gaussian(processes.VP(), 2)
    solver = solvers.UniPC(2, Eps(), final_corrector=final)
    run = lambda times: jaxdiff.sample(
        jax.random.key(0), oracle, (2,), 3, solver=solver, times=times
    )
    plain = jaxdiff.sample(
        jax.random.key(0), oracle, (2,), 3, solver=solvers.UniPC(2, Eps()), times=6
    )
    np.testing.assert_allclose(run(6).x, plain.x, atol=1e-5)
    np.testing.assert_array_equal(run(6).nfe, 6)
    # Where there is noise left, it corrects.
    np.testing.assert_array_equal(run(jnp.linspace(1.0, 0.1, 7)).nfe, 7 if final else 6)
    data = oracles.empirical(processes.VP(), [[0.0, 1.0], [1.0, 0.0]])
    x = jaxdiff.sample(
        jax.random.key(0), data, (2,), 3, solver=solvers.UniPC(2, final_corrector=final), times=6
    ).x
    assert np.all(np.isfinite(x))


@pytest.mark.parametrize("name", ["EVODiff", "DDIM", "UniPC", "SEEDS", "EDMHeun"])
def test_events_may_be_numbers(name):
    """And are then those of a vector of one."""
    number = oracles.gaussian(processes.VP(), 0.3, [[0.5]])
    vector = oracles.gaussian(processes.VP(), [0.3], [[0.5]])
    options = dict(solver=getattr(solvers, name)(), times=9)
    x = jaxdiff.sample(jax.random.key(0), number, (), 50, **options).x
    assert x.shape == (50,)
    of_one = jaxdiff.sample(jax.random.key(0), vector, (1,), 50, **options).x
    np.testing.assert_allclose(x, of_one[:, 0], atol=1e-5)

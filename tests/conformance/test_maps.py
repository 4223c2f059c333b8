"""What every map of denoisers promises, the library's own and those that others write."""

import dataclasses
import inspect

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import outside
import pytest
from cases import Counting, mixture, with_random_weights
from flax import nnx

import jaxdiff
from jaxdiff import geometry, guidance, networks, processes, solvers
from jaxdiff.stepwise import at_step, init_notes

KEY = jax.random.key(0)
COUNT, STEPS = 3, 5
# Beside DDIM.
SOLVERS = (solvers.EDMHeun(), solvers.UniPC(2))


class Weaker(jaxdiff.Denoiser):
    """Half of another denoiser's answer: a second child."""

    denoiser: jaxdiff.Denoiser

    @property
    def process(self):
        return self.denoiser.process

    def __call__(self, x, t, cond=None, *, key=None):
        return 0.5 * self.denoiser(x, t, cond, key=key)


def centred(x):
    return x - jnp.mean(x)


def mean(x):
    return jnp.mean(x) * jnp.ones_like(x)


def towards(x, t, y):
    return -jnp.sum((x - y) ** 2) / 8


def scores(x):
    return jnp.stack([x[0], 2 * x[1], x[0] * x[1]])


def close(x0, y):
    return -jnp.sum((x0 - y) ** 2)


def alike(x0, concept):
    return jnp.exp(x0[0] * (1 - 2 * concept))


def odds(x, t):
    return jnp.tanh(x[0] + t)


PARTS = tuple(map(jax.tree_util.Partial, (mean, centred)))

# Every map, made from a base; the evaluations it costs on five steps of DDIM, and the calls that
# these are: branches that run as one batch are one call.
MAPS = {
    "Clipped": (lambda base: jaxdiff.Clipped(base, -1.2, 1.2), 5, 5),
    "DynamicThresholding": (lambda base: jaxdiff.DynamicThresholding(base), 5, 5),
    "ClassifierFree": (lambda base: guidance.ClassifierFree(base, null_cond=2, scale=2.0), 10, 5),
    "RescaledClassifierFree": (
        lambda base: guidance.RescaledClassifierFree(base, null_cond=2, scale=2.0), 10, 5,
    ),
    "CFGPlusPlus": (lambda base: guidance.CFGPlusPlus(base, null_cond=2), 10, 5),
    "AdaptiveProjected": (
        lambda base: guidance.AdaptiveProjected(base, null_cond=2, scale=2.0, radius=0.5), 10, 5,
    ),
    "CFGZeroStar": (lambda base: guidance.CFGZeroStar(base, null_cond=2, scale=2.0), 8, 4),
    "LimitedInterval": (
        lambda base: guidance.LimitedInterval(base, null_cond=2, scale=3.0, low=0.0, high=2.0),
        None, None,
    ),
    "AdaptiveGuidance": (
        lambda base: guidance.AdaptiveGuidance(base, null_cond=2, scale=3.0, agreement=0.98),
        None, None,
    ),
    "GuidancePolicy": (
        lambda base: guidance.GuidancePolicy(base, 2, jnp.asarray([3.0, 1.0, 0.5, 0.0, 2.0])), 8, 5,
    ),
    "LinearAdaptiveGuidance": (
        lambda base: guidance.LinearAdaptiveGuidance(
            base, 2, jnp.tile(jnp.asarray([0.9, -0.3]), (5, 1)), jnp.full((5, 1), 0.3),
            jnp.asarray([2, 1, 2, 1, 0]), 2.0,
        ),
        7, 5,
    ),
    "IndependentCondition": (
        lambda base: guidance.IndependentCondition(base, guidance.UniformLabel(2), 2.0), 10, 5,
    ),
    "Autoguidance": (lambda base: guidance.Autoguidance(base, Weaker(base), 2.0), 10, 10),
    "ClassifierGuidance": (
        lambda base: guidance.ClassifierGuidance(base, jax.tree_util.Partial(towards), 0.3), 5, 5,
    ),
    "EluCD": (lambda base: guidance.EluCD(base, jax.tree_util.Partial(scores), 2.0), 5, 5),
    "EventGuidance": (
        lambda base: guidance.EventGuidance(base, jax.tree_util.Partial(centred), std=0.5), 5, 5,
    ),
    "LossGuidance": (
        lambda base: guidance.LossGuidance(base, jax.tree_util.Partial(close), 0.3, draws=2), 5, 5,
    ),
    "ManifoldPreserving": (
        lambda base: guidance.ManifoldPreserving(base, jax.tree_util.Partial(close), 0.3), 5, 5,
    ),
    "Universal": (
        lambda base: guidance.Universal(base, jax.tree_util.Partial(close), 0.3, iterations=2),
        5, 5,
    ),
    "Composable": (
        lambda base: guidance.Composable(base, null_cond=2, count=2, scale=1.5), 15, 5,
    ),
    "SemanticGuidance": (
        lambda base: guidance.SemanticGuidance(
            base, null_cond=2, count=2, scale=1.5, quantile=0.4, warm_up=1
        ),
        20, 5,
    ),
    "SafeLatent": (
        lambda base: guidance.SafeLatent(base, 2, 0, 2.0, 1.0, safety=2.0, threshold=0.1), 15, 5,
    ),
    "PosteriorOdds": (
        lambda base: guidance.PosteriorOdds(base, 0, jax.tree_util.Partial(odds), 0.5), 10, 5,
    ),
    "NegativePrompt": (lambda base: guidance.NegativePrompt(base, 2.0), 10, 5),
    "Conditioned": (
        lambda base: guidance.Conditioned(base, {"label": jnp.zeros((), jnp.int32)}), 5, 5,
    ),
    "Product": (lambda base: guidance.Product([base, Weaker(base)], [1.5, -0.5]), 10, 10),
    "Factorized": (lambda base: guidance.Factorized(base, PARTS), 10, 5),
    "BlackScholesBlending": (
        lambda base: guidance.BlackScholesBlending(base, jax.tree_util.Partial(alike)), 5, 5,
    ),
    "FixedPart": (lambda base: guidance.FixedPart(base, PARTS[0]), 5, 5),
    "EditedBetween": (
        lambda base: geometry.EditedBetween(base, jaxdiff.Clipped(base, -1.2, 1.2), 0.25, 0.75),
        5, 5,
    ),
    "NoisyCondition": (outside.NoisyCondition, 5, 5),
    "Momentum": (outside.Momentum, 10, 10),
    "Measured": (outside.Measured, 5, 5),
    "Ensemble": (lambda base: outside.Ensemble(base, (Weaker(base), Weaker(base))), 15, 15),
}  # fmt: skip
each_map = pytest.mark.parametrize("name", MAPS)


class Stated(jaxdiff.DenoiserMap):
    """States the noise that x0 implies, which says nothing new."""

    base: jaxdiff.Denoiser

    def estimate(self, x, t, cond=None, *, key=None):
        found = self.base.estimate(x, t, cond, key=key)
        return found.replace(eps=found.noise(self.process, x, t))


def cond_of(name, count=COUNT):
    cond = {"label": jnp.arange(count) % 2}
    rows = jnp.linspace(-0.5, 0.5, 2 * COUNT).reshape(COUNT, 2)[:count]
    if name == "NoisyCondition":
        cond["shift"] = rows
    if name == "Measured":
        cond |= {"y": rows, "mask": jnp.ones((count, 2))}
    if name == "Composable":
        both = jnp.tile(jnp.arange(2), (count, 1))
        cond |= {"concepts": both, "weights": jnp.tile(jnp.asarray([1.0, -0.2]), (count, 1))}
    if name == "SemanticGuidance":
        both = jnp.tile(jnp.arange(2), (count, 1))
        cond |= {"edits": both, "edit_weights": jnp.tile(jnp.asarray([0.3, -0.1]), (count, 1))}
    if name == "NegativePrompt":
        cond["negative"] = 1 - cond["label"]
    if name == "Factorized":
        cond["parts"] = jnp.tile(jnp.arange(2), (count, 1))
    wanting = ("ClassifierGuidance", "EventGuidance", "LossGuidance", "ManifoldPreserving")
    if name == "BlackScholesBlending":
        cond["concepts"] = jnp.tile(jnp.arange(2), (count, 1))
    if name == "FixedPart":
        cond["known"] = rows
    if name in ("Universal", *wanting):
        cond["y"] = rows
    if name == "EluCD":
        cond["y"] = jnp.arange(count)
    return cond


def base(dtype=jnp.float32):
    return mixture(processes.VP(), dtype)


def run(name, denoiser, solver=solvers.DDIM(), count=COUNT, **options):
    options = {"times": STEPS, "cond": cond_of(name, count), **options}
    return jaxdiff.sample(KEY, denoiser, (2,), count, solver=solver, **options)


def numbers(denoiser):
    """Names of the fields that may be swept."""
    return [
        f.name for f in dataclasses.fields(denoiser) if isinstance(getattr(denoiser, f.name), float)
    ]


def test_no_map_is_missing():
    public = {
        value
        for module in (jaxdiff, guidance, geometry)
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, jaxdiff.DenoiserMap)
        and not getattr(value, "__abstractvars__", ())
    }
    # These read a network's taps, which an oracle has not; tests of their own.
    public -= {geometry.TimedOffset, guidance.TimeStepGuidance, guidance.ConditionAnnealed}
    # One asks for densities, one for images; tests of their own.
    public -= {guidance.Mixture, guidance.UpsampleGuidance}
    public -= {guidance.LateConstraint}
    public -= {guidance.PerturbedAttention, guidance.SmoothedEnergy, guidance.SelfAttention}
    assert public <= {type(build(base())) for build, *_ in MAPS.values()}


@each_map
def test_numbers_are_swept_and_evaluations_counted(x64, name):
    """Floats, integers, NumPy's and JAX's scalars alike do not trace anew.

    A sweep by vmap is the loop, and an example by itself is that of a batch.
    """
    build, expected, called = MAPS[name]
    traces = []

    class Traced(Counting):
        def __call__(self, x, t, cond=None, *, key=None):
            traces.append(1)
            return super().__call__(x, t, cond, key=key)

    counting = Traced(base(jnp.float64))
    denoiser = build(counting)
    alone, first = run(name, denoiser, count=1), len(traces)
    jax.effects_barrier()
    if expected is not None:
        assert (int(alone.nfe[0]), len(counting.calls)) == (expected, called)
    for field in numbers(denoiser):
        for value in (0, 0.75, np.float32(0.75), np.int64(0), jnp.float32(0.75)):
            run(name, dataclasses.replace(denoiser, **{field: value}), count=1)
            assert len(traces) == first > 0, (field, type(value))

    denoiser = build(base(jnp.float64))
    fields = numbers(denoiser)[:1]
    if not fields:
        swept = run(name, denoiser)
        swept, nfe = swept.x[None], swept.nfe[None]
    else:

        def at(value):
            out = run(name, eqx.tree_at(lambda d: getattr(d, fields[0]), denoiser, value))
            return out.x, out.nfe

        value = getattr(denoiser, fields[0])
        swept, nfe = jax.jit(jax.vmap(at))(jnp.asarray([value, 0.8 * value, 0.5 * value]))
        # Whatever the strike, the cheapest option is the same.
        assert np.allclose(swept[1], swept[2]) == (name == "BlackScholesBlending")
    np.testing.assert_allclose(swept[0, 0], alone.x[0], rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(nfe[0, 0], alone.nfe[0])


@each_map
def test_with_three_solvers_and_two_other_maps(x64, name):
    """Maps around it and inside that change nothing change nothing, and the cost is counted."""
    build, oracle = MAPS[name][0], base(jnp.float64)
    plain = build(oracle)
    inside = build(jaxdiff.Clipped(oracle, -9.0, 9.0))
    outside_ = guidance.ClassifierFree(plain, null_cond=2, scale=1.0)

    @jax.jit
    def final(plain, inside, outside_):
        alone = [run(name, plain, solver) for solver in SOLVERS]
        return alone, run(name, inside, SOLVERS[0]), run(name, outside_, SOLVERS[1])

    alone, inside, around = final(plain, inside, outside_)
    assert all(np.all(np.isfinite(out.x)) for out in alone)
    assert not np.allclose(alone[0].x, alone[1].x)
    np.testing.assert_allclose(inside.x, alone[0].x, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(inside.nfe, alone[0].nfe)
    np.testing.assert_allclose(around.x, alone[1].x, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(around.nfe, 2 * alone[1].nfe)


@pytest.mark.parametrize("name", [name for name in MAPS if name != "Ensemble"])
def test_a_noise_that_the_base_states_is_guided_with_x0(x64, name):
    """What states the implied noise is what states none, inside of every map."""
    build, oracle = MAPS[name][0], base(jnp.float64)
    x, t = jnp.asarray([0.3, -0.2]), jnp.asarray(0.5)
    cond = jax.tree.map(lambda leaf: leaf[0], cond_of(name))

    @jax.jit
    def noise(denoiser):
        notes = init_notes(denoiser, x)
        step = jaxdiff.Step(t, t / 2, KEY, index=jnp.asarray(1), notes=notes, num_steps=STEPS)
        found = at_step(denoiser, step).estimate(x, t, cond)
        return found.x0, found.noise(denoiser.process, x, t)

    expected, found = noise(build(oracle)), noise(build(Stated(oracle)))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@each_map
def test_a_start_without_signal_is_finite_or_refused(name):
    """Where alpha is 0, and of a number of steps."""
    denoiser = MAPS[name][0](mixture(processes.RectifiedFlow(), jnp.float32))
    assert np.all(np.isfinite(run(name, denoiser).x))
    if denoiser.needs_signal:
        wanted = f"must start where alpha > 0 with {type(denoiser).__name__}"
        with pytest.raises(ValueError, match=f"`times` {wanted}"):
            run(name, denoiser, times=jnp.linspace(1.0, 0.0, STEPS + 1))
    else:
        out = run(name, denoiser, times=jnp.linspace(1.0, 0.0, STEPS + 1))
        assert np.all(np.isfinite(out.x))


@each_map
def test_dtypes_and_gradients(name):
    denoiser = MAPS[name][0](base())
    half = run(name, denoiser, dtype=jnp.bfloat16).x
    assert half.dtype == jnp.bfloat16 and np.all(np.isfinite(np.asarray(half, np.float32)))

    def final(arrays):
        x = run(name, eqx.combine(arrays, rest)).x
        return x.sum(), x

    arrays, rest = eqx.partition(denoiser, eqx.is_inexact_array_like)
    arrays = jax.tree.map(jnp.asarray, arrays)
    (_, x), slopes = jax.jit(jax.value_and_grad(final, has_aux=True))(arrays)
    assert x.dtype == jnp.float32
    chex.assert_tree_all_finite(slopes)


@each_map
def test_taps_are_reached(name):
    """Edits change the answer; reads come along with the estimate, or are refused by name."""
    network = with_random_weights(
        lambda: networks.MLP(2, hidden=8, num_blocks=1, num_classes=2, rngs=nnx.Rngs(0))
    )
    leaf = jaxdiff.NetworkDenoiser(network, processes.VP())
    denoiser = MAPS[name][0](leaf)
    x, t = jnp.asarray([0.3, -0.2]), jnp.asarray(0.5)
    cond = jax.tree.map(lambda leaf: leaf[0], cond_of(name))
    step = jaxdiff.Step(t, t / 2, KEY, index=jnp.asarray(1), notes=init_notes(denoiser, x))

    @jax.jit
    def look(denoiser):
        return at_step(denoiser, step).estimate(x, t, cond)

    edited = jaxdiff.edit_taps(denoiser, {"block.0": lambda h: 0 * h})
    assert not np.allclose(look(edited).x0, look(denoiser).x0)
    wanted = jaxdiff.reading(denoiser, ("block.0",))
    if name == "Ensemble":
        with pytest.raises(ValueError, match="`Ensemble` defines `__call__` alone.*taps"):
            look(wanted)
        return
    seen = jnp.asarray(2) if name == "Composable" else cond["label"]
    direct = jax.jit(jaxdiff.reading(leaf, ("block.0",)).estimate)(x, t, seen)
    np.testing.assert_allclose(look(wanted).taps["block.0"], direct.taps["block.0"], rtol=1e-5)

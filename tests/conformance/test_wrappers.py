"""What every wrapper of solvers promises, the library's own and those that others write."""

import dataclasses
import inspect

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import outside
import pytest
from cases import Counting, mixture

import jaxdiff
from jaxdiff import guidance, processes, solvers
from jaxdiff.predictions import X0

KEY = jax.random.key(0)
INTERVAL = solvers.RestartInterval(0.5, 3.0)
# Every wrapper around a base; one that leaves the base as it is; and the evaluations that five
# steps of DDIM cost in it.
WRAPPERS = {
    "AncestralNoise": (solvers.AncestralNoise, lambda b: solvers.AncestralNoise(b, 0.0), 5),
    "PredictorCorrector": (
        lambda b: solvers.PredictorCorrector(b, 2),
        lambda b: solvers.PredictorCorrector(b, 0),
        15,
    ),
    "Reflected": (
        lambda b: solvers.Reflected(b, -1.5, 1.0),
        lambda b: solvers.Reflected(b, -1e6, 1e6),
        5,
    ),
    "Restart": (
        lambda b: solvers.Restart(b, (INTERVAL,)),
        lambda b: solvers.Restart(b, ()),
        5 + 2 * 2,
    ),
    "Recurrence": (
        lambda b: guidance.Recurrence(b, 3, t_low=0.45, t_high=9.0),
        lambda b: guidance.Recurrence(b, 1),
        11,
    ),
    "Corrected": (
        lambda b: guidance.Corrected(b, guidance.Langevin(0.05), 2),
        lambda b: guidance.Corrected(b, count=0),
        15,
    ),
    "Projected": (
        outside.Projected,
        lambda b: outside.Projected(b, share=0.0),
        5,
    ),
}
each_wrapper = pytest.mark.parametrize("name", WRAPPERS)


@pytest.fixture
def oracle(x64):
    return mixture(processes.VP())


def run(denoiser, solver, count=3, **options):
    options = {"times": 5, "cond": jnp.arange(count) % 2, **options}
    return jaxdiff.sample(KEY, denoiser, (2,), count, solver=solver, **options)


def test_no_wrapper_is_missing():
    public = {
        value
        for module in (solvers, guidance)
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, solvers.SolverWrapper)
        and not inspect.isabstract(value)
    }
    # These ask for data of the example, or for a base that draws; tests of their own.
    public -= {guidance.TrainingFree, guidance.DPS, guidance.FreeDoM, guidance.SVDD}
    public -= {guidance.Pasted}
    public -= {guidance.EluCDSteps}
    # No setting of it leaves the base as it is; tests of its own.
    public -= {solvers.DoubleJump}
    assert public <= {type(build(solvers.DDIM())) for build, _, _ in WRAPPERS.values()}


@each_wrapper
def test_numbers_are_swept_and_evaluations_counted(oracle, name):
    """Numbers of any kind do not trace anew, a sweep is the loop, an example is by itself."""
    traces = []

    class Traced(Counting):
        def __call__(self, x, t, cond=None, *, key=None):
            traces.append(1)
            return super().__call__(x, t, cond, key=key)

    build, _, expected = WRAPPERS[name]
    counting, solver = Traced(oracle), build(solvers.DDIM())
    alone, first = run(counting, solver, count=1), len(traces)
    jax.effects_barrier()
    assert int(alone.nfe[0]) == expected == len(counting.calls)
    fields = [
        f.name for f in dataclasses.fields(solver) if isinstance(getattr(solver, f.name), float)
    ]
    for field in fields:
        old = getattr(solver, field)
        whole = int(np.sign(old) * max(1, round(2 * abs(old))))
        for value in (whole, 0.9 * old, np.float32(0.9 * old), jnp.float32(0.9 * old)):
            run(counting, dataclasses.replace(solver, **{field: value}), count=1)
            assert len(traces) == first > 0, (field, type(value))
    if not fields:
        swept = run(oracle, solver).x[None]
    else:
        old = getattr(solver, fields[0])

        def at(value):
            return run(oracle, eqx.tree_at(lambda s: getattr(s, fields[0]), solver, value)).x

        swept = jax.jit(jax.vmap(at))(jnp.asarray([old, 0.5 * old]))
        assert not np.allclose(swept[0], swept[1])
    np.testing.assert_allclose(swept[0, 0], alone.x[0], rtol=1e-9, atol=1e-9)


@each_wrapper
def test_around_any_base_and_any_map(oracle, name):
    """The neutral one is its base, plan and memory included; maps keep what they remember."""
    build, neutral, _ = WRAPPERS[name]
    bases = [solvers.EDMHeun(), solvers.DPMSolver(2, X0())]
    if build(bases[0]).inserts_steps:
        for base in (solvers.UniPC(2), solvers.BDIA()):
            with pytest.raises(ValueError, match=f"`base` of {name} must be .* single steps"):
                build(base)
    else:
        bases.append(solvers.UniPC(2))
    bases.append(solvers.Reflected(solvers.DDIM(), -9.0, 9.0))
    if name == "Projected":
        with pytest.raises(TypeError, match="`base` of Projected must be an ExplicitSolver"):
            run(oracle, build(bases.pop()))
    remembering = outside.Momentum(jaxdiff.Clipped(oracle, -9.0, 9.0))
    # A base without noise may be wrapped by one that draws.
    wrapped = jax.jit(lambda: [run(remembering, neutral(base)) for base in bases])()
    plain = jax.jit(lambda: [run(remembering, base) for base in bases])()
    for found, expected in zip(wrapped, plain, strict=True):
        np.testing.assert_allclose(found.x, expected.x, rtol=1e-8, atol=1e-8)
        np.testing.assert_array_equal(found.nfe, expected.nfe)
        np.testing.assert_allclose(found.notes[0], expected.notes[0], rtol=1e-8, atol=1e-8)
    # And not only where it is neutral.
    out = run(remembering, build(bases[0]))
    assert np.all(np.isfinite(out.x)) and not np.allclose(out.x, plain[0].x)


@each_wrapper
def test_dtypes_and_gradients(name):
    oracle = mixture(processes.VP(), jnp.float32)
    solver = WRAPPERS[name][0](solvers.DDIM())
    half = run(oracle, solver, dtype=jnp.bfloat16).x
    assert half.dtype == jnp.bfloat16 and np.all(np.isfinite(np.asarray(half, np.float32)))

    def final(arrays):
        oracle, solver = eqx.combine(arrays, rest)
        x = run(oracle, solver).x
        return x.sum(), x

    arrays, rest = eqx.partition((oracle, solver), eqx.is_inexact_array_like)
    arrays = jax.tree.map(jnp.asarray, arrays)
    (_, x), slopes = jax.jit(jax.value_and_grad(final, has_aux=True))(arrays)
    assert x.dtype == jnp.float32
    chex.assert_tree_all_finite(slopes)


def test_a_population_goes_around_and_not_inside():
    with pytest.raises(TypeError, match="`base` of Recurrence must move examples by themselves"):
        outside.Recurrence(outside.ParticleGuidance())

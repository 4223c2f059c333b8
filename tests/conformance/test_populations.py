"""What every population promises, the library's own and those that others write."""

import dataclasses
import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import outside
import pytest
from cases import mixture

import jaxdiff
from jaxdiff import guidance, processes, solvers

KEY = jax.random.key(0)
# Every population, and its base.
POPULATIONS = {
    "ParticleGuidance": guidance.ParticleGuidance,
    "Resampled": outside.Resampled,
}
each_population = pytest.mark.parametrize("name", POPULATIONS)


@pytest.fixture
def oracle(x64):
    return mixture(processes.VP())


def run(denoiser, solver, count=8, **options):
    options = {"times": 5, **options}
    return jaxdiff.sample(KEY, denoiser, (2,), count, solver=solver, **options)


def test_no_population_is_missing():
    public = {
        value
        for module in (solvers, guidance)
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, solvers.PopulationSolver)
        and not inspect.isabstract(value)
    }
    # It asks for data of the example, and one particle is guided, too; tests of its own.
    public -= {guidance.TwistedSMC}
    assert public <= set(POPULATIONS.values())


@each_population
def test_one_particle_is_the_plain_sampler_and_so_are_those_that_do_not_interact(oracle, name):
    build = POPULATIONS[name]
    plain = run(oracle, build().base)
    for alone in (build(size=1), build(size=4, strength=0.0)):
        found = run(oracle, alone)
        np.testing.assert_allclose(found.x, plain.x, rtol=1e-9, atol=1e-9)
        np.testing.assert_array_equal(found.nfe, plain.nfe)
    assert not np.allclose(run(oracle, build(size=4)).x, plain.x)


@each_population
def test_populations_do_not_see_each_other(oracle, name):
    """Nor how many are computed at a time, with maps that draw and remember inside."""
    solver = POPULATIONS[name](size=4)
    denoiser = outside.Momentum(outside.IndependentCondition(oracle))
    cond = {"cond": jnp.asarray([0, 1, 1, 0, 0, 0, 1, 1])}
    whole = run(denoiser, solver, **cond)
    chunks = run(denoiser, solver, batch_size=4, **cond)
    np.testing.assert_allclose(chunks.x, whole.x, rtol=1e-9, atol=1e-9)
    second = run(denoiser, solver, count=4, first_index=4, cond=cond["cond"][4:])
    np.testing.assert_allclose(second.x, whole.x[4:], rtol=1e-9, atol=1e-9)
    # The inner map is the first, and remembers nothing.
    np.testing.assert_allclose(second.notes[1], whole.notes[1][4:], rtol=1e-9, atol=1e-9)
    assert whole.nfe.shape == (8,)


@each_population
def test_numbers_sweeps_dtypes_and_gradients(name):
    oracle, solver = mixture(processes.VP(), jnp.float32), POPULATIONS[name]()
    traces = []

    class Traced(jaxdiff.DenoiserMap):
        base: jaxdiff.Denoiser

        def __call__(self, x, t, cond=None, *, key=None):
            traces.append(1)
            return self.base(x, t, cond, key=key)

    first = run(Traced(oracle), solver).x
    count = len(traces)
    fields = [
        f.name for f in dataclasses.fields(solver) if isinstance(getattr(solver, f.name), float)
    ]
    for field in fields:
        for value in (2, 0.7, np.float32(0.7), jnp.float32(0.7)):
            run(Traced(oracle), dataclasses.replace(solver, **{field: value}))
            assert len(traces) == count > 0, (field, type(value))
    assert run(oracle, solver, dtype=jnp.bfloat16).x.dtype == jnp.bfloat16

    def final(value):
        swept = eqx.tree_at(lambda s: getattr(s, fields[0]), solver, value)
        return run(oracle, swept).x

    old = getattr(solver, fields[0])
    swept = jax.jit(jax.vmap(final))(jnp.asarray([old, 0.5 * old]))
    np.testing.assert_allclose(swept[0], first, atol=1e-4)
    slope = jax.jit(jax.grad(lambda value: final(value).sum()))(jnp.asarray(old))
    assert np.isfinite(slope)


@each_population
def test_a_step_is_public_and_equivariant(oracle, name):
    """Init and step by hand: permuted particles step to permuted states.

    Draws that the population shares go by place: there the law is, not the draw.
    """
    solver, size = POPULATIONS[name](size=4), 4
    times = jnp.linspace(0.8, 0.1, 4)
    order = jnp.asarray([2, 0, 3, 1])
    x = jax.random.normal(KEY, (size, 2))
    keys = jax.random.split(jax.random.key(1), size)
    label = jnp.asarray([0, 1, 1, 0])

    @jax.jit
    def move(x, keys, label, shared):
        problem = solvers.Problem(oracle, label, keys, times, -1)
        problem = dataclasses.replace(problem, plan=solver.plan(problem))
        memory = jax.vmap(solver.init_memory, (problem.axes, 0))(problem, x)
        step = dataclasses.replace(problem.step(jnp.asarray(1), memory), shared=shared)
        return solver.take(problem, x, step)

    if name == "ParticleGuidance":
        plain, moved = (
            move(x[rows], keys[rows], label[rows], KEY) for rows in (jnp.arange(size), order)
        )
        np.testing.assert_allclose(moved.x, plain.x[order], rtol=1e-9)
        np.testing.assert_array_equal(moved.nfe, 1)
    else:
        many = jax.random.split(jax.random.key(2), 4000)
        plain, moved = (
            jax.vmap(move, (None, None, None, 0))(x[rows], keys[rows], label[rows], many).x
            for rows in (jnp.arange(size), order)
        )
        # Each place holds the particles in proportion to their weights.
        proposed = dataclasses.replace(solver, strength=0.0)
        problem = solvers.Problem(oracle, label, keys, times, -1)
        step = dataclasses.replace(problem.step(jnp.asarray(1)), shared=KEY)
        states = proposed.take(problem, x, step).x
        weights = jax.nn.softmax(solver.strength * states[:, 0])
        for found in (plain, moved):
            np.testing.assert_allclose(found.mean((0, 1)), weights @ states, atol=0.03)


def test_numbers_of_examples_that_make_no_population_are_refused(oracle):
    solver = outside.ParticleGuidance(size=4)
    for options, argument in (
        ({"count": 6}, "num_samples"),
        ({"batch_size": 3}, "batch_size"),
        ({"first_index": 2}, "first_index"),
    ):
        with pytest.raises(ValueError, match=f"`{argument}` must be a multiple of .* size 4"):
            run(oracle, solver, **options)
    own = jnp.broadcast_to(jnp.linspace(1.0, 0.0, 4), (8, 4))
    with pytest.raises(ValueError, match="`times` must be one grid for all with a population"):
        run(oracle, solver, times=own)
    with pytest.raises(ValueError, match="`size` must be at least 1"):
        outside.ParticleGuidance(size=0)
    with pytest.raises(TypeError, match="`base` of ParticleGuidance must be an ExplicitSolver"):
        run(oracle, outside.ParticleGuidance(solvers.BDIA()))
    with pytest.raises(ValueError, match="move examples by themselves to invert"):
        jaxdiff.invert(oracle, jnp.ones((4, 2)), solver=solver)

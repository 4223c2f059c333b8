"""What every solver promises, whatever its method."""

import functools
import inspect

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Counting, mixture

import jaxdiff
from jaxdiff import parallel, processes, solvers
from jaxdiff.predictions import X0, Eps

RESTART = solvers.Restart(intervals=(solvers.RestartInterval(0.5, 3.0),))
# Every public solver, with the evaluations it spends on six steps of a grid that ends at zero
# (at t_min for stock solvers).
SOLVERS = {
    "Ancestral": (solvers.Ancestral(), 6),
    "AncestralNoise": (solvers.AncestralNoise(), 11),
    "BDIA": (solvers.BDIA(), 6),
    "DDIM": (solvers.DDIM(), 6),
    "DDIM(0.5)": (solvers.DDIM(0.5), 6),
    "DEIS": (solvers.DEIS(3), 6),
    "DPMSolver(2)": (solvers.DPMSolver(2), 11),
    "DPMSolver(3)": (solvers.DPMSolver(3, X0()), 16),
    "DPMSolverMultistep": (solvers.DPMSolverMultistep(3), 6),
    "DPMSolverMultistep(eps, sde)": (solvers.DPMSolverMultistep(2, Eps(), eta=0.7), 6),
    "DoubleJump": (solvers.DoubleJump(), 6),
    "EDICT": (solvers.EDICT(), 12),
    "EDMHeun": (solvers.EDMHeun(), 11),
    "EDMHeun(churn)": (solvers.EDMHeun(s_churn=4.0), 11),
    "EVODiff": (solvers.EVODiff(), 6),
    "EulerMaruyama": (solvers.EulerMaruyama(), 6),
    "FixedPointInversion": (solvers.FixedPointInversion(), 6),
    "PNDM": (solvers.PNDM(), 7),
    "PNDM(runge_kutta)": (solvers.PNDM(4, "runge_kutta"), 15),
    "PredictorCorrector": (solvers.PredictorCorrector(), 12),
    "Reflected": (solvers.Reflected(solvers.DDIM(), -3.0, 3.0), 6),
    "Restart": (RESTART, 11 + 2 * 2 * 2),
    "RNRI": (solvers.RNRI(), 6),
    "SASolver": (solvers.SASolver(), 6),
    "SEEDS": (solvers.SEEDS(3), 16),
    "UniPC": (solvers.UniPC(), 6),
    "UniPC(eps)": (solvers.UniPC(2, Eps(), "bh1"), 6),
    "ReverseSDE": (solvers.ReverseSDE(diffrax.ShARK()), 12),
    "diffrax.Euler": (diffrax.Euler(), 6),
    "diffrax.Midpoint": (diffrax.Midpoint(), 12),
    "diffrax.Heun": (diffrax.Heun(), 12),
    "diffrax.Tsit5": (diffrax.Tsit5(), 37),
}
each_solver = pytest.mark.parametrize("name", SOLVERS)


def run(denoiser, solver, count=16, times=6, **options):
    return jaxdiff.sample(
        jax.random.key(0), denoiser, (2,), count, solver=solver, times=times, **options
    )


@functools.cache
def spread(name):
    """Samples over eight devices, and the text of their program."""
    solver, oracle = SOLVERS[name][0], mixture(processes.VP())
    sharding = parallel.batch_sharding(parallel.make_mesh(devices=jax.devices()))
    program = jax.jit(lambda oracle: run(oracle, solver, sharding=sharding).x)
    compiled = program.lower(oracle).compile()
    return compiled(oracle), compiled.as_text()


@each_solver
def test_a_start_without_signal_is_finite_or_refused(name):
    solver, times = SOLVERS[name][0], jnp.linspace(1.0, 0.0, 7)
    oracle = mixture(processes.RectifiedFlow(), jnp.float32)
    if not isinstance(solver, solvers.DiffusionSolver):
        return
    if solver.needs_signal:
        for grid in (times, jnp.tile(times, (16, 1))):
            with pytest.raises(ValueError, match="`times` must start where alpha > 0 with"):
                run(oracle, solver, times=grid)
    else:
        assert np.all(np.isfinite(run(oracle, solver, times=times).x))


def test_no_solver_is_missing():
    instances = [solver for solver, _ in SOLVERS.values()]
    public = {
        value
        for value in vars(solvers).values()
        if isinstance(value, type)
        and issubclass(value, solvers.DiffusionSolver)
        and not inspect.isabstract(value)
    }
    # These need a learned variance, or a map between two times; they have tests of their own.
    public -= {solvers.LearnedAncestral, solvers.FlowMapSteps}
    assert public <= {type(solver) for solver in instances}


class Told(jaxdiff.Stepwise):
    """Draws once a step, counts the steps, and says out loud the noise that x0 implies."""

    base: jaxdiff.Denoiser
    draws: list = eqx.field(static=True, default_factory=list)

    def __hash__(self):
        return id(self)

    def init_memory(self, x):
        return jnp.zeros((), jnp.int32)

    def estimate(self, x, t, cond=None, *, key=None):
        draw = jax.random.uniform(self.step.key)
        jax.debug.callback(lambda draw: self.draws.append(float(draw)), draw, ordered=False)
        found = self.base.estimate(x, t, cond, key=key)
        sigma = self.process.sigma(t)
        eps = (x - self.process.alpha(t) * found.x0) / jnp.where(sigma > 0, sigma, 1.0)
        return self.remember(found.replace(eps=eps), self.step.memory + 1)


@each_solver
def test_evaluations_are_counted_and_steps_told(x64, name):
    """A map inside draws once a step, whatever the stages, and remembers from step to step.

    Nor does any example depend on the others, or on the devices. In double precision: six long
    steps amplify rounding, a thousandfold by EDICT.

    A noise that is said out loud is followed, and is here the one that is implied.
    """
    solver, expected = SOLVERS[name]
    counting = Counting(mixture(processes.VP()))
    of_ours = isinstance(solver, solvers.DiffusionSolver)
    told = Told(counting) if of_ours else counting
    out = run(told, solver, count=3, batch_size=1)
    jax.effects_barrier()
    if of_ours:
        # Restarts insert steps of their own.
        steps = 6 + 2 * 2 if name == "Restart" else 6
        assert len(set(told.draws)) == 3 * steps
        np.testing.assert_array_equal(out.notes[0], steps)
    np.testing.assert_array_equal(out.nfe, expected)
    assert len(counting.calls) == 3 * expected
    # One after the other on one device, as all together on eight.
    np.testing.assert_allclose(out.x, spread(name)[0][:3], rtol=1e-8, atol=1e-8)
    assert np.all(np.isfinite(out.x))
    for dtype in (jnp.float32, jnp.bfloat16):
        low = jax.eval_shape(lambda: run(counting.denoiser, solver, count=1, dtype=dtype).x)  # noqa: B023
        assert low.dtype == dtype


@each_solver
def test_sharded_program_has_no_communication_and_no_host(x64, name):
    samples, text = spread(name)
    for word in ("all-reduce", "all-gather", "collective-permute", "all-to-all", "callback"):
        assert word not in text, word
    assert len(samples.sharding.device_set) == 8


@each_solver
def test_samples_have_derivatives_and_a_path(x64, name):
    """By numbers of the model and by the grid, against a difference quotient."""
    solver, _ = SOLVERS[name]
    last = 0.0 if isinstance(solver, solvers.DiffusionSolver) else 1e-3
    oracle = mixture(processes.VP())

    # A draw on a grid of stock solvers is a function of its time.
    moves = 0.0 if name == "ReverseSDE" else 0.05

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def final(change):
        scaled = eqx.tree_at(lambda o: o.means, oracle, oracle.means * (1 + change))
        inside = jnp.asarray([0.8, 0.6, 0.4, 0.2, 0.1])
        inside = inside + change * moves * jnp.sin(4 * jnp.pi * inside)
        times = jnp.concatenate([jnp.ones(1), inside, jnp.full(1, last)])
        saveat = diffrax.SaveAt(t0=True, steps=True)
        out = run(scaled, solver, count=2, saveat=saveat, times=times)
        return out.x.sum(), out

    (_, out), slope = final(0.0)
    step = 1e-6
    difference = (final(step)[0][0] - final(-step)[0][0]) / (2 * step)
    np.testing.assert_allclose(slope, difference, rtol=1e-4)
    # The trajectory starts at the noise and ends at the sample.
    path = out.trajectory
    assert path.x.shape == (2, 7, 2) and np.all(np.diff(path.t) < 0)
    np.testing.assert_allclose(path.x[:, -1], out.x, rtol=1e-12)

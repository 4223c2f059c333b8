import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import mixture

import jaxdiff
from jaxdiff import guidance, parallel, processes, solvers
from jaxdiff.denoiser import Denoiser


@pytest.fixture(scope="module")
def oracle():
    return mixture(processes.VP(), jnp.float32)


def run(oracle, count=64, **options):
    options = {"times": 8, "solver": solvers.DDIM(1.0), **options}
    return jaxdiff.sample(jax.random.key(0), oracle, (2,), count, **options)


def data_sharding(devices):
    return parallel.batch_sharding(parallel.make_mesh(devices=jax.devices()[:devices]))


def test_sample_i_does_not_depend_on_the_batch(oracle):
    whole = run(oracle)
    for batch_size in (1, 7):
        np.testing.assert_allclose(run(oracle, batch_size=batch_size).x, whole.x, atol=1e-5)
    np.testing.assert_allclose(run(oracle, count=7).x, whole.x[:7], atol=1e-5)
    piece = run(oracle, count=16, first_index=40)
    np.testing.assert_allclose(piece.x, whole.x[40:56], atol=1e-5)


class Noise(solvers.DiffusionSolver):
    """Returns the noise that a step draws, and nothing else."""

    stochastic = True

    def update(self, problem, x, step):
        return jax.random.normal(step.key, x.shape, x.dtype), step.memory, 0


def test_noise_is_bitwise_the_same_in_any_batch_and_on_any_devices(oracle):
    whole = run(oracle, solver=Noise()).x
    assert abs(whole.std() - 1) < 0.2
    shardings = [{"sharding": data_sharding(devices)} for devices in (1, 2, 4, 8)]
    for options in ({"batch_size": 1}, {"batch_size": 7}, *shardings):
        np.testing.assert_array_equal(run(oracle, solver=Noise(), **options).x, whole)
    np.testing.assert_array_equal(run(oracle, solver=Noise(), count=7).x, whole[:7])


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_sample_i_does_not_depend_on_the_devices(oracle, devices):
    whole = run(oracle)
    sharding = data_sharding(devices)
    # Weights committed to one device, as a checkpoint restores them, come along.
    spread = run(jax.device_put(oracle, jax.devices()[0]), sharding=sharding)
    assert len(spread.x.sharding.device_set) == devices
    np.testing.assert_allclose(spread.x, whole.x, atol=1e-5)


def test_nothing_recompiles_when_numbers_change(oracle):
    traces = []

    class Traced(Denoiser):
        denoiser: Denoiser

        @property
        def process(self):
            return self.denoiser.process

        def __call__(self, x, t, cond=None, *, key=None):
            traces.append(1)
            return self.denoiser(x, t, cond, key=key)

    def guided(scale, weight):
        base = eqx.tree_at(lambda o: o.means, oracle, oracle.means * weight)
        return guidance.ClassifierFree(Traced(base), null_cond=2, scale=scale)

    cond = jnp.zeros(4, jnp.int32)
    first = run(guided(1.0, 1.0), count=4, cond=cond, solver=solvers.DDIM(0.5))
    count = len(traces)
    assert count > 0
    for scale, weight, eta in ((1.0, 1.0, 0.5), (3.0, 1.0, 0.5), (3.0, 2.0, 0.1), (2, 0.5, 1)):
        out = run(guided(scale, weight), count=4, cond=cond, solver=solvers.DDIM(eta))
    assert len(traces) == count
    assert not np.allclose(out.x, first.x)
    run(
        guided(1.0, 1.0),
        count=4,
        cond=cond,
        solver=solvers.DDIM(0.5),
        times=jnp.linspace(0.9, 0, 9),
    )
    assert len(traces) == count


@pytest.mark.parametrize("solver", [solvers.DDIM(), solvers.BDIA(), diffrax.Heun()])
def test_everything_works_inside_jit(oracle, solver):
    """With grids that jit knows, which are checked, and with grids that it traces."""
    times, x = jnp.linspace(0.9, 0.1, 5), jnp.asarray([[0.3, -0.2]])
    down = lambda times: jaxdiff.denoise(jax.random.key(0), oracle, x, solver=solver, times=times).x
    up = lambda times: jaxdiff.invert(oracle, x, solver=solver, times=times).x
    for fn, grid in ((down, times), (up, times[::-1])):
        np.testing.assert_allclose(
            jax.jit(lambda fn=fn, grid=grid: fn(grid))(), fn(grid), atol=1e-5
        )
        np.testing.assert_allclose(jax.jit(fn)(grid), fn(grid), atol=1e-5)
    traced = jax.jit(
        lambda oracle: jaxdiff.denoise(jax.random.key(0), oracle, x, solver=solver, times=times)
    )(oracle)
    np.testing.assert_allclose(traced.x, down(times), atol=1e-5)
    assert traced.nfe.dtype == jnp.int32
    backwards, from_zero = times[::-1], jnp.linspace(0.0, 0.9, 5)
    with pytest.raises(ValueError, match="strictly decrease"):
        jax.jit(lambda: down(backwards))()
    with pytest.raises(ValueError, match="sigma > 0"):
        jax.jit(lambda: up(from_zero))()


def test_guidance_scale_sweeps_under_vmap(oracle):
    guided = guidance.ClassifierFree(oracle, null_cond=2, scale=1.0)
    cond = jnp.ones(3, jnp.int32)

    def at(scale):
        return run(eqx.tree_at(lambda g: g.scale, guided, scale), count=3, cond=cond).x

    scales = jnp.asarray([0.0, 1.0, 2.5])
    swept = jax.vmap(at)(scales)
    for scale, x in zip(scales, swept, strict=True):
        np.testing.assert_allclose(x, at(scale), atol=1e-5)


def test_guided_sampling_counts_both_evaluations(oracle):
    guided = guidance.ClassifierFree(oracle, null_cond=2, scale=2.0)
    out = run(guided, count=2, cond=jnp.zeros(2, jnp.int32), times=6)
    assert np.all(np.asarray(out.nfe) == 12)


def test_inversion_then_sampling_returns(x64):
    oracle = mixture(processes.VP())
    x = jax.vmap(oracle.sample_data)(jax.random.split(jax.random.key(0), 16))
    times = solvers.log_snr_times(oracle.process, 400)
    latents = jaxdiff.invert(oracle, x, solver=solvers.EDMHeun(), times=times[::-1]).x
    back = jaxdiff.denoise(
        jax.random.key(0), oracle, latents, solver=solvers.EDMHeun(), times=times
    ).x
    assert np.abs(back - x).max() < 1e-3
    assert np.all(np.abs(latents.std(0) - 1) < 0.6)


def test_samplers_differentiate_in_both_modes(oracle):
    x = jnp.asarray([[0.3, -0.2]])

    def final(scale, adjoint):
        out = jaxdiff.denoise(jax.random.key(0), oracle, scale * x, times=5, adjoint=adjoint)
        return out.x.sum()

    reverse = jax.grad(final)(1.0, diffrax.RecursiveCheckpointAdjoint())
    forward = jax.jvp(lambda s: final(s, diffrax.ForwardMode()), (1.0,), (1.0,))[1]
    difference = (
        final(1.01, diffrax.DirectAdjoint()) - final(0.99, diffrax.DirectAdjoint())
    ) / 0.02
    np.testing.assert_allclose(reverse, forward, rtol=1e-4)
    np.testing.assert_allclose(reverse, difference, rtol=1e-2)


@pytest.mark.parametrize("solver", [solvers.DDIM(), solvers.UniPC(2), diffrax.Bosh3()])
def test_paths_are_in_times_and_states_of_the_process(x64, solver):
    oracle = mixture(processes.VP())
    x, times = jnp.asarray([[0.9, -0.4]]), jnp.linspace(0.9, 0.1, 6)
    run = lambda saveat, **options: jaxdiff.denoise(
        jax.random.key(0), oracle, x, solver=solver, times=times, saveat=saveat, **options
    )
    whole = run(diffrax.SaveAt(t0=True, steps=True))
    np.testing.assert_allclose(whole.trajectory.t[0], times, rtol=1e-7)
    np.testing.assert_array_equal(whole.trajectory.x[0, 0], x[0])
    for k in (2, 4):
        part = jaxdiff.denoise(jax.random.key(0), oracle, x, solver=solver, times=times[: k + 1])
        if not isinstance(solver, solvers.UniPC):  # which ends by a step of lower order
            np.testing.assert_allclose(whole.trajectory.x[0, k], part.x[0], rtol=1e-9)
    # Given times; at those of the grid, the same states; and a function of them.
    given = run(diffrax.SaveAt(ts=times[jnp.asarray([1, 3])]))
    np.testing.assert_allclose(given.trajectory.x[0], whole.trajectory.x[0, [1, 3]], rtol=1e-5)
    guess = run(diffrax.SaveAt(t1=True, fn=lambda t, x, problem: problem.x0(x, t)))
    np.testing.assert_allclose(guess.trajectory.x[0, 0], oracle(whole.x[0], times[-1]), rtol=1e-9)
    # Between them, linear for our solvers; diffrax interpolates its own.
    middle = run(diffrax.SaveAt(ts=jnp.asarray([(times[2] + times[3]) / 2])))
    if isinstance(solver, solvers.DiffusionSolver):
        mean = (whole.trajectory.x[0, 2] + whole.trajectory.x[0, 3]) / 2
        np.testing.assert_allclose(middle.trajectory.x[0, 0], mean, rtol=1e-9)


def test_paths_of_inversions_run_upwards(x64):
    oracle, times = mixture(processes.VP()), jnp.linspace(0.1, 0.9, 6)
    x = jnp.asarray([[0.9, -0.4]])
    for solver in (solvers.DDIM(), diffrax.Heun()):
        out = jaxdiff.invert(
            oracle, x, solver=solver, times=times, saveat=diffrax.SaveAt(t0=True, steps=True)
        )
        np.testing.assert_allclose(out.trajectory.t[0], times, rtol=1e-7)
        np.testing.assert_allclose(
            out.trajectory.x[0, [0, -1]], jnp.stack([x[0], out.x[0]]), rtol=1e-9
        )


def test_examples_may_have_grids_of_their_own(oracle):
    x, key = jnp.asarray([[0.9, -0.4], [0.3, 0.2]]), jax.random.key(0)
    times = jnp.stack([jnp.linspace(0.9, 0.1, 6), jnp.linspace(0.5, 0.0, 6)])
    for solver in (solvers.EDMHeun(), solvers.DPMSolverMultistep(2), solvers.Ancestral()):
        both = jaxdiff.denoise(key, oracle, x, solver=solver, times=times)
        for i in range(2):
            alone = jaxdiff.denoise(key, oracle, x, solver=solver, times=times[i])
            np.testing.assert_allclose(both.x[i], alone.x[i], atol=1e-5)
            assert both.nfe[i] == alone.nfe[i]
    with pytest.raises(ValueError, match=r"one grid per example, 2, got shape \(3, 6\)"):
        jaxdiff.denoise(key, oracle, x, times=jnp.ones((3, 6)))
    with pytest.raises(ValueError, match="strictly decrease"):
        jaxdiff.denoise(key, oracle, x, times=times.at[1, 2].set(0.9))
    with pytest.raises(ValueError, match=r"inside \[0, 1\]"):
        jaxdiff.denoise(key, oracle, x, times=times.at[0, 0].set(1.5))


def test_states_that_are_not_finite_are_named(oracle):
    x = jnp.asarray([[0.9, jnp.nan], [0.3, 0.2]])
    with pytest.raises(ValueError, match="`x` must be finite, got 1 of 4 entries"):
        jaxdiff.denoise(jax.random.key(0), oracle, x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtype_is_kept(oracle, dtype):
    assert run(oracle, count=2, dtype=dtype).x.dtype == dtype


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"times": jnp.linspace(0, 1, 5)}, ValueError, r"strictly decrease.*times\[::-1\]"),
        ({"times": jnp.asarray([1.0, 0.5, 0.5])}, ValueError, "strictly decrease"),
        ({"times": jnp.asarray([1.0, np.nan, 0.5])}, ValueError, "strictly decrease"),
        ({"times": jnp.asarray([1.5, 0.5])}, ValueError, r"inside \[0, 1\]"),
        ({"times": 0}, ValueError, "must be at least 1, got 0"),
        ({"times": jnp.asarray([1.0])}, ValueError, "at least two times"),
        ({"times": jnp.asarray([1.0, 0.0]), "solver": diffrax.Heun()}, ValueError, "sigma > 0"),
        ({"solver": diffrax.Kvaerno3()}, TypeError, "explicit diffrax ODE solver"),
        ({"cond": jnp.zeros(3, jnp.int32)}, ValueError, "leading axis"),
        ({"stepsize_controller": diffrax.PIDController(1e-3, 1e-3)}, ValueError, "stock"),
        ({"solver": solvers.UniPC(3), "times": 2}, ValueError, "order 3, got 2"),
        ({"saveat": diffrax.SaveAt(dense=True)}, ValueError, "`saveat` must name times"),
        ({"solver": diffrax.LeapfrogMidpoint()}, TypeError, "explicit diffrax ODE solver"),
        ({"solver": diffrax.ShARK()}, TypeError, r"Wrap it: ReverseSDE\(diffrax.ShARK"),
    ],
)
def test_bad_input_is_named(oracle, options, error, match):
    with pytest.raises(error, match=match):
        run(oracle, count=4, **options)


def test_bad_keys_are_named(oracle):
    with pytest.raises(TypeError, match=r"typed PRNG key.*jax.random.key"):
        jaxdiff.sample(jax.random.PRNGKey(0), oracle, (2,), 4)
    with pytest.raises(TypeError, match="single PRNG key"):
        jaxdiff.sample(jax.random.split(jax.random.key(0)), oracle, (2,), 4)
    with pytest.raises(ValueError, match="deterministic"):
        jaxdiff.invert(oracle, jnp.zeros((1, 2)), solver=solvers.Ancestral())

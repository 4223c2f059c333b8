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


class Counting(Denoiser):
    """Counts its evaluations on the host, and its traces."""

    denoiser: Denoiser
    calls: list = eqx.field(static=True, default_factory=list)

    @property
    def process(self):
        return self.denoiser.process

    def __hash__(self):
        return id(self)

    def __call__(self, x, t, cond=None, *, key=None):
        jax.debug.callback(lambda _: self.calls.append(1), t, ordered=False)
        return self.denoiser(x, t, cond, key=key)


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


def compiled(oracle, **options):
    """The optimised program of a sampler sharded over eight devices."""
    sharding = data_sharding(8)
    fn = lambda oracle: run(oracle, sharding=sharding, **options)
    return jax.jit(fn).lower(oracle).compile().as_text()


@pytest.mark.parametrize(
    "solver", [solvers.DDIM(1.0), solvers.EDMHeun(s_churn=4.0), diffrax.Heun()]
)
def test_sharded_sampler_needs_no_communication_and_no_host(oracle, solver):
    text = compiled(oracle, solver=solver)
    for word in ("all-reduce", "all-gather", "collective-permute", "all-to-all", "callback"):
        assert word not in text, word


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


@pytest.mark.parametrize(
    ("solver", "expected"),
    [
        (solvers.DDIM(), 6),
        (solvers.Ancestral(), 6),
        (solvers.EDMHeun(), 11),
        (diffrax.Euler(), 6),
        (diffrax.Heun(), 12),
        (diffrax.Tsit5(), 37),
    ],
)
def test_reported_evaluations_are_the_true_ones(oracle, solver, expected):
    counting = Counting(oracle)
    out = run(counting, count=1, times=6, solver=solver)
    jax.effects_barrier()
    assert int(out.nfe[0]) == expected == len(counting.calls)


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
        ({"times": 0}, ValueError, "at least one step"),
        ({"times": jnp.asarray([1.0])}, ValueError, "at least two times"),
        ({"times": jnp.asarray([1.0, 0.0]), "solver": diffrax.Heun()}, ValueError, "sigma > 0"),
        ({"solver": diffrax.Kvaerno3()}, TypeError, "explicit diffrax ODE solver"),
        ({"cond": jnp.zeros(3, jnp.int32)}, ValueError, "leading axis"),
        ({"stepsize_controller": diffrax.PIDController(1e-3, 1e-3)}, ValueError, "stock"),
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

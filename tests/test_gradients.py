"""Derivatives through samplers: what they hold in memory, and what they are."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import mixture
from outside import Measured, Momentum

import jaxdiff
from benchmarks import gradients
from jaxdiff import guidance, networks, parallel, processes, solvers

KEY = jax.random.key(0)


@pytest.mark.parametrize("steps", [5, 10, 20])
def test_weight_gradients_hold_what_a_checkpointed_loop_holds(steps):
    """And not one gradient of the weights for each example, which is 240 times as much.

    Of a UNet: among the slow tests.
    """
    network, shape = gradients.mlp()
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    ours, hand = (
        gradients.megabytes(gradients.gradient(fn, network, x, steps))
        for fn in (gradients.by_sampler, gradients.by_hand)
    )
    assert ours <= 1.1 * hand
    weights = 4e-6 * networks.num_params(network)
    assert ours < 2 * weights
    if steps == 20:
        last = gradients.gradient(gradients.by_sampler, network, x, steps, last_k=2)
        assert gradients.megabytes(last) < ours


def test_sharded_batches_hold_no_more_and_exchange_the_sum_alone():
    """On eight devices, each holds what a loop over its part holds."""
    network, (count, size) = gradients.mlp()
    mesh = parallel.make_mesh(devices=jax.devices())
    x = jax.device_put(jnp.ones((count, size)), parallel.batch_sharding(mesh))
    network = parallel.replicate(network, mesh)
    ours, hand = (
        gradients.gradient(fn, network, x, 5) for fn in (gradients.by_sampler, gradients.by_hand)
    )
    assert gradients.megabytes(ours) <= 1.1 * gradients.megabytes(hand)
    text = ours.as_text()
    assert "all-to-all" not in text and "collective-permute" not in text
    found, expected = ours(network, x), hand(network, x)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize(
    "solver",
    [solvers.DDIM(0.5), solvers.UniPC(2), solvers.EDMHeun(), diffrax.Heun()],
)
def test_derivatives_by_start_condition_measurement_scale_and_times(x64, solver):
    """All at once, against difference quotients, in reverse and forward; examples stay apart."""
    oracle, count = mixture(processes.VP()), 3
    start = {
        "x": jax.random.normal(KEY, (count, 2)),
        "y": jnp.linspace(-0.5, 0.5, 2 * count).reshape(count, 2),
        "scale": jnp.asarray(1.7),
        "inside": jnp.asarray([0.7, 0.45, 0.2]),
        "means": oracle.means,
    }
    last = 1e-3 if isinstance(solver, diffrax.Heun) else 0.0

    def final(given, adjoint=None):
        known = eqx.tree_at(lambda o: o.means, oracle, given["means"])
        guided = guidance.ClassifierFree(Measured(known, std=0.5), 2, given["scale"])
        cond = {"label": jnp.arange(count) % 2, "y": given["y"], "mask": jnp.ones((count, 2))}
        times = jnp.concatenate([jnp.ones(1), given["inside"], jnp.full(1, last)])
        out = jaxdiff.denoise(
            KEY, guided, given["x"], cond=cond, solver=solver, times=times, adjoint=adjoint
        )
        return jnp.sum(jnp.sin(out.x), axis=1)

    rows = jax.jit(jax.jacrev(final))(start)
    # Example i moves by its own start and measurement alone.
    for name in ("x", "y"):
        others = rows[name][~np.eye(count, dtype=bool)]
        np.testing.assert_array_equal(others, 0)
        assert np.abs(rows[name][np.eye(count, dtype=bool)]).min() > 0
    leaves, structure = jax.tree.flatten(start)
    directions = [jax.random.normal(jax.random.key(i), leaf.shape) for i, leaf in enumerate(leaves)]
    directions = jax.tree.unflatten(structure, directions)
    compiled, step = jax.jit(final), 1e-6
    for name in start:
        zero = {k: jnp.zeros_like(v) for k, v in start.items()}
        direction = zero | {name: directions[name]}
        shifted = [
            compiled(jax.tree.map(lambda a, d: a + sign * step * d, start, direction))  # noqa: B023
            for sign in (1, -1)
        ]
        expected = (shifted[0] - shifted[1]) / (2 * step)
        axes = rows[name].ndim - 1
        found = jnp.tensordot(rows[name], directions[name], axes)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    forward = jax.jvp(lambda s: final(s, diffrax.ForwardMode()), (start,), (directions,))[1]
    total = sum(jnp.tensordot(rows[name], directions[name], rows[name].ndim - 1) for name in start)
    np.testing.assert_allclose(forward, total, rtol=1e-7)


@pytest.mark.parametrize("solver", [solvers.DDIM(1.0), solvers.UniPC(2), diffrax.Bosh3()])
def test_the_last_steps_alone(x64, solver):
    """The gradient is that of a run whose first part is a constant; the samples are the same."""
    own = isinstance(solver, solvers.DiffusionSolver)
    oracle = mixture(processes.VP())
    denoiser = Momentum(oracle) if own else guidance.ClassifierFree(oracle, 2, 1.5)
    times = jnp.linspace(0.9, 0.1, 7)
    cond = {"cond": jnp.asarray([0, 1, 1])}

    def final(means, **options):
        moved = eqx.tree_at(lambda o: o.means, oracle, means)
        known = eqx.tree_at(lambda d: d.base, denoiser, moved)
        run = dict(solver=solver, times=times, **cond) | options
        return jaxdiff.sample(KEY, known, (2,), 3, **run)

    @jax.jit
    def both(means):
        grads = [jax.grad(lambda m, k=k: final(m, last_k=k).x.sum())(means) for k in (None, 6, 2)]
        return grads, [final(means, last_k=k) for k in (None, 2)]

    grads, outs = both(oracle.means)
    np.testing.assert_allclose(outs[1].x, outs[0].x, rtol=1e-12)
    np.testing.assert_array_equal(outs[1].nfe, outs[0].nfe)
    np.testing.assert_allclose(grads[1], grads[0], rtol=1e-10)
    assert not np.allclose(grads[2], grads[0], rtol=1e-3)
    if isinstance(solver, solvers.DDIM):
        # A run in two pieces, of which the first is a constant.
        first = final(oracle.means, times=times[:5])

        def rest(means):
            known = eqx.tree_at(
                lambda d: d.base, denoiser, eqx.tree_at(lambda o: o.means, oracle, means)
            )
            return jaxdiff.denoise(
                KEY, known, first.x, notes=first.notes, first_step=4, solver=solver,
                times=times[4:], **cond,
            ).x.sum()  # fmt: skip

        np.testing.assert_allclose(grads[2], jax.jit(jax.grad(rest))(oracle.means), rtol=1e-8)


def test_last_steps_that_make_no_sense_are_refused():
    oracle = mixture(processes.VP(), jnp.float32)
    run = lambda **options: jaxdiff.sample(KEY, oracle, (2,), 2, times=5, **options)
    with pytest.raises(ValueError, match="`last_k` must be at least 1"):
        run(last_k=0)
    with pytest.raises(ValueError, match="`last_k` must be at most the number of steps 5, got 6"):
        run(last_k=6)
    with pytest.raises(ValueError, match="`last_k` needs a fixed grid and no `saveat`"):
        run(last_k=2, saveat=diffrax.SaveAt(t1=True))


def test_gradients_of_the_schedule_are_finite_to_the_end(x64):
    """Where sigma is 0 at the last time and stays so."""
    for process in (processes.VP(), processes.Cosine(offset=0.008), processes.TrigFlow()):
        oracle = mixture(process)
        arrays, rest = eqx.partition(oracle, eqx.is_inexact_array_like)
        arrays = jax.tree.map(jnp.asarray, arrays)

        def final(arrays):
            return jaxdiff.sample(KEY, eqx.combine(arrays, rest), (2,), 2, times=4).x.sum()  # noqa: B023

        slopes = jax.jit(jax.grad(final))(arrays)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slopes))

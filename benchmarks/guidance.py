"""Guidance: sixteen scales in one program against sixteen runs; evaluations that are skipped."""

from collections.abc import Iterator

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import jaxdiff
from benchmarks.gradients import PROCESS, unet
from benchmarks.measure import Record, paired
from jaxdiff import guidance, predictions

STEPS, SCALES = 6, 16


def sweeps() -> Iterator[Record]:
    """Time of a sweep over the scale, and of an interval that a third of the steps are in."""
    network, (_, *shape) = unet(num_classes=10)
    base = jaxdiff.NetworkDenoiser(network, PROCESS, predictions.V())
    guided = guidance.ClassifierFree(base, null_cond=10, scale=1.0)
    count, key = 4, jax.random.key(0)
    cond = jnp.arange(count) % 10
    traces = []

    def at(guided, scale):
        traces.append(1)
        swept = eqx.tree_at(lambda g: g.scale, guided, scale)
        return jaxdiff.sample(key, swept, tuple(shape), count, cond=cond, times=STEPS).x

    scales = jnp.linspace(1.0, 8.0, SCALES)
    together, alone = jax.jit(jax.vmap(at, (None, 0))), jax.jit(at)
    label = f"UNet, {SCALES} scales by vmap"
    yield paired(
        f"{label}, time / as many runs",
        lambda: together(guided, scales),
        lambda: [alone(guided, scale) for scale in scales],
        rounds=3,
        warm=1,
    )
    yield Record.of(f"{label}, traces / 1", [len(traces) - 1], "", "ratio")

    # Decided by the level at which a step begins.
    times = PROCESS.times(STEPS, 0.0)
    levels = np.asarray(PROCESS.sigma(times) / PROCESS.alpha(times))[:-1]
    within = {"low": float(levels[4]) * 1.01, "high": float(levels[2]) * 1.01}
    limited = guidance.LimitedInterval(base, null_cond=10, scale=3.0, **within)
    count = 32
    cond = jnp.arange(count) % 10

    @jax.jit
    def draw(denoiser):
        return jaxdiff.sample(key, denoiser, tuple(shape), count, cond=cond, times=STEPS)

    assert int(draw(limited).nfe[0]) == STEPS + STEPS // 3
    yield paired(
        "UNet, guidance in a third of the steps, time / in all",
        lambda: draw(limited).x,
        lambda: draw(guided).x,
        rounds=5,
        warm=1,
    )

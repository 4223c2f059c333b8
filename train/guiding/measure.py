"""A sweep: one method at all scales and one noise, in one program; and its figures."""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import jaxdiff
from jaxdiff import solvers
from train.core.comparison import resampled_frechet
from train.core.data import DataInfo
from train.core.evaluation import figures_of
from train.guiding.recipe import PARTICLES, Method, Parts


class Swept(NamedTuple):
    """Samples of a method at several scales.

    Attributes:
        x: `(scales, count, *event)`.
        nfe: evaluations of each, `(scales, count)`.
        seconds: of one sample at one scale.
        bytes: that the program holds beside its arguments.
    """

    x: np.ndarray
    nfe: np.ndarray
    seconds: float
    bytes: int


def blocks(classes: tuple[int, ...], count: int) -> np.ndarray | None:
    """Classes in turn, as many consecutive samples of each as a population has."""
    if not classes:
        return None
    return np.resize(np.repeat(np.asarray(classes, np.int32), PARTICLES), count)


class Program:
    """A method as one compiled program, for all scales and any noise.

    Sample i has the same noise whatever the method, the scale and the size of a batch. The grid
    begins at a noise level of 80: guidance multiplies gradients by sigma^2 / alpha, and errors of
    the network's with them.

    Args:
        method: what is sampled.
        parts: of the run.
        info: of its data.
        scales: all at once.
        steps: of the solver.
        size: samples at a time of each scale, rounded up to whole populations.
    """

    def __init__(self, method: Method, parts: Parts, info: DataInfo, scales, steps: int, size: int):
        self.method, self.info, self.scales = method, info, jnp.asarray(scales, jnp.float32)
        self.size = -(-size // PARTICLES) * PARTICLES
        self.arrays, static = eqx.partition(parts, eqx.is_array)
        process = parts.model.process
        self.times = solvers.bounded_times(process, process.times(steps, 0.0))
        shown = self._cond(None if not info.classes else np.zeros(self.size, np.int32))

        def draw(arrays, scales, times, key, cond, first):
            parts = eqx.combine(arrays, static)

            def one(scale):
                denoiser = method.build(parts, scale)
                if info.pixels:  # with a derivative, for methods that differentiate through it
                    denoiser = jaxdiff.Clipped(denoiser, straight_through=True)
                out = jaxdiff.sample(
                    key, denoiser, info.event_shape, self.size, cond=cond,
                    solver=method.solver(parts, scale), times=times, first_index=first,
                )  # fmt: skip
                return out.x, out.nfe

            return jax.vmap(one)(scales)

        sizes = self.arrays, self.scales, self.times, jax.random.key(0), shown, jnp.int32(0)
        self.run = jax.jit(draw).lower(*sizes).compile()
        memory = self.run.memory_analysis()
        self.bytes = int(memory.temp_size_in_bytes + memory.output_size_in_bytes)

    def _cond(self, classes: np.ndarray | None) -> Any:
        if classes is None or self.info.num_classes is None:
            return None
        return self.method.cond(jnp.asarray(classes), self.info.num_classes)

    def __call__(self, key: jax.Array, count: int, classes: np.ndarray | None) -> Swept:
        """So many samples, of these classes."""
        starts = range(0, count, self.size)
        begun, found = time.perf_counter(), []
        for first in starts:
            rows = np.arange(first, first + self.size)
            cond = self._cond(
                None if classes is None else classes[np.minimum(rows, len(classes) - 1)]
            )
            given = self.arrays, self.scales, self.times, key, cond, jnp.int32(first)
            found.append(jax.device_get(self.run(*given)))
        seconds = (time.perf_counter() - begun) / (len(starts) * self.size * len(self.scales))
        x, nfe = (np.concatenate(part, 1)[:, :count] for part in zip(*found, strict=True))
        return Swept(np.clip(x, -1, 1) if self.info.pixels else x, nfe, seconds, self.bytes)


def figures_at(
    swept: Swept, i: int, method: Method, classes, chosen: Mapping[str, Any], reference
) -> dict[str, Any]:
    """The figures of one scale: of samples, and what they cost."""
    samples = {"x": swept.x[i]} | ({} if classes is None else {"cond": classes})
    nfe = float(swept.nfe[i].mean())
    return {
        **figures_of(chosen, samples, reference),
        "frechet_resampled": [
            round(value, 5) for value in resampled_frechet(chosen, samples, reference)
        ],
        "nfe": nfe,
        "backward": method.backward * nfe,
        "gradients": method.gradients * nfe,
        "seconds": swept.seconds,
        "bytes": swept.bytes,
    }

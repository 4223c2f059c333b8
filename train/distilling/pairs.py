"""Noise, and what the teacher's sampler makes of it: examples of their own, kept with the run."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdiff import distillation, parallel, solvers
from jaxdiff.data import ArraySource
from jaxdiff.denoiser import Denoiser
from train.core import figures
from train.core.data import DataInfo, Source
from train.core.sampling import requested


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Pairs(ArraySource):
    """Samples of the teacher with the noise they were made of, in place of the data.

    Attributes:
        noise: `(n, *event)`.
    """

    noise: Any = None

    def __getitem__(self, index: int | np.ndarray) -> dict[str, Any]:
        """See `ArraySource`."""
        return {**super().__getitem__(index), "noise": self.noise[index]}


def pairs_of(
    teacher: Denoiser, source: Source, path: Path, count: int, seed: int, steps: int = 50
) -> Pairs:
    """Pairs that the teacher makes by DPM-Solver++ in so many steps, or those of the file.

    Args:
        teacher: the denoiser.
        source: the data, whose conditions they have in turn.
        path: of the file, which is written if it is not there.
        count: of pairs.
        seed: of their noise.
        steps: of the sampler.
    """
    info = DataInfo.of(source)
    cond = requested(source, info, count)
    if not path.exists():
        made = distillation.reflow_pairs(
            jax.random.key(seed + 2), teacher, info.event_shape, count, cond=cond,
            solver=solvers.DPMSolverMultistep(), times=steps, batch_size=min(count, 500),
        )  # fmt: skip
        made = parallel.fetch(made)
        if parallel.is_first():
            path.parent.mkdir(parents=True, exist_ok=True)
            figures.write_arrays(path, x=made["x"], noise=made["noise"])
        parallel.wait_for_all("pairs")
    with np.load(path) as kept:
        x, noise = kept["x"], kept["noise"]
    own = None if cond is None else jax.tree.map(np.asarray, cond)
    return Pairs(
        np.asarray(x, np.float32), own, source.num_classes, source.class_names, source.words,
        source.pixels, noise=np.asarray(noise, np.float32),
    )  # fmt: skip

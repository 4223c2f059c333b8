"""Sample a trained run; its directory is all that is needed.

python -m train.sample runs/digits --num-samples 64 --labels 3 8 --guidance-scale 2
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxdiff import parallel
from jaxdiff.training import CheckpointStore, TrainState, init_train_state
from train import config as cfg
from train import report
from train.evaluate import draw
from train.pretrain import run


@dataclasses.dataclass(frozen=True)
class Options:
    """What to sample, and how.

    Attributes:
        run_dir: directory written by train.pretrain.
        num_samples: how many.
        labels: classes, taken in turn; none for all classes.
        guidance_scale: None for the run's own; 1 is the plain conditional model.
        solver: None for the run's own.
        sampling_steps: None for the run's own.
        batch_size: samples computed at a time; None for the run's own.
        seed: seed of the samples.
        out: file name without suffix; None for samples-<seed> in the run directory.
        data_path: where the data are, if they have moved.
    """

    run_dir: Annotated[str, tyro.conf.Positional]
    num_samples: int = 64
    labels: tuple[int, ...] = ()
    guidance_scale: float | None = None
    solver: cfg.SolverName | None = None
    sampling_steps: int | None = None
    batch_size: int | None = None
    seed: int = 0
    out: str | None = None
    data_path: str | None = None


def load_run(run_dir: str, data_path: str | None = None):
    """Configuration, training data and newest state of a run.

    Raises:
        ValueError: if the directory holds no run, or the run no checkpoint.
    """
    config = dataclasses.replace(cfg.load_config(run_dir), run_dir=run_dir)
    if data_path is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=data_path))
    source = cfg.build_source(config.data)
    template = init_train_state({"model": cfg.build_player(config, source)}, jax.random.key(0))
    restored = CheckpointStore(Path(run_dir) / "checkpoints").restore_latest(template.unpack())
    if restored is None:
        raise ValueError(f"The run in {run_dir} has no checkpoint yet. Train it first.")
    return config, source, TrainState.pack(**restored[0])


def main(options: Options) -> None:
    """Draw samples and write them as npz and as a picture."""
    config, source, state = load_run(options.run_dir, options.data_path)
    changes = {
        name: getattr(options, name)
        for name in ("guidance_scale", "solver", "sampling_steps", "batch_size")
        if getattr(options, name) is not None
    }
    settings = dataclasses.replace(config.evaluation, **changes)
    config = dataclasses.replace(config, evaluation=settings)
    count = options.num_samples
    cond = None
    if source.num_classes is not None:
        labels = np.asarray(options.labels or range(source.num_classes), np.int32)
        if labels.min() < 0 or labels.max() > source.num_classes:
            raise ValueError(
                f"`labels` must lie in [0, {source.num_classes}), or be {source.num_classes} for "
                f"none, got {labels.tolist()}."
            )
        cond = jnp.asarray(np.resize(labels, count))
    elif options.labels:
        raise ValueError("`labels` must be empty: the run has no classes.")
    denoiser = state.players["model"].averaged()
    key = jax.random.key(options.seed)
    samples, out, rate = draw(config, denoiser, source, parallel.make_mesh(), key, cond, count)

    target = Path(options.out or Path(options.run_dir) / f"samples-{options.seed}")
    arrays = {"x": samples} if cond is None else {"x": samples, "cond": np.asarray(cond)}
    np.savez(f"{target}.npz", **arrays)
    if len(source.event_shape) == 3:
        report.image_grid(samples, Path(f"{target}.png"), columns=min(count, 10))
    else:
        report.scatter(samples, source[np.arange(len(source))]["x"], Path(f"{target}.png"))
    print(
        f"{count} samples of step {int(state.step)}, {int(out.nfe[0])} evaluations each, "
        f"{rate:.1f} images/s (compilation included): {target}.npz, {target}.png"
    )


if __name__ == "__main__":
    options = tyro.cli(Options)
    sys.exit(run(lambda: main(options)))

"""Train a diffusion model on real data, sample it, and measure the samples.

    python -m train.pretrain digits
    python -m train.pretrain cifar10 --data.path PATH --network.bfloat16

The same command again goes on where the run stopped, whatever stopped it.
"""

import json
import sys
import time
from pathlib import Path

import jax
import tyro
from tqdm import tqdm

from jaxdiff import parallel
from jaxdiff.data import make_loader
from jaxdiff.training import (
    CheckpointStore,
    Hook,
    Interrupted,
    TrainState,
    fit,
    init_train_state,
    make_train_step,
    write_json,
)
from train import config as cfg
from train import report
from train.evaluate import evaluate


def main(config: cfg.Config) -> TrainState:
    """Train, or go on training, and evaluate."""
    run_dir = Path(config.run_dir)
    store = CheckpointStore(run_dir / "checkpoints", keep=config.keep_checkpoints)
    check_config(config, run_dir)
    source = cfg.build_source(config.data)
    players = {"model": cfg.build_player(config, source)}
    mesh = parallel.make_mesh()
    check_batch(config, mesh)

    state = init_train_state(players, jax.random.key(config.seed))
    if mesh.size > 1:
        state = parallel.replicate(state, mesh)
    batches = iter(make_loader(source, config.batch_size, seed=config.seed, flip=config.data.flip))
    run_dir.mkdir(parents=True, exist_ok=True)
    restored = store.restore_latest(state.unpack())
    if restored is not None:
        unpacked, data_state, _ = restored
        state = TrainState.pack(**unpacked)
        batches.set_state(data_state)
        print(f"Going on from step {int(state.step)} of {config.steps} in {run_dir}.")
    write_json(run_dir / "config.json", cfg.to_json(config))

    first = int(state.step)
    log = MetricsLog(run_dir, first, config)
    state = fit(
        make_train_step(players),
        state,
        batches,
        num_steps=config.steps,
        hooks=[Hook(config.log_every, log, before_checkpoint=True)],
        store=store,
        checkpoint_every=config.checkpoint_every,
        config=cfg.to_json(config),
        place=lambda batch: parallel.shard_batch(batch, mesh),
    )
    log.close()
    report.loss_curve(run_dir)
    evaluate(config, state, source, mesh, steps_per_second=log.rate)
    return state


def check_config(config: cfg.Config, run_dir: Path) -> None:
    """A run goes on only with the configuration it began with."""
    if not (run_dir / "config.json").exists():
        return
    stored = cfg.to_json(cfg.load_config(run_dir))
    differences = cfg.contradictions(stored, config)
    if differences:
        raise ValueError(
            f"The configuration contradicts the run in {run_dir}: {'; '.join(differences)}. Use "
            "the same values, or another --run-dir."
        )


def check_batch(config: cfg.Config, mesh: jax.sharding.Mesh) -> None:
    """Refuse a batch that the devices cannot share."""
    if config.batch_size % mesh.size:
        raise ValueError(
            f"`batch_size` must be divisible by the {mesh.size} devices, got {config.batch_size}."
        )


class MetricsLog:
    """Writes metrics as JSON lines and shows a progress bar; attribute `rate` is steps/s."""

    def __init__(self, run_dir: Path, first_step: int, config: cfg.Config):
        self.path = run_dir / "metrics.jsonl"
        self._forget_after(first_step)
        self.rate = None
        self.begun = None  # the first interval holds the compilation
        self.bar = tqdm(total=config.steps, initial=first_step, unit="step", file=sys.stderr)
        self.writer = None
        if config.tensorboard:
            from tensorboardX import SummaryWriter

            self.writer = SummaryWriter(str(run_dir / "tensorboard"))

    def _forget_after(self, step: int) -> None:
        """Drop lines of steps after the checkpoint, which will be trained again."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):
                continue  # a line cut short by a kill
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        temporary.rename(self.path)

    def __call__(self, step: int, state: TrainState, metrics: dict[str, float]) -> None:
        """Write one line."""
        now = time.perf_counter()
        if self.begun is None:
            self.begun = (step, now)
        elif step > self.begun[0]:
            self.rate = (step - self.begun[0]) / (now - self.begun[1])
        record = {"step": step, **metrics, "steps_per_second": self.rate}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self.writer is not None:
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)
        self.bar.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
        self.bar.update(step - self.bar.n)

    def close(self) -> None:
        """Finish the progress bar and the event file."""
        self.bar.close()
        if self.writer is not None:
            self.writer.close()


def run(fn) -> int:
    """Call `fn`; an error becomes one line and an exit status."""
    try:
        fn()
    except Interrupted as stop:
        print(f"\n{stop} A checkpoint is written; the same command goes on.", file=sys.stderr)
        return 128 + stop.signum
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    return 0


def cli(args: list[str] | None = None) -> int:
    """The command line: a preset and what to change of it; the exit status."""
    config = tyro.extras.overridable_config_cli(cfg.PRESETS, args=args)
    return run(lambda: main(config))


if __name__ == "__main__":
    sys.exit(cli())

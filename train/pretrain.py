"""Train a diffusion model on real data, sample it, and measure the samples.

    python -m train.pretrain digits
    python -m train.pretrain folder --data.path PATH
    python -m train.pretrain cifar10 --data.path PATH --network.bfloat16

The same command again goes on where the run stopped, whatever stopped it; so does
`python -m train.resume RUN`, without flags.
"""

import dataclasses
import sys
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import tyro

from jaxdiff import parallel
from jaxdiff._tree import jit
from jaxdiff.data import make_loader
from jaxdiff.training import (
    CheckpointStore,
    Hook,
    Player,
    TrainState,
    fit,
    init_train_state,
    load_run,
    make_train_step,
    save_model,
)
from train import config as cfg
from train import report
from train.data import DataInfo, Source, build_sources
from train.evaluate import build_solver, draw, evaluate, picture, requested
from train.runner import MetricsLog, restore_weights, run


def main(config: cfg.Config) -> TrainState:
    """Train, or go on training, and evaluate."""
    cfg.check(config)
    build_solver(config.evaluation)  # refuses options that the solver does not have
    run_dir = Path(config.run_dir)
    check_config(config, run_dir)
    source, held_out = build_sources(config.data)
    info = DataInfo.of(source)
    player = cfg.build_player(config, info)
    mesh = parallel.make_mesh()
    check_batch(config, mesh)
    loader = make_loader(source, config.batch_size, seed=config.seed, flip=config.data.flip)
    store = CheckpointStore(run_dir / "checkpoints", keep=config.keep_checkpoints)
    if config.init_from and not store.steps():
        player = begin_from(player, config.init_from)
    players = {"model": player}
    save_model(run_dir, players, **dataclasses.asdict(info))

    state = init_train_state(players, jax.random.key(config.seed))
    if mesh.size > 1:
        state = parallel.replicate(state, mesh)
    batches = iter(loader)
    restored = store.restore_latest(state.unpack())
    if restored is not None:
        unpacked, data_state, _ = restored
        state = TrainState.pack(**unpacked)
        batches.set_state(data_state)
        print(f"Going on from step {int(state.step)} of {config.steps} in {run_dir}.")
    cfg.save_config(config)

    log = MetricsLog(run_dir, int(state.step), config.steps, tensorboard=config.tensorboard)
    hooks = [Hook(config.log_every, log, before_checkpoint=True)]
    if config.sample_every:
        hooks.append(Hook(config.sample_every, Watch(config, info, held_out, mesh, log)))
    state = fit(
        make_train_step(players),
        state,
        batches,
        num_steps=config.steps,
        hooks=hooks,
        store=store,
        checkpoint_every=config.checkpoint_every,
        config=cfg.to_json(config),
        place=lambda batch: parallel.shard_batch(batch, mesh),
    )
    log.close()
    report.loss_curve(run_dir)
    model = state.players["model"].averaged(index=config.evaluation.average)
    evaluate(config, model, source, held_out, mesh, steps_per_second=log.rate)
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
            "the same values, or another --run-dir, with --init-from to begin with its weights."
        )


def check_batch(config: cfg.Config, mesh: jax.sharding.Mesh) -> None:
    """Refuse a batch that the devices cannot share."""
    if config.batch_size % mesh.size:
        raise ValueError(
            f"`batch_size` must be divisible by the {mesh.size} devices, got {config.batch_size}."
        )


def begin_from(player: Player, run_dir: str) -> Player:
    """A player whose network begins with the averaged weights of another run."""
    found = load_run(run_dir)
    network, missing, left = restore_weights(player.model.network, found.model.network)
    print(f"Beginning with the weights of step {found.step} in {run_dir}.")
    for names, what in ((missing, "begin anew"), (left, "are left out")):
        if names:
            print(f"  {len(names)} weights {what}: {', '.join(names)}")
    return eqx.tree_at(lambda p: p.model.network, player, network)


@jit
def _loss_of(loss, model, key, batch):
    return loss(model, key, batch, {})[0]


class Watch:
    """Between steps: a picture of samples, and the loss of the averaged weights on held-out data.

    The same examples, times and noise each time, so that the curve shows the model alone.
    """

    def __init__(self, config: cfg.Config, info: DataInfo, held_out: Source, mesh, log: MetricsLog):
        self.config, self.info, self.mesh, self.log = config, info, mesh, log
        chosen = np.random.default_rng(config.seed).permutation(len(held_out))
        self.batch = held_out[np.sort(chosen[: min(256, len(held_out))])]
        self.loss = cfg.build_loss(config, info)
        count = 64 if info.num_classes is None else config.evaluation.per_class * len(info.classes)
        self.cond = requested(held_out, info, count)
        self.count = count

    def __call__(self, step: int, state: TrainState, metrics: dict[str, float]) -> None:
        """Write samples/<step>.png, and one line of the log."""
        config, key = self.config, jax.random.key(self.config.seed + 1)
        model = state.players["model"].averaged(index=config.evaluation.average)
        self.log.add(step, {"held_out_loss": float(_loss_of(self.loss, model, key, self.batch))})
        out, _ = draw(config.evaluation, model, self.info, self.mesh, key, self.cond, self.count)
        folder = Path(config.run_dir) / "samples"
        folder.mkdir(exist_ok=True)
        path = folder / f"{step:08d}.png"
        picture(path, np.asarray(out.x), self.cond, self.batch["x"], config.evaluation, self.info)


def cli(args: list[str] | None = None) -> int:
    """The command line: a preset and what to change of it; the exit status."""
    config = tyro.extras.overridable_config_cli(cfg.PRESETS, args=args)
    return run(lambda: main(config))


if __name__ == "__main__":
    sys.exit(cli())

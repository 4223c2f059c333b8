"""Runs of the recipes, as their tests look at them."""

import jax

from jaxdiff.training import CheckpointStore, TrainState, init_train_state, load_run
from train import config as cfg
from train.data import DataInfo


def state_of(run_dir):
    """All that a run has written, from its directory alone."""
    info = DataInfo.from_json(load_run(run_dir).info)
    player = cfg.build_player(cfg.load_config(run_dir), info)
    template = init_train_state({"model": player}, jax.random.key(0)).unpack()
    restored = CheckpointStore(run_dir / "checkpoints").restore_latest(template)
    return TrainState.pack(**restored[0])

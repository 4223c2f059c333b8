"""Runs of the recipes, as their tests look at them."""

import jax

from jaxdiff.training import CheckpointStore, TrainState, init_train_state, load_run
from train.core.config import load_config
from train.core.data import DataInfo
from train.pretraining import recipe


def state_of(run_dir):
    """All that a run has written, from its directory alone."""
    info = DataInfo.from_json(load_run(run_dir).info)
    player = recipe.build_player(load_config(run_dir, recipe.Config), info)
    template = init_train_state({"model": player}, jax.random.key(0)).unpack()
    restored = CheckpointStore(run_dir / "checkpoints").restore_latest(template)
    return TrainState.pack(**restored[0])

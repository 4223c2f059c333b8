"""Go on with a run, without flags; or for longer, or with another evaluation.

    python -m train.resume runs/digits
    python -m train.resume runs/digits --steps 3000
    python -m train.resume runs/digits --fsdp 8

A run that becomes longer has the learning rates of the longer schedule from then on.
"""

import dataclasses
import sys
from typing import Annotated

import tyro

from train.core.config import LaunchConfig, load_config
from train.core.runner import launch, run
from train.pretrain import main
from train.pretraining.recipe import Config


@dataclasses.dataclass(frozen=True)
class Options:
    """Which run.

    Attributes:
        run_dir: directory written by train.pretrain.
        steps: how many steps it shall have; None for its own number.
        data_path: where the data are, if they have moved.
        labels_path: where an idx data set's labels are, if they have moved.
        data: devices over which batches are split; None for all that remain.
        fsdp: devices over which batches and weights are split; None as before.
        tensor: devices over which single layers are split; None as before.
        launch: the processes.
    """

    run_dir: Annotated[str, tyro.conf.Positional]
    steps: int | None = None
    data_path: str | None = None
    labels_path: str | None = None
    data: int | None = None
    fsdp: int | None = None
    tensor: int | None = None
    launch: LaunchConfig = LaunchConfig()


def resumed(options: Options) -> Config:
    """The configuration of the run, with what has changed."""
    config = load_config(options.run_dir, Config)
    moved = {
        name: value
        for name, value in (("path", options.data_path), ("labels_path", options.labels_path))
        if value is not None
    }
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **moved))
    axes = {name: getattr(options, name) for name in ("data", "fsdp", "tensor")}
    given = {name: value for name, value in axes.items() if value is not None}
    if given:  # the others' number of devices follows
        config = dataclasses.replace(
            config, mesh=dataclasses.replace(config.mesh, **{"data": None, **given})
        )
    config = dataclasses.replace(config, launch=options.launch)
    return config if options.steps is None else dataclasses.replace(config, steps=options.steps)


def cli(args: list[str] | None = None) -> int:
    """The command line; the exit status."""
    options = tyro.cli(Options, args=args)

    def start() -> None:
        config = resumed(options)
        launch(config)
        main(config)

    return run(start)


if __name__ == "__main__":
    sys.exit(cli())

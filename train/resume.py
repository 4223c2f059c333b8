"""Go on with a run, without flags; or for longer, or with another evaluation.

    python -m train.resume runs/digits
    python -m train.resume runs/digits --steps 3000

A run that becomes longer has the learning rates of the longer schedule from then on.
"""

import dataclasses
import sys
from typing import Annotated

import tyro

from train.core.config import load_config
from train.core.runner import run
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
    """

    run_dir: Annotated[str, tyro.conf.Positional]
    steps: int | None = None
    data_path: str | None = None
    labels_path: str | None = None


def resumed(options: Options) -> Config:
    """The configuration of the run, with what has changed."""
    config = load_config(options.run_dir, Config)
    moved = {
        name: value
        for name, value in (("path", options.data_path), ("labels_path", options.labels_path))
        if value is not None
    }
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **moved))
    return config if options.steps is None else dataclasses.replace(config, steps=options.steps)


def cli(args: list[str] | None = None) -> int:
    """The command line; the exit status."""
    options = tyro.cli(Options, args=args)
    return run(lambda: main(resumed(options)))


if __name__ == "__main__":
    sys.exit(cli())

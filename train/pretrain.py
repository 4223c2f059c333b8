"""Train a diffusion model on real data, sample it, and measure the samples.

    python -m train.pretrain digits
    python -m train.pretrain folder --data.path PATH
    python -m train.pretrain cifar10 --data.path PATH --network.bfloat16

The same command again goes on where the run stopped, whatever stopped it; so does
`python -m train.resume RUN`, without flags.
"""

import sys

import tyro

from jaxdiff.training import TrainState
from train.core import runner
from train.core.data import DataInfo, build_sources
from train.pretraining import recipe


def main(config: recipe.Config) -> TrainState:
    """Train, or go on training, and evaluate."""
    runner.check(config)
    source, held_out = build_sources(config.data)
    info = DataInfo.of(source)
    return runner.train(
        config,
        lambda: {"model": recipe.build_player(config, info)},
        source,
        held_out,
        sampled="model",
        held_out_loss=recipe.build_loss(config, info),
    )


def cli(args: list[str] | None = None) -> int:
    """The command line: a preset and what to change of it; the exit status."""
    config = tyro.extras.overridable_config_cli(recipe.PRESETS, args=args)

    def start() -> None:
        runner.launch(config)
        main(config)

    return runner.run(start)


if __name__ == "__main__":
    sys.exit(cli())

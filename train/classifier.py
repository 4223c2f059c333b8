"""Train the classifiers that guide a trained run, and say how good they are.

    python -m train.classifier runs/digits

One sees noisy examples and their noise label, for `ClassifierGuidance`; one clean examples, for
what looks at x0. Both are kept in RUN/guides, and `train.guide` takes them from there. Neither is
the classifier that measures samples.
"""

import dataclasses
import sys
from typing import Annotated

import tyro

from train.core import runner
from train.core.config import RunConfig, load_config
from train.core.data import build_sources
from train.core.sampling import load_model
from train.guiding.classifiers import accuracies, load_guides


@dataclasses.dataclass(frozen=True)
class Options:
    """What is trained.

    Attributes:
        run_dir: directory written by train.pretrain.
        steps: of the training of each; None for those of the run's measuring classifier.
        data_path: where the data are, if they have moved.
    """

    run_dir: Annotated[str, tyro.conf.Positional]
    steps: int | None = None
    data_path: str | None = None


def prepared(run_dir: str, steps: int | None, data_path: str | None) -> RunConfig:
    """The configuration of a run, with other steps of classifiers, and the data's new place.

    Raises:
        ValueError: for fewer than one step.
    """
    config = load_config(run_dir, RunConfig)
    evaluation = config.evaluation
    steps = evaluation.classifier_steps if steps is None else steps
    if steps < 1:
        raise ValueError(f"`steps` of classifiers must be at least 1, got {steps}.")
    changed = dataclasses.replace(config, evaluation=dataclasses.replace(
        evaluation, classifier_steps=steps
    ))  # fmt: skip
    if data_path is None:
        return changed
    return dataclasses.replace(changed, data=dataclasses.replace(config.data, path=data_path))


def main(options: Options) -> dict[str, float]:
    """Train what is missing, and print accuracies on held-out data."""
    config = prepared(options.run_dir, options.steps, options.data_path)
    source, held_out = build_sources(config.data)
    guides = load_guides(config, load_model(config).model, source)
    found = accuracies(guides, held_out, config.seed)
    runner.say("\n".join(f"{name}: {value:.1%}" for name, value in found.items()))
    return found


def cli(args: list[str] | None = None) -> int:
    """The command line; the exit status."""
    options = tyro.cli(Options, args=args)
    return runner.run(lambda: main(options))


if __name__ == "__main__":
    sys.exit(cli())

"""Sample a trained run and measure the samples against held-out real data.

    python -m train.evaluate runs/digits --solver unipc --sampling-steps 10

measures a finished run again, with other samplers, and writes beside the first figures.
"""

import dataclasses
import sys

import tyro

from jaxdiff import parallel
from train.core.config import MetricName, RunConfig, load_config
from train.core.data import DataInfo, build_sources
from train.core.evaluation import check_metrics, evaluate
from train.core.runner import run
from train.core.sampling import SamplingOptions, changed, load_model
from train.core.sampling import guided as guided


@dataclasses.dataclass(frozen=True)
class Options(SamplingOptions):
    """What to measure again; None for what the run's own evaluation does.

    Attributes:
        num_samples: samples measured.
        metrics: what is measured; none for the run's own.
        classifier_steps: training steps of the classifier that measures images of classes, 0 for
            none.
        name: of the figures, evaluation-<name>.json; None for the solver and its steps.
        data_path: where the data are, if they have moved.
    """

    num_samples: int | None = None
    metrics: tuple[MetricName, ...] | None = None
    classifier_steps: int | None = None
    name: str | None = None
    data_path: str | None = None


def main(options: Options) -> dict[str, float]:
    """Measure a run again."""
    if options.name is not None and (not options.name or "/" in options.name):
        raise ValueError(f"`name` must be part of a file's name, got {options.name!r}.")
    config = changed(load_config(options.run_dir, RunConfig), options)
    if options.data_path is not None:
        moved = dataclasses.replace(config.data, path=options.data_path)
        config = dataclasses.replace(config, data=moved)
    try:
        source, held_out = build_sources(config.data)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} If the data have moved, pass --data-path.") from None
    settings = config.evaluation
    check_metrics(DataInfo.of(source), settings, len(held_out))
    model = load_model(config).model
    name = options.name or f"{settings.solver}-{settings.sampling_steps}"
    return evaluate(config, model, source, held_out, parallel.make_mesh(), name=f"-{name}")


def cli(args: list[str] | None = None) -> int:
    """The command line; the exit status."""
    options = tyro.cli(Options, args=args)
    return run(lambda: main(options))


if __name__ == "__main__":
    sys.exit(cli())

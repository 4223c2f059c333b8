"""Sample a trained run and measure the samples against held-out real data.

    python -m train.evaluate runs/digits --solver unipc --sampling-steps 10
    python -m train.evaluate runs/digits --samples my-images --metrics frechet kid coverage

measures a finished run again, with other samplers, and writes beside the first figures; or images
of any origin, in a folder with one folder for each class or in an npz file.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from jaxdiff import data, networks, parallel
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
        samples: images to measure in place of the run's, a folder or an npz file.
        inception: file of InceptionV3's weights, whose features are compared then: FID and KID as
            the field has them; see `jaxdiff.networks.load_inception`.
    """

    num_samples: int | None = None
    metrics: tuple[MetricName, ...] | None = None
    classifier_steps: int | None = None
    name: str | None = None
    data_path: str | None = None
    samples: str | None = None
    inception: str | None = None


def read_samples(path: str, info: DataInfo) -> dict[str, Any]:
    """Images of any origin, of the form of the run's data.

    Raises:
        ValueError: for another shape, or classes that are none of the run's.
    """
    there = data.npz(path) if path.endswith(".npz") else data.image_folder(path)
    if there.event_shape != info.event_shape:
        raise ValueError(
            f"`samples` must be of the shape of the run's data, {info.event_shape}, got "
            f"{there.event_shape}."
        )
    found = dict(there[np.arange(len(there))])
    if info.num_classes and not info.cond and "cond" not in found:
        raise ValueError(
            "`samples` must say which class each image is to show, in folders or as `cond`, for "
            f"data of {info.num_classes} classes."
        )
    if info.num_classes and not info.cond and there.class_names:  # by name, in the run's order
        order = {info.name_of(i): i for i in range(info.num_classes)}
        if strange := [name for name in there.class_names if name not in order]:
            raise ValueError(
                f"`samples` must have folders named as the classes, {list(order)}, got "
                f"{strange[0]!r}."
            )
        ranks = np.array([order[name] for name in there.class_names])
        found["cond"] = ranks[np.asarray(found["cond"])].astype(np.int32)
    if info.num_classes and not info.cond and np.max(found["cond"]) >= info.num_classes:
        raise ValueError(
            f"`samples` must have labels below {info.num_classes}, got {np.max(found['cond'])}."
        )
    return found


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
    samples, info = None, DataInfo.of(source)
    if options.samples is not None:
        samples = read_samples(options.samples, info)
        counted = dataclasses.replace(config.evaluation, num_samples=len(samples["x"]))
        config = dataclasses.replace(config, evaluation=counted)
    settings, inception = config.evaluation, None
    if options.inception is not None:
        if len(info.event_shape) != 3 or info.event_shape[-1] not in (1, 3):
            raise ValueError(
                f"`inception` sees images, grey or in colour, got data of {info.event_shape}."
            )
        inception = networks.load_inception(options.inception)
    check_metrics(info, settings, len(held_out))
    model = load_model(config, options.adapter).model
    name = options.name or f"{settings.solver}-{settings.sampling_steps}"
    if samples is not None:
        name = options.name or Path(str(options.samples)).stem
    return evaluate(
        config, model, source, held_out, parallel.make_mesh(), name=f"-{name}", samples=samples,
        inception=inception,
    )  # fmt: skip


def cli(args: list[str] | None = None) -> int:
    """The command line; the exit status."""
    options = tyro.cli(Options, args=args)
    return run(lambda: main(options))


if __name__ == "__main__":
    sys.exit(cli())

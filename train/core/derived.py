"""Runs that are made of another run: its data and network, and what suits the data."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxdiff.denoiser import NetworkDenoiser
from train.core.config import (
    DataConfig,
    EvaluationConfig,
    RunConfig,
    SamplingConfig,
    load_config,
)

SIZES = ("steps", "batch_size", "learning_rate")
# What a command has under the names of the configuration.
SHARED = ("grad_clip", "ema_decay", "sample_every", "checkpoint_every", "mesh", "launch")


@dataclasses.dataclass(frozen=True)
class DerivedConfig(RunConfig):
    """A run that is made of another one.

    Attributes:
        base: directory of the other.
    """

    base: str = ""

    @property
    def shared_dir(self) -> Path:
        """Classifiers are the base run's, for all that are made of it."""
        return Path(self.base)


def check_denoising(base: Any) -> None:
    """Refuse a base that is no denoiser with a network, such as a student of one step.

    Raises:
        ValueError: for it.
    """
    if not isinstance(base, NetworkDenoiser):
        raise ValueError(
            f"`base` must be a run of train.pretrain, or of a denoiser, got {type(base).__name__}. "
            "Pass the run that it was made of."
        )


def data_of(there: RunConfig, path: str | None) -> DataConfig:
    """The data of a run, which may have moved."""
    return there.data if path is None else dataclasses.replace(there.data, path=path)


def derived(
    options: Any, presets: Mapping[str, tuple[int, int, float]], *, folder: str, warmup: int
) -> dict[str, Any]:
    """Fields of the configuration that a command's options, and their base, have in common.

    Args:
        options: of the command; None where what suits the data is wanted.
        presets: steps, batch size and rate by the name of the data.
        folder: in the base's directory, where no other is asked for.
        warmup: steps at most.
    """
    there = load_config(options.base, RunConfig)
    data = data_of(there, options.data_path)
    preset = presets.get(data.name, presets["cifar10" if data.name == "folder" else "toy"])
    sizes = dict(zip(SIZES, preset, strict=True))
    given = {name: getattr(options, name) for name in SIZES}
    sizes |= {name: value for name, value in given.items() if value is not None}
    return {
        "base": options.base,
        "run_dir": options.run_dir or str(Path(options.base) / folder),
        "data": data,
        "network": there.network,
        "warmup_steps": max(min(warmup, sizes["steps"] - 1), 0),
        "seed": there.seed if options.seed is None else options.seed,
        "log_every": 20,
        **sizes,
        **{name: getattr(options, name) for name in SHARED},
    }


def evaluated(base: str, sampling: SamplingConfig, num_samples: int) -> EvaluationConfig:
    """The evaluation of a base, by another sampler, and by its classifier if it has none."""
    there = load_config(base, RunConfig).evaluation
    return dataclasses.replace(
        there,
        **{f.name: getattr(sampling, f.name) for f in dataclasses.fields(SamplingConfig)},
        num_samples=num_samples,
        classifier_steps=there.classifier_steps or EvaluationConfig.classifier_steps,
    )


def chosen_of(kind: type, options: Any) -> Any:
    """The part of a configuration whose fields the options have by the same names."""
    return kind(**{f.name: getattr(options, f.name) for f in dataclasses.fields(kind)})

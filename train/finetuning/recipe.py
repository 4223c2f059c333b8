"""MMD fine-tuning of a pretrained run: configuration, and what is built from it."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import finetuning, metrics
from jaxdiff.denoiser import Denoiser
from jaxdiff.training import Player
from train.core.building import build_average, build_optimizer
from train.core.classifiers import load_classifier
from train.core.config import EvaluationConfig, RunConfig, SamplingConfig, SolverName, load_config
from train.core.data import DataInfo, Source
from train.core.derived import DerivedConfig
from train.core.evaluation import classifiable, features_by
from train.core.sampling import build_solver, build_times, guided, load_model


@dataclasses.dataclass(frozen=True)
class MMDConfig:
    """How the few-step sampler is matched to the data.

    Attributes:
        solver: what is tuned, and sampled with afterwards.
        sampling_steps: its steps.
        guidance_scale: at which it is tuned and sampled; 1 is the plain conditional model.
        features: of a small classifier that is trained for it, which is another than the one that
            measures; or the pixels themselves; "auto" takes pixels for data without classes.
        kernel: on features; "rbf" has the median distance of the data's as its bandwidth.
        statistic: "u" is unbiased, "v" is not.
        reference: training examples that samples are compared with, chosen once; 0 compares with
            those of each batch.
        by_class: match within each class.
        last_k: differentiate through the last steps alone; None for all.
        micro_batch: samples drawn at a time; None for all.
        rank: of an adapter; 0 tunes all weights.
    """

    solver: SolverName = "ddim"
    sampling_steps: int = 5
    guidance_scale: float = 1.0
    features: Literal["auto", "classifier", "pixels"] = "auto"
    kernel: Literal["poly1", "poly2", "poly3", "rbf", "energy"] = "energy"
    statistic: Literal["u", "v"] = "u"
    reference: int = 4096
    by_class: bool = False
    last_k: int | None = None
    micro_batch: int | None = None
    rank: int = 0


@dataclasses.dataclass(frozen=True)
class Config(DerivedConfig):
    """A tuned run.

    Attributes:
        mmd: how.
    """

    mmd: MMDConfig = MMDConfig()

    def check(self) -> None:
        """Refuse numbers that make no run, before any work."""
        super().check()
        mmd = self.mmd
        for name, least in (
            *(("sampling_steps", 1), ("rank", 0), ("last_k", 1), ("micro_batch", 1)),
            ("reference", 0),
        ):
            value = getattr(mmd, name)
            if value is not None and value < least:
                raise ValueError(f"`mmd.{name}` must be at least {least}, got {value}.")
        if mmd.last_k is not None and mmd.last_k > mmd.sampling_steps:
            raise ValueError(
                f"`mmd.last_k` must be at most `mmd.sampling_steps`, {mmd.sampling_steps}, got "
                f"{mmd.last_k}."
            )
        if mmd.micro_batch is not None and self.batch_size % mmd.micro_batch:
            raise ValueError(
                f"`mmd.micro_batch` must divide `batch_size`, {self.batch_size}, got "
                f"{mmd.micro_batch}."
            )
        if mmd.by_class and (mmd.statistic != "u" or mmd.reference):
            raise ValueError(
                "`mmd.by_class` goes with `mmd.statistic` u and `mmd.reference` 0, got "
                f"{mmd.statistic} and {mmd.reference}."
            )


def configure(base: str, **changes: Any) -> Config:
    """The configuration that tunes a run: its data, network and evaluation, and what has changed.

    Args:
        base: directory of the run.
        **changes: fields of `Config`.
    """
    there = load_config(base, RunConfig)
    mmd = changes.pop("mmd", MMDConfig())
    changes.setdefault("run_dir", str(Path(base) / "mmd"))
    evaluation = dataclasses.replace(
        there.evaluation, solver=mmd.solver, sampling_steps=mmd.sampling_steps, order=None,
        eta=None, churn=None, times=None, average=0, ema_width=None,
        guidance_scale=mmd.guidance_scale,
        classifier_steps=there.evaluation.classifier_steps or EvaluationConfig.classifier_steps,
        **changes.pop("evaluation", {}),
    )  # fmt: skip
    kept = {"data": there.data, "network": there.network}
    return Config(base=base, mmd=mmd, evaluation=evaluation, **{**kept, **changes})


def sampling_of(mmd: MMDConfig) -> SamplingConfig:
    """What is tuned, as settings of a sampler."""
    return SamplingConfig(
        solver=mmd.solver, sampling_steps=mmd.sampling_steps, guidance_scale=mmd.guidance_scale
    )


def load_base(config: Config) -> Denoiser:
    """The denoiser that is tuned, with its averaged weights."""
    return load_model(load_config(config.base, RunConfig)).model


class Sampled:
    """What is sampled from a denoiser: the map of the recipes, whose clip hides no gradient.

    A class, because a function of the data's description could not be compared with another.
    """

    def __init__(self, info: DataInfo, scale: float):
        self.info, self.scale = info, scale

    def __call__(self, denoiser: Denoiser) -> Denoiser:
        """Guided and clipped."""
        return guided(denoiser, self.info, self.scale, straight_through=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sampled) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((Sampled, self.scale))


def build_features(config: Config, source: Source, mesh) -> Any:
    """What the loss looks at: another classifier than the one that measures, or pixels.

    Raises:
        ValueError: for data that do not go with what was asked for.
    """
    info, mmd = DataInfo.of(source), config.mmd
    if mmd.by_class and (info.cond or not info.num_classes):
        raise ValueError("`mmd.by_class` needs data whose condition is a class.")
    if mmd.features == "classifier" and not classifiable(info):
        raise ValueError(
            "`mmd.features` classifier needs images of classes, of even height and width, got data "
            f"of {info.event_shape}. Pass pixels."
        )
    if mmd.features == "pixels" or not classifiable(info):
        return features_by(None)
    return features_by(
        load_classifier(
            config, source, mesh, name="features", seed=config.seed + 1000, channels=24, features=48
        )
    )


def build_loss(config: Config, denoiser: Denoiser, source: Source, features: Any, reference: int):
    """The loss on samples of the configured sampler, against so many examples or the batch's."""
    mmd, info = config.mmd, DataInfo.of(source)
    settings = sampling_of(mmd)
    rows = np.random.default_rng(config.seed).permutation(len(source))[: max(reference, 512)]
    examples = source[np.sort(rows)]
    known = jnp.asarray(metrics.features_of(features, examples["x"]))
    kernel = {
        "poly1": lambda: metrics.Polynomial(1),
        "poly2": lambda: metrics.Polynomial(2),
        "poly3": lambda: metrics.Polynomial(3),
        "rbf": lambda: metrics.RBF(metrics.median_bandwidth(known[:256], known[256:512])),
        "energy": lambda: metrics.Energy(),
    }[mmd.kernel]()
    unbiased = mmd.statistic == "u"
    against: dict[str, Any] = {"kernel": kernel}
    if reference and unbiased and info.num_classes and not info.cond:
        # In the proportions of the batch's classes, which are then no noise.
        labels = jnp.asarray(examples["cond"])
        against = {
            "reference": metrics.class_embedding(
                known, labels, kernel, num_classes=info.num_classes
            )
        }
    elif reference:
        against = {"reference": metrics.sample_embedding(known, kernel)}
    return finetuning.MMDLoss(
        build_solver(settings),
        build_times(settings, denoiser.process),
        last_k=mmd.last_k,
        sampled=Sampled(info, mmd.guidance_scale),
        clip=finetuning.straight_through_clip if info.pixels else None,
        micro_batch=mmd.micro_batch,
        features=features,
        **against,
        unbiased=unbiased,
        num_classes=info.num_classes if mmd.by_class else None,
    )


def build_player(config: Config, denoiser: Denoiser, loss: Any) -> Player:
    """The model that learns: all weights of the denoiser, or an adapter of them."""
    optimizer, average = build_optimizer(config), build_average(config)
    if not config.mmd.rank:
        return Player(denoiser, loss, optimizer, average)
    key = jax.random.key(config.seed)
    adapter = finetuning.make_adapter(denoiser.network, key, rank=config.mmd.rank)
    model = finetuning.adapt(denoiser, adapter)
    return Player(model, loss, optimizer, average, trainable=finetuning.adapter_weights)

"""Configurations of training runs: a dataclass, presets, and what is built from them."""

import dataclasses
import json
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import optax
from flax import nnx

from jaxdiff import losses, networks, predictions, processes
from jaxdiff.denoiser import LogNoiseLabel, NetworkDenoiser, TimeLabel
from jaxdiff.training import ConstantEMA, Player, PowerEMA, write_json
from train.data import DataConfig, DataInfo
from train.data import build_source as build_source
from train.data import build_sources as build_sources


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """The network.

    Attributes:
        kind: unet and dit take images, mlp vectors.
        channels: base width of a unet, width of the others.
        channel_mults: widths of a unet's levels.
        num_res_blocks: residual blocks per level of a unet.
        attention_resolutions: image sizes at which a unet attends.
        depth: blocks of a dit or mlp.
        num_heads: attention heads.
        patch_size: of a dit.
        dropout: dropout rate.
        scale_shift: modulate norms by the embedding (unet).
        bfloat16: compute in bfloat16; weights stay float32.
        remat: recompute blocks in the backward pass, to save memory.
    """

    kind: Literal["unet", "dit", "mlp"] = "unet"
    channels: int = 32
    channel_mults: tuple[int, ...] = (1, 2)
    num_res_blocks: int = 1
    attention_resolutions: tuple[int, ...] = (4,)
    depth: int = 6
    num_heads: int = 1
    patch_size: int = 2
    dropout: float = 0.0
    scale_shift: bool = True
    bfloat16: bool = False
    remat: bool = False


SolverName = Literal[
    *("ddim", "ancestral", "heun", "euler", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "deis"),
    *("sa_solver", "seeds"),
]


TimesName = Literal["uniform", "log_snr", "karras", "polyexponential", "quadratic"]


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Sampling and measuring; may change when a run is resumed.

    Attributes:
        num_samples: samples measured.
        per_class: samples of each class in the picture.
        guidance_scale: 1 is the plain conditional model.
        solver: see `train.sampling`.
        sampling_steps: steps of the solver.
        times: the grid of steps; None for the one customary for the process and the solver.
        order: of the solver; None for its own.
        eta: noise that the solver adds; None for its own.
        churn: noise that "heun" adds, over all steps.
        average: which average of the weights, counted from 0.
        batch_size: samples computed at a time.
        classifier_steps: training steps of the classifier that measures images of classes, 0 for
            none.
    """

    num_samples: int = 1000
    per_class: int = 10
    guidance_scale: float = 1.5
    solver: SolverName = "ddim"
    sampling_steps: int = 25
    times: TimesName | None = None
    order: int | None = None
    eta: float | None = None
    churn: float | None = None
    average: int = 0
    batch_size: int = 250
    classifier_steps: int = 1200


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run.

    Attributes:
        run_dir: where everything is written.
        data: the data set.
        network: the network.
        evaluation: sampling and measuring at the end.
        process: forward process.
        prediction: what the network predicts.
        weighting: of the loss; "uniform" weights the prediction's own error by 1.
        time_law: law of the training time.
        sigma_data: standard deviation of the data, for EDM's preconditioning.
        label_dropout: probability of training without the label.
        steps: training steps.
        batch_size: global batch size.
        learning_rate: peak of a schedule that rises linearly and falls as a cosine.
        warmup_steps: length of the rise.
        grad_clip: largest norm of the gradient.
        accumulate: micro-batches per update.
        ema: how weights are averaged: with a constant decay, or by power functions of several
            widths, from which any other is made afterwards.
        ema_decay: decay of the constant average.
        ema_widths: relative widths of the power functions.
        init_from: directory of a run whose weights this one begins with, where names and shapes
            are the same.
        seed: seed of everything.
        log_every: steps between logged metrics; may change when a run is resumed.
        sample_every: steps between pictures of samples and the loss on held-out data, 0 for none;
            may change when a run is resumed.
        checkpoint_every: steps between checkpoints; may change when a run is resumed.
        keep_checkpoints: how many are kept; may change when a run is resumed.
        tensorboard: write TensorBoard events too; may change when a run is resumed.
    """

    run_dir: str = "runs/digits"
    data: DataConfig = DataConfig()
    network: NetworkConfig = NetworkConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    process: Literal["vp", "cosine", "subvp", "ve", "edm", "rectified_flow", "trigflow"] = "cosine"
    prediction: Literal["x0", "eps", "v", "velocity", "f"] = "v"
    weighting: Literal["uniform", "min_snr", "truncated_snr", "p2", "sigmoid", "elbo"] = "uniform"
    time_law: Literal["uniform", "log_normal", "logit_normal"] = "uniform"
    sigma_data: float = 0.5
    label_dropout: float = 0.1
    steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    grad_clip: float = 1.0
    accumulate: int = 1
    ema: Literal["constant", "power"] = "constant"
    ema_decay: float = 0.995
    ema_widths: tuple[float, ...] = (0.05, 0.10)
    init_from: str = ""
    seed: int = 0
    log_every: int = 20
    sample_every: int = 0
    checkpoint_every: int = 250
    keep_checkpoints: int = 3
    tensorboard: bool = False


PRESETS = {
    "digits": ("8x8 digits of scikit-learn, class-conditional", Config()),
    "cifar10": (
        "CIFAR-10 with DDPM's 35.7M UNet; set --data.path",
        Config(
            run_dir="runs/cifar10",
            data=DataConfig("cifar10", flip=True),
            network=NetworkConfig(
                channels=128,
                channel_mults=(1, 2, 2, 2),
                num_res_blocks=2,
                attention_resolutions=(16,),
                dropout=0.1,
                scale_shift=False,
            ),
            evaluation=EvaluationConfig(num_samples=5000, sampling_steps=50),
            process="vp",
            prediction="eps",
            steps=200_000,
            batch_size=128,
            learning_rate=2e-4,
            warmup_steps=5000,
            ema_decay=0.9999,
            log_every=50,
            checkpoint_every=5000,
        ),
    ),
    "mnist": (
        "MNIST, averaged to 14x14, class-conditional; set --data.path",
        Config(
            run_dir="runs/mnist",
            data=DataConfig("mnist", resize=14),
            network=NetworkConfig(attention_resolutions=(7,)),
            steps=4000,
            batch_size=128,
            ema_decay=0.999,
            checkpoint_every=500,
        ),
    ),
    "folder": (
        "a folder of images, one sub-folder per class; set --data.path",
        Config(
            run_dir="runs/folder",
            data=DataConfig("folder", resize=32, mode="rgb", flip=True),
            network=NetworkConfig(
                channels=64, channel_mults=(1, 2, 2), attention_resolutions=(8,), num_res_blocks=2
            ),
            evaluation=EvaluationConfig(num_samples=200, per_class=8, sampling_steps=50),
            steps=20_000,
            ema_decay=0.999,
            log_every=50,
            checkpoint_every=1000,
        ),
    ),
    "prompts": (
        "digits in colours, sizes and places, with captions",
        Config(
            run_dir="runs/prompts",
            data=DataConfig("prompts"),
            network=NetworkConfig(attention_resolutions=(12,), channel_mults=(1, 2)),
            evaluation=EvaluationConfig(num_samples=500, guidance_scale=2.0),
            steps=4000,
            ema_decay=0.999,
            checkpoint_every=500,
        ),
    ),
    "toy2d": (
        "densities in the plane with an MLP",
        Config(
            run_dir="runs/toy2d",
            data=DataConfig("two_moons"),
            network=NetworkConfig(kind="mlp", channels=128, depth=3),
            evaluation=EvaluationConfig(num_samples=4000, batch_size=4000, guidance_scale=1.0),
            process="rectified_flow",
            prediction="velocity",
            steps=3000,
            batch_size=256,
            ema_decay=0.999,
            log_every=100,
            checkpoint_every=1000,
        ),
    ),
}

FREE_FIELDS = (
    "run_dir",
    "evaluation",
    "log_every",
    "sample_every",
    "checkpoint_every",
    "keep_checkpoints",
    "tensorboard",
)
"""Fields that do not change what is trained, and so may differ when a run is resumed."""


# What older versions called fields of the data.
_RENAMED = {"size": "resize", "gray": "mode"}
# Values that must be at least so large.
_LEAST = {
    **dict.fromkeys(("steps", "batch_size", "accumulate", "log_every", "checkpoint_every"), 1),
    **dict.fromkeys(("keep_checkpoints", "network.channels", "network.depth"), 1),
    **dict.fromkeys(("network.num_res_blocks", "network.num_heads", "network.patch_size"), 1),
    **dict.fromkeys(("evaluation.num_samples", "evaluation.per_class"), 1),
    **dict.fromkeys(("evaluation.sampling_steps", "evaluation.batch_size"), 1),
    **dict.fromkeys(("warmup_steps", "sample_every", "seed", "evaluation.classifier_steps"), 0),
    **dict.fromkeys(("evaluation.average", "evaluation.guidance_scale", "label_dropout"), 0),
}
_POSITIVE = ("learning_rate", "grad_clip", "sigma_data")


def check(config: Config) -> None:
    """Refuse numbers that make no run, before any work.

    Raises:
        ValueError: naming the first field.
    """

    def value(name):
        part: Any = config
        for piece in name.split("."):
            part = getattr(part, piece)
        return part

    for name, least in _LEAST.items():
        if not value(name) >= least:
            raise ValueError(f"`{name}` must be at least {least}, got {value(name)}.")
    for name in _POSITIVE:
        if not 0 < value(name) < float("inf"):
            raise ValueError(f"`{name}` must be positive and finite, got {value(name)}.")
    if config.label_dropout >= 1:
        raise ValueError(f"`label_dropout` must be below 1, got {config.label_dropout}.")
    if config.evaluation.average and config.ema == "constant":
        raise ValueError("`evaluation.average` must be 0: there is one average of the weights.")


def to_json(config: Config) -> dict[str, Any]:
    """The configuration as JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(value: dict[str, Any]) -> Config:
    """The configuration that `to_json` wrote, of this version or an older one."""

    def build(kind, value, prefix=""):
        fields = {f.name: f for f in dataclasses.fields(kind)}
        unknown = sorted(set(value) - set(fields))
        if unknown:
            raise ValueError(f"it has fields that this version does not know: {prefix}{unknown[0]}")
        return kind(
            **{
                name: build(type(fields[name].default), item, f"{name}.")
                if isinstance(item, dict)
                else tuple(item)
                if isinstance(item, list)
                else item
                for name, item in value.items()
            }
        )

    stored = dict(value.get("data", {}))
    if "gray" in stored:
        stored["gray"] = "gray" if stored["gray"] else None
    old = {_RENAMED.get(name, name): item for name, item in stored.items()}
    return build(Config, {**value, "data": old} if stored else value)


def load_config(run_dir: str | Path) -> Config:
    """The configuration of a run directory, with defaults for what older versions had not.

    Raises:
        ValueError: if the directory has none that can be read.
    """
    path = Path(run_dir) / "config.json"
    try:
        value = json.loads(path.read_text())
        version = value.pop("version", "of before 0.3")
        return dataclasses.replace(from_json(value), run_dir=str(run_dir))
    except FileNotFoundError:
        raise ValueError(
            f"`run_dir` must be a directory written by train.pretrain, got {run_dir}: it has no "
            "config.json."
        ) from None
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from None
    except ValueError as error:
        raise ValueError(f"{path} was written by jaxdiff {version}: {error}.") from None


def save_config(config: Config) -> None:
    """Write config.json, with the version that wrote it."""
    stored = {"version": metadata.version("jaxdiff"), **to_json(config)}
    write_json(Path(config.run_dir) / "config.json", stored)


def contradictions(stored: dict[str, Any], config: Config) -> list[str]:
    """What of a configuration contradicts the stored one, e.g. "batch_size: 64 there, 32 here"."""

    def compare(old, new, prefix=""):
        for name in sorted(set(old) | set(new)):
            if not prefix and name in FREE_FIELDS:
                continue
            before, now = old.get(name), new.get(name)
            if isinstance(before, dict) and isinstance(now, dict):
                yield from compare(before, now, f"{prefix}{name}.")
            elif name == "steps" and now > before:
                continue  # longer is the same run
            elif before != now and f"{prefix}{name}" not in ("data.path", "data.labels_path"):
                yield f"{prefix}{name}: {before} there, {now} here"

    return list(compare(stored, to_json(config)))


def build_network(config: NetworkConfig, info: DataInfo, seed: int) -> nnx.Module:
    """The network for a data set.

    Raises:
        ValueError: if a unet or dit is to take anything but images, or an mlp anything but
            vectors; or for a condition that networks do not take.
    """
    shape, rngs = info.event_shape, nnx.Rngs(seed)
    common = {
        **condition_arguments(info),
        "dropout": config.dropout,
        "dtype": jnp.bfloat16 if config.bfloat16 else None,
        "remat": config.remat,
        "rngs": rngs,
    }
    if config.kind == "mlp":
        if len(shape) != 1:
            raise ValueError(f"`network.kind` mlp takes vectors, got data of shape {shape}.")
        if "token_size" in common:
            raise ValueError("`network.kind` mlp takes no tokens. Use a unet or a dit.")
        return networks.MLP(shape[0], hidden=config.channels, num_blocks=config.depth, **common)
    if len(shape) != 3:
        raise ValueError(f"`network.kind` {config.kind} takes images, got data of shape {shape}.")
    common |= {"image_size": shape[:2], "in_channels": shape[2], "num_heads": config.num_heads}
    if config.kind == "dit":
        return networks.DiT(
            patch_size=config.patch_size, hidden=config.channels, depth=config.depth, **common
        )
    return networks.UNet(
        config.channels,
        channel_mults=config.channel_mults,
        num_res_blocks=config.num_res_blocks,
        attention_resolutions=config.attention_resolutions,
        scale_shift=config.scale_shift,
        **common,
    )


def condition_arguments(info: DataInfo) -> dict[str, Any]:
    """The arguments of a network that takes the conditions of the data.

    Raises:
        ValueError: for vectors that are not the label, and other shapes.
    """
    found: dict[str, Any] = {"num_classes": info.num_classes}
    scalars = []
    for name, shape in info.cond.items():
        if name == "label" and len(shape) == 1:
            found["label_size"] = shape[0]
        elif name == "tokens" and info.words is not None:
            found |= {"token_size": 32, "num_words": len(info.words)}
        elif name == "tokens" and len(shape) == 2:
            found["token_size"] = shape[1]
        elif len(shape) == 0:
            scalars.append(name)
        elif name != "token_mask":
            raise ValueError(
                f"The condition {name!r} has shape {shape}, which no network here takes. "
                "One vector is the 'label', scalars have any name, sequences of vectors are "
                "'tokens' with a 'token_mask'."
            )
    return {**found, "scalars": scalars}


def build_denoiser(config: Config, info: DataInfo) -> NetworkDenoiser:
    """The denoiser that learns."""
    process = {
        "vp": processes.VP,
        "cosine": processes.Cosine,
        "subvp": processes.SubVP,
        "ve": processes.VE,
        "edm": processes.EDM,
        "rectified_flow": processes.RectifiedFlow,
        "trigflow": lambda: processes.TrigFlow(config.sigma_data),
    }[config.process]()
    # Noise levels that grow without bound need inputs of unit variance.
    unbounded = config.process in ("ve", "edm")
    scaled = unbounded or config.prediction == "f"
    label = LogNoiseLabel(config.sigma_data, factor=250.0) if scaled else TimeLabel()
    network = build_network(config.network, info, config.seed)
    return NetworkDenoiser(network, process, build_prediction(config), label)


def build_prediction(config: Config) -> predictions.Prediction:
    """What the network predicts."""
    return {
        "x0": predictions.X0,
        "eps": predictions.Eps,
        "v": predictions.V,
        "velocity": predictions.Velocity,
        "f": lambda: predictions.F(config.sigma_data),
    }[config.prediction]()


def build_loss(config: Config, info: DataInfo) -> losses.DenoisingLoss:
    """The training loss."""
    weighting = {
        "uniform": lambda: losses.Uniform(build_prediction(config)),
        "min_snr": losses.MinSNR,
        "truncated_snr": losses.TruncatedSNR,
        "p2": losses.P2,
        "sigmoid": losses.Sigmoid,
        "elbo": losses.ELBO,
    }[config.weighting]()
    law = {
        "uniform": losses.UniformTime,
        "log_normal": losses.LogNormal,
        "logit_normal": losses.LogitNormal,
    }[config.time_law]()
    return losses.DenoisingLoss(weighting, law, info.null_cond, config.label_dropout)


def build_player(config: Config, info: DataInfo) -> Player:
    """The denoiser, its loss, its optimiser and its average."""
    updates = max(config.steps // config.accumulate, config.warmup_steps + 1)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, updates
    )
    optimizer = optax.chain(optax.clip_by_global_norm(config.grad_clip), optax.adam(schedule))
    if config.accumulate > 1:
        optimizer = optax.MultiSteps(optimizer, config.accumulate).gradient_transformation()
    return Player(
        build_denoiser(config, info),
        build_loss(config, info),
        optimizer,
        ConstantEMA(config.ema_decay) if config.ema == "constant" else PowerEMA(config.ema_widths),
    )

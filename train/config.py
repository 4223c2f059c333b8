"""Configurations of training runs: a dataclass, presets, and what is built from them."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxdiff import data, losses, networks, predictions, processes
from jaxdiff.data import ArraySource
from jaxdiff.denoiser import LogNoiseLabel, NetworkDenoiser, TimeLabel
from jaxdiff.training import ConstantEMA, Player


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data set.

    Attributes:
        name: which reader; the last five are densities in the plane.
        path: where the files are (cifar10, folder: a directory; npz, idx: a file).
        labels_path: labels file of an idx data set.
        flip: mirror images at random.
        size: average images over blocks to this height and width; None leaves them.
        gray: average the channels of images into one.
    """

    name: Literal[
        "digits",
        "cifar10",
        "folder",
        "npz",
        "idx",
        "two_moons",
        "swiss_roll",
        "checkerboard",
        "eight_gaussians",
        "rings",
    ] = "digits"
    path: str = ""
    labels_path: str = ""
    flip: bool = False
    size: int | None = None
    gray: bool = False


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


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Sampling and measuring at the end of a run; may change when a run is resumed.

    Attributes:
        num_samples: samples measured.
        per_class: samples of each class in the picture.
        guidance_scale: 1 is the plain conditional model.
        solver: see `train.sample`.
        sampling_steps: steps of the solver.
        batch_size: samples computed at a time.
        classifier_steps: training steps of the classifier that measures images of classes.
    """

    num_samples: int = 1000
    per_class: int = 10
    guidance_scale: float = 1.5
    solver: SolverName = "ddim"
    sampling_steps: int = 25
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
        ema_decay: decay of the averaged weights.
        seed: seed of everything.
        log_every: steps between logged metrics; may change when a run is resumed.
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
    ema_decay: float = 0.995
    seed: int = 0
    log_every: int = 20
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
    "checkpoint_every",
    "keep_checkpoints",
    "tensorboard",
)
"""Fields that do not change what is trained, and so may differ when a run is resumed."""


def to_json(config: Config) -> dict[str, Any]:
    """The configuration as JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(value: dict[str, Any]) -> Config:
    """The configuration that `to_json` wrote."""

    def build(kind, value):
        fields = {f.name: f for f in dataclasses.fields(kind)}
        unknown = set(value) - set(fields)
        if unknown:
            raise ValueError(f"The configuration has unknown fields {sorted(unknown)}.")
        return kind(
            **{
                name: build(type(fields[name].default), item)
                if isinstance(item, dict)
                else tuple(item)
                if isinstance(item, list)
                else item
                for name, item in value.items()
            }
        )

    return build(Config, value)


def load_config(run_dir: str | Path) -> Config:
    """The configuration of a run directory.

    Raises:
        ValueError: if the directory has none that can be read.
    """
    path = Path(run_dir) / "config.json"
    try:
        return from_json(json.loads(path.read_text()))
    except FileNotFoundError:
        raise ValueError(
            f"`run_dir` must be a directory written by train.pretrain, got {run_dir}: it has no "
            "config.json."
        ) from None
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from None


def contradictions(stored: dict[str, Any], config: Config) -> list[str]:
    """What of a configuration contradicts the stored one, e.g. "batch_size: 64 there, 32 here"."""

    def compare(old, new, prefix=""):
        for name in sorted(set(old) | set(new)):
            if not prefix and name in FREE_FIELDS:
                continue
            before, now = old.get(name), new.get(name)
            if isinstance(before, dict) and isinstance(now, dict):
                yield from compare(before, now, f"{prefix}{name}.")
            elif before != now and f"{prefix}{name}" not in ("data.path", "data.labels_path"):
                yield f"{prefix}{name}: {before} there, {now} here"

    return list(compare(stored, to_json(config)))


def build_source(config: DataConfig, split: Literal["train", "test"] = "train") -> ArraySource:
    """The data of a split; data sets without a test split hold out their last tenth."""
    source = _read_source(config, split)
    if config.size is None and not config.gray:
        return source
    return data.reduced(source, size=config.size, gray=config.gray)


def _read_source(config: DataConfig, split: Literal["train", "test"]) -> ArraySource:
    if config.name == "digits":
        return data.digits(split)
    if config.name in ("cifar10", "folder", "npz", "idx") and not config.path:
        raise ValueError(
            f"`data.path` must say where the {config.name} data are, got nothing. Pass --data.path."
        )
    if config.name == "cifar10":
        return data.cifar10(config.path, split)
    readers = {
        "folder": lambda: data.image_folder(config.path),
        "npz": lambda: data.npz(config.path),
        "idx": lambda: data.idx(config.path, config.labels_path or None),
    }
    if config.name in readers:
        source = readers[config.name]()
    else:
        density = getattr(data, config.name)
        source = data.array_source(density(jax.random.key(0), 20_000))
    cut = len(source) - len(source) // 10
    part = slice(None, cut) if split == "train" else slice(cut, None)
    cond = None if source.cond is None else source.cond[part]
    return dataclasses.replace(source, x=source.x[part], cond=cond)


def build_network(config: NetworkConfig, source: ArraySource, seed: int) -> nnx.Module:
    """The network for a data set.

    Raises:
        ValueError: if a unet or dit is to take anything but square images, or an mlp anything
            but vectors.
    """
    shape, rngs = source.event_shape, nnx.Rngs(seed)
    common = {
        "num_classes": source.num_classes,
        "dropout": config.dropout,
        "dtype": jnp.bfloat16 if config.bfloat16 else None,
        "remat": config.remat,
        "rngs": rngs,
    }
    if config.kind == "mlp":
        if len(shape) != 1:
            raise ValueError(f"`network.kind` mlp takes vectors, got data of shape {shape}.")
        return networks.MLP(shape[0], hidden=config.channels, num_blocks=config.depth, **common)
    if len(shape) != 3 or shape[0] != shape[1]:
        raise ValueError(
            f"`network.kind` {config.kind} takes square images, got data of shape {shape}."
        )
    common |= {"image_size": shape[0], "in_channels": shape[2], "num_heads": config.num_heads}
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


def build_denoiser(config: Config, source: ArraySource) -> NetworkDenoiser:
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
    network = build_network(config.network, source, config.seed)
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


def build_loss(config: Config, source: ArraySource) -> losses.DenoisingLoss:
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
    return losses.DenoisingLoss(weighting, law, source.num_classes, config.label_dropout)


def build_player(config: Config, source: ArraySource) -> Player:
    """The denoiser, its loss, its optimiser and its average."""
    updates = max(config.steps // config.accumulate, config.warmup_steps + 1)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, updates
    )
    optimizer = optax.chain(optax.clip_by_global_norm(config.grad_clip), optax.adam(schedule))
    if config.accumulate > 1:
        optimizer = optax.MultiSteps(optimizer, config.accumulate).gradient_transformation()
    return Player(
        build_denoiser(config, source),
        build_loss(config, source),
        optimizer,
        ConstantEMA(config.ema_decay),
    )

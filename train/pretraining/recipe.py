"""The configuration of a pretraining run, its presets, and what is built from them."""

import dataclasses
from typing import Literal

from jaxdiff import losses, predictions, processes
from jaxdiff.denoiser import LogNoiseLabel, NetworkDenoiser, TimeLabel
from jaxdiff.training import Player
from train.core.building import build_average, build_network, build_optimizer
from train.core.config import EvaluationConfig, NetworkConfig, RunConfig
from train.core.data import DataConfig, DataInfo


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """A denoiser trained on data.

    Attributes:
        process: forward process.
        prediction: what the network predicts.
        weighting: of the loss; "uniform" weights the prediction's own error by 1.
        time_law: law of the training time.
        sigma_data: standard deviation of the data, for EDM's preconditioning.
        time_factor: what times in [0, 1] are multiplied by for the network; what is to be
            differentiated by time, such as a mean flow, wants a small one, 10 say.
        label_dropout: probability of training without the label.
    """

    process: Literal["vp", "cosine", "subvp", "ve", "edm", "rectified_flow", "trigflow"] = "cosine"
    prediction: Literal["x0", "eps", "v", "velocity", "f"] = "v"
    weighting: Literal["uniform", "min_snr", "truncated_snr", "p2", "sigmoid", "elbo"] = "uniform"
    time_law: Literal["uniform", "log_normal", "logit_normal"] = "uniform"
    sigma_data: float = 0.5
    time_factor: float = 1000.0
    label_dropout: float = 0.1

    def check(self) -> None:
        """Refuse numbers that make no run, before any work."""
        super().check()
        self.check_positive("sigma_data", "time_factor")
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"`label_dropout` must lie in [0, 1), got {self.label_dropout}.")


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
            network=NetworkConfig(channels=24, channel_mults=(1, 2, 2), attention_resolutions=(8,)),
            evaluation=EvaluationConfig(num_samples=500, guidance_scale=2.0),
            steps=3000,
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
    factor = config.time_factor
    label = LogNoiseLabel(config.sigma_data, factor / 4) if scaled else TimeLabel(factor)
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
    return Player(
        build_denoiser(config, info),
        build_loss(config, info),
        build_optimizer(config),
        build_average(config),
    )

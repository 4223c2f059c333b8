"""Pieces of configuration that recipes share, and the files they are kept in."""

import dataclasses
import json
from importlib import metadata
from operator import attrgetter
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from jaxdiff.training import sigma_rel_to_gamma, write_json
from train.core.data import DataConfig

SolverName = Literal[
    *("ddim", "ancestral", "heun", "euler", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "deis"),
    *("sa_solver", "seeds", "flow_map", "double_jump"),
]
TimesName = Literal["uniform", "log_snr", "karras", "polyexponential", "quadratic"]
MetricName = Literal[
    *("accuracy", "frechet", "sliced_wasserstein", "mmd2", "size", "colour", "place", "digit"),
    *("kid", "precision", "recall", "density", "coverage", "vendi", "classifier_score"),
    *("copied", "c2st", "frechet_limit"),
]
WriterName = Literal["tensorboard", "wandb"]
RematName = Literal["none", "blocks", "dots_saveable", "dots_with_no_batch_dims_saveable"]
T = TypeVar("T", bound="RunConfig")


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
        remat: what is recomputed in the backward pass, to save memory: blocks whole, or all but
            their matrix products, by a policy of `jax.checkpoint_policies`.
        stacked: stack a dit's blocks and run them as one loop: programs that do not grow with the
            depth.
        attention: how attention is computed, see `jaxdiff.networks`; cudnn is for GPUs in
            bfloat16.
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
    remat: RematName = "none"
    stacked: bool = False
    attention: Literal["plain", "xla", "cudnn"] = "plain"

    def check(self) -> None:
        """Refuse what a network of this kind does not have.

        Raises:
            ValueError: naming the field.
        """
        if self.stacked and self.kind != "dit":
            raise ValueError(f"`network.stacked` is an option of a dit, got a {self.kind}.")
        if self.attention != "plain" and self.kind == "mlp":
            raise ValueError("`network.attention` must be left out for an mlp, which has none.")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices are used; may change when a run is resumed.

    Attributes:
        data: devices over which batches are split; None for all that remain.
        fsdp: devices over which batches and weights are split.
        tensor: devices over which single layers are split.
    """

    data: int | None = None
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """Several processes; may change when a run is resumed.

    Attributes:
        detect: join the processes that the environment tells of: SLURM, Kubernetes, Cloud TPU,
            Open MPI.
        coordinator: address and port of process 0, where nothing is detected.
        num_processes: how many there are.
        process_id: which one this is, from 0.
        timeout: seconds to wait for the others.
    """

    detect: bool = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout: float = 300.0


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How samples are drawn.

    Attributes:
        guidance_scale: 1 is the plain conditional model, 0 the unconditional one.
        solver: see `train.core.sampling`.
        sampling_steps: steps of the solver.
        times: the grid of steps; None for the one customary for the process and the solver.
        start: the time that sampling begins at, of steps uniform in time; None for the last one.
        order: of the solver; None for its own.
        eta: noise that the solver adds; None for its own. Of "flow_map" the gamma in [0, 1]: 1 is
            multistep consistency sampling, None the map itself.
        churn: noise that "heun" adds, over all steps.
        average: which average of the weights, counted from 0.
        ema_width: relative width of an average that is made afterwards, of all the power-function
            averages in the checkpoints; None for `average`.
        batch_size: samples computed at a time.
    """

    guidance_scale: float = 1.5
    solver: SolverName = "ddim"
    sampling_steps: int = 25
    times: TimesName | None = None
    start: float | None = None
    order: int | None = None
    eta: float | None = None
    churn: float | None = None
    average: int = 0
    ema_width: float | None = None
    batch_size: int = 250


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(SamplingConfig):
    """Sampling and measuring; may change when a run is resumed.

    Attributes:
        num_samples: samples measured.
        per_class: samples of each class in the picture.
        metrics: what is measured; none for all that suit the data.
        classifier_steps: training steps of the classifier that measures images of classes, 0 for
            none.
    """

    num_samples: int = 1000
    per_class: int = 10
    metrics: tuple[MetricName, ...] = ()
    classifier_steps: int = 1200


# Values that must be at least so large.
_LEAST = {
    **dict.fromkeys(("steps", "batch_size", "accumulate", "log_every", "checkpoint_every"), 1),
    **dict.fromkeys(("keep_checkpoints", "network.channels", "network.depth"), 1),
    **dict.fromkeys(("network.num_res_blocks", "network.num_heads", "network.patch_size"), 1),
    **dict.fromkeys(("evaluation.num_samples", "evaluation.per_class"), 1),
    **dict.fromkeys(("evaluation.sampling_steps", "evaluation.batch_size"), 1),
    **dict.fromkeys(("warmup_steps", "sample_every", "seed", "evaluation.classifier_steps"), 0),
    **dict.fromkeys(("profile", "data.threads"), 0),
    **dict.fromkeys(("evaluation.average", "evaluation.guidance_scale"), 0),
}


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What every training run has; recipes add their own.

    Attributes:
        run_dir: where everything is written.
        data: the data set.
        network: the network.
        evaluation: sampling and measuring at the end.
        mesh: the devices.
        launch: the processes; not kept with the run.
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
        writers: where the log goes beside metrics.jsonl; may change when a run is resumed.
        profile: how many steps the profiler watches, once the first have run; its trace is in
            profile/. May change when a run is resumed.
    """

    run_dir: str = "runs/digits"
    data: DataConfig = DataConfig()
    network: NetworkConfig = NetworkConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    mesh: MeshConfig = MeshConfig()
    launch: LaunchConfig = LaunchConfig()
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
    writers: tuple[WriterName, ...] = ()
    profile: int = 0

    @property
    def shared_dir(self) -> Path:
        """Where classifiers are that runs share."""
        return Path(self.run_dir)

    @property
    def of_so_many_steps(self) -> bool:
        """Whether what is learned depends on the number of steps, which then may not grow."""
        return False

    def check(self) -> None:
        """Refuse numbers that make no run, before any work.

        Raises:
            ValueError: naming the first field.
        """
        for name, least in _LEAST.items():
            value = attrgetter(name)(self)
            if not value >= least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        self.check_positive("learning_rate", "grad_clip")
        self.network.check()
        scale = self.evaluation.guidance_scale
        if not scale < float("inf"):
            raise ValueError(f"`evaluation.guidance_scale` must be finite, got {scale}.")
        if self.seed >= 2**32:
            raise ValueError(f"`seed` must be in [0, 2^32), got {self.seed}.")
        mults = self.network.channel_mults
        if not mults or min(mults) < 1:
            raise ValueError(f"`network.channel_mults` must be positive numbers, got {mults}.")
        if self.ema == "power" and not self.ema_widths:
            raise ValueError("`ema_widths` must have one width at least, got none.")
        if self.accumulate > self.steps:
            raise ValueError(
                f"`accumulate` must be at most `steps`, {self.steps}, got {self.accumulate}: no "
                "update would be made."
            )
        average, width = self.evaluation.average, self.evaluation.ema_width
        count = 1 if self.ema == "constant" else len(self.ema_widths)
        if average >= count:
            raise ValueError(
                f"`evaluation.average` must be below {count}, the number of averages, got "
                f"{average}."
            )
        if width is not None and (self.ema == "constant" or average):
            raise ValueError(
                "`evaluation.ema_width` must be left out with an `average` of its own, and for a "
                "run that was not trained with --ema power."
            )
        if width is not None:
            sigma_rel_to_gamma(width)

    def check_positive(self, *names: str) -> None:
        """Refuse numbers that are not positive and finite."""
        for name in names:
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(
                    f"`{name}` must be positive and finite, got {getattr(self, name)}."
                )


FREE_FIELDS = (
    "run_dir",
    "evaluation",
    "mesh",
    "launch",
    "log_every",
    "sample_every",
    "checkpoint_every",
    "keep_checkpoints",
    "writers",
    "profile",
)
"""Fields that do not change what is trained, and so may differ when a run is resumed."""
FREE_DATA = ("data.path", "data.labels_path", "data.threads")


# What older versions called fields of the data.
_RENAMED = {"size": "resize", "gray": "mode"}


def to_json(config: RunConfig) -> dict[str, Any]:
    """The configuration as JSON, without `launch`, which belongs to one process and one start."""
    value = json.loads(json.dumps(dataclasses.asdict(config)))
    del value["launch"]
    return value


def from_json(kind: type[T], value: dict[str, Any]) -> T:
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

    value = dict(value)
    if "data" in value:
        data = dict(value["data"])
        if "gray" in data:
            data["gray"] = "gray" if data["gray"] else None
        value["data"] = {_RENAMED.get(name, name): item for name, item in data.items()}
    network = value.get("network")
    if isinstance(network, dict) and isinstance(network.get("remat"), bool):
        value["network"] = {**network, "remat": "blocks" if network["remat"] else "none"}
    if "tensorboard" in value:
        value["writers"] = ("tensorboard",) if value.pop("tensorboard") else ()
    if kind is RunConfig:  # of whatever recipe
        known = {f.name for f in dataclasses.fields(RunConfig)}
        value = {name: item for name, item in value.items() if name in known}
    return build(kind, value)


def load_config(run_dir: str | Path, kind: type[T]) -> T:
    """The configuration of a run directory, with defaults for what older versions had not.

    Args:
        run_dir: the run's directory.
        kind: the recipe's configuration, or `RunConfig` for what all recipes have.

    Raises:
        ValueError: if the directory has none that can be read.
    """
    path = Path(run_dir) / "config.json"
    version = "of before 0.3"
    try:
        value = dict(json.loads(path.read_bytes()))
        version = value.pop("version", version)
        found = dataclasses.replace(from_json(kind, value), run_dir=str(run_dir))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"`run_dir` must be a directory written by a recipe, got {run_dir}: it has no "
            "config.json."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from None
    except ValueError as error:
        raise ValueError(f"{path} was written by jaxdiff {version}: {error}.") from None
    if wrong := wrong_types(found):
        raise ValueError(f"{path} is damaged: `{wrong}` has a value that it cannot have.")
    return found


def wrong_types(config: Any, prefix: str = "") -> str:
    """Name of the first field whose value is not of its type; "" if there is none."""
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(kind):
            fault = wrong_types(value, f"{prefix}{name}.") if isinstance(value, kind) else name
            if fault:
                return fault if fault != name else f"{prefix}{name}"
        elif not _fits(value, kind):
            return f"{prefix}{name}"
    return ""


def _fits(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, inner[0]) for item in value)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def save_config(config: RunConfig) -> None:
    """Write config.json, with the version that wrote it."""
    stored = {"version": metadata.version("jaxdiff"), **to_json(config)}
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    write_json(Path(config.run_dir) / "config.json", stored)


def contradictions(stored: dict[str, Any], config: RunConfig) -> list[str]:
    """What of a configuration contradicts the stored one, e.g. "batch_size: 64 there, 32 here"."""

    def compare(old, new, prefix=""):
        for name in sorted(set(old) | set(new)):
            if not prefix and name in FREE_FIELDS:
                continue
            before, now = old.get(name), new.get(name)
            if isinstance(before, dict) and isinstance(now, dict):
                yield from compare(before, now, f"{prefix}{name}.")
            elif name == "steps" and now > before and not config.of_so_many_steps:
                continue  # longer is the same run
            elif before != now and f"{prefix}{name}" not in FREE_DATA:
                yield f"{prefix}{name}: {before} there, {now} here"

    return list(compare(stored, to_json(config)))


def check_same(config: RunConfig) -> None:
    """A run goes on only with the configuration it began with.

    Raises:
        ValueError: with all that contradicts the run in the directory.
    """
    run_dir = Path(config.run_dir)
    if not (run_dir / "config.json").exists():
        return
    differences = contradictions(to_json(load_config(run_dir, type(config))), config)
    if differences:
        raise ValueError(
            f"The configuration contradicts the run in {run_dir}: {'; '.join(differences)}. Use "
            "the same values, or another --run-dir, with --init-from to begin with its weights."
        )

"""Methods of distillation by name: the students, the players, and how the student is sampled."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jaxdiff import distillation, guidance, losses, predictions, processes
from jaxdiff.conditions import from_entries
from jaxdiff.denoiser import Denoiser, NetworkDenoiser, TimeLabel, reading
from jaxdiff.networks import tap_names, with_scalars
from jaxdiff.training import Follow, Player
from train.core.building import build_average, build_optimizer
from train.core.data import DataInfo
from train.core.derived import DerivedConfig, check_denoising
from train.core.sampling import guided, is_told

END = "end"  # the entry by which a student is told where to
END_FACTOR = 100.0  # in which units: sinusoids of numbers below 1 tell little
ROUNDS = (32, 1)  # steps of the first and the last student of progressive distillation
SCALES = (1.0, 3.0)  # of guidance, of students that are always told it
LAST = 80.0  # noise level at which students on grids of levels begin, EDM's
START = 2.5  # noise level at which generators begin, as score identity distillation has it


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """How a student learns.

    Attributes:
        method: its name, see `METHODS`.
        guidance_scale: of the teacher; 1 is the plain conditional model.
        scales: least and most scale of a student that is told it; none for a student of one scale,
            or `SCALES` for those that are always told it.
        grid_steps: of the teacher's grid, for methods that have one.
        generator_every: steps of the fake score for one of the generator.
        pairs: of noise and samples that the teacher makes, for methods that learn from them.
    """

    method: str = "consistency"
    guidance_scale: float = 1.0
    scales: tuple[float, ...] = ()
    grid_steps: int = 18
    generator_every: int = 2
    pairs: int = 10_000


@dataclasses.dataclass(frozen=True)
class Config(DerivedConfig):
    """A distilled run.

    Attributes:
        distill: how.
    """

    distill: DistillConfig = DistillConfig()

    @property
    def method(self) -> "Method":
        """What the name stands for."""
        return METHODS[self.distill.method]

    @property
    def of_so_many_steps(self) -> bool:
        """See `RunConfig`."""
        return self.method.scheduled

    @property
    def scales(self) -> tuple[float, float] | None:
        """Of a student that is told them."""
        if self.method.told == "always" and not self.distill.scales:
            return SCALES
        return tuple(self.distill.scales) or None  # type: ignore[return-value]

    def check(self) -> None:
        """Refuse numbers that make no run, before any work.

        Raises:
            ValueError: naming the first field.
        """
        super().check()
        chosen = self.distill
        if chosen.method not in METHODS:
            raise ValueError(
                f"`distill.method` must be one of {', '.join(METHODS)}, got {chosen.method!r}."
            )
        for name in ("grid_steps", "generator_every", "pairs"):
            value = getattr(chosen, name)
            if value < 1:
                raise ValueError(f"`distill.{name}` must be at least 1, got {value}.")
        if chosen.scales and (len(chosen.scales) != 2 or chosen.scales[0] > chosen.scales[1]):
            raise ValueError(f"`distill.scales` must be none or two in order, got {chosen.scales}.")
        if bool(chosen.scales) and not self.method.told:
            named = ", ".join(name for name, method in METHODS.items() if method.told)
            raise ValueError(
                f"`distill.scales` is for {named}, whose students are told the scale; got "
                f"{chosen.method!r}. Pass --guidance-scale for a teacher of one."
            )
        least = len(distillation.rounds(*ROUNDS))
        if chosen.method == "progressive" and self.steps < least:
            raise ValueError(f"`steps` must be at least {least}, one a round, got {self.steps}.")
        if chosen.guidance_scale != 1 and self.scales is not None:
            raise ValueError(
                "`distill.guidance_scale` must be 1 for a student that is told the scale, got "
                f"{chosen.guidance_scale}. Its range is --scales, {self.scales}."
            )
        if chosen.guidance_scale != 1 and not self.method.guided:
            raise ValueError(
                f"`distill.guidance_scale` must be 1 for {chosen.method!r}, which has no guided "
                f"teacher, got {chosen.guidance_scale}."
            )


class Parts:
    """What a method builds its players of.

    Attributes:
        config: the configuration.
        base: the denoiser to be distilled, with its averaged weights.
        info: of the data.
        chosen: how a student learns.
    """

    def __init__(self, config: Config, base: NetworkDenoiser, info: DataInfo):
        self.config, self.info, self.chosen = config, info, config.distill
        check_denoising(base)
        self.base, self.told = config.method.seen(base), is_told(base, info)
        scale = self.chosen.guidance_scale
        twice = config.method.again
        if self.told and not (twice and config.scales):
            raise ValueError(
                "`base` is told the scale of guidance: its students are by --method progressive "
                f"with --scales as it was, got {self.chosen.method!r} and {config.scales}."
            )
        if twice and config.scales and not self.told:
            raise ValueError(
                f"`base` must be told the scale of guidance for {self.chosen.method!r} with "
                "--scales. Distil it by --method guided first, and pass that run."
            )
        if info.null_cond is None and (config.method.conditions or config.scales or scale != 1):
            raise ValueError(
                f"`distill.method` {self.chosen.method} with guidance scale {scale:g} needs data "
                "with conditions, and a model of them. Choose another method, or scale 1."
            )

    @property
    def teacher(self) -> Denoiser:
        """Guided, and not clipped: what a student learns is a trajectory."""
        plain = dataclasses.replace(self.info, pixels=False)
        if self.scales is None or self.told:
            return guided(self.base, plain, self.chosen.guidance_scale)
        return guidance.ClassifierFree(self.base, self.info.null_cond, self.scales[1])

    @property
    def unconditional(self) -> Denoiser:
        """The base without its condition."""
        return guidance.Conditioned(self.base, self.info.null_cond)

    @property
    def scales(self) -> tuple[float, float] | None:
        """Of a student that is told them."""
        return self.config.scales

    @property
    def weighting(self) -> losses.Weighting:
        """Of a fake score's loss: 1 on the network's own output."""
        return losses.Uniform(self.base.prediction)

    @property
    def start(self) -> float:
        """The time at which generators begin."""
        return start_of(self.base)

    def student(self, *told: str) -> NetworkDenoiser:
        """The teacher's network, which is told more."""
        names = (*told, *(("scale",) if self.scales and not self.told else ()))
        network = with_scalars(self.base.network, *names) if names else self.base.network
        return dataclasses.replace(self.base, network=network)

    def jump(self) -> distillation.Jump:
        """A map to the data."""
        return distillation.Jump(self.student())

    def between(self) -> distillation.Jump:
        """A map between any two times."""
        return distillation.Jump(self.student(END), END, factor=END_FACTOR)

    def player(self, model: Any, loss: Any, **options: Any) -> Player:
        """A player with the run's optimiser and average."""
        average = build_average(self.config)
        return Player(model, loss, build_optimizer(self.config), average, **options)

    def follower(self, model: Any, loss: Any, rate: float = 2.0, **options: Any) -> Player:
        """A player without an average, such as a fake score, at a multiple of the rate."""
        config = dataclasses.replace(self.config, learning_rate=rate * self.config.learning_rate)
        return Player(model, loss, build_optimizer(config), **options)

    def fake(self, start: float | None = None) -> Player:
        """The score of what the generator makes, which begins as the teacher's."""
        denoising = losses.DenoisingLoss(self.weighting)
        return self.follower(self.base, distillation.FakeScoreLoss(denoising, start))

    def generator(self, loss: Any, **others: Player) -> dict[str, Player]:
        """A generator and its fake score, which learns more often."""
        start = loss.start
        player = self.player(self.jump(), loss, every=self.chosen.generator_every)
        return {"fake": self.fake(start), **others, "generator": player}


def feature_critic(base: NetworkDenoiser, info: DataInfo, seed: int) -> distillation.FeatureCritic:
    """A critic that looks at a network's inner activations, at their narrowest."""
    x, cond = jnp.zeros(info.event_shape), 0 if info.num_classes else None
    names = tap_names(base.network, x, jnp.zeros(()), cond)
    tap = "mid" if "mid" in names else [n for n in names if n.startswith("block.")][-1]
    seen = eqx.filter_eval_shape(reading(base, (tap,)).estimate, x, jnp.float32(0.5), cond)
    size, rngs = seen.taps[tap].shape[-1], nnx.Rngs(seed)
    layers = nnx.Linear(size, 64, rngs=rngs), nnx.silu, nnx.Linear(64, 1, rngs=rngs)
    return distillation.FeatureCritic(Head(nnx.Sequential(*layers), tap), (tap,))


def start_of(base: Denoiser) -> float:
    """The time of noise level `START`."""
    return float(base.process.time(-2 * jnp.log(jnp.float32(START))))


def batch_like(info: DataInfo, size: int) -> dict[str, Any]:
    """A batch of zeros that has the data's shapes and dtypes."""
    shapes = {**info.cond, **({} if info.num_classes is None else {"label": ()})}
    whole = {"label": info.num_classes is not None, "tokens": info.words is not None}
    cond = {
        name: jnp.zeros((size, *shape), jnp.int32 if whole.get(name) else jnp.float32)
        for name, shape in shapes.items()
    }
    return {"x": jnp.zeros((size, *info.event_shape)), "cond": from_entries(cond)}


def _same(base: NetworkDenoiser) -> NetworkDenoiser:
    return base


def as_trigflow(base: NetworkDenoiser) -> NetworkDenoiser:
    """A model of the cosine process as the same function of angles, for losses that want these.

    Raises:
        ValueError: for a model of another process.
    """
    if isinstance(base.process, processes.TrigFlow):
        return base
    label = base.preconditioning
    plain = isinstance(base.process, processes.Cosine) and not float(base.process.offset)
    if not plain or not isinstance(label, TimeLabel):
        raise ValueError(
            "`base` must be a run with --process cosine or trigflow, got "
            f"{type(base.process).__name__}."
        )
    factor = float(label.factor) * 2 / float(jnp.pi)
    return NetworkDenoiser(
        base.network, processes.TrigFlow(1.0), base.prediction, TimeLabel(factor, label.shift)
    )


def as_edm(base: NetworkDenoiser) -> NetworkDenoiser:
    """The same model up to EDM's last noise level, for grids of levels: where data are no more.

    Processes that end in pure noise have levels without end.
    """
    process = base.process
    last = float(process.time(-2 * jnp.log(jnp.float32(LAST))))
    if last >= float(process.t_max):
        return base
    return dataclasses.replace(base, process=dataclasses.replace(process, t_max=last))


@dataclasses.dataclass(frozen=True)
class Method:
    """What a name stands for.

    Attributes:
        paper: whose it is.
        build: the players; where one is named "teacher" it is in the teacher's place.
        kind: of the student: a denoiser, or a map between two times.
        sampled: the player that is sampled.
        gamma: of `solvers.FlowMapSteps`, where the student is a map.
        evaluations: that the student can be sampled with.
        starts: whether the student begins at noise level `START`, and not at the last time.
        told: whether the student may be told a scale of guidance: False, True or "always".
        again: whether that is for a base which is told it already: the second stage of two.
        conditions: whether it needs data with conditions.
        guided: whether there is a teacher to be guided.
        pairs: whether it learns from noise and what the teacher makes of it.
        teacher: what learns nothing, of the parts.
        seen: the base as the method sees it.
        scheduled: whether something is over by the last step, so that a longer run is another one.
    """

    paper: str
    build: Callable[[Parts], dict[str, Player]]
    kind: str = "map"
    sampled: str = "student"
    gamma: float | None = 1.0
    evaluations: tuple[int, ...] = (1, 2, 4)
    starts: bool = False
    told: bool | str = False
    again: bool = False
    conditions: bool = False
    guided: bool = True
    pairs: bool = False
    teacher: Callable[[Parts], Denoiser] = lambda parts: parts.teacher
    seen: Callable[[NetworkDenoiser], NetworkDenoiser] = _same
    scheduled: bool = False


def _progressive(parts: Parts) -> dict[str, Player]:
    # One program for all rounds: the teacher takes the student's weights at the end of each.
    count = len(distillation.rounds(*ROUNDS))
    length = max(parts.config.steps // count, 1)
    halving = distillation.HalvingSteps(*ROUNDS, length)
    # A student of all scales is sampled by double jumps, too, which start between its steps.
    shifts = 1 if parts.scales is None else 2
    loss = distillation.ProgressiveDistillation(halving, shifts=shifts, scales=parts.scales)
    teacher = Player(parts.base, Follow("student"), every=halving.begins)
    return {"teacher": teacher, "student": parts.player(parts.student(), loss)}


def _guided(parts: Parts) -> dict[str, Player]:
    loss = distillation.GuidedDistillation(parts.scales)
    return {"student": parts.player(parts.student(), loss)}


def _consistency(parts: Parts) -> dict[str, Player]:
    loss = distillation.ConsistencyDistillation(
        steps=distillation.FixedSteps(parts.chosen.grid_steps), target="student",
        scales=parts.scales,
    )  # fmt: skip
    return {"student": parts.player(parts.jump(), loss)}


def _consistency_training(parts: Parts) -> dict[str, Player]:
    steps = distillation.DoublingSteps(parts.config.steps, 10, 160)
    loss = distillation.ConsistencyTraining(steps=steps)
    return {"student": parts.player(parts.jump(), loss)}


def _easy(parts: Parts) -> dict[str, Player]:
    loss = distillation.EasyConsistencyTuning(doubling=max(parts.config.steps // 8, 1))
    return {"student": parts.player(parts.jump(), loss)}


def _continuous(parts: Parts) -> dict[str, Player]:
    loss = distillation.ContinuousConsistency(
        warmup=parts.config.steps / 4, teacher="teacher", scales=parts.scales
    )
    return {"student": parts.player(parts.jump(), loss)}


def _boot(parts: Parts) -> dict[str, Player]:
    loss = distillation.BOOT(steps=distillation.FixedSteps(32), scales=parts.scales)
    # A network of v answers a start as if it were a noisy example: not so one of x0.
    student = dataclasses.replace(parts.student(), prediction=predictions.X0())
    return {"student": parts.player(distillation.SignalMap(student), loss)}


def _reflow(parts: Parts) -> dict[str, Player]:
    return {"student": parts.player(parts.student(), distillation.ReflowLoss(parts.weighting))}


def _pair_regression(parts: Parts) -> dict[str, Player]:
    return {"student": parts.player(parts.jump(), distillation.PairRegression())}


def _shortcut(parts: Parts) -> dict[str, Player]:
    loss = distillation.Shortcut(steps=32, target="student", teacher="teacher")
    return {"student": parts.player(parts.between(), loss)}


def _mean_flow(parts: Parts) -> dict[str, Player]:
    # The published weight is for residuals that have the spread of the data, and a teacher's none.
    loss = distillation.MeanFlow(power=0.0, teacher="teacher", scales=parts.scales)
    return {"student": parts.player(parts.between(), loss)}


def _trajectory(parts: Parts) -> dict[str, Player]:
    steps = parts.chosen.grid_steps
    loss = distillation.ConsistencyTrajectory(steps=steps, most=steps, target="student")
    return {"student": parts.player(parts.between(), loss)}


def _single_trajectory(parts: Parts) -> dict[str, Player]:
    # From noise, and to any time: what is distilled is sampled, and edits nothing.
    bank = distillation.TrajectoryBank.empty(batch_like(parts.info, parts.config.batch_size))
    loss = distillation.SingleTrajectory(
        bank, steps=parts.chosen.grid_steps, strength=1.0, reach=1.0, gan=None, scales=parts.scales,
    )  # fmt: skip
    return {"student": parts.player(parts.between(), loss)}


def _conditional(parts: Parts) -> dict[str, Player]:
    loss = distillation.ConditionalDistillation(target="student")
    return {"student": parts.player(parts.jump(), loss)}


def _diff_instruct(parts: Parts) -> dict[str, Player]:
    return parts.generator(distillation.DiffInstruct(start=parts.start))


def _dmd(parts: Parts) -> dict[str, Player]:
    return parts.generator(distillation.DMD(start=parts.start))


def _dmd2(parts: Parts) -> dict[str, Player]:
    loss = distillation.DMD2(start=parts.start, gan=3e-2)
    seen = feature_critic(parts.base, parts.info, parts.config.seed)
    critic = parts.follower(seen, distillation.CriticLoss(start=parts.start))
    return parts.generator(loss, critic=critic)


def _sds(parts: Parts) -> dict[str, Player]:
    loss = distillation.SDS(start=parts.start)
    return {"generator": parts.player(parts.jump(), loss)}


def _vsd(parts: Parts) -> dict[str, Player]:
    return parts.generator(distillation.VSD(start=parts.start))


def _repulsive(parts: Parts) -> dict[str, Player]:
    loss = distillation.Repulsive(sds=distillation.SDS(start=parts.start))
    return {"generator": parts.player(parts.jump(), loss)}


def _esd(parts: Parts) -> dict[str, Player]:
    return parts.generator(distillation.ESD(null_cond=parts.info.null_cond, start=parts.start))


def _idempotent(parts: Parts) -> dict[str, Player]:
    matching = distillation.SiD(start=parts.start)
    players = parts.generator(matching)
    loss = distillation.ScoreIdempotent(matching)
    return {**players, "generator": dataclasses.replace(players["generator"], loss=loss)}


def _moments(parts: Parts) -> dict[str, Player]:
    fake = parts.follower(parts.base, distillation.MomentMatchingAuxiliary(4))
    loss = distillation.MultistepMomentMatching(4)
    every = parts.chosen.generator_every
    return {"fake": fake, "generator": parts.player(parts.jump(), loss, every=every)}


def _inductive(parts: Parts) -> dict[str, Player]:
    # Classes are mixed in a batch, and only particles of one class see one another.
    most = max(n for n in (1, 2, 4, 8, 16) if parts.config.batch_size % n == 0)
    loss = distillation.InductiveMomentMatching(most, prediction=parts.base.prediction)
    return {"student": parts.player(parts.between(), loss)}


def _sid(parts: Parts) -> dict[str, Player]:
    # 1.2, as published, has the wrong sign for laws that are too wide.
    return parts.generator(distillation.SiD(1.0, start=parts.start))


class Head(eqx.Module):
    """Activations to a logit: their mean over places, and a network of one hidden layer."""

    network: nnx.Module
    tap: str = eqx.field(static=True)

    def __call__(self, taps: dict[str, Array]) -> Array:
        """See `distillation.FeatureCritic`."""
        h = taps[self.tap]
        return self.network(h.reshape(-1, h.shape[-1]).mean(0))[0]


def _generator(paper: str, build: Callable[[Parts], dict[str, Player]], **options: Any) -> Method:
    """A generator of one step."""
    kept = {"sampled": "generator", "starts": True, "evaluations": (1,), **options}
    return Method(paper, build, **kept)


METHODS: dict[str, Method] = {
    # The last student of all is for one step.
    "progressive": Method(
        "Salimans, Ho 2022", _progressive, kind="denoiser", evaluations=(1,), guided=False,
        told=True, again=True, scheduled=True,
    ),
    "guided": Method("Meng et al. 2022", _guided, kind="denoiser", told="always", conditions=True),
    "consistency": Method("Song et al. 2023", _consistency, told=True, seen=as_edm),
    "latent-consistency": Method(
        "Luo et al. 2023", _consistency, told="always", conditions=True, seen=as_edm
    ),
    "consistency-training": Method(
        "Song, Dhariwal 2023", _consistency_training, guided=False, seen=as_edm, scheduled=True
    ),
    "easy-consistency": Method(
        "Geng et al. 2024", _easy, guided=False, seen=as_edm, scheduled=True
    ),
    "continuous-consistency": Method(
        "Lu, Song 2024", _continuous, told=True, seen=as_trigflow, scheduled=True
    ),
    "boot": Method("Gu et al. 2023", _boot, gamma=None, evaluations=(1,), told=True),
    "reflow": Method("Liu et al. 2022", _reflow, kind="denoiser", pairs=True),
    "pair-regression": Method(
        "Liu et al. 2022", _pair_regression, pairs=True, evaluations=(1,)
    ),
    "shortcut": Method("Frans et al. 2024", _shortcut, gamma=None),
    "mean-flow": Method("Geng et al. 2025", _mean_flow, gamma=None, told=True),
    "trajectory": Method("Kim et al. 2023", _trajectory, gamma=None, seen=as_edm),
    "single-trajectory": Method(
        "Xu et al. 2024", _single_trajectory, gamma=None, told=True, seen=as_edm
    ),
    "conditional": Method(
        "Mei et al. 2023", _conditional, conditions=True, guided=False,
        teacher=lambda parts: parts.unconditional,
    ),
    "sds": _generator("Poole et al. 2022", _sds),
    "repulsive": _generator("Zilberstein et al. 2024", _repulsive),
    "vsd": _generator("Wang et al. 2023", _vsd),
    "esd": _generator("Wang et al. 2024", _esd, conditions=True),
    "diff-instruct": _generator("Luo et al. 2023", _diff_instruct),
    "dmd": _generator("Yin et al. 2023", _dmd),
    "dmd2": _generator("Yin et al. 2024", _dmd2),
    "sid": _generator("Zhou et al. 2024", _sid),
    "idempotent": _generator("2025, arXiv 2509.21470", _idempotent),
    "moment-matching": Method(
        "Salimans et al. 2024", _moments, sampled="generator", evaluations=(1, 2, 4)
    ),
    "inductive": Method("Zhou et al. 2025", _inductive, gamma=None),
}  # fmt: skip

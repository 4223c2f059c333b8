"""Methods of unlearning by name: the players, what they are given, and how the result is sampled.

Of `jaxdiff.unlearning` these are left out: `edit_cross_attention`, `decorrelate`, `damp` and
`safree`, which want tokens; `PreferenceLoss`, which wants pairs; `Flooding`, which forgets examples
and no class; `noisy_descent`, whose guarantee is for a model that was trained with it.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdiff import distillation, losses, unlearning
from jaxdiff.data import ArraySource, make_loader
from jaxdiff.denoiser import Denoiser, NetworkDenoiser
from jaxdiff.training import Player, init_train_state, make_train_step
from train.core.building import build_average, build_optimizer
from train.core.data import DataInfo
from train.core.derived import DerivedConfig, check_denoising
from train.distilling.recipe import feature_critic, start_of


@dataclasses.dataclass(frozen=True)
class UnlearnConfig:
    """What is forgotten, and how.

    Attributes:
        method: its name, see `METHODS`.
        forget: the classes.
        override: the class that is said instead, for methods that have one; None for any other
            that is kept, drawn anew, or for what the method has of its own.
        scale: of negative guidance, for methods that have it; None for the method's own.
        weight: of what is kept beside what is forgotten, or the other way round; None for the
            method's own.
        parameters: parts of the paths of weights that learn, such as "classes" or "attention"; none
            for all.
        trajectory_steps: of the sampler that states are taken from, for methods that sample.
        generator: directory of a distilled run that score forgetting begins with; none to begin
            with the model.
        generator_every: steps of the fake score for one of the generator.
    """

    method: str = "erased"
    forget: tuple[int, ...] = (0,)
    override: int | None = None
    scale: float | None = None
    weight: float | None = None
    parameters: tuple[str, ...] = ()
    trajectory_steps: int = 10
    generator: str = ""
    generator_every: int = 2


@dataclasses.dataclass(frozen=True)
class Config(DerivedConfig):
    """An unlearned run.

    Attributes:
        unlearn: how.
    """

    unlearn: UnlearnConfig = UnlearnConfig()

    @property
    def method(self) -> "Method":
        """What the name stands for."""
        return METHODS[self.unlearn.method]

    def check(self) -> None:
        """Refuse numbers that make no run, before any work.

        Raises:
            ValueError: naming the first field.
        """
        super().check()
        chosen = self.unlearn
        if chosen.method not in METHODS:
            raise ValueError(
                f"`unlearn.method` must be one of {', '.join(METHODS)}, got {chosen.method!r}."
            )
        if chosen.override in chosen.forget:
            raise ValueError(
                f"`unlearn.override` must be a class that is kept, got {chosen.override}, which is "
                f"to be forgotten with {chosen.forget}."
            )
        for name in ("trajectory_steps", "generator_every"):
            if getattr(chosen, name) < 1:
                raise ValueError(
                    f"`unlearn.{name}` must be at least 1, got {getattr(chosen, name)}."
                )
        for name in ("override", "scale", "weight", "generator"):
            value = getattr(chosen, name)
            if value not in (None, "") and name not in self.method.takes:
                named = ", ".join(n for n, method in METHODS.items() if name in method.takes)
                raise ValueError(
                    f"`unlearn.{name}` is for {named}; {chosen.method!r} has none, got {value!r}."
                )
        if chosen.parameters and self.method.kind == "edit":
            raise ValueError("`unlearn.parameters` is for methods that learn; leave it out.")


class Parts:
    """What a method is built of.

    Attributes:
        config: the configuration.
        base: the denoiser that is to forget, with its averaged weights.
        generator: what score forgetting begins with.
        info: of the data.
        kept: examples of what is kept.
        forget: examples of what is forgotten.
    """

    def __init__(
        self,
        config: Config,
        base: NetworkDenoiser,
        info: DataInfo,
        kept: ArraySource,
        forget: ArraySource,
        generator: Any = None,
    ):
        check_denoising(base)
        self.config, self.base, self.info = config, base, info
        self.kept, self.forget, self.chosen = kept, forget, config.unlearn
        self.generator = distillation.Jump(base) if generator is None else generator
        self.null = info.null_cond
        if info.num_classes is None or info.cond:
            raise ValueError(
                "`base` must be a model of classes alone, got one of other conditions."
            )
        self.mask()  # refused here, before any work
        override = self.chosen.override
        if override is not None and override not in info.classes:
            raise ValueError(
                f"`unlearn.override` must be a class of the data, {info.classes}, got {override}."
            )

    @property
    def classes(self) -> np.ndarray:
        """Those that are kept."""
        return np.setdiff1d(self.info.classes, self.chosen.forget).astype(np.int32)

    def override(self) -> unlearning.Override:
        """What is said instead."""
        if self.chosen.override is None:
            return unlearning.AnyOf(self.classes)
        return unlearning.Always(self.chosen.override)

    def scale(self, own: float) -> float:
        """Of negative guidance."""
        return own if self.chosen.scale is None else self.chosen.scale

    def weight(self, own: float) -> float:
        """Of one term beside the other."""
        return own if self.chosen.weight is None else self.chosen.weight

    @property
    def states(self) -> unlearning.States:
        """Of guided sampling."""
        return unlearning.OnTrajectory(self.null, steps=self.chosen.trajectory_steps)

    @property
    def weighting(self) -> losses.Weighting:
        """1 on the network's own output."""
        return losses.Uniform(self.base.prediction)

    @property
    def denoising(self) -> losses.DenoisingLoss:
        """Of what is kept, as in training."""
        return losses.DenoisingLoss(self.weighting, null_cond=self.null)

    def mask(self) -> Any:
        """Which weights learn."""
        patterns = self.chosen.parameters
        return unlearning.parameter_mask(self.base.network, *patterns) if patterns else None

    def player(self, loss: Any, model: Any = None, mask: Any = None, **options: Any) -> Player:
        """A player with the run's optimiser and average, which begins as the model."""
        config = self.config
        return Player(
            self.base if model is None else model, loss, build_optimizer(config),
            build_average(config), mask=self.mask() if mask is None else mask, **options,
        )  # fmt: skip

    def gradient(self, loss: Any) -> Any:
        """Of a loss at the model, over some examples of both kinds."""
        batch = self.some(256)

        @eqx.filter_jit
        @eqx.filter_grad
        def slope(network, key):
            model = eqx.tree_at(lambda m: m.network, self.base, network)
            return loss(model, key, batch, {})[0]

        return slope(self.base.network, jax.random.key(self.config.seed))

    def some(self, count: int) -> dict[str, Any]:
        """A batch of kept examples, and of those to be forgotten."""
        rng = np.random.default_rng(self.config.seed)
        kept, forget = (
            source[rng.choice(len(source), count)] for source in (self.kept, self.forget)
        )
        return {**kept, "forget": forget}

    def tuned(self, source: ArraySource) -> Denoiser:
        """The model after as many updates on some examples."""
        config = self.config
        loss = dataclasses.replace(self.denoising, null_cond=None)
        player = Player(self.base, loss, build_optimizer(config))
        size = min(config.batch_size, len(source))
        batches = make_loader(source, size, seed=config.seed, num_threads=0)
        return learned(player, itertools.islice(batches, config.steps), config.seed)


def learned(player: Player, batches: Iterable[Any], seed: int, **constants: Any) -> Any:
    """A player's model after some batches."""
    players = {"model": player}
    state, step = init_train_state(players, jax.random.key(seed)), make_train_step(players)
    for batch in batches:
        state, _ = step(state, batch, constants)
    return state.players["model"].model


@dataclasses.dataclass(frozen=True)
class Method:
    """What a name stands for.

    Attributes:
        paper: whose it is.
        build: the players; or, of an edit, the model itself.
        kind: what comes of it: a "denoiser" or a "generator" that learned, or an "edit".
        constants: what losses find beside the teacher.
        data: what examples it needs: "none", "forget", "kept" or "both".
        sampled: the player that is sampled.
        takes: those of "override", "scale", "weight" and "generator" that mean something to it.
    """

    paper: str
    build: Callable[[Parts], Any]
    takes: tuple[str, ...] = ()
    kind: str = "denoiser"
    constants: Callable[[Parts], dict[str, Any]] = lambda parts: {}
    data: str = "both"
    sampled: str = "model"


def _model(build: Callable[[Parts], Any]) -> Callable[[Parts], dict[str, Player]]:
    """One player that minimises a loss."""
    return lambda parts: {"model": parts.player(build(parts))}


def _relabelled(parts: Parts) -> unlearning.Relabelled:
    return unlearning.Relabelled(parts.override(), parts.weighting)


def _with_kept(parts: Parts, forget: Any, weight: float) -> unlearning.Both:
    return unlearning.Both(forget, parts.denoising, parts.weight(weight))


def _salun(parts: Parts) -> dict[str, Player]:
    loss = _with_kept(parts, _relabelled(parts), 1.0)
    slope = parts.gradient(unlearning.OnForgotten(parts.denoising))
    mask, chosen = unlearning.saliency_mask(slope, 0.5), parts.mask()
    if chosen is not None:
        mask = jax.tree.map(lambda a, b: a & b, mask, chosen)
    return {"model": parts.player(loss, mask=mask)}


def _anti_edited(parts: Parts) -> unlearning.AntiEditing:
    return unlearning.AntiEditing(
        parts.null, parts.scale(3.0), unlearning.AnyOf(parts.classes), likeness=0.1, share=0.5,
        states=parts.states, weighting=parts.weighting,
    )  # fmt: skip


def _score_forgetting(parts: Parts, matching: Any) -> dict[str, Player]:
    start, chosen = start_of(parts.base), parts.chosen
    weight = parts.weight(1.0)
    loss = unlearning.ScoreForgetting(
        parts.override(), dataclasses.replace(matching, start=(start,)), forget=weight
    )
    denoising = losses.DenoisingLoss(parts.weighting)
    fake = unlearning.ScoreForgettingFake(
        distillation.FakeScoreLoss(denoising, start), forget=weight
    )
    faster = dataclasses.replace(parts.config, learning_rate=2 * parts.config.learning_rate)
    return {
        "fake": Player(parts.base, fake, build_optimizer(faster)),
        "generator": parts.player(loss, parts.generator, every=chosen.generator_every),
    }


def _generator(matching: Any) -> Method:
    return Method(
        "Chen et al. 2024", lambda parts: _score_forgetting(parts, matching),
        ("override", "weight", "generator"), kind="generator", sampled="generator", data="none",
    )  # fmt: skip


class Eye(eqx.Module):
    """A critic that looks through a model as it was: `(x, t, cond) -> logit`."""

    seen: NetworkDenoiser
    head: distillation.FeatureCritic

    def __call__(self, x: Array, t: Array, cond: Any) -> Array:
        """See `distillation.Adversarial`."""
        return self.head.on(self.seen)(x, t, cond)


def _domain_corrected(parts: Parts) -> dict[str, Player]:
    """Forgotten and kept examples of a batch are side by side: any kept class is an anchor."""
    correction = unlearning.DomainCorrection()
    loss = unlearning.GradientSurgery(correction, parts.denoising, parts.weight(1.0))
    faster = dataclasses.replace(parts.config, learning_rate=5 * parts.config.learning_rate)
    critic = Player(
        Eye(parts.base, feature_critic(parts.base, parts.info, parts.config.seed)),
        unlearning.DomainCritic(correction, "model"), build_optimizer(faster),
        trainable=lambda critic: critic.head,
    )  # fmt: skip
    return {"critic": critic, "model": parts.player(loss)}


def _slug(parts: Parts) -> NetworkDenoiser:
    """One layer, moved until the loss of what is forgotten is that of noise."""
    loss = unlearning.OnForgotten(parts.denoising)
    forget, retain = parts.gradient(loss), parts.gradient(parts.denoising)
    network = parts.base.network
    layer = unlearning.best_layers(unlearning.score_layers(network, forget, retain))[-1]
    batch, key = parts.some(256), jax.random.key(parts.config.seed)

    def moved(step):
        changed = unlearning.move_layer(network, forget, layer, step)
        return eqx.tree_at(lambda m: m.network, parts.base, changed)

    value = eqx.filter_jit(lambda step: loss(moved(step), key, batch, {})[0])
    first = float(value(jnp.zeros(())))
    # Halfway from what it was to that of no knowledge, of the data's own spread.
    enough = (first + 1.0) / 2
    step = unlearning.search_step(lambda s: max(0.0, enough - float(value(jnp.float32(s)))), 1e-3)
    return moved(step)


METHODS: dict[str, Method] = {
    "erased": Method(
        "Gandikota et al. 2023",
        _model(lambda p: unlearning.ErasedConcepts(
            p.null, p.scale(1.0), states=p.states, weighting=p.weighting)),
        data="none",
        takes=("scale",),
    ),
    "all-but-one": Method(
        "Hong et al. 2023",
        _model(lambda p: unlearning.AllButOne(
            p.null, p.chosen.override, p.weight(1.0), p.states, p.weighting)),
        data="none",
        takes=("override", "weight"),
    ),
    "ablated": Method(
        "Kumari et al. 2023",
        _model(lambda p: unlearning.ConceptAblation(False, p.weight(1.0), p.weighting)),
        data="kept",
        takes=("weight",),
    ),
    "anti-edited": Method("Wang et al. 2025", _model(_anti_edited), takes=("scale",)),
    "early-steering": Method(
        "Chen et al. 2025",
        _model(lambda p: unlearning.EarlySteering(
            p.null, p.override(), p.scale(3.0), preserve=p.weight(10.0),
            states=unlearning.OnTrajectory(p.null, steps=p.chosen.trajectory_steps, most=0.5),
            weighting=p.weighting)),
        data="none",
        takes=("override", "scale", "weight"),
    ),
    "self-distilled": Method(
        "Kim et al. 2023",
        _model(lambda p: unlearning.SafeSelfDistillation(
            p.null, "model", p.states, p.weighting)),
        data="none",
    ),
    "relabelled": Method(
        "random labels",
        _model(lambda p: _with_kept(p, _relabelled(p), 1.0)),
        takes=("override", "weight"),
    ),
    "salun": Method("Fan et al. 2023", _salun, takes=("override", "weight")),
    "erase-diff": Method(
        "Wu et al. 2024",
        _model(lambda p: unlearning.EraseDiff(_relabelled(p), p.denoising, p.weight(1.0))),
        takes=("override", "weight"),
    ),
    "surgery": Method(
        "Wu et al. 2024",
        _model(lambda p: unlearning.GradientSurgery(_relabelled(p), p.denoising, p.weight(1.0))),
        takes=("override", "weight"),
    ),
    "domain-corrected": Method("Wu et al. 2024", _domain_corrected, takes=("weight",)),
    "amnesia": Method(
        "Heng, Soh 2023",
        _model(lambda p: unlearning.SelectiveAmnesia(
            dataclasses.replace(p.denoising, null_cond=None), elastic=p.weight(10.0))),
        constants=lambda p: {"fisher": unlearning.fisher_diagonal(
            jax.random.key(p.config.seed), p.base, p.kept[np.arange(50)],
            dataclasses.replace(p.denoising, null_cond=None), times=20)},
        data="kept",
        takes=("weight",),
    ),
    "repulsion": Method(
        "Tiwary et al. 2023",
        _model(lambda p: unlearning.Repulsion(p.denoising, p.weight(1.0), 0.02)),
        constants=lambda p: {"adapted": p.tuned(p.forget)},
        takes=("weight",),
    ),
    "ascent": Method(
        "gradient ascent",
        _model(lambda p: _with_kept(
            p, unlearning.GradientAscent(dataclasses.replace(p.denoising, null_cond=None)), 1.0)),
        takes=("weight",),
    ),
    "kept-only": Method("fine-tuning", _model(lambda p: p.denoising), data="kept"),
    "score-forgetting": _generator(distillation.SiD()),
    "score-forgetting, alpha 1": _generator(distillation.SiD(1.0)),
    "score-forgetting, diff-instruct": _generator(distillation.DiffInstruct()),
    "negated": Method(
        "Ilharco et al. 2022",
        lambda p: unlearning.negate_task(p.base, p.tuned(p.forget), p.scale(1.0)),
        kind="edit", data="forget",
        takes=("scale",),
    ),
    "one-layer": Method("Cai et al. 2024", _slug, kind="edit"),
    "renamed": Method(
        "no unlearning",
        lambda p: unlearning.edit_classes(
            p.base, np.asarray(p.chosen.forget),
            np.resize(p.classes if p.chosen.override is None else [p.chosen.override],
                      len(p.chosen.forget))),
        kind="edit", data="none",
        takes=("override",),
    ),
}  # fmt: skip

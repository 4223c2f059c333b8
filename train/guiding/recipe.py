"""Methods of guidance by name: what each needs, and the denoiser and solver it makes of a run.

Of `jaxdiff.guidance` these are left out: `Composable` and `SemanticGuidance`, which with one
concept are `ClassifierFree`, and `Conditioned` and `BlackScholesBlending`, which want several;
`EventGuidance`, whose function does not know the class; `Factorized`, `FixedPart` and `Pasted`,
which want images of several parts, and `UpsampleGuidance`, of several sizes; `Product` and
`Mixture`, of several models, and `Corrected`, for a Metropolis step, which want densities;
`GuidancePolicy` and `LinearAdaptiveGuidance`, which are fitted first; `LateConstraint`,
which is trained; `PosteriorOdds` and `SafeLatent`, which keep a class out.
"""

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdiff import guidance, solvers
from jaxdiff.denoiser import Denoiser, NetworkDenoiser
from jaxdiff.networks import softened
from jaxdiff.taps import tap_names
from jaxdiff.training import CheckpointStore, load_run
from train.core.classifiers import Classifier, logits_of
from train.core.config import RunConfig, load_config
from train.core.data import DataInfo, Source
from train.core.sampling import load_model
from train.guiding.classifiers import guidable, load_guides
from train.pretraining.recipe import Config

# Consecutive samples have one class, so that they may be a population.
PARTICLES = 4
CLASSES, DROPOUT, WEAKER = "classes", "label dropout in training", "an earlier checkpoint"
ATTENTION, EMBEDDING = "attention", "an embedding of the time"
# The methods' kinds, as the picture has them apart.
RULES, OTHERS = "rules and schedules", "something else than no class"
SAMPLERS, CLASSIFIERS = "populations, noise and time travel", "classifiers"


class Parts(eqx.Module):
    """What a run has to guide with; None and () for what it does not have.

    Attributes:
        model: the denoiser.
        weaker: of an earlier checkpoint.
        guides: the classifiers.
        num_classes: how many, which is the label of none as well.
        layers: the self-attention that is made worse.
        has: what methods may need.
    """

    model: Denoiser
    weaker: Denoiser | None = None
    guides: Any = None
    num_classes: Any = eqx.field(static=True, default=None)
    layers: tuple[str, ...] = eqx.field(static=True, default=())
    has: frozenset[str] = eqx.field(static=True, default=frozenset())

    @property
    def none(self) -> int:
        """The label of no class."""
        return self.num_classes

    @property
    def clean(self) -> Any:
        """log p(y | x0), a function of x0 and y with weights."""
        return jax.tree_util.Partial(_log_prob, self.guides.clean)


def _log_prob(classifier: Classifier, x0: Array, y: Array) -> Array:
    return jax.nn.log_softmax(logits_of(classifier, x0))[y]


def _energy(classifier: Classifier, x0: Array, y: Array) -> Array:
    return -_log_prob(classifier, x0, y)


def _probabilities(classifier: Classifier, x0: Array) -> Array:
    return jax.nn.softmax(logits_of(classifier, x0))


class Bayes(eqx.Module):
    """A strength with which a step of DDIM follows Bayes' rule: scale sigma_t^2 (1 - e^-h).

    Attributes:
        scale: 1 is the rule.
        carried: whether it is that of a gradient which is added to x_s as it is, and so
            alpha_s / alpha_t of the other.
    """

    scale: Array
    carried: bool = eqx.field(static=True, default=False)

    def __call__(self, process, t, s, length):
        """See `guidance.TrainingFree`."""
        h = 0.5 * (process.log_snr(s) - process.log_snr(t))
        strength = self.scale * process.sigma(t) ** 2 * -jnp.expm1(-h)
        return strength * process.alpha(s) / process.alpha(t) if self.carried else strength


# What one sample is conditioned on, of the classes and the number of them.
def label(classes: Array, count: int) -> Any:
    """Its class."""
    del count
    return classes


def against_next(classes: Array, count: int) -> Any:
    """Its class, and the next one in place of none."""
    return {"label": classes, "negative": (classes + 1) % count}


def wanted(classes: Array, count: int) -> Any:
    """No class for the network; the class for a classifier."""
    return {"label": jnp.full_like(classes, count), "y": classes}


def measured(classes: Array, count: int) -> Any:
    """The same, as probabilities that are to be met."""
    return {"label": jnp.full_like(classes, count), "y": jax.nn.one_hot(classes, count)}


def _ddim(parts: "Parts", scale: Array) -> solvers.DiffusionSolver:
    return solvers.DDIM()


@dataclasses.dataclass(frozen=True)
class Method:
    """One method, and what it costs beside evaluations.

    Attributes:
        kind: which panel of the picture it is in.
        build: the guided denoiser, of a run's parts and the scale.
        solver: likewise; DDIM for most.
        needs: what a run must have.
        cond: of the classes and their number, what is sampled with.
        scaled: whether there is a scale.
        backward: backward passes of the network for each evaluation.
        gradients: those of a classifier, likewise.
        own: how its own number follows from the scale, for the table.
    """

    kind: str
    build: Callable[[Parts, Any], Denoiser]
    solver: Callable[[Parts, Any], Any] = _ddim
    needs: tuple[str, ...] = ()
    cond: Callable[[Array, int], Any] = label
    scaled: bool = True
    backward: int = 0
    gradients: int = 0
    own: str = ""


def _plain(parts: Parts, scale: Array) -> Denoiser:
    return parts.model


def _cfg(parts: Parts, scale: Array) -> Denoiser:
    return guidance.ClassifierFree(parts.model, parts.none, scale)


def _rule(build: Callable[[Parts, Any], Denoiser], own: str = "") -> Method:
    return Method(RULES, build, needs=(CLASSES, DROPOUT), own=own)


def _by_classifier(gradients: int, *, backward: int = 0, build=_plain, **options: Any) -> Method:
    return Method(
        CLASSIFIERS, build, needs=(CLASSES, DROPOUT), gradients=gradients, backward=backward,
        **{"cond": wanted, **options},
    )  # fmt: skip


def _freedom(parts: Parts, scale: Array) -> Any:
    energy = jax.tree_util.Partial(_energy, parts.clean.args[0])
    inside = guidance.FreeDoM(energy=energy, rho=Bayes(scale, carried=True))
    process = parts.model.process
    low, high = (process.time(jnp.asarray(log_snr)) for log_snr in (1.5, -1.5))
    return guidance.Recurrence(inside, 2, t_low=low, t_high=high)


class _Tempered(eqx.Module):
    """A log-probability times a scale."""

    log_prob: Any
    scale: Array

    def __call__(self, x0, y):
        return self.scale * self.log_prob(x0, y)


def _elucd(parts: Parts, scale: Any, beta: float | None = 3.0, **options: Any) -> Denoiser:
    """By the clean classifier, softened; the estimate that it sees is clipped."""
    guides: Any = parts.guides
    # Those of points have no activation to be softened.
    smooth = beta is None or not hasattr(guides.clean, "activation")
    classifier = guides.clean if smooth else softened(guides.clean, beta)
    logits = jax.tree_util.Partial(logits_of, classifier)
    return guidance.EluCD(parts.model, logits, scale, **options)


def _particle(parts: Parts, scale: Array) -> Denoiser:
    guided = {CLASSES, DROPOUT} <= parts.has
    return guidance.ClassifierFree(parts.model, parts.none, 3.0) if guided else parts.model


METHODS: dict[str, Method] = {
    "unguided": Method(RULES, _plain, scaled=False),
    "cfg": _rule(_cfg),
    "interval": _rule(
        lambda p, s: guidance.LimitedInterval(p.model, p.none, s, low=0.19, high=1.61)
    ),
    "linear": _rule(lambda p, s: guidance.ClassifierFree(p.model, p.none, guidance.LinearScale(s))),
    "cosine": _rule(lambda p, s: guidance.ClassifierFree(p.model, p.none, guidance.CosineScale(s))),
    "rescaled": _rule(lambda p, s: guidance.RescaledClassifierFree(p.model, p.none, s)),
    "cfg++": _rule(lambda p, s: guidance.CFGPlusPlus(p.model, p.none, s / 8), "scale / 8"),
    "apg": _rule(lambda p, s: guidance.AdaptiveProjected(p.model, p.none, s)),
    "cfg-zero": _rule(lambda p, s: guidance.CFGZeroStar(p.model, p.none, s)),
    "adaptive": _rule(lambda p, s: guidance.AdaptiveGuidance(p.model, p.none, s)),
    "negative": Method(
        OTHERS, lambda p, s: guidance.NegativePrompt(p.model, s), needs=(CLASSES,),
        cond=against_next,
    ),
    "autoguidance": Method(
        OTHERS, lambda p, s: guidance.Autoguidance(p.model, p.weaker, s), needs=(WEAKER,)
    ),
    "icg": Method(
        OTHERS, needs=(CLASSES,),
        build=lambda p, s: guidance.IndependentCondition(
            p.model, guidance.UniformLabel(p.none), s
        ),
    ),
    "tsg": Method(
        OTHERS, lambda p, s: guidance.TimeStepGuidance(p.model, s), needs=(EMBEDDING,)
    ),
    "pag": Method(
        OTHERS, lambda p, s: guidance.PerturbedAttention(p.model, s - 1, layers=p.layers),
        needs=(ATTENTION,), own="scale - 1",
    ),
    "seg": Method(
        OTHERS, lambda p, s: guidance.SmoothedEnergy(p.model, s - 1, layers=p.layers),
        needs=(ATTENTION,), own="scale - 1",
    ),
    "sag": Method(
        OTHERS, lambda p, s: guidance.SelfAttention(p.model, (s - 1) / 5, layer=p.layers[0]),
        needs=(ATTENTION,), own="(scale - 1) / 5",
    ),
    "cads": Method(
        SAMPLERS, needs=(CLASSES, DROPOUT),
        build=lambda p, s: guidance.ClassifierFree(
            guidance.ConditionAnnealed(p.model), p.none, s
        ),
    ),
    "recurrence": Method(
        SAMPLERS, _cfg, lambda p, s: guidance.Recurrence(count=2), needs=(CLASSES, DROPOUT)
    ),
    "particle": Method(
        SAMPLERS, _particle,
        lambda p, s: guidance.ParticleGuidance(
            size=PARTICLES, strength=(s - 1) / 4, features=jax.tree_util.Partial(jnp.ravel)
        ),
        backward=1, own="strength (scale - 1) / 4, with CFG at 3 where there are classes",
    ),
    "classifier": _by_classifier(
        1, build=lambda p, s: guidance.ClassifierGuidance(p.model, p.guides.noisy, s)
    ),
    "lgd": _by_classifier(
        4, backward=1, build=lambda p, s: guidance.LossGuidance(p.model, p.clean, s, draws=4)
    ),
    "mpgd": _by_classifier(1, build=lambda p, s: guidance.ManifoldPreserving(p.model, p.clean, s)),
    "universal": _by_classifier(
        3, backward=1,
        build=lambda p, s: guidance.Universal(p.model, p.clean, s, rate=0.2, iterations=2),
    ),
    "dps": _by_classifier(
        1, backward=1, cond=measured,
        solver=lambda p, s: guidance.DPS(
            operator=jax.tree_util.Partial(_probabilities, p.guides.clean), scale=s
        ),
    ),
    "freedom": _by_classifier(1, backward=1, solver=_freedom),
    "tfg": _by_classifier(
        12, backward=1,
        solver=lambda p, s: guidance.TrainingFree(
            log_prob=p.clean, rho=Bayes(s), mu=s / 10, draws=4, iterations=2
        ),
        own="rho of Bayes' rule at the scale, mu scale / 10",
    ),
    "smc": _by_classifier(
        1, backward=1,
        solver=lambda p, s: guidance.TwistedSMC(size=PARTICLES, log_prob=_Tempered(p.clean, s)),
        own="the clean classifier's probability to the power of the scale",
    ),
    "elucd": _by_classifier(1, build=lambda p, s: _elucd(p, s)),
    # With one component less each.
    "elucd-noisy-input": _by_classifier(1, build=lambda p, s: _elucd(p, s, input="xt")),
    "elucd-sharp": _by_classifier(1, build=lambda p, s: _elucd(p, s, beta=None)),
    "elucd-conditional": _by_classifier(1, build=lambda p, s: _elucd(p, s, tau2=1.0)),
    "elucd-steps": _by_classifier(
        1, own="0.004 scale, before each step of DDIM",
        solver=lambda p, s: guidance.EluCDSteps(
            solvers.DDIM(), logits=jax.tree_util.Partial(logits_of, p.guides.clean),
            scale=0.004 * s,
        ),
    ),
    "elucd-no-sine": _by_classifier(1, build=lambda p, s: _elucd(p, s, gamma=0.0)),
    "svdd": _by_classifier(
        0,
        solver=lambda p, s: guidance.SVDD(
            count=4, temperature=1 / s, reward=p.clean, of_example=True
        ),
        own="temperature 1 / scale",
    ),
}  # fmt: skip


def lacking(method: Method, has: Collection[str]) -> str | None:
    """The first thing that a method needs and a run does not have; None for nothing."""
    return next((need for need in method.needs if need not in has), None)


def check_methods(names: Collection[str], has: Collection[str], run_dir: str) -> None:
    """Refuse methods that there are not, or that the run cannot be guided by.

    Raises:
        ValueError: naming the first, and what it lacks.
    """
    for name in names:
        if name not in METHODS:
            raise ValueError(f"`methods` must be among {list(METHODS)}, got {name!r}.")
        need = lacking(METHODS[name], has)
        if need is not None:
            raise ValueError(
                f"`methods` must be those that the run can be guided by: {name!r} needs {need}, "
                f"and the run in {run_dir} has none."
            )


def abilities(config: RunConfig, info: DataInfo, model: Denoiser) -> tuple[frozenset[str], tuple]:
    """What methods may ask of a run, and the layers of its network that attend to themselves."""
    taps = _taps(model, info)
    attending = [name.removesuffix(".weights") for name in taps if name.endswith(".weights")]
    middle = attending[len(attending) // 2 :][:1]
    layers = ("mid.attn",) if "mid.attn" in attending else tuple(middle)
    there = {
        CLASSES: guidable(info),
        DROPOUT: guidable(info) and _dropout(config) > 0,
        WEAKER: len(_checkpoints(config)) > 1,
        ATTENTION: bool(layers),
        EMBEDDING: "emb" in taps,
    }
    return frozenset(name for name, has in there.items() if has), layers


def _taps(model: Denoiser, info: DataInfo) -> tuple[str, ...]:
    if not isinstance(model, NetworkDenoiser):
        return ()
    cond = None if not info.classes else jax.ShapeDtypeStruct((), np.int32)
    shape, number = (jax.ShapeDtypeStruct(s, np.float32) for s in (info.event_shape, ()))
    return tap_names(model.network, shape, number, cond)


def _dropout(config: RunConfig) -> float:
    """Of labels; 0 for runs of other recipes, which say nothing of it."""
    try:
        return load_config(config.run_dir, Config).label_dropout
    except ValueError:
        return 0.0


def _checkpoints(config: RunConfig) -> list[int]:
    return CheckpointStore(Path(config.run_dir) / "checkpoints").steps()


def weaker_step(config: RunConfig, share: float) -> int | None:
    """The earlier checkpoint that is nearest to a share of the run's steps; None if there is none.

    Args:
        config: of the run.
        share: in (0, 1).
    """
    steps = _checkpoints(config)
    return min(steps[:-1], key=lambda step: abs(step - share * steps[-1]), default=None)


def build_parts(config: RunConfig, source: Source, names: Collection[str], weaker: float) -> Parts:
    """What the methods of these names need of a run: classifiers are trained if they are missing.

    Raises:
        ValueError: for methods that the run cannot be guided by.
    """
    model, info = load_model(config).model, DataInfo.of(source)
    has, layers = abilities(config, info, model)
    check_methods(names, has, config.run_dir)
    chosen = [METHODS[name] for name in names]
    step = weaker_step(config, weaker)
    other = None
    if step is not None and any(WEAKER in method.needs for method in chosen):
        other = load_run(config.run_dir, average=config.evaluation.average, step=step).model
    guides = None
    if any(method.kind == CLASSIFIERS for method in chosen):
        guides = load_guides(config, model, source)
    return Parts(model, other, guides, info.num_classes, layers, has)

"""Drawing samples: from names to solvers and grids, conditions, and the draw itself."""

import dataclasses
import time
from typing import Annotated, Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array

import jaxdiff
from jaxdiff import finetuning, guidance, parallel, solvers
from jaxdiff.denoiser import Denoiser
from jaxdiff.distillation import told_scale
from jaxdiff.flow_map import FlowMap
from jaxdiff.processes import GaussianProcess
from jaxdiff.training import Run, load_run
from train.core.config import EvaluationConfig, RunConfig, SamplingConfig, SolverName, TimesName
from train.core.data import DataInfo, Source

# Classes, and the options that their names stand for.
SOLVERS: dict[str, tuple[type, dict[str, Any]]] = {
    "ddim": (solvers.DDIM, {}),
    "ancestral": (solvers.Ancestral, {}),
    "heun": (solvers.EDMHeun, {}),
    "euler": (diffrax.Euler, {}),
    "dpmpp_2m": (solvers.DPMSolverMultistep, {}),
    "dpmpp_2m_sde": (solvers.DPMSolverMultistep, {"eta": 1.0}),
    "unipc": (solvers.UniPC, {"order": 2}),
    "deis": (solvers.DEIS, {}),
    "sa_solver": (solvers.SASolver, {"predictor_order": 2, "corrector_order": 2}),
    "seeds": (solvers.SEEDS, {}),
    "flow_map": (solvers.FlowMapSteps, {}),
    "double_jump": (solvers.DoubleJump, {}),
}
# The same, by the names that settings have for them.
RENAMED = {"s_churn": "churn", "gamma": "eta"}


def build_solver(settings: SamplingConfig) -> Any:
    """The solver of the settings, with their options.

    Raises:
        ValueError: for an option that the solver does not have.
    """
    kind, options = SOLVERS[settings.solver]
    known = {RENAMED.get(f.name, f.name): f.name for f in dataclasses.fields(kind)}
    for name in ("order", "eta", "churn"):
        value = getattr(settings, name)
        if value is not None and name not in known:
            raise ValueError(
                f"`{name}` is no option of the solver {settings.solver!r}. Leave it out."
            )
        if value is not None:
            options = {**options, known[name]: value}
    return kind(**options)


def check_sampling(settings: SamplingConfig) -> None:
    """Refuse what a solver cannot do, before any work.

    Raises:
        ValueError: for an option that the solver does not have, or fewer steps than its order.
    """
    solver = build_solver(settings)
    order = getattr(solver, "order", 1)
    multistep = isinstance(solver, solvers.DPMSolverMultistep | solvers.UniPC | solvers.DEIS)
    if multistep and settings.sampling_steps < order:
        raise ValueError(
            f"`sampling_steps` must be at least the order of {settings.solver!r}, {order}, got "
            f"{settings.sampling_steps}."
        )
    if settings.start is not None and (settings.times is not None or not settings.start > 0):
        raise ValueError(
            "`start` must be a time above 0, and left out with a grid of `times`, got "
            f"{settings.start} and {settings.times}."
        )


def build_times(settings: SamplingConfig, process: GaussianProcess) -> Any:
    """The grid of the settings, or the number of its steps."""
    if settings.start is not None:
        return jnp.linspace(settings.start, 0, settings.sampling_steps + 1)
    if settings.times is None:
        return settings.sampling_steps
    return getattr(solvers, f"{settings.times}_times")(process, settings.sampling_steps)


def guided(
    denoiser: Denoiser | FlowMap,
    data: Source | DataInfo,
    scale: float,
    *,
    straight_through: bool = False,
) -> Any:
    """What one samples from: guided, and clipped last to the range of what are pixels.

    A student is as it is: it is told the scale, or learned it from its teacher.
    """
    info = data if isinstance(data, DataInfo) else DataInfo.of(data)
    if is_told(denoiser, info):
        scale = 1.0
    if isinstance(denoiser, FlowMap):
        if info.null_cond is not None and scale != 1:
            raise ValueError(
                "`guidance_scale` must be 1 for a map between two times, which has its teacher's, "
                f"got {scale}."
            )
        return denoiser
    if info.null_cond is not None and scale != 1:
        denoiser = guidance.ClassifierFree(denoiser, info.null_cond, scale)
    if not info.pixels:
        return denoiser
    return jaxdiff.Clipped(denoiser, straight_through=straight_through)


def is_told(model: Any, info: DataInfo) -> bool:
    """Whether a student's network takes the scale of guidance as an entry of its condition.

    Data may have a condition of this name, which is theirs.
    """
    arguments = dict(getattr(getattr(model, "network", None), "arguments", ()))
    return "scale" in arguments.get("scalars", ()) and "scale" not in info.cond


def requested(source: Source, info: DataInfo, count: int) -> Any:
    """Conditions to sample with: the trained classes in turn, or those of real examples."""
    if not info.cond:
        return requested_classes(count, info.classes)
    rows = np.arange(count) % len(source)
    return jax.tree.map(jnp.asarray, source[rows]["cond"])


def requested_classes(count: int, classes: tuple[int, ...]) -> Array | None:
    """Classes in turn, or None without classes."""
    return jnp.asarray(np.resize(np.asarray(classes, np.int32), count)) if classes else None


def draw(settings: SamplingConfig, denoiser: Denoiser, info: DataInfo, mesh, key, cond, count: int):
    """A `Solution` with `count` samples as the settings want them, and images/s.

    Of pixels, whatever a solver's last addition rounds to, within [-1, 1].
    """
    # As many on every device; what is too many is left out, and changes no other sample.
    drawn = -(-count // mesh.size) * mesh.size
    cond = jax.tree.map(lambda rows: jnp.resize(rows, (drawn, *rows.shape[1:])), cond)
    if is_told(denoiser, info):
        cond = told_scale(cond, jnp.full(drawn, settings.guidance_scale))
    begun = time.perf_counter()
    out = jaxdiff.sample(
        key,
        guided(denoiser, info, settings.guidance_scale),
        info.event_shape,
        drawn,
        cond=cond,
        solver=build_solver(settings),
        times=build_times(settings, denoiser.process),
        batch_size=settings.batch_size,
        sharding=parallel.batch_sharding(mesh) if mesh.size > 1 else None,
    )
    out = jax.tree.map(lambda rows: rows[:count], jax.block_until_ready(out))
    if info.pixels:
        out = dataclasses.replace(out, x=jnp.clip(out.x, -1, 1))
    return out, count / (time.perf_counter() - begun)


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How a finished run is sampled; None for what its own evaluation does.

    Attributes:
        run_dir: directory written by a recipe.
        guidance_scale: 1 is the plain conditional model, 0 the unconditional one.
        solver: name of the solver.
        sampling_steps: its steps.
        times: the grid of steps.
        start: the time that sampling begins at, of steps uniform in time.
        order: of the solver.
        eta: noise that the solver adds.
        churn: noise that "heun" adds, over all steps.
        average: which average of the weights, counted from 0.
        ema_width: relative width of an average that is made afterwards, of power-function ones.
        batch_size: samples computed at a time.
        adapter: file of an adapter that is merged into the network, adapter.npz of a tuned run.
    """

    run_dir: Annotated[str, tyro.conf.Positional]
    guidance_scale: float | None = None
    solver: SolverName | None = None
    sampling_steps: int | None = None
    times: TimesName | None = None
    start: float | None = None
    order: int | None = None
    eta: float | None = None
    churn: float | None = None
    average: int | None = None
    ema_width: float | None = None
    batch_size: int | None = None
    adapter: str | None = None


def changed(config: RunConfig, options: SamplingOptions) -> RunConfig:
    """A run's configuration with the evaluation that the options want."""
    names = {f.name for f in dataclasses.fields(EvaluationConfig)}
    given = {k: v for k, v in vars(options).items() if k in names and v is not None}
    # Another solver does not take the options of the run's own.
    if given.get("solver", config.evaluation.solver) != config.evaluation.solver:
        given = {"order": None, "eta": None, "churn": None, **given}
    # Nor does one average go with another.
    if {"average", "ema_width"} & set(given):
        given = {"average": 0, "ema_width": None, **given}
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, **given))
    config.check()
    check_sampling(config.evaluation)
    return config


def load_model(config: RunConfig, adapter: str | None = None) -> Run:
    """The model of a run, with the average that the configuration wants, and perhaps an adapter."""
    settings = config.evaluation
    found = load_run(config.run_dir, average=settings.average, sigma_rel=settings.ema_width)
    if adapter is None:
        return found
    adapted = finetuning.adapt(found.model, finetuning.load_adapter(adapter))
    return found._replace(model=finetuning.merged(adapted))

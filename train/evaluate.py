"""Sample a trained run and measure the samples against held-out real data.

    python -m train.evaluate runs/digits --solver unipc --sampling-steps 10

measures a finished run again, with other samplers, and writes beside the first figures.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jaxtyping import Array
from tqdm import tqdm

import jaxdiff
from jaxdiff import data, guidance, metrics, networks, parallel, solvers
from jaxdiff.data import make_loader
from jaxdiff.denoiser import Denoiser
from jaxdiff.processes import GaussianProcess
from jaxdiff.training import (
    CheckpointStore,
    Hook,
    Player,
    TrainState,
    fit,
    init_train_state,
    load_run,
    make_train_step,
    write_json,
)
from train import config as cfg
from train import report
from train.data import DataInfo, Source, build_sources
from train.runner import run

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
}


def build_solver(settings: cfg.EvaluationConfig) -> Any:
    """The solver of the settings, with their options.

    Raises:
        ValueError: for an option that the solver does not have.
    """
    kind, options = SOLVERS[settings.solver]
    given = {"order": settings.order, "eta": settings.eta, "s_churn": settings.churn}
    options = options | {name: value for name, value in given.items() if value is not None}
    known = {f.name for f in dataclasses.fields(kind)}
    if unknown := sorted(set(options) - known):
        name = {"s_churn": "churn"}.get(unknown[0], unknown[0])
        raise ValueError(f"`{name}` is no option of the solver {settings.solver!r}. Leave it out.")
    return kind(**options)


def build_times(settings: cfg.EvaluationConfig, process: GaussianProcess) -> Any:
    """The grid of the settings, or the number of its steps."""
    if settings.times is None:
        return settings.sampling_steps
    return getattr(solvers, f"{settings.times}_times")(process, settings.sampling_steps)


def guided(denoiser: Denoiser, source: Source | DataInfo, scale: float) -> Denoiser:
    """The denoiser one samples from: guided, and clipped last to the range of what are pixels."""
    info = source if isinstance(source, DataInfo) else DataInfo.of(source)
    if info.null_cond is not None and scale != 1:
        denoiser = guidance.ClassifierFree(denoiser, info.null_cond, scale)
    return jaxdiff.Clipped(denoiser) if info.pixels else denoiser


def classifier_loss(classifier, key, batch, frozen):
    """Cross entropy with label smoothing of 0.1, on images shifted by up to one pixel."""
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(batch["x"])))

    def logits(key, x):
        shift_key, dropout_key = jax.random.split(key)
        shift = jax.random.randint(shift_key, (2,), -1, 2)
        padded = jnp.pad(x, ((1, 1), (1, 1), (0, 0)), mode="edge")
        moved = jax.lax.dynamic_slice(padded, (*(shift + 1), 0), x.shape)
        return classifier(moved, key=dropout_key)

    targets = optax.smooth_labels(jax.nn.one_hot(batch["cond"], classifier.num_classes), 0.1)
    values = jax.vmap(logits)(keys, batch["x"])
    return optax.softmax_cross_entropy(values, targets).mean(), {}


def load_classifier(config: cfg.Config, source: Source) -> networks.ConvClassifier:
    """The classifier that measures samples: trained on the real train split once, then cached.

    Cached as a checkpoint in the run directory.
    """
    height, width, channels = source.event_shape
    classifier = networks.ConvClassifier(
        image_size=(height, width),
        in_channels=channels,
        num_classes=source.num_classes,
        rngs=nnx.Rngs(config.seed),
    )
    steps = config.evaluation.classifier_steps
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    player = Player(classifier, classifier_loss, optimizer, trainable=lambda model: model)
    state = init_train_state({"classifier": player}, jax.random.key(config.seed))
    store = CheckpointStore(Path(config.run_dir) / "classifier", keep=1)
    restored = store.restore_latest(state.unpack())
    if restored is not None:
        state = TrainState.pack(**restored[0])
    done = int(state.step)
    if done < steps:
        with tqdm(total=steps, initial=done, unit="step", desc="classifier") as bar:

            def progress(step, state, metrics):
                bar.update(step - bar.n)  # whose True would end the run

            state = fit(
                make_train_step({"classifier": player}),
                state,
                iter(make_loader(source, min(64, len(source)), seed=config.seed)),
                num_steps=steps,
                hooks=[Hook(20, progress)],
                store=store,
                checkpoint_every=steps,
            )
    return state.players["classifier"].model


def requested(source: Source, info: DataInfo, count: int) -> Any:
    """Conditions to sample with: the trained classes in turn, or those of real examples."""
    if not info.cond:
        return requested_classes(count, info.classes)
    rows = np.arange(count) % len(source)
    return jax.tree.map(jnp.asarray, source[rows]["cond"])


def requested_classes(count: int, classes: tuple[int, ...]) -> Array | None:
    """Classes in turn, or None without classes."""
    return jnp.asarray(np.resize(np.asarray(classes, np.int32), count)) if classes else None


def draw(
    settings: cfg.EvaluationConfig, denoiser: Denoiser, info: DataInfo, mesh, key, cond, count: int
):
    """A `Solution` with `count` samples as the settings want them, and images/s.

    Of pixels, whatever a solver's last addition rounds to, within [-1, 1].
    """
    # As many on every device; what is too many is left out, and changes no other sample.
    drawn = -(-count // mesh.size) * mesh.size
    cond = jax.tree.map(lambda rows: jnp.resize(rows, (drawn, *rows.shape[1:])), cond)
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


def evaluate(
    config: cfg.Config,
    denoiser: Denoiser,
    source: Source,
    held_out: Source,
    mesh,
    *,
    steps_per_second: float | None = None,
    name: str = "",
) -> dict[str, float]:
    """Sample, write figures and pictures, and print a table.

    Writes evaluation<name>.json and samples<name>.png into the run directory. The floor of each
    distance is the same distance between real train and real held-out data, with as many examples.
    """
    run_dir, settings, info = Path(config.run_dir), config.evaluation, DataInfo.of(source)
    count = settings.num_samples
    cond = requested(held_out, info, count)
    key = jax.random.key(config.seed + 1)
    out, rate = draw(settings, denoiser, info, mesh, key, cond, count)
    samples = np.asarray(out.x)

    chosen = np.random.default_rng(0).permutation(len(source))[: min(count, len(source))]
    real, test = source[chosen], held_out[np.arange(len(held_out))]
    figures = {
        "nfe": int(out.nfe[0]),
        "images_per_second": rate,
        "train_steps_per_second": steps_per_second,
        "sliced_wasserstein": _sliced(samples, test["x"]),
        "sliced_wasserstein_floor": _sliced(real["x"], test["x"]),
    }
    rows = [_row("sliced Wasserstein distance", figures, "sliced_wasserstein", "{:.4f}")]
    if measurable(info, settings) and min(len(samples), len(held_out)) > 1:
        classifier = load_classifier(config, source)
        figures |= _recognition(classifier, samples, cond, real["x"], test)
        rows = [
            _row("class accuracy", figures, "accuracy", "{:.1%}"),
            _row("Frechet distance", figures, "frechet", "{:.3f}"),
            *rows,
        ]
    if info.words == data.PROMPT_WORDS:
        shown = _attributes(samples, cond)
        floor = _attributes(test["x"], test["cond"])
        figures |= shown | {f"{what}_floor": share for what, share in floor.items()}
        rows += [_row(f"{what} as the caption says", figures, what, "{:.1%}") for what in shown]
    write_json(run_dir / f"evaluation{name}.json", figures)
    speed = f"{figures['images_per_second']:.0f} images/s (compilation included)"
    if steps_per_second:
        speed += f", {steps_per_second:.1f} training steps/s"
    speed += f", {figures['nfe']} network evaluations each"
    header = (f"{count} samples", "samples", "real train data")
    print(f"\n{report.table(rows, header)}\n\n{speed}; figures and pictures are in {run_dir}")
    picture(run_dir / f"samples{name}.png", samples, cond, test["x"], settings, info)
    return figures


def measurable(info: DataInfo, settings: cfg.EvaluationConfig) -> bool:
    """Whether the classifier can measure the samples: images of even sides, in classes alone."""
    shape = info.event_shape
    images = len(shape) == 3 and shape[0] % 2 == 0 and shape[1] % 2 == 0
    return images and bool(info.classes) and not info.cond and settings.classifier_steps > 0


def _sliced(x: np.ndarray, y: np.ndarray) -> float:
    flat = [jnp.asarray(v).reshape(len(v), -1) for v in (x, y)]
    return float(metrics.sliced_wasserstein(jax.random.key(0), *flat, num_projections=256))


def _row(title: str, figures: dict, name: str, form: str) -> tuple[str, str, str]:
    return title, form.format(figures[name]), form.format(figures[f"{name}_floor"])


def _recognition(classifier, samples, cond, real, test) -> dict[str, float]:
    @eqx.filter_jit
    def look(classifier, x):
        return jax.vmap(classifier)(x), jax.vmap(classifier.features)(x)

    logits, features = look(classifier, samples)
    test_logits, test_features = look(classifier, test["x"])
    _, real_features = look(classifier, real)
    accuracy, error = metrics.accuracy(logits, cond)
    return {
        "accuracy": float(accuracy),
        "accuracy_standard_error": float(error),
        # What the classifier itself reaches on data it has never seen.
        "accuracy_floor": float(metrics.accuracy(test_logits, jnp.asarray(test["cond"]))[0]),
        "frechet": float(metrics.frechet_distance(features, test_features)),
        "frechet_floor": float(metrics.frechet_distance(real_features, test_features)),
    }


def _attributes(samples, cond) -> dict[str, float]:
    """How many samples show what their captions say, of those that say it."""
    said, shown = np.asarray(cond["tokens"]), data.prompt_attributes(samples)
    columns = {"size": (0, shown.size), "colour": (1, shown.colour), "place": (3, shown.place)}
    return {
        name: float(np.mean(found[rows] == said[rows, column]))
        for name, (column, found) in columns.items()
        if (rows := said[:, column] < len(data.PROMPT_WORDS)).any()
    }


def picture(path: Path, samples, cond, reference, settings, info: DataInfo) -> None:
    """Write what the samples look like: a grid with a row for each class, or points."""
    if len(info.event_shape) != 3:
        report.scatter(samples, reference, path)
        return
    if info.cond or cond is None or np.ptp(cond) == 0:
        report.image_grid(samples[:100], path, columns=min(10, len(samples)), pixels=info.pixels)
        return
    labels = np.asarray(cond)
    present, counts = np.unique(labels, return_counts=True)
    columns = min(settings.per_class, int(counts.min()))
    titles = [info.name_of(label) for label in present]
    images = np.concatenate([samples[labels == label][:columns] for label in present])
    report.image_grid(images, path, columns=columns, titles=titles, pixels=info.pixels)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure again; see `EvaluationConfig` for what is not said here.

    Attributes:
        run_dir: directory written by train.pretrain.
        name: of the figures, evaluation-<name>.json; None for the solver and its steps.
        data_path: where the data are, if they have moved.
    """

    run_dir: Annotated[str, tyro.conf.Positional]
    num_samples: int | None = None
    guidance_scale: float | None = None
    solver: cfg.SolverName | None = None
    sampling_steps: int | None = None
    times: cfg.TimesName | None = None
    order: int | None = None
    eta: float | None = None
    churn: float | None = None
    average: int | None = None
    batch_size: int | None = None
    classifier_steps: int | None = None
    name: str | None = None
    data_path: str | None = None


def moved_sources(config: cfg.Config) -> tuple[Source, Source]:
    """The data of a finished run, or an error that says how to name their new place."""
    try:
        return build_sources(config.data)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} If the data have moved, pass --data-path.") from None


def changed(config: cfg.Config, options: Any) -> cfg.Config:
    """A run's configuration with the evaluation that the options want."""
    names = {f.name for f in dataclasses.fields(cfg.EvaluationConfig)}
    given = {k: v for k, v in vars(options).items() if k in names and v is not None}
    # Another solver does not take the options of the run's own.
    if given.get("solver", config.evaluation.solver) != config.evaluation.solver:
        given = {"order": None, "eta": None, "churn": None, **given}
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, **given))
    cfg.check(config)
    build_solver(config.evaluation)
    return config


def main(options: Options) -> dict[str, float]:
    """Measure a run again."""
    config = changed(cfg.load_config(options.run_dir), options)
    if options.data_path is not None:
        moved = dataclasses.replace(config.data, path=options.data_path)
        config = dataclasses.replace(config, data=moved)
    source, held_out = moved_sources(config)
    model = load_run(options.run_dir, average=config.evaluation.average).model
    settings = config.evaluation
    name = options.name or f"{settings.solver}-{settings.sampling_steps}"
    return evaluate(config, model, source, held_out, parallel.make_mesh(), name=f"-{name}")


def cli(args: list[str] | None = None) -> int:
    """The command line; the exit status."""
    options = tyro.cli(Options, args=args)
    return run(lambda: main(options))


if __name__ == "__main__":
    sys.exit(cli())

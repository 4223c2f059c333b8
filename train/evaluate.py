"""Sample a trained run and measure the samples against held-out real data."""

import time
from pathlib import Path

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array

import jaxdiff
from jaxdiff import guidance, metrics, networks, parallel, solvers
from jaxdiff.data import ArraySource, make_loader
from jaxdiff.denoiser import Denoiser
from jaxdiff.training import (
    CheckpointStore,
    Player,
    TrainState,
    fit,
    init_train_state,
    make_train_step,
    write_json,
)
from train import config as cfg
from train import report

SOLVERS = {
    "ddim": solvers.DDIM,
    "ancestral": solvers.Ancestral,
    "heun": solvers.EDMHeun,
    "euler": diffrax.Euler,
    "dpmpp_2m": solvers.DPMSolverMultistep,
    "dpmpp_2m_sde": lambda: solvers.DPMSolverMultistep(eta=1.0),
    "unipc": lambda: solvers.UniPC(2),
    "deis": solvers.DEIS,
    "sa_solver": lambda: solvers.SASolver(2, 2),
    "seeds": solvers.SEEDS,
}


def guided(denoiser: Denoiser, source: ArraySource, scale: float) -> Denoiser:
    """The denoiser one samples from: clipped to the range of images, and guided by the class."""
    if len(source.event_shape) == 3:
        denoiser = jaxdiff.Clipped(denoiser)
    if source.num_classes is None:
        return denoiser
    return guidance.ClassifierFree(denoiser, source.num_classes, scale)


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


def load_classifier(config: cfg.Config, source: ArraySource) -> networks.ConvClassifier:
    """The classifier that measures samples: trained on the real train split once, then cached.

    Cached as a checkpoint in the run directory.
    """
    size, _, channels = source.event_shape
    classifier = networks.ConvClassifier(
        image_size=size,
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
    state = fit(
        make_train_step({"classifier": player}),
        state,
        iter(make_loader(source, min(64, len(source)), seed=config.seed)),
        num_steps=steps,
        store=store,
        checkpoint_every=steps,
    )
    return state.players["classifier"].model


def requested_classes(count: int, num_classes: int | None) -> Array | None:
    """Classes 0, 1, ... in turn, or None without classes."""
    return None if num_classes is None else jnp.arange(count, dtype=jnp.int32) % num_classes


def draw(config: cfg.Config, denoiser: Denoiser, source: ArraySource, mesh, key, cond, count: int):
    """Samples `(count, *event)` as the run's evaluation settings want them, and images/s."""
    settings = config.evaluation
    sharding = parallel.batch_sharding(mesh) if count % mesh.size == 0 else None

    def run():
        return jaxdiff.sample(
            key,
            guided(denoiser, source, settings.guidance_scale),
            source.event_shape,
            count,
            cond=cond,
            solver=SOLVERS[settings.solver](),
            times=settings.sampling_steps,
            batch_size=settings.batch_size if mesh.size == 1 else None,
            sharding=sharding,
        )

    begun = time.perf_counter()
    out = jax.block_until_ready(run())
    return np.asarray(out.x), out, count / (time.perf_counter() - begun)


def evaluate(
    config: cfg.Config, state: TrainState, source: ArraySource, mesh, *, steps_per_second=None
) -> dict[str, float]:
    """Sample from the averaged weights, write pictures and figures, and print a table.

    Writes samples.png and evaluation.json into the run directory. The floor of each distance is
    the same distance between real train and real held-out data, with as many examples.
    """
    run_dir, settings = Path(config.run_dir), config.evaluation
    held_out = cfg.build_source(config.data, "test")
    denoiser = state.players["model"].averaged()
    count = settings.num_samples
    cond = requested_classes(count, source.num_classes)
    key = jax.random.key(config.seed + 1)
    samples, out, rate = draw(config, denoiser, source, mesh, key, cond, count)

    chosen = np.random.default_rng(0).permutation(len(source))[: min(count, len(source))]
    real, test = source[chosen]["x"], held_out[np.arange(len(held_out))]
    figures = {
        "nfe": int(out.nfe[0]),
        "images_per_second": rate,
        "train_steps_per_second": steps_per_second,
        "sliced_wasserstein": _sliced(samples, test["x"]),
        "sliced_wasserstein_floor": _sliced(real, test["x"]),
    }
    rows = [_row("sliced Wasserstein distance", figures, "sliced_wasserstein", "{:.4f}")]
    if len(source.event_shape) == 3 and source.num_classes is not None:
        classifier = load_classifier(config, source)
        figures |= _recognition(classifier, samples, cond, real, test)
        rows = [
            _row("class accuracy", figures, "accuracy", "{:.1%}"),
            _row("Frechet distance", figures, "frechet", "{:.3f}"),
            *rows,
        ]
    _picture(run_dir, samples, cond, test["x"], settings, source)
    write_json(run_dir / "evaluation.json", figures)
    speed = f"{figures['images_per_second']:.0f} images/s (compilation included)"
    if steps_per_second:
        speed += f", {steps_per_second:.1f} training steps/s"
    header = (f"{count} samples", "samples", "real train data")
    print(f"\n{report.table(rows, header)}\n\n{speed}; figures and pictures are in {run_dir}")
    return figures


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


def _picture(run_dir, samples, cond, reference, settings, source) -> None:
    path = run_dir / "samples.png"
    if len(source.event_shape) == 1:
        report.scatter(samples, reference, path)
        return
    if cond is None:
        report.image_grid(samples[:100], path, columns=10)
        return
    classes = range(source.num_classes)
    columns = max(1, min(settings.per_class, len(samples) // source.num_classes))
    rows = [samples[np.asarray(cond) == c][:columns] for c in classes]
    titles = [str(c) for c, row in zip(classes, rows, strict=True) if len(row)]
    report.image_grid(np.concatenate(rows), path, columns=columns, titles=titles)

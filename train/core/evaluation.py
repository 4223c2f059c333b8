"""Measuring samples against held-out real data: metrics by name, a table, and a picture."""

import copy
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import tree_util
from jaxtyping import Array

from jaxdiff import data, metrics, networks, parallel
from jaxdiff.denoiser import Denoiser
from jaxdiff.training import write_json
from train.core import figures
from train.core.classifiers import Classifier, load_classifier, logits_of
from train.core.config import EvaluationConfig, RunConfig
from train.core.data import DataInfo, Source
from train.core.sampling import draw, requested

Batch = Mapping[str, Any]
Metric = Callable[[Batch, Batch], Any]
"""(samples, reference) -> a number, or a number and its standard error.

Both are batches of a source: "x" of shape `(n, *event)`, and their conditions "cond" where there
are any.
"""
MOST_REFERENCES = 50_000  # as many as the field's metrics are taken over
BLOCK = 250  # rows of matrices between samples that are in memory at once
MOST_RESAMPLED = 256  # features of which Frechet distances are resampled
MOST_EIGENVALUES = 2000  # of samples whose matrix is diagonalised
FEATURES = (
    *("frechet", "frechet_limit", "kid", "precision", "recall", "density", "coverage", "vendi"),
    *("spatial_frechet", "c2st", "copied"),
)
# Those that a classifier makes, or makes features for, where there is one.
CLASSIFIED = ("accuracy", "classifier_score", *FEATURES)


@eqx.filter_jit
def _logits(classifier, x):
    return jax.vmap(lambda x: logits_of(classifier, x))(x)


class ClassAccuracy:
    """The share of samples that a classifier takes for what they were asked to be."""

    def __init__(self, classifier: Classifier):
        self.classifier = classifier

    def __call__(self, samples: Batch, reference: Batch) -> tuple[Array, Array]:
        """The share and its standard error."""
        logits = _logits(self.classifier, samples["x"])
        return metrics.accuracy(logits, jnp.asarray(samples["cond"]))


class OfFeatures:
    """A metric of a network's features, or of the pixels themselves without one.

    Args:
        metric: of the features of samples and of reference.
        classifier: whose; a small classifier, InceptionV3, or None for pixels.
        against: a source in place of the reference, such as all that was trained on.
        cache: where features are kept, for reference examples are measured again and again.
        equal: whether as many of both are compared.
        look: what is seen of an image: `(classifier, x)` to a vector; None for `features_by`'s.
    """

    def __init__(
        self,
        metric: Callable[[Array, Array], Any],
        classifier: networks.ConvClassifier | networks.InceptionV3 | None,
        *,
        against: Source | None = None,
        cache: Path | None = None,
        equal: bool = False,
        look: Callable[..., Array] | None = None,
    ):
        self.metric, self.cache = metric, cache
        seen = features_by(classifier)
        self.features = seen if look is None else tree_util.Partial(look, classifier)
        self.against, self.equal = against, equal
        # Inception sees images of 299 x 299, whatever the data's size.
        self.batch_size = 32 if isinstance(classifier, networks.InceptionV3) else 500

    def __call__(self, samples: Batch, reference: Batch) -> Any:
        """What the metric gives."""
        there = np.asarray(reference["x"]) if self.against is None else self.against
        size = self.batch_size
        x = metrics.features_of(self.features, np.asarray(samples["x"]), batch_size=size)
        y = metrics.features_of(self.features, there, batch_size=size, cache=self.cache)
        if self.equal:  # of either the same number, whatever its order
            count = min(len(x), len(y))
            x, y = (z[np.random.default_rng(0).permutation(len(z))[:count]] for z in (x, y))
        return self.metric(jnp.asarray(x), jnp.asarray(y))

    def taking(self, metric: Callable[[Array, Array], Any]) -> "OfFeatures":
        """Another metric of the same features."""
        found = copy.copy(self)
        found.metric = metric
        return found


def features_by(
    classifier: networks.ConvClassifier | networks.InceptionV3 | None,
) -> Callable[[Array], Array]:
    """What a network sees in one image, or its pixels; the weights are leaves."""
    return tree_util.Partial(_flat if classifier is None else _seen, classifier)


def _flat(_, x):
    return x.reshape(-1)


def _seen(classifier, x):
    return classifier.features(_coloured(classifier, x))


def _coloured(classifier, x):
    grey = isinstance(classifier, networks.InceptionV3) and x.shape[-1] == 1
    return jnp.repeat(x, 3, -1) if grey else x


def _seen_where(classifier, x):
    """Seven channels of a layer that still knows where things are, as sFID takes them.

    Nash, Menick, Dieleman, Battaglia, "Generating Images with Sparse Representations", 2021, arXiv
    2103.03841.
    """
    if classifier is None:
        return x.reshape(-1)
    name = "Mixed_6d" if isinstance(classifier, networks.InceptionV3) else "conv3"
    tap = networks.Tap(wanted=[name])
    classifier(_coloured(classifier, x), tap=tap)
    return tap.values[name][..., :7].reshape(-1)


class ClassifierScore:
    """How sure a classifier is, and of how many classes."""

    def __init__(self, classifier: networks.ConvClassifier):
        self.classifier = classifier

    def __call__(self, samples: Batch, reference: Batch) -> Array:
        """The score."""
        return metrics.classifier_score(_logits(self.classifier, samples["x"]))


def kid(x: Array, y: Array) -> tuple[Array, Array]:
    """The unbiased squared MMD under a cubic kernel, and its standard error."""
    value = metrics.mmd2_unbiased(x, y, block_size=BLOCK)
    variance = metrics.mmd2_variance(x, y, block_size=BLOCK)
    return value, jnp.where(variance > 0, jnp.sqrt(variance), jnp.nan)  # 0 is "not known"


def frechet(x: Array, y: Array) -> tuple[Array, ...]:
    """The Frechet distance and, where it is quickly taken again, its error by resampling both."""
    key, distance = jax.random.key(0), metrics.frechet_distance
    if x.shape[1] > MOST_RESAMPLED:
        return (distance(x, y),)
    return distance(x, y), metrics.bootstrap_error(key, distance, x, y, count=20)


def of_features(
    classifier: networks.ConvClassifier | networks.InceptionV3 | None, source: Source, cache: Path
) -> dict[str, Metric]:
    """The metrics of features, by name."""
    key = jax.random.key(0)
    precision_recall = functools.partial(metrics.precision_recall, block_size=BLOCK)
    density_coverage = functools.partial(metrics.density_coverage, block_size=BLOCK)

    def one(metric, **options):
        return OfFeatures(metric, classifier, cache=cache, **options)

    return {
        "frechet": one(frechet),
        "frechet_limit": one(lambda x, y: metrics.frechet_limit(key, x, y)[:2]),
        "spatial_frechet": one(frechet, look=_seen_where),
        "kid": one(kid),
        "precision": one(lambda x, y: precision_recall(x, y)[0], equal=True),
        "recall": one(lambda x, y: precision_recall(x, y)[1], equal=True),
        "density": one(lambda x, y: density_coverage(x, y)[0], equal=True),
        "coverage": one(lambda x, y: density_coverage(x, y)[1], equal=True),
        "vendi": one(lambda x, y: metrics.vendi_score(x[:MOST_EIGENVALUES])),
        "c2st": one(lambda x, y: tuple(metrics.c2st(key, x, y)), equal=True),
        "copied": OfFeatures(
            lambda x, y: metrics.copied_share(x, y, block_size=BLOCK), None,
            against=source, cache=cache,
        ),
    }  # fmt: skip


def sliced_wasserstein(samples: Batch, reference: Batch) -> Array:
    """The sliced Wasserstein distance of order 2, over 256 directions."""
    flat = [jnp.asarray(batch["x"]).reshape(len(batch["x"]), -1) for batch in (samples, reference)]
    return metrics.sliced_wasserstein(jax.random.key(0), *flat, num_projections=256)


def mmd2(samples: Batch, reference: Batch, count: int = 1000) -> Array:
    """The squared MMD under a Gaussian kernel of the median bandwidth, of so many examples."""

    def some(x):
        return jnp.asarray(x[np.random.default_rng(0).permutation(len(x))[:count]])

    x, y = some(samples["x"]), some(reference["x"])
    return metrics.mmd2_unbiased(x, y, metrics.RBF(metrics.median_bandwidth(x, y)))


def _share(hits: np.ndarray) -> tuple[float, float]:
    """The share that is true, and its binomial standard error; NaN of none at all."""
    if not len(hits):
        return float("nan"), float("nan")
    share = float(np.mean(hits))
    return share, float(np.sqrt(share * (1 - share) / len(hits)))


class PromptAttribute:
    """The share of coloured digits that show what their captions say, of those that say it.

    Args:
        name: "size", "colour" or "place".
    """

    def __init__(self, name: str):
        self.name, self.column = name, {"size": 0, "colour": 1, "place": 3}[name]

    def __call__(self, samples: Batch, reference: Batch) -> tuple[float, float]:
        """The share and its standard error."""
        said = np.asarray(samples["cond"]["tokens"])[:, self.column]
        shown = getattr(data.prompt_attributes(np.asarray(samples["x"])), self.name)
        rows = said < len(data.PROMPT_WORDS)
        return _share(shown[rows] == said[rows])


class PromptDigit:
    """The share of coloured digits that are the one their captions say, of those that say one.

    Told by the nearest of real training images, digits in grey: what it makes of held-out ones is
    the floor.

    Args:
        source: training images of the world of captions.
    """

    def __init__(self, source: Source):
        examples = source[np.arange(0, len(source), 2)]
        said = np.asarray(examples["cond"]["tokens"])[:, 2]
        known = said < len(data.PROMPT_WORDS)
        self.pixels, self.said = self._pixels(examples["x"])[known], said[known]

    @staticmethod
    def _pixels(x) -> np.ndarray:
        return data.prompt_attributes(np.asarray(x)).digit_pixels.reshape(len(x), -1)

    def __call__(self, samples: Batch, reference: Batch) -> tuple[float, float]:
        """The share and its standard error."""
        said = np.asarray(samples["cond"]["tokens"])[:, 2]
        rows = said < len(data.PROMPT_WORDS)
        pixels = self._pixels(samples["x"])[rows]
        # |a - b|^2 without |a|^2, which the nearest does not depend on.
        apart = (self.pixels**2).sum(1) - 2 * pixels @ self.pixels.T
        return _share(self.said[apart.argmin(1)] == said[rows])


def classifiable(info: DataInfo) -> bool:
    """Whether the data are images of classes that the small classifier can learn."""
    shape = info.event_shape
    images = len(shape) == 3 and shape[0] % 2 == 0 and shape[1] % 2 == 0
    return images and bool(info.classes) and not info.cond


def suitable(info: DataInfo, settings: EvaluationConfig, count: int) -> tuple[str, ...]:
    """Names of the metrics that are taken of such data unless others are asked for."""
    classes = classifiable(info) and settings.classifier_steps > 0
    pairs = min(settings.num_samples, count) > 1
    return (
        *(("accuracy", "frechet") if classes and pairs else ()),
        "sliced_wasserstein",
        *(("mmd2",) if pairs else ()),
        *(("size", "colour", "place", "digit") if info.words == data.PROMPT_WORDS else ()),
    )


def possible(info: DataInfo, settings: EvaluationConfig, count: int) -> tuple[str, ...]:
    """Names of all metrics that can be taken of such data, held-out examples counted."""
    found = suitable(info, settings, count)
    more = ("classifier_score",) if "accuracy" in found else ()
    if min(settings.num_samples, count) >= 16:
        more += FEATURES
    return (*found, *(name for name in more if name not in found))


def check_metrics(info: DataInfo, settings: EvaluationConfig, count: int) -> None:
    """Refuse metrics that cannot be taken, before any work.

    Raises:
        ValueError: naming the first.
    """
    known = possible(info, settings, count)
    for name in settings.metrics:
        if name not in known:
            raise ValueError(
                f"`evaluation.metrics` must be among {list(known)} for these data, got {name!r}."
            )


def build_metrics(
    config: RunConfig,
    source: Source,
    count: int,
    mesh: jax.sharding.Mesh,
    inception: networks.InceptionV3 | None = None,
) -> dict[str, Metric]:
    """The metrics that the configuration names, or all that suit so many held-out examples.

    Those of features are of Inception's if it is given, and of a small classifier's otherwise.
    """
    settings, info = config.evaluation, DataInfo.of(source)
    names = settings.metrics or suitable(info, settings, count)
    found: dict[str, Metric] = {"sliced_wasserstein": sliced_wasserstein, "mmd2": mmd2}
    found |= {name: PromptAttribute(name) for name in ("size", "colour", "place")}
    if "digit" in names:
        found["digit"] = PromptDigit(source)
    classifier = None
    if "accuracy" in suitable(info, settings, count) and set(CLASSIFIED) & set(names):
        classifier = load_classifier(config, source, mesh)
        found |= {
            "accuracy": ClassAccuracy(classifier),
            "classifier_score": ClassifierScore(classifier),
        }
    if set(FEATURES) & set(names):
        found |= of_features(
            inception or classifier, source, config.shared_dir / "features-of-data"
        )
    return {name: found[name] for name in names}


# How they are called and written in the table.
_TITLES = {
    "accuracy": ("class accuracy", "{:.1%}"),
    "frechet": ("Frechet distance", "{:.3f}"),
    "sliced_wasserstein": ("sliced Wasserstein distance", "{:.4f}"),
    "mmd2": ("squared MMD", "{:.5f}"),
    "kid": ("squared MMD of features (KID)", "{:.5f}"),
    "spatial_frechet": ("Frechet distance of spatial features", "{:.3f}"),
    "frechet_limit": ("Frechet distance, of infinitely many", "{:.3f}"),
    "vendi": ("Vendi score", "{:.2f}"),
    "classifier_score": ("classifier score", "{:.2f}"),
    "c2st": ("told from real ones", "{:.1%}"),
    "copied": ("copied from training images", "{:.1%}"),
    **{name: (name, "{:.3f}") for name in ("precision", "recall", "density", "coverage")},
    **{
        name: (f"{name} as the caption says", "{:.1%}")
        for name in ("size", "colour", "place", "digit")
    },
}


def measure(
    metrics: Mapping[str, Metric], samples: Batch, reference: Batch, real: Batch
) -> dict[str, float]:
    """All metrics of samples, and of real data in their place.

    Args:
        metrics: by name.
        samples: what is measured.
        reference: held-out examples.
        real: training examples, as many as there are samples.

    Returns:
        name -> value; name_standard_error, where the metric knows one; and name_floor, what
        held-out examples reach against the training examples.
    """
    return {**figures_of(metrics, samples, reference), **floors(metrics, reference, real)}


def figures_of(metrics: Mapping[str, Metric], samples: Batch, reference: Batch) -> dict[str, float]:
    """All metrics of samples: name -> value; name_standard_error, where the metric gives one."""
    numbers = {}
    finite = bool(np.isfinite(np.asarray(samples["x"], float)).all())
    for name, metric in metrics.items():
        # Samples that are not finite have no figures, and a run that made them has an end.
        found = metric(samples, reference) if finite else float("nan")
        value, *error = np.atleast_1d(np.asarray(found, float))
        numbers[name] = float(value)
        # Of one block there is no error.
        if error and np.isfinite(error[0]):
            numbers[f"{name}_standard_error"] = float(error[0])
    return numbers


def floors(metrics: Mapping[str, Metric], reference: Batch, real: Batch) -> dict[str, float]:
    """name_floor, what held-out examples reach against the training examples."""
    return {
        f"{name}_floor": float(np.ravel(np.asarray(metric(reference, real), float))[0])
        for name, metric in metrics.items()
    }


def references(count: int) -> np.ndarray:
    """Which held-out examples samples are measured against: all, or of very many the same part."""
    if count <= MOST_REFERENCES:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).permutation(count)[:MOST_REFERENCES])


def evaluate(
    config: RunConfig,
    denoiser: Denoiser,
    source: Source,
    held_out: Source,
    mesh: jax.sharding.Mesh,
    *,
    metrics: Mapping[str, Metric] | None = None,
    steps_per_second: float | None = None,
    name: str = "",
    samples: dict[str, Any] | None = None,
    inception: networks.InceptionV3 | None = None,
) -> dict[str, float]:
    """Sample, write figures and pictures, and print a table.

    Writes evaluation<name>.json and samples<name>.png into the run directory.

    Args:
        config: of the run.
        denoiser: what is sampled.
        source: the data it was trained on.
        held_out: the data it was not.
        mesh: the devices.
        metrics: by name, any functions of (samples, reference); None for the configuration's.
        steps_per_second: of the training, for the table.
        name: of the files.
        samples: examples to measure in place of the denoiser's.
        inception: whose features are compared, in place of a small classifier's.
    """
    run_dir, settings, info = Path(config.run_dir), config.evaluation, DataInfo.of(source)
    nfe, rate = None, None
    if samples is None:
        count = settings.num_samples
        cond = requested(held_out, info, count)
        key = jax.random.key(config.seed + 1)
        out, rate = draw(settings, denoiser, info, mesh, key, cond, count)
        nfe, x = parallel.fetch((out.nfe, out.x))
        samples = {"x": x} | ({} if cond is None else {"cond": cond})
    count, cond = len(samples["x"]), samples.get("cond")

    chosen = np.random.default_rng(0).permutation(len(source))[: min(count, len(source))]
    real, reference = source[chosen], held_out[references(len(held_out))]
    if metrics is None:
        metrics = build_metrics(config, source, len(held_out), mesh, inception)
    numbers = measure(metrics, samples, reference, real) | {
        "nfe": None if nfe is None else int(nfe[0]),
        "images_per_second": rate,
        "train_steps_per_second": steps_per_second,
    }
    if not parallel.is_first():
        return numbers
    write_json(run_dir / f"evaluation{name}.json", numbers)
    rows = [_row(name, numbers) for name in metrics]
    speed = "given samples" if rate is None else f"{rate:.0f} images/s (compilation included)"
    if steps_per_second:
        speed += f", {steps_per_second:.1f} training steps/s"
    if nfe is not None:
        speed += f", {numbers['nfe']} network evaluations each"
    header = (f"{count} samples", "samples", "real data")
    print(f"\n{figures.table(rows, header)}\n\n{speed}; figures and pictures are in {run_dir}")
    path = run_dir / f"samples{name}.png"
    picture(path, samples["x"], cond, reference["x"], settings, info)
    return numbers


def _row(name: str, numbers: Mapping[str, float]) -> tuple[str, str, str]:
    title, form = _TITLES.get(name, (name.replace("_", " "), "{:.4g}"))
    value, error = form.format(numbers[name]), numbers.get(f"{name}_standard_error")
    if error is not None:
        value += f" +- {form.format(error)}"
    return title, value, form.format(numbers[f"{name}_floor"])


def picture(path: Path, samples, cond, reference, settings, info: DataInfo) -> None:
    """Write what the samples look like: a grid with a row for each class or caption, or points."""
    if len(info.event_shape) != 3:
        figures.scatter(samples, reference, path)
        return
    rows, names = _rows(cond, info)
    present, counts = np.unique(rows, return_counts=True)
    if len(present) < 2 or counts.min() < 2:
        figures.image_grid(samples[:100], path, columns=min(10, len(samples)), pixels=info.pixels)
        return
    columns = min(settings.per_class, int(counts.min()))
    images = np.concatenate([samples[rows == row][:columns] for row in present])
    titles = [names(row) for row in present]
    figures.image_grid(images, path, columns=columns, titles=titles, pixels=info.pixels)


def _rows(cond, info: DataInfo) -> tuple[np.ndarray, Callable[[int], str]]:
    """The row of the picture that a sample belongs to, and what rows are called."""
    if info.words is not None and isinstance(cond, Mapping):
        words = (*info.words, "")
        tokens = np.asarray(cond["tokens"])
        captions, first, rows = np.unique(tokens, axis=0, return_index=True, return_inverse=True)
        order = np.argsort(first)  # as they were asked for
        names = [" ".join(words[i] for i in captions[k]).strip() or "none" for k in order]
        return np.argsort(order)[rows.ravel()], names.__getitem__
    if info.cond or cond is None:
        return np.zeros(0, int), str
    return np.asarray(cond), info.name_of

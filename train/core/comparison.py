"""Rows of a comparison, drawn from the same noise: figures, their errors, and errors by pairs."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdiff import metrics
from train.core.classifiers import load_classifier
from train.core.config import RunConfig
from train.core.data import DataInfo, Source
from train.core.evaluation import MOST_RESAMPLED, ClassAccuracy, classifiable, of_features

TITLES = {
    "nfe": ("evaluations", "{:.0f}"),
    "frechet": ("Frechet", "{:.3f}"),
    "kid": ("KID", "{:.4f}"),
    "accuracy": ("accuracy", "{:.1%}"),
    "density": ("density", "{:.2f}"),
    "coverage": ("coverage", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "vendi": ("Vendi", "{:.1f}"),
}
RESAMPLES = 50


def held_out_metrics(
    config: RunConfig,
    source: Source,
    mesh,
    names: Sequence[str] = ("frechet", "kid", "density", "coverage"),
) -> dict[str, Any]:
    """Of the classifier that measures, which no loss and no guidance has seen.

    Of images without classes, and of vectors, features are the examples themselves.
    """
    info = DataInfo.of(source)
    classes = bool(info.classes) and not info.cond and len(info.event_shape) == 1
    seen = classifiable(info)
    classifier = load_classifier(config, source, mesh) if seen or classes else None
    known = of_features(
        classifier if seen else None, source, config.shared_dir / "features-of-data"
    )
    # Compiled once for all rows, whose samples are as many.
    found: dict[str, Any] = {
        name: known[name].taking(jax.jit(known[name].metric)) for name in names
    }
    return found if classifier is None else {**found, "accuracy": ClassAccuracy(classifier)}


@jax.jit
def resampled(x: Array, y: Array) -> Array:
    """Frechet distances of resamples, the same rows whatever is measured; none of many features.

    Rows of a comparison have the same noise and reference, so those of two of them make pairs.
    """
    if x.shape[1] > MOST_RESAMPLED:
        return jnp.zeros(0)
    key = jax.random.key(1)
    return metrics.bootstrap(key, metrics.frechet_distance, x, y, count=RESAMPLES)


def resampled_frechet(chosen: Mapping[str, Any], samples, reference) -> list[float]:
    """`resampled` of what "frechet" looks at; NaN of samples that are not finite."""
    if not np.isfinite(np.asarray(samples["x"], float)).all():
        return [float("nan")] * RESAMPLES
    found = chosen["frechet"].taking(resampled)(samples, reference)
    return np.asarray(found, float).tolist()


def difference(row: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float]:
    """A row's Frechet distance less another's, and its error by pairs; NaN where it is not known.

    Both must be of the same noise, count and reference.
    """
    pairs = np.subtract(row["frechet_resampled"], other["frechet_resampled"])
    return row["frechet"] - other["frechet"], float(np.std(pairs, ddof=1)) if len(pairs) else np.nan


def mean_of(values: Sequence[float], form: str, errors: Sequence[float | None] = ()) -> str:
    """The mean over seeds and its standard error; of one seed, the error that is known of it."""
    if not values:
        return ""
    text, form = form.format(np.mean(values)), form.replace("+", "")  # errors have no sign
    if len(values) < 2:
        known = [error for error in errors if error is not None and np.isfinite(error)]
        return f"{text} +- {form.format(known[0])}" if known else text
    return f"{text} +- {form.format(np.std(values, ddof=1) / len(values) ** 0.5)}"

"""Whether a classifier knows how sure it may be: calibration, proper scores, along sampling too."""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray, PyTree, Scalar

from jaxdiff._checks import check_callable, check_count
from jaxdiff.denoiser import Denoiser
from jaxdiff.metrics._accuracy import accuracy
from jaxdiff.metrics._pair import features
from jaxdiff.sampling import resolve_grid, sample
from jaxdiff.solvers import DDIM, DiffusionSolver


def _checked(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Logits in float32 at least, and labels, after the checks of `accuracy`."""
    accuracy(logits, labels)
    return features("logits", logits), jnp.asarray(labels)


def _mean(values: Array) -> tuple[Scalar, Scalar]:
    """The mean and its standard error."""
    return jnp.mean(values), jnp.std(values) / len(values) ** 0.5


def calibration_error(
    logits: Float[Array, "n classes"],
    labels: Int[Array, "n"],
    *,
    num_bins: int = 15,
    bins: str = "width",
) -> Scalar:
    """sum_b (n_b / n) |accuracy_b - confidence_b|, over bins b of the largest probability (ECE).

    Not 0 for a classifier that is calibrated: of n examples in B bins it is about
    sqrt(2 B p (1 - p) / (pi n)), p the accuracy. In bins it is at most the error without them,
    E |P(right | confidence) - confidence|, and near to that in narrow ones.

    Args:
        logits: (n, classes).
        labels: (n,) integers in [0, classes).
        num_bins: B.
        bins: "width" for equal widths in [0, 1]; "mass" for equal numbers of examples.

    Returns:
        The error, a scalar in [0, 1].

    Raises:
        ValueError: as `accuracy`, or for other bins.

    Examples:
        >>> logits = jnp.log(jnp.asarray([[0.75, 0.25]] * 4))
        >>> round(float(metrics.calibration_error(logits, jnp.asarray([0, 0, 0, 1]))), 6)
        0.0

    Reference: Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", 2017,
    arXiv 1706.04599; bins of equal mass in Nguyen, O'Connor, "Posterior calibration and
    exploratory analysis for natural language processing models", 2015, arXiv 1508.05154.
    """
    logits, labels = _checked(logits, labels)
    check_count("num_bins", num_bins)
    if bins not in ("width", "mass"):
        raise ValueError(f'`bins` must be "width" or "mass", got {bins!r}.')
    sure = jnp.exp(jnp.max(jax.nn.log_softmax(logits), -1))
    gap = (jnp.argmax(logits, -1) == labels) - sure
    if bins == "width":
        # Bins are open below: 1 is in the last.
        place = jnp.clip(jnp.ceil(sure * num_bins).astype(int) - 1, 0, num_bins - 1)
    else:
        rank = jnp.argsort(jnp.argsort(sure))
        place = rank * num_bins // len(sure)
    sums = jax.ops.segment_sum(gap, place, num_bins)
    return jnp.sum(jnp.abs(sums)) / len(sure)


def brier_score(
    logits: Float[Array, "n classes"], labels: Int[Array, "n"]
) -> tuple[Scalar, Scalar]:
    """Mean of sum_c (p_c - [c is the label])^2, and its standard error: proper, in [0, 2].

    Args:
        logits: (n, classes).
        labels: (n,) integers in [0, classes).

    Returns:
        The score and its standard error, scalars.

    Raises:
        ValueError: as `accuracy`.

    Reference: Brier, "Verification of Forecasts Expressed in Terms of Probability", 1950.
    """
    logits, labels = _checked(logits, labels)
    hit = jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype)
    return _mean(jnp.sum((jax.nn.softmax(logits) - hit) ** 2, -1))


def negative_log_likelihood(
    logits: Float[Array, "n classes"], labels: Int[Array, "n"]
) -> tuple[Scalar, Scalar]:
    """Mean of -log p(label), in nats, and its standard error: the cross-entropy, proper.

    Args:
        logits: (n, classes).
        labels: (n,) integers in [0, classes).

    Returns:
        The mean and its standard error, scalars.

    Raises:
        ValueError: as `accuracy`.
    """
    logits, labels = _checked(logits, labels)
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0]
    return _mean(-log_p)


class TrajectoryCalibration(NamedTuple):
    """What a metric says of a classifier along sampling.

    Attributes:
        times: of the process, `(num_steps,)`, without the end.
        of_x0: the metric's values on predicted clean examples, each with a leading axis of times.
        of_xt: those on the noisy states.
    """

    times: Array
    of_x0: Any
    of_xt: Any


class _Look(eqx.Module):
    """A classifier's logits of a state, and of the clean example that a denoiser predicts."""

    classifier: Callable[[Array], Array]
    predictor: Callable[[Array, Array, PyTree], Array] | None

    def __call__(self, t, x, problem):
        predictor = problem.denoiser if self.predictor is None else self.predictor
        return self.classifier(predictor(x, t, problem.cond)), self.classifier(x)


def trajectory_calibration(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    classifier: Callable[[Array], Array],
    shape: tuple[int, ...],
    labels: Int[Array, "n"],
    *,
    cond: PyTree = None,
    predictor: Callable[[Array, Array, PyTree], Array] | None = None,
    metric: Callable[[Array, Array], PyTree] = calibration_error,
    solver: DiffusionSolver = DDIM(),
    times: int | ArrayLike = 20,
    batch_size: int | None = None,
) -> TrajectoryCalibration:
    """Calibration of a classifier at every step of sampling, with the labels that were asked for.

    At each time before the end the classifier sees the state, and the clean example that is
    predicted from it. The mean over times is the integral calibration error, by which the parts of
    classifier guidance are chosen. Each costs one more evaluation of the predictor a step.

    Args:
        key: typed key.
        denoiser: what is sampled: conditional, or guided.
        classifier: `x -> (classes,)`, logits of one example; a pytree whose weights are leaves.
        shape: of one example.
        labels: (n,) integers, one for each sample.
        cond: as of `sample`; None for the labels themselves.
        predictor: `(x, t, cond) -> x0_hat` that is looked at, a pytree; None for the denoiser. Of a
            map that needs to know its step, or takes a condition of its own, what is inside:
            `jax.tree_util.Partial(lambda base, x, t, cond: base(x, t), guided.base)`.
        metric: `(logits (n, classes), labels (n,)) -> number` or a pytree of numbers, such as
            `brier_score`.
        solver: a solver of this library.
        times: as of `sample`, a shared grid.
        batch_size: as of `sample`.

    Returns:
        Times, and the metric's values at them.

    Raises:
        TypeError: for a classifier or predictor that is no function.

    Reference: Ma, Hu, Wang, Sun, "Elucidating The Design Space of Classifier-Guided Diffusion
    Generation", 2023, arXiv 2310.11311; bins and grid are choices of ours.
    """
    check_callable("classifier", classifier, "jax.tree_util.Partial(function, classifier)")
    if predictor is not None:
        check_callable("predictor", predictor, "a denoiser")
    count = len(labels)
    grid = resolve_grid(denoiser, times, solver, count)
    look = _Look(classifier, predictor)
    out = sample(
        key,
        denoiser,
        shape,
        count,
        cond=labels if cond is None else cond,
        solver=solver,
        times=grid,
        batch_size=batch_size,
        saveat=diffrax.SaveAt(t0=True, steps=True, fn=look),
    )
    assert out.trajectory is not None
    # Nothing is predicted at the end.
    seen = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0)[:-1], out.trajectory.x)
    values = [jax.vmap(lambda logits: metric(logits, labels))(logits) for logits in seen]
    return TrajectoryCalibration(grid[:-1], *values)

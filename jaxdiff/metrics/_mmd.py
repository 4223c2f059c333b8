"""Maximum mean discrepancy: estimators, their errors, tests, and mean embeddings.

Every sum over pairs is a mean of means by rows, of kernel values less a constant, which changes no
MMD: what cancels then is of the size of the spread of the values, and not of the values.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, Scalar

from jaxdiff._checks import check_count, check_key, check_kind
from jaxdiff._tree import dots, is_known
from jaxdiff.metrics._gram import Rows, one_hot, rows_of, shift_of
from jaxdiff.metrics._kernels import Kernel, Polynomial
from jaxdiff.metrics._pair import feature_pair


def mmd2_unbiased(
    x: Float[Array, "n *event"],
    y: Float[Array, "m *event"],
    kernel: Kernel = Polynomial(),
    *,
    paired: bool = False,
    block_size: int | None = None,
) -> Scalar:
    """Unbiased estimate of the squared MMD (a U-statistic); may be negative.

    sum_{i != j} k(x_i, x_j) / (n (n - 1)) + the same for y - 2 mean_ij k(x_i, y_j). Of pairs
    (x_i, y_i) that were made together the last mean, too, is over i != j.

    Rows may be split over a mesh: under jit each device computes the rows it holds, against all
    others, gathered.

    Args:
        x: (n, *event) samples or features, n >= 2; events are flattened.
        y: (m, *event), m >= 2.
        kernel: with the default, and Inception features, this is KID on one block.
        paired: whether x_i and y_i depend on each other, as a sample and a real example of one
            class do; n = m. Other pairs are then independent, and these would bias the mean.
        block_size: rows of the Gram matrices in memory at once, for many samples; None for all.
            Gradients compute them again.

    Returns:
        The estimate, a scalar.

    Raises:
        ValueError: for too few samples, pairs of different sizes, events of different shapes, or
            numbers that are not finite.

    Examples:
        >>> x, y = jax.random.normal(jax.random.key(0), (2, 500, 3))
        >>> kernel = metrics.RBF(metrics.median_bandwidth(x, y))
        >>> bool(abs(metrics.mmd2_unbiased(x, y, kernel)) < 0.01)
        True

    Reference: Gretton, Borgwardt, Rasch, Schoelkopf, Smola, "A Kernel Two-Sample Test", 2012,
    JMLR 13, lemma 6.
    """
    check_kind("kernel", kernel, Kernel, "Polynomial()")
    x, y = feature_pair(x, y, minimum=2)
    if paired and len(x) != len(y):
        raise ValueError(f"`paired` needs as many of `x` as of `y`, got {len(x)} and {len(y)}.")
    shift = shift_of(kernel, x, y)
    xx, yy = (rows_of(kernel, a, a, shift, block_size, same=True) for a in (x, y))
    xy = rows_of(kernel, x, y, shift, block_size, same=paired)
    return jnp.mean(xx.mean) + jnp.mean(yy.mean) - 2 * jnp.mean(xy.mean)


def mmd2_biased(
    x: Float[Array, "n *event"],
    y: Float[Array, "m *event"],
    kernel: Kernel = Polynomial(),
    *,
    block_size: int | None = None,
) -> Scalar:
    """Squared MMD of the two empirical distributions (a V-statistic), >= 0 up to rounding.

    mean_ij k(x_i, x_j) + mean_ij k(y_i, y_j) - 2 mean_ij k(x_i, y_j). Its mean is that of
    `mmd2_unbiased` and (E k(x, x) - E k(x, x')) / n + the same for y.

    Args:
        x: (n, *event) samples or features; events are flattened.
        y: (m, *event).
        kernel: a positive definite kernel.
        block_size: as in `mmd2_unbiased`.

    Returns:
        The squared MMD, a scalar, 0 for x = y.

    Raises:
        ValueError: for no samples, events of different shapes, or numbers that are not finite.

    Reference: Gretton et al., "A Kernel Two-Sample Test", 2012, JMLR 13, eq. 5.
    """
    check_kind("kernel", kernel, Kernel, "Polynomial()")
    x, y = feature_pair(x, y, minimum=1)
    shift = shift_of(kernel, x, y)
    xx, yy = (rows_of(kernel, a, a, shift, block_size, own=True).mean for a in (x, y))
    xy = rows_of(kernel, x, y, shift, block_size).mean
    return jnp.mean(xx) + jnp.mean(yy) - 2 * jnp.mean(xy)


def mmd2_variance(
    x: Float[Array, "n *event"],
    y: Float[Array, "m *event"],
    kernel: Kernel = Polynomial(),
    *,
    block_size: int | None = None,
) -> Scalar:
    """Variance of `mmd2_unbiased` over draws of both samples, estimated from one.

    By Hoeffding's decomposition of the U-statistic, with a = E_x' k(., x'), b = E_y k(., y):
    4/n Var_x(a - b) + 2/(n (n - 1)) Var2 k(x, x') + the same for y + 4/(n m) Var2 k(x, y), where
    Var2 is the variance that is left of a kernel value when both first-order parts are taken out.
    The second-order terms are all there is where both laws are one.

    Args:
        x: (n, *event), n >= 4.
        y: (m, *event), m >= 4.
        kernel: any.
        block_size: as in `mmd2_unbiased`.

    Returns:
        The variance, a scalar >= 0. Its estimate is unbiased, but for negative ones, as there are
        where both laws are nearly one: those are 0, and say that it is not known.

    Raises:
        ValueError: as `mmd2_unbiased`.

    Reference: Sutherland, Tung, Strathmann, De, Ramdas, Smola, Gretton, "Generative Models and
    Model Criticism via Optimized Maximum Mean Discrepancy", 2017, arXiv 1611.04488, section 2, has
    the terms for n = m; the form for n != m follows in the same way.
    """
    check_kind("kernel", kernel, Kernel, "Polynomial()")
    x, y = feature_pair(x, y, minimum=4)
    shift = shift_of(kernel, x, y)
    xx, yy = (rows_of(kernel, a, a, shift, block_size, same=True) for a in (x, y))
    xy, yx = (rows_of(kernel, a, b, shift, block_size) for a, b in ((x, y), (y, x)))
    n, m = len(x), len(y)

    # Products of expectations, each from samples that the other has not seen: no term is biased.
    aa_x, aa_y = jnp.mean(_product(xx, n - 1)), jnp.mean(_product(yy, m - 1))
    bb_x, bb_y = jnp.mean(_product(xy, m)), jnp.mean(_product(yx, n))
    means_xx, means_yy, means_xy = _squared_mean(xx), _squared_mean(yy), _squared_mean(xy, yx)

    def first_order(own, cross, aa, bb, squared):
        """Var(a - b) over one sample."""
        count = len(own.mean)
        ab = jnp.mean(own.mean * cross.mean)
        mean_ab = (count * jnp.mean(own.mean) * jnp.mean(cross.mean) - 2 * ab) / (count - 2)
        return aa - 2 * ab + bb - (squared - 2 * mean_ab + means_xy)

    def second_order(rows, left, right, squared):
        return jnp.mean(rows.square) - left - right + squared

    total = 4 / n * first_order(xx, xy, aa_x, bb_x, means_xx)
    total += 4 / m * first_order(yy, yx, aa_y, bb_y, means_yy)
    total += 2 / (n * (n - 1)) * second_order(xx, aa_x, aa_x, means_xx)
    total += 2 / (m * (m - 1)) * second_order(yy, aa_y, aa_y, means_yy)
    total += 4 / (n * m) * second_order(xy, bb_x, bb_y, means_xy)
    return jnp.maximum(total, 0)


def mmd2_linear(
    x: Float[Array, "n *event"], y: Float[Array, "n *event"], kernel: Kernel = Polynomial()
) -> tuple[Scalar, Scalar]:
    """Unbiased squared MMD in linear time, from pairs that share no sample.

    mean_i h_i, h_i = k(x_1, x_2) + k(y_1, y_2) - k(x_1, y_2) - k(x_2, y_1) of samples 2i and
    2i + 1. Its h_i are independent: the error is that of a mean, at any n.

    Args:
        x: (n, *event), n >= 4; a last odd one is left out.
        y: (n, *event).
        kernel: any.

    Returns:
        The estimate and its standard error, scalars.

    Raises:
        ValueError: for samples of different sizes, and as `mmd2_unbiased`.

    Reference: Gretton et al., "A Kernel Two-Sample Test", 2012, JMLR 13, lemma 14.
    """
    check_kind("kernel", kernel, Kernel, "Polynomial()")
    x, y = feature_pair(x, y, minimum=4)
    if len(x) != len(y):
        raise ValueError(
            f"`x` and `y` must be as many, got {len(x)} and {len(y)}. Leave some out, or use "
            "`mmd2_unbiased`."
        )
    count = len(x) // 2
    x1, x2, y1, y2 = x[: 2 * count : 2], x[1::2][:count], y[: 2 * count : 2], y[1::2][:count]
    value = jax.vmap(lambda u, v: kernel(u[None], v[None])[0, 0])
    h = value(x1, x2) + value(y1, y2) - value(x1, y2) - value(x2, y1)
    return jnp.mean(h), jnp.std(h, ddof=1) / count**0.5


def permutation_test(
    key: PRNGKeyArray,
    x: Float[Array, "n *event"],
    y: Float[Array, "m *event"],
    kernel: Kernel = Polynomial(),
    *,
    num_permutations: int = 1000,
) -> tuple[Scalar, Scalar]:
    """Whether two samples are of one law: `mmd2_unbiased`, and how often chance gives as much.

    p = (1 + #{permutations of the pooled sample with at least this MMD}) / (1 + count): for equal
    laws P(p <= a) <= a exactly, for any kernel that does not depend on which sample is which.

    Args:
        key: typed key; draws the permutations.
        x: (n, *event), n >= 2.
        y: (m, *event), m >= 2.
        kernel: any. A bandwidth that `median_bandwidth` took from both samples is allowed.
        num_permutations: how many.

    Returns:
        The squared MMD and p, scalars. Memory is that of the Gram matrix of both samples together.

    Raises:
        ValueError: as `mmd2_unbiased`.

    Reference: Gretton et al., "A Kernel Two-Sample Test", 2012, JMLR 13, section 5.
    """
    check_key(key)
    check_kind("kernel", kernel, Kernel, "Polynomial()")
    check_count("num_permutations", num_permutations)
    x, y = feature_pair(x, y, minimum=2)
    n, m = len(x), len(y)
    pooled = jnp.concatenate([x, y])
    gram = kernel(pooled, pooled)
    gram = jnp.where(jnp.eye(n + m, dtype=bool), 0, gram - jnp.mean(gram))

    def statistic(ours):
        theirs = 1 - ours
        right = dots(gram, ours)
        xx, xy, yy = ours @ right, theirs @ right, theirs @ dots(gram, theirs)
        return xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)

    observed = jnp.arange(n + m) < n
    keys = jax.random.split(key, num_permutations)
    drawn = jax.vmap(lambda key: jax.random.permutation(key, observed))(keys)
    found = jax.lax.map(statistic, drawn.astype(gram.dtype), batch_size=64)
    value = statistic(observed.astype(gram.dtype))
    # A permutation that gives the two samples themselves must count whatever rounding says.
    slack = 1e3 * jnp.finfo(gram.dtype).eps * jnp.max(jnp.abs(gram)) / min(n, m)
    p = (1 + jnp.sum(found >= value - slack)) / (1 + num_permutations)
    return value, p


def conditional_mmd2(
    x: Float[Array, "n *event"],
    x_labels: Int[Array, "n"],
    y: Float[Array, "m *event"],
    y_labels: Int[Array, "m"],
    kernel: Kernel = Polynomial(),
    *,
    num_classes: int,
) -> tuple[Scalar, Float[Array, "num_classes"]]:
    """Unbiased squared MMD within each class, and its mean over the classes.

    Classes with fewer than two samples on either side count for nothing in the mean.

    Args:
        x: (n, *event).
        x_labels: (n,) integers in [0, num_classes).
        y: (m, *event).
        y_labels: (m,).
        kernel: any.
        num_classes: how many classes there are.

    Returns:
        The mean, a scalar, and that of each class, `(num_classes,)`, NaN for those that do not
        count.

    Raises:
        ValueError: for labels that do not fit, no class with two samples on both sides, and as
            `mmd2_unbiased`.
    """
    check_kind("kernel", kernel, Kernel, "Polynomial()")
    check_count("num_classes", num_classes)
    x, y = feature_pair(x, y, minimum=2)
    a, b = (
        one_hot("x_labels", x_labels, x, num_classes),
        one_hot("y_labels", y_labels, y, num_classes),
    )
    n, m = a.sum(0), b.sum(0)
    counted = (n >= 2) & (m >= 2)
    if is_known(counted) and not counted.any():
        raise ValueError(
            "`x_labels` and `y_labels` must have a class with two samples on both sides, got none."
        )
    shift = shift_of(kernel, x, y)
    n, m = (
        jnp.where(counted, count, 2) for count in (n, m)
    )  # of those that count, no division by 0

    def within(u, v, rows, columns, count, same):
        gram = kernel(u, v) - shift
        gram = jnp.where(jnp.eye(len(u), dtype=bool), 0, gram) if same else gram
        return jnp.sum(rows * dots(gram, columns), 0) / count

    each = within(x, x, a, a, n * (n - 1), True) + within(y, y, b, b, m * (m - 1), True)
    each -= 2 * within(x, y, a, b, n * m, False)
    mean = jnp.sum(jnp.where(counted, each, 0)) / jnp.sum(counted)
    return mean, jnp.where(counted, jax.lax.stop_gradient(each), jnp.nan)


def _product(rows: Rows, count: int) -> Array:
    """Unbiased E k(x_i, y) k(x_i, y') for each row, with y and y' different."""
    return (count * rows.mean**2 - rows.square) / (count - 1)


def _squared_mean(rows: Rows, columns: Rows | None = None) -> Scalar:
    """Unbiased (E k)^2: the mean of k(x_i, y_j) k(x_k, y_l) with all of them different.

    Without columns, of one sample against itself.
    """
    n = float(len(rows.mean))  # products of counts are more than an integer holds
    total, squares = jnp.sum(rows.mean), jnp.sum(rows.square)
    if columns is None:
        m = n - 1
        left = (m * total) ** 2 - 4 * m**2 * jnp.sum(rows.mean**2) + 2 * m * squares
        return left / (n * m * (n - 2) * (n - 3))
    m = float(len(columns.mean))
    left = (m * total) ** 2 - m**2 * jnp.sum(rows.mean**2)
    left += m * squares - n**2 * jnp.sum(columns.mean**2)
    return left / (n * (n - 1) * m * (m - 1))

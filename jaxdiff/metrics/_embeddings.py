"""What kernels see of data that do not change: mean embeddings, of all or class by class."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree, Scalar

from jaxdiff._checks import check_count, check_kind
from jaxdiff._tree import batched, dots
from jaxdiff.metrics._gram import one_hot, rows_of, shift_of
from jaxdiff.metrics._kernels import FiniteKernel, Kernel, Polynomial
from jaxdiff.metrics._pair import features


class Embedding(eqx.Module):
    """What a kernel sees of a law that does not change: E_y k(., y), and E k(y, y').

    Attributes:
        kernel: the kernel.
    """

    kernel: eqx.AbstractVar[Kernel]

    @abstractmethod
    def norm(self) -> Scalar:
        """E k(y, y') of the law, y and y' independent."""

    @abstractmethod
    def above(self, x: Float[Array, "n *event"]) -> Float[Array, "n"]:
        """E_y k(x_i, y) - norm for each row of x."""


class SampleEmbedding(Embedding):
    """The law that gives every one of m examples the same weight, for any kernel.

    Attributes:
        kernel: the kernel.
        rows: the examples, `(m, d)`.
        square: the mean of k over all pairs, an example with itself among them.
    """

    kernel: Kernel
    rows: Array
    square: Scalar

    def norm(self) -> Scalar:
        """See `Embedding`."""
        return self.square

    def above(self, x: Float[Array, "n *event"]) -> Float[Array, "n"]:
        """See `Embedding`; memory is that of the Gram matrix between x and the examples."""
        x = _of_dimension(x, self.rows.shape[1])
        return rows_of(self.kernel, x, self.rows, self.square, None).mean


class MeanEmbedding(Embedding):
    """What a `FiniteKernel` sees of a law: exact for a whole data set, at any size.

    Attributes:
        kernel: the kernel.
        moments: means over the law.
        count: of the examples they were taken over.
        dimension: of the examples.
    """

    kernel: FiniteKernel
    moments: PyTree
    count: Array
    dimension: int = eqx.field(static=True)

    def __call__(self, x: Float[Array, "n *event"]) -> Float[Array, "n"]:
        """E_y k(x_i, y) for each row of x."""
        return self.kernel.against(_of_dimension(x, self.dimension), self.moments)

    def norm(self) -> Scalar:
        """See `Embedding`."""
        return self.kernel.product(self.moments, self.moments)

    def above(self, x: Float[Array, "n *event"]) -> Float[Array, "n"]:
        """See `Embedding`."""
        return self(x) - self.norm()

    def merge(self, other: "MeanEmbedding") -> "MeanEmbedding":
        """That of both sets of examples together."""
        count = self.count + other.count

        def mean(a, b):
            return a + (b - a) * (other.count / count).astype(a.dtype)

        moments = jax.tree.map(mean, self.moments, other.moments)
        return MeanEmbedding(self.kernel, moments, count, self.dimension)


def mean_embedding(
    y: Array | Iterable[Array],
    kernel: FiniteKernel = Polynomial(2),
) -> MeanEmbedding:
    """The mean embedding of a data set, for `mmd2_to_embedding`: a reference without noise.

    Args:
        y: (m, *event) samples or features; or batches of them, of which one is in memory at a
            time.
        kernel: a kernel of finitely many features: `Polynomial`, with d^degree numbers, or
            `RandomFeatures`.

    Returns:
        The embedding, a pytree.

    Raises:
        TypeError: for another kernel.
        ValueError: for no examples.
    """
    check_kind("kernel", kernel, FiniteKernel, "Polynomial(2)")
    batches: Any = [y] if hasattr(y, "shape") else y
    total = None
    for batch in batches:
        rows = features("y", batch)
        count = jnp.asarray(float(len(rows)))
        found = MeanEmbedding(kernel, kernel.moments(rows), count, rows.shape[1])
        total = found if total is None else total.merge(found)
    if total is None:
        raise ValueError("`y` must hold one batch at least, got none.")
    return total


def sample_embedding(
    y: Float[Array, "m *event"], kernel: Kernel = Polynomial(), *, block_size: int | None = 256
) -> SampleEmbedding:
    """The embedding of m examples themselves, for `mmd2_to_embedding` with any kernel.

    What is computed once: the mean of k over their m^2 pairs. A few thousand examples stand for a
    data set of any size, because their noise is that of m, and not of the n samples beside them.

    Args:
        y: (m, *event) samples or features.
        kernel: any.
        block_size: rows of the Gram matrix in memory at a time; None for all.

    Returns:
        The embedding, a pytree that holds the examples.

    Raises:
        ValueError: for no examples.
    """
    check_kind("kernel", kernel, Kernel, "Polynomial()")
    rows = features("y", y)
    shift = shift_of(kernel, rows, rows)
    norm = shift + jnp.mean(rows_of(kernel, rows, rows, shift, block_size, own=True).mean)
    return SampleEmbedding(kernel, rows, norm)


def mmd2_to_embedding(
    x: Float[Array, "n *event"], embedding: Embedding, *, biased: bool = False
) -> Scalar:
    """Squared MMD of samples to a law of which the kernel's mean embedding is known.

    mean_{i != j} k(x_i, x_j) - 2 mean_i E_y k(x_i, y) + E k(y, y'): unbiased, and only x is noise.

    Args:
        x: (n, *event), n >= 2.
        embedding: of the data, from `mean_embedding` or `sample_embedding`.
        biased: of the law of the n samples themselves instead, i = j included.

    Returns:
        The squared MMD, a scalar.

    Raises:
        ValueError: as `mmd2_unbiased`.
    """
    check_kind("embedding", embedding, Embedding, "sample_embedding(y)")
    x = features("x", x, minimum=2)
    rows = rows_of(embedding.kernel, x, x, embedding.norm(), None, same=not biased, own=biased).mean
    return jnp.mean(rows) - 2 * jnp.mean(embedding.above(x))


class ClassEmbedding(eqx.Module):
    """The law of every class by itself, that of m examples with labels, for any kernel.

    Attributes:
        kernel: the kernel.
        rows: the examples, `(m, d)`.
        shares: `(m, num_classes)`, of an example in its class: 1 / its size, and 0 in others.
        norms: `(num_classes, num_classes)`, mean of k - shift between two classes.
        shift: what is taken from every kernel value, and changes no MMD.
    """

    kernel: Kernel
    rows: Array
    shares: Array
    norms: Array
    shift: Scalar

    def above(self, x: Float[Array, "n *event"]) -> Float[Array, "n classes"]:
        """E_y k(x_i, y) - shift for each row of x and y of each class."""
        x = _of_dimension(x, self.rows.shape[1])
        return dots(self.kernel(x, self.rows) - self.shift, self.shares)


def class_embedding(
    y: Float[Array, "m *event"],
    labels: Int[Array, "m"],
    kernel: Kernel = Polynomial(),
    *,
    num_classes: int,
    block_size: int = 256,
) -> ClassEmbedding:
    """The embeddings of m examples class by class, for `mmd2_to_classes`.

    Args:
        y: (m, *event) samples or features.
        labels: (m,) their classes.
        kernel: any.
        num_classes: how many there are; some may have no example.
        block_size: examples that are compared with all at a time.

    Returns:
        The embedding, a pytree that holds the examples.

    Raises:
        ValueError: for no examples, or labels that are none.
    """
    check_kind("kernel", kernel, Kernel, "Polynomial()")
    rows = features("y", y)
    hot = one_hot("labels", labels, rows, check_count("num_classes", num_classes))
    sizes = jnp.sum(hot, 0)
    shares, shift = hot / jnp.maximum(sizes, 1), shift_of(kernel, rows, rows)

    def row(u):
        return dots(kernel(u[None], rows)[0] - shift, shares)

    norms = dots(shares.T, batched(row, block_size)(rows))
    return ClassEmbedding(kernel, rows, shares, norms, shift)


def mmd2_to_classes(
    x: Float[Array, "n *event"], labels: Int[Array, "n"], embedding: ClassEmbedding
) -> Scalar:
    """Squared MMD of samples to data in the proportions of the samples' own classes.

    mean_{i != j} [k(x_i, x_j) - 2 E_{y of class c_j} k(x_i, y) + E k(y of c_i, y' of c_j)]: what
    `mmd2_unbiased(paired=True)` is on average over real examples of the same classes, so that it
    has no noise from the data, and none from how many samples of each class there are.

    Args:
        x: (n, *event), n >= 2.
        labels: (n,) classes of the samples.
        embedding: of the data, from `class_embedding`.

    Returns:
        The squared MMD, a scalar; unbiased, if labels are drawn independently. NaN if a sample is
        of a class that the data do not have.

    Raises:
        ValueError: for another dimension or number of labels.
    """
    check_kind("embedding", embedding, ClassEmbedding, "class_embedding(y, labels)")
    x = features("x", x, minimum=2)
    n, (num_classes, _) = len(x), embedding.norms.shape
    hot = one_hot("labels", labels, x, num_classes)
    # Of the other samples, the number in each class.
    others = (jnp.sum(hot, 0) - hot) / (n - 1)
    own = rows_of(embedding.kernel, x, x, embedding.shift, None, same=True).mean
    across = jnp.sum(embedding.above(x) * others, 1)
    norms = jnp.sum(dots(hot, embedding.norms) * others, 1)
    value = jnp.mean(own) - 2 * jnp.mean(across) + jnp.mean(norms)
    known = jnp.any(embedding.shares > 0, 0)
    return jnp.where(jnp.all(dots(hot, ~known + 0.0) == 0), value, jnp.nan)


def _of_dimension(x: Array, dimension: int) -> Array:
    """x as (n, d), of the dimension of an embedding."""
    x = features("x", x)
    if x.shape[1] != dimension:
        raise ValueError(
            f"`x` must have the dimension of the embedding's examples, {dimension}, got "
            f"{x.shape[1]}. Take both from the same features."
        )
    return x

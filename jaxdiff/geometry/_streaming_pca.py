"""Principal components of a population that is seen in batches."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff.geometry._linalg import canonical_signs


class PrincipalDirections(eqx.Module):
    """Principal directions of a population.

    Signs are such that the largest entry of each direction is positive. Directions beyond the
    population's rank have standard deviation 0, and mean nothing.

    Attributes:
        mean: `(*shape)`.
        directions: orthonormal, `(r, *shape)`.
        std: the population's standard deviation along each, decreasing, `(r,)`; an edit by one
            standard deviation is h + std[i] directions[i].
        explained: the share of the total variance along each, `(r,)`.
    """

    mean: Array
    directions: Array
    std: Array
    explained: Array


class StreamingPCA(eqx.Module):
    """Principal components of a population seen in batches: `init`, `update`, `finish`.

    Keeps the mean, the leading components and the total variance of what it has seen. A batch X of
    b examples is merged by a truncated singular value decomposition of

        [ diag(s) V;  X - mean(X);  sqrt(n b / (n + b)) (mean - mean(X)) ],

    whose Gram matrix is the joint scatter matrix. Exact if the rank kept is that of the population;
    else what a batch's truncation drops is lost, and a rank larger than needed lessens that. The
    mean and the total variance are always exact. An immutable pytree: it may be scanned over
    batches, and mapped over time steps by `jax.vmap`.

    Attributes:
        count: examples seen, int32.
        mean: `(*shape)`.
        basis: orthonormal, `(rank, *shape)`.
        values: singular values of the centred population, `(rank,)`.
        total: sum of squared distances from the mean.

    Reference: Ross, Lim, Lin, Yang, "Incremental Learning for Robust Visual Tracking", 2008, IJCV
    77, section 2.1.
    """

    count: Array
    mean: Array
    basis: Array
    values: Array
    total: Array

    @classmethod
    def init(
        cls, shape: tuple[int, ...], rank: int, dtype: jnp.dtype | None = None
    ) -> "StreamingPCA":
        """Before the first batch.

        Args:
            shape: of one example.
            rank: how many components are kept, at most the size of an example.
            dtype: float32 or better; None for JAX's default float.

        Raises:
            ValueError: if `rank` is out of range.
        """
        mean = jnp.zeros(shape, jnp.result_type(float) if dtype is None else dtype)
        if not 1 <= rank <= mean.size:
            raise ValueError(
                f"`rank` must lie between 1 and the size of an example, {mean.size}, got {rank}."
            )
        basis = jnp.zeros((rank, *shape), mean.dtype)
        zero = jnp.zeros((), mean.dtype)
        return cls(jnp.zeros((), jnp.int32), mean, basis, basis.reshape(rank, -1)[:, 0], zero)

    @jax.default_matmul_precision("highest")
    def update(self, batch: Array) -> "StreamingPCA":
        """With another batch seen.

        Args:
            batch: `(b, *shape)`.

        Raises:
            ValueError: if the examples have another shape.
        """
        if batch.shape[1:] != self.mean.shape or batch.ndim == self.mean.ndim:
            raise ValueError(
                f"`batch` must have shape (b, *shape) with shape {self.mean.shape}, got "
                f"{batch.shape}."
            )
        size, rank = batch.shape[0], self.values.shape[0]
        batch = batch.astype(self.mean.dtype)
        # Relative to a point of the population, means lose no digits to its distance from zero.
        mean = batch[0] + jnp.mean(batch - batch[0], 0)
        seen = self.count.astype(mean.dtype)
        step, centred = mean - self.mean, batch - mean
        shift = jnp.sqrt(seen * size / (seen + size)) * step
        rows = jnp.concatenate([centred, shift[None]]).reshape(size + 1, -1)
        kept = self.values[:, None] * self.basis.reshape(rank, -1)
        _, values, basis = jnp.linalg.svd(jnp.concatenate([kept, rows]), full_matrices=False)
        return StreamingPCA(
            self.count + size,
            self.mean + step * (size / (seen + size)),
            basis[:rank].reshape(self.basis.shape),
            values[:rank],
            self.total + jnp.sum(rows**2),
        )

    def finish(self, rank: int | None = None) -> PrincipalDirections:
        """What was found.

        Args:
            rank: how many components, at most those kept; None for all.

        Raises:
            ValueError: if `rank` is out of range.
        """
        kept = self.values.shape[0]
        rank = kept if rank is None else rank
        if not 1 <= rank <= kept:
            raise ValueError(f"`rank` must lie between 1 and the {kept} kept, got {rank}.")
        values = self.values[:rank]
        directions = canonical_signs(self.basis[:rank].reshape(rank, -1))
        return PrincipalDirections(
            self.mean,
            directions.reshape(rank, *self.mean.shape),
            values / jnp.sqrt(jnp.maximum(self.count - 1, 1).astype(values.dtype)),
            values**2 / jnp.where(self.total > 0, self.total, 1.0),
        )

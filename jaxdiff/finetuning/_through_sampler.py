"""Losses on samples, whose gradient goes through the sampler."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_callable, check_count, check_kind
from jaxdiff._tree import num_parts, straight_through_clip
from jaxdiff.denoiser import Denoiser, check_denoiser
from jaxdiff.losses._batch import check_batch
from jaxdiff.parallel import batch_sharding_here
from jaxdiff.sampling import sample
from jaxdiff.solvers import DDIM


def _same(denoiser: Denoiser) -> Denoiser:
    return denoiser


class ThroughSampler(eqx.Module):
    """Base of the losses on samples of a model; a loss defines `of_samples`.

    The samples are those of `sample` with the same solver and times: example i draws from the
    loss's key folded with i. Every step is computed once more on the way back, and memory grows
    with the steps by their states alone. On a mesh, each device draws its part of the batch.

    Args:
        solver: any solver that is differentiable, stochastic ones included.
        times: number of steps, or a grid, as of `sample`.
        last_k: differentiate through the last k steps alone; None for all.
        sampled: what is sampled from, `denoiser -> denoiser`, such as guidance of it.
        clip: what is done to samples before they are looked at, such as
            `straight_through_clip`; None for nothing.
        micro_batch: samples drawn at a time, a divisor of the batch. What the loss looks at is
            kept, and the way there computed again in the backward pass: the gradient of the whole
            batch, in the memory of a part. None for all at once.
    """

    solver: diffrax.AbstractSolver = DDIM()
    times: Any = 5
    last_k: int | None = eqx.field(static=True, default=None, kw_only=True)
    sampled: Callable[[Denoiser], Denoiser] = eqx.field(default=_same, kw_only=True)
    clip: Callable[[Array], Array] | None = eqx.field(default=straight_through_clip, kw_only=True)
    micro_batch: int | None = eqx.field(static=True, default=None, kw_only=True)

    def __check_init__(self):
        check_kind("solver", self.solver, diffrax.AbstractSolver, "DDIM()")
        check_callable("sampled", self.sampled, "a map of denoisers")
        if self.clip is not None:
            check_callable("clip", self.clip, "straight_through_clip")
        for name in ("last_k", "micro_batch"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))

    def draw(
        self,
        denoiser: Denoiser,
        key: PRNGKeyArray,
        shape: tuple[int, ...],
        count: int,
        cond: PyTree = None,
        *,
        look: Callable[[Array, PyTree], PyTree] = lambda x, cond: x,
        last_k: int | None = None,
    ) -> PyTree:
        """What `look` makes of each sample, with a gradient to the denoiser.

        Args:
            denoiser: the model.
            key: typed key.
            shape: of an example, `(*event)`.
            count: of samples.
            cond: their conditions, with a leading axis of `count`.
            look: function of one sample and its condition, such as features of `seen(x)`.
            last_k: in place of the loss's own.

        Returns:
            Its values, with a leading axis of `count`.

        Raises:
            ValueError: for a `micro_batch` that does not divide the count, or is not split evenly
                over the devices.
        """
        check_denoiser(denoiser)
        size = count if self.micro_batch is None else self.micro_batch
        if count % size:
            raise ValueError(
                f"`micro_batch` must divide the batch, {count}, got {size}. Pass a divisor."
            )

        sharding = batch_sharding_here()
        split = 1 if sharding is None else num_parts(sharding)
        if size % split:
            raise ValueError(
                f"`micro_batch` must be a multiple of the {split} devices that examples are split "
                f"over, got {size}."
            )

        def piece(denoiser, first, cond):
            x = sample(
                key, self.sampled(denoiser), shape, size, cond=cond, solver=self.solver,
                times=self.times, last_k=self.last_k if last_k is None else last_k,
                first_index=first, sharding=sharding,
            ).x  # fmt: skip
            return jax.vmap(look)(x, cond)

        if size == count:
            return piece(denoiser, 0, cond)
        firsts = jnp.arange(0, count, size)
        parts = jax.tree.map(lambda c: c.reshape(-1, size, *c.shape[1:]), cond)
        # What a piece returns is all that is kept of it.
        kept = jax.checkpoint(piece)
        found = jax.lax.map(lambda part: kept(denoiser, *part), (firsts, parts))
        return jax.tree.map(lambda leaf: leaf.reshape(count, *leaf.shape[2:]), found)

    def seen(self, x: Array) -> Array:
        """A sample as the loss looks at it: clipped."""
        return x if self.clip is None else self.clip(x)

    def __call__(
        self, denoiser: Denoiser, key: PRNGKeyArray, batch: dict, frozen: Any
    ) -> tuple[Array, dict[str, Array]]:
        """The loss of as many samples as the batch has examples, under their conditions.

        Args:
            denoiser: the model that learns.
            key: typed key.
            batch: `{"x": (B, *event), "cond": pytree with leading axis B}`; "cond" may be absent.
            frozen: other models.

        Returns:
            The scalar loss, and metrics.

        Raises:
            TypeError: for a batch that is none, or whose examples are no floats.
        """
        check_batch(batch)
        return self.of_samples(denoiser, key, batch, frozen)

    @abstractmethod
    def of_samples(
        self, denoiser: Denoiser, key: PRNGKeyArray, batch: dict, frozen: Any
    ) -> tuple[Array, dict[str, Array]]:
        """As a call; `draw` gives the samples."""

"""A residual MLP for vectors."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from jaxdiff.networks._layers import (
    Block,
    ConditionEmbedding,
    Network,
    arguments_of,
    check_rate,
    dropout,
    fold,
    remat_policy,
    zeros,
)
from jaxdiff.taps import Tap


class MLPBlock(Block):
    """h + Linear(SiLU(Linear(scale * norm(h) + shift))), modulated by the embedding."""

    def __init__(self, hidden: int, rate: float, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.rate = rate
        self.norm = nnx.LayerNorm(hidden, use_scale=False, use_bias=False, **kinds)
        self.modulation = nnx.Linear(hidden, 2 * hidden, **kinds)
        self.first = nnx.Linear(hidden, hidden, **kinds)
        self.second = nnx.Linear(hidden, hidden, kernel_init=zeros, **kinds)

    def __call__(self, h: Array, emb: Array, key: PRNGKeyArray | None) -> Array:
        """One block; h and emb `(hidden,)`."""
        scale, shift = jnp.split(self.modulation(nnx.silu(emb)), 2)
        inner = nnx.silu(self.first(self.norm(h) * (1 + scale) + shift))
        return h + self.second(dropout(inner, self.rate, key))


class MLP(Network):
    """A residual MLP over one vector, conditioned on noise level and class.

    Taps: "emb"; "block.0", "block.1", ... (the residual stream after each block).

    Args:
        features: size d of the example, which is `(d,)`.
        hidden: width, even; the size of the embedding, too.
        num_blocks: number of residual blocks.
        num_classes: number of classes, or None; see `Network` for this and the next two.
        label_size: size of a vector label, or None.
        scalars: names of scalar conditions.
        dropout: dropout rate in the blocks, in [0, 1).
        out_features: size of the output; None for `features`.
        remat: recompute each block in the backward pass; or what to keep of it, by the name of
            a policy of `jax.checkpoint_policies`.
        dtype: compute dtype; None follows the input and the weights.
        param_dtype: dtype of the weights.
        rngs: initialisation keys.

    Raises:
        ValueError: if `hidden` is odd or below 4, or for an unknown policy.
    """

    def __init__(
        self,
        features: int,
        *,
        hidden: int = 128,
        num_blocks: int = 3,
        num_classes: int | None = None,
        label_size: int | None = None,
        scalars: Sequence[str] = (),
        dropout: float = 0.0,
        out_features: int | None = None,
        remat: bool | str = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.arguments = arguments_of(locals())
        if hidden < 4 or hidden % 2:
            raise ValueError(f"`hidden` must be even and at least 4, got {hidden}.")
        check_rate(dropout)
        remat_policy(remat)
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.shape, self.remat = (features,), remat
        self.embedding = ConditionEmbedding(
            hidden, hidden, num_classes=num_classes, label_size=label_size, scalars=scalars, **kinds
        )
        self.first = nnx.Linear(features, hidden, **kinds)
        self.blocks = nnx.List(MLPBlock(hidden, dropout, **kinds) for _ in range(num_blocks))
        self.norm = nnx.LayerNorm(hidden, **kinds)
        self.last = nnx.Linear(hidden, out_features or features, kernel_init=zeros, **kinds)

    @property
    def out_features(self) -> int:
        """Size of the output."""
        return self.last.out_features

    def forward(
        self,
        tap: Tap,
        x: Array,
        emb: Array,
        key: PRNGKeyArray | None,
        tokens: Array | None,
        token_mask: Array | None,
    ) -> Array:
        """See `Network`."""
        h = self.first(x)
        # A noise label of wider dtype than x must not widen the whole network.
        emb = emb.astype(h.dtype)
        for i, block in enumerate(self.blocks):

            def run(tap, block, h, emb, key, i=i):
                return tap(f"block.{i}", self.at_use(block, "blocks")(h, emb, key))

            h = tap.run(run, block, h, emb, fold(key, i), remat=self.remat)
        return self.last(nnx.silu(self.norm(h)))

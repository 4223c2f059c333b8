"""Distribution matching distillation, held to its teacher by stored pairs."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_callable, check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.distillation._generated import (
    Begun,
    begin,
    finish,
    noise_and_times,
    start_times,
)
from jaxdiff.distillation._matching import ScoreDifference
from jaxdiff.distillation._shared import (
    Distance,
    Squared,
    scale_range,
)
from jaxdiff.flow_map import FlowMap
from jaxdiff.losses import TimeLaw, Uniform, UniformTime, Weighting
from jaxdiff.predictions import X0
from jaxdiff.training import Frozen


class NormalisedDifference(ScoreDifference):
    """Base: the difference of two scores, over how far the example is from the teacher's answer."""

    normalise: eqx.AbstractVar[bool]
    floor: eqx.AbstractVar[Number]

    def __check_init__(self):
        check_callable("weighting", self.weighting, "losses.Uniform(predictions.X0())")
        check_kind("time_law", self.time_law, TimeLaw, "losses.UniformTime()")
        check_number("floor", self.floor, above=0.0)

    def reference(self, fake: Any, x0: Array, x: Array, t: Array, cond: PyTree) -> Array:
        """See `ScoreDifference`."""
        del x0
        return fake(x, t, cond)

    def factor(self, x0: Array, target: Array) -> Array | float:
        """1 / max(mean |x_g - D_teacher|, floor) if normalised, over the size of the example."""
        if not self.normalise:
            return 1 / x0.size
        return 1 / (x0.size * jnp.maximum(jnp.mean(jnp.abs(x0 - target)), self.floor))


class DMD(NormalisedDifference):
    """Distribution matching, held to a teacher's own samples by pairs of noise and sample.

    The gradient on what a generator makes is a mean over its numbers,

        w(t) (D_fake(x_t) - D_teacher(x_t)) / mean |x_g - D_teacher(x_t)|,

    and with a `regression` weight a mean distance of model(noise) to the stored sample is added,
    which keeps modes that the first term would drop. One pass of the generator over both halves,
    one of the fake score, one of the teacher.

    Without `normalise` the mean of the gradient is that of `DiffInstruct` over the size of an
    example. The normaliser depends on the example: with it this is the gradient of no KL, and its
    components may even point the other way.

    **Fixed point**: the teacher's law, at which the first term's gradient is 0 for every example;
    with the normaliser it need not be the only one. Pairs agree with it if the teacher's solver is
    exact.

    Args:
        weighting: w, a factor in x0; `Uniform(X0())` is 1.
        time_law: of the noise level; the paper's is uniform on [0.02, 0.98].
        start: as of `DiffInstruct`; pairs begin at the first time.
        scales: as of `DiffInstruct`; not with pairs.
        normalise: divide by mean |x_g - D_teacher|.
        floor: of that, > 0.
        regression: weight of the pairs `batch["noise"]` and `batch["pair"]`, >= 0, the paper's is
            0.25 with a perceptual distance; None for none.
        distance: of two examples.

    Raises:
        TypeError: when called, for a generator that is no `FlowMap`.
        ValueError: when called, without a "teacher" or a "fake", or without pairs.

    Reference: Yin, Gharbi, Zhang, Shechtman, Durand, Freeman, Park, "One-step Diffusion with
    Distribution Matching Distillation", 2023, arXiv 2311.18828, algorithm 1, with the
    weight sigma^2 / alpha of scores, which is 1 in x0.
    """

    weighting: Weighting = Uniform(X0())
    time_law: TimeLaw = UniformTime()
    start: tuple[Number, ...] | None = start_times()
    scales: tuple[Number, Number] | None = scale_range()
    normalise: bool = eqx.field(static=True, default=True)
    floor: Number = number(1e-5)
    regression: Number | None = number(None)
    distance: Distance | Any = Squared()

    def __check_init__(self):
        if self.regression is None:
            return
        check_number("regression", self.regression, least=0.0)
        check_callable("distance", self.distance, "distillation.Squared()")
        if self.scales is not None:
            raise ValueError(
                "`regression` has pairs of one guidance scale, got `scales` too. Leave one out."
            )

    def __call__(
        self, model: FlowMap, key: PRNGKeyArray, batch: dict[str, Any], frozen: Frozen
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            model: the generator.
            key: typed key; example i draws from its fold_in with i.
            batch: `{"x": (B, *event), "cond": ...}`, of whose x only the shape is looked at; with
                `regression` also `"pair"`, what the teacher's solver makes under the same
                conditions of alpha pair + sigma noise at the first time, and its `"noise"`, of unit
                variance: "x" and "noise" of `reflow_pairs`, `(B, *event)` each.
            frozen: holds the teacher and the fake score.

        Returns:
            The scalar loss, and `{"gap": mean square of what the scores differ by}`; with pairs
            also `"regression"`, their mean distance.
        """
        if self.regression is None:
            return self.matched(model, key, batch, frozen)
        begin_key, noise_key = jax.random.split(key)
        begun = begin(model, begin_key, batch, self.start)
        noise, pair = _pairs(batch)
        first = jnp.full_like(begun.t, model.process.t_max if self.start is None else self.start[0])
        started = jax.vmap(model.process.marginal)(pair, noise, first).astype(begun.x.dtype)
        both = Begun(
            jnp.concatenate([begun.x, started]),
            jnp.concatenate([begun.t, first]),
            jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), begun.cond),
            None,
        )
        made, remade = jnp.split(finish(model, both), 2)
        drawn = noise_and_times(model.process, noise_key, made, self.time_law)
        losses, gaps = self.compared(model, drawn, made, begun, frozen)
        apart = jax.vmap(self.distance)(remade, jax.lax.stop_gradient(pair)).mean()
        metrics = {"gap": gaps.mean(), "regression": apart}
        return losses.mean() + self.regression * apart, metrics


def _pairs(batch: dict[str, Any]) -> tuple[Array, Array]:
    if missing := sorted({"noise", "pair"} - set(batch)):
        raise ValueError(
            f"`regression` needs pairs, batch['noise'] and batch['pair'], got none of {missing}. "
            "Take those of distillation.reflow_pairs, whose 'x' is the pair, or leave it None."
        )
    for name in ("noise", "pair"):
        if jnp.shape(batch[name]) != jnp.shape(batch["x"]):
            raise ValueError(
                f"`batch[{name!r}]` must have the shape of batch['x'], {jnp.shape(batch['x'])}, "
                f"got {jnp.shape(batch[name])}."
            )
    return batch["noise"], batch["pair"]

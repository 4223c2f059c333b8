"""Score forgetting distillation: a generator that says something else where it is to forget."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jaxdiff._checks import check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.denoiser import Denoiser
from jaxdiff.distillation import FakeScoreLoss, SiD
from jaxdiff.distillation._generated import begin, finish, noise_and_times, weighted_mean
from jaxdiff.distillation._matching import DistributionMatching
from jaxdiff.flow_map import FlowMap
from jaxdiff.losses._batch import check_batch, stratified_uniform
from jaxdiff.training import Frozen
from jaxdiff.unlearning._overrides import Override
from jaxdiff.unlearning._shared import forget_of


def _fused(batch: dict[str, Any], retain: Number, forget: Number) -> tuple[dict, Array]:
    """Retained rows, then forgotten ones, and weights whose mean is the sum of both means."""
    check_batch(batch)
    rows = forget_of(batch)
    parts = [{name: part.get(name) for name in ("x", "cond")} for part in (batch, rows)]
    structures: list[Any] = [jax.tree.structure(part["cond"]) for part in parts]
    kept, other = structures
    if kept != other:
        raise ValueError(
            "`batch` must have conditions of one form for what is kept and what is forgotten, got "
            f"{kept} and {other}."
        )
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b.astype(a.dtype)]), *parts)
    n, m = len(batch["x"]), len(rows["x"])
    weights = jnp.full(n, retain * (n + m) / n), jnp.full(m, forget * (n + m) / m)
    return both, jnp.concatenate(weights)


class ScoreForgetting(eqx.Module):
    """Distil what is kept, and for what is forgotten the teacher's answer to another condition.

        retain E_c l(c, c, c) + forget E_f l(f, f, o),

    l(c_g, c_s, c_p) the loss of a generator told c_g, whose examples the fake score sees under c_s
    and the teacher under c_p; c of the batch, f of `batch["forget"]`, o from `override`. The
    forgetting term is the other with the teacher's condition exchanged. Of the examples in a batch
    only the shapes are looked at: no data. Both terms are one batch: one pass of the generator, one
    of each score.

    **Fixed point**: the teacher's law p(x | c) where c is kept, and p(x | o) where it is forgotten.
    With `forget` 0 it is `matching` on what is kept, up to rounding; but the generator shares its
    weights, and what it makes of f moves with them. With o = f it is `matching` with class weights:
    nothing is forgotten.

    What is forgotten has far to go, and on the way its width can run away where `SiD` has the wrong
    sign, with alpha 1.2 and levels that are small beside it: take the published levels, 0.14 to 13
    for data of spread 1/2 to 1, or alpha 1.

    Beside it, the fake score learns by `ScoreForgettingFake` of the same weights.

    Args:
        override: the condition in place of a forgotten one.
        matching: how the generator is drawn to the teacher: `distillation.SiD()`, `SiD(1.0)` or
            `DiffInstruct()`, say; its `start` is the generator's.
        retain: factor on what is kept, >= 0.
        forget: factor on what is forgotten, >= 0; the published 0.01 for pixels, 1 for latents.

    Raises:
        TypeError: when called, for a generator that is no `FlowMap`.
        ValueError: when called, without a "teacher" or a "fake", or a batch without "forget".

    Reference: Chen, Zhang, Zhou, "Score Forgetting Distillation: A Swift, Data-Free Method for
    Machine Unlearning in Diffusion Models", 2024, arXiv 2409.11219, algorithm 1. Its released code
    takes the fake score of the first stage for the teacher of the second; here the teacher is the
    constant that is passed.
    """

    override: Override | Any
    matching: DistributionMatching = SiD()
    retain: Number = number(1.0)
    forget: Number = number(0.01)

    def __check_init__(self):
        check_kind("matching", self.matching, DistributionMatching, "distillation.SiD()")
        check_number("retain", self.retain, least=0.0)
        check_number("forget", self.forget, least=0.0)

    def __call__(
        self, model: FlowMap, key: PRNGKeyArray, batch: dict[str, Any], frozen: Frozen
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            model: the generator, such as a `distillation.Jump`.
            key: typed key; example i draws from its fold_in with i, forgotten ones after the kept.
            batch: `{"x": ..., "cond": ..., "forget": {"x": ..., "cond": ...}}`.
            frozen: holds the teacher and the fake score.

        Returns:
            The scalar loss; the "gap" of what is kept, and that of what is forgotten as
            "forget_gap", which tell how far teacher and fake score are apart.
        """
        both, weight = _fused(batch, self.retain, self.forget)
        count = len(batch["x"])
        matching = self.matching
        begin_key, noise_key, forget_key, override_key = jax.random.split(key, 4)
        begun = begin(model, begin_key, both, matching.start, matching.scales)
        x0 = finish(model, begun)
        own = jax.tree.map(lambda leaf: leaf[count:], both["cond"])
        other = self.override(override_key, own, jax.lax.stop_gradient(x0[count:]))
        told = jax.tree.map(
            lambda kept, new: jnp.concatenate([kept[:count], new.astype(kept.dtype)]),
            both["cond"],
            other,
        )
        # Each part has times of its own, in strata: the kept are drawn as without the others.
        parts = (
            noise_and_times(model.process, noise_key, x0[:count], matching.time_law),
            noise_and_times(model.process, forget_key, x0[count:], matching.time_law),
        )
        noise = jax.tree.map(lambda *both: jnp.concatenate(both), *parts)
        losses, gaps = matching.compared(model, noise, x0, begun, frozen, told)
        metrics = {"gap": gaps[:count].mean(), "forget_gap": gaps[count:].mean()}
        return weighted_mean(losses, weight), metrics


class ScoreForgettingFake(eqx.Module):
    """The denoising loss of what the generator makes, of kept and forgotten conditions alike.

    The score of the generator as it is: under a forgotten condition, too, that of what it makes
    there. A pass of the generator without a gradient, and one of the denoiser.

    Args:
        fake: the loss of the fake score, with the generator's `start`.
        retain: factor on what is kept, >= 0.
        forget: factor on what is forgotten, >= 0.

    Raises:
        ValueError: when called, without a player "generator", or a batch without "forget".

    Reference: Chen, Zhang, Zhou, "Score Forgetting Distillation: A Swift, Data-Free Method for
    Machine Unlearning in Diffusion Models", 2024, arXiv 2409.11219, algorithm 1.
    """

    fake: FakeScoreLoss = FakeScoreLoss()
    retain: Number = number(1.0)
    forget: Number = number(0.01)

    def __check_init__(self):
        check_kind("fake", self.fake, FakeScoreLoss, "distillation.FakeScoreLoss()")
        check_number("retain", self.retain, least=0.0)
        check_number("forget", self.forget, least=0.0)

    def __call__(
        self, model: Denoiser, key: PRNGKeyArray, batch: dict[str, Any], frozen: Frozen
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch; see `ScoreForgetting`."""
        both, weight = _fused(batch, self.retain, self.forget)
        kept, count = len(batch["x"]), len(weight)
        keys = jax.random.split(jax.random.split(key)[1], 3)
        levels = stratified_uniform(keys[0], kept), stratified_uniform(keys[2], count - kept)
        return self.fake.weighted(model, key, both, frozen, weight, jnp.concatenate(levels))

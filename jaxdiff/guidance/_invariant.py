"""Invariant guidance: no group of examples is denoised worse than another, without known groups."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jaxdiff._checks import check_count, check_key, check_kind, check_number
from jaxdiff._tree import Number, number, root
from jaxdiff.denoiser import Denoiser, check_denoiser
from jaxdiff.losses import DenoisingLoss, each_example, stratified_uniform
from jaxdiff.losses._batch import check_batch, wide


class GroupWeights(eqx.Module):
    """How far each example of a data set belongs to each group: softmax of `logits`, by rows.

    Rows of a softmax are on the simplex whatever the optimiser does, and its gradient is 0 only
    where that along the simplex is. A Euclidean projection fits steps of plain gradient descent,
    not those of Adam, which are scaled by coordinate. Weights of exactly 0 are not reached, but
    tended to.

    Attributes:
        logits: `(n, g)`; -inf for weights of 0, where groups are known.
    """

    logits: Array

    def __call__(self, index: Array) -> Array:
        """The weights `(*index, g)` of examples, by their number in the data set."""
        return jax.nn.softmax(self.logits[index], axis=-1)


def group_weights(
    key: PRNGKeyArray, num_examples: int, num_groups: int, *, size: float = 0.1
) -> GroupWeights:
    """Weights that are nearly equal; at equal ones no group differs, and none could begin to.

    Args:
        key: typed key.
        num_examples: n, of the data set.
        num_groups: g.
        size: standard deviation of the logits.

    Returns:
        The weights, to be learned by `GroupingLoss`.
    """
    check_key(key)
    shape = check_count("num_examples", num_examples), check_count("num_groups", num_groups)
    check_number("size", size, above=0.0)
    return GroupWeights(size * jax.random.normal(key, shape))


def example_losses(
    denoiser: Denoiser,
    key: PRNGKeyArray,
    batch: dict,
    *,
    loss: DenoisingLoss = DenoisingLoss(),
    draws: int = 16,
) -> Array:
    """The denoising loss of each example, as a mean over times and noises of its own.

    Args:
        denoiser: the pretrained model.
        key: typed key; example i of the data set draws from its fold_in with i.
        batch: `{"x": (B, *event), "index": (B,), "cond": ...}`, "index" the numbers of the
            examples in the data set.
        loss: its weighting, law of the time and null condition.
        draws: times for each example, one in each of as many strata.

    Returns:
        `(B,)`.

    Raises:
        ValueError: without "index".
    """
    check_batch(batch)
    check_kind("loss", loss, DenoisingLoss, "losses.DenoisingLoss()")
    index = _index_of(batch)

    def one(i, x0, cond):
        time_key, noise_key = jax.random.split(jax.random.fold_in(key, i))
        u = stratified_uniform(time_key, draws)

        def once(n, u):
            t = loss.time_law.quantile(denoiser.process, u)
            return loss.per_example(denoiser, jax.random.fold_in(noise_key, n), x0, t, cond)[0]

        return jnp.mean(jax.vmap(once)(jnp.arange(draws), u))

    return jax.vmap(one)(index, batch["x"], batch.get("cond"))


class GroupingLoss(eqx.Module):
    """-std_g L_g - floor min_jg w_jg l_j, L_g = sum_j w_jg l_j / sum_j w_jg: groups that differ.

    The loss of `GroupWeights`, for a `Player` whose `trainable` is the model itself. Of two groups
    the best are those of a threshold on l: along a row, the difference of means has no largest
    value but at its ends, so that weights tend to 0 or 1. It may be that of one outlier against
    all others, and steps may end at one that no change of a single row betters. A floor keeps
    weights apart from 0; of two values a < b in equal numbers, groups are found for
    floor < sqrt(2) (b / a - 1) alone.

    Args:
        floor: of the smallest share of a loss.

    Reference: Hou, Wu, Xu, Huang, Bai, Wu, Bian, "InvDiff: Invariant Guidance for Bias Mitigation
    in Diffusion Models", 2024, arXiv 2412.08480. The code there clips rows and divides them by
    their sums, has a floor of 3, and l from noise compared with clean examples.
    """

    floor: Number = number(0.0)

    def __check_init__(self):
        check_number("floor", self.floor, least=0.0)

    def __call__(
        self, groups: GroupWeights, key: PRNGKeyArray, batch: dict, frozen: Any
    ) -> tuple[Array, dict[str, Array]]:
        """The loss of some examples, or better of all.

        Args:
            groups: the weights that learn.
            key: not used.
            batch: `{"index": (B,), "loss": (B,)}`, as of `example_losses`.
            frozen: not used.

        Returns:
            The scalar loss, and `{"spread": std_g L_g}`.

        Raises:
            ValueError: without "index" or "loss".
        """
        del key, frozen
        index = _index_of(batch)
        if "loss" not in batch:
            raise ValueError(
                f"`batch` must have the examples' losses as 'loss', got {sorted(batch)}. Compute "
                "them by example_losses."
            )
        losses, weights = wide(batch["loss"]), groups(index)
        variance, _ = _variance(*_group_losses(weights, losses))
        # `root` of a variance of 0, where all groups are the same, has a derivative of 0.
        spread = root(variance)
        least = jnp.min(weights * losses[:, None])
        return -spread - self.floor * least, {"spread": spread}


class InvariantLoss(eqx.Module):
    """mean_g L_g + variance Var_g L_g, L_g = sum_j w_jg l_j / sum_j w_jg over the batch.

    l_j is the denoising loss of example j, w_jg how far it belongs to group g, Var the unbiased
    variance over groups; a group of weight 0 in the batch is left out. Of two groups this is
    their mean and variance (L_1 - L_2)^2 / 2. Sums are over the whole batch, on all devices. Noise
    of L_g in a small batch counts as a difference of groups, at any weights.

    For the pretrained model and a second one, which alone learns, blended by `Autoguidance`:

        model = Autoguidance(delta, base, scale=0.5)
        Player(model, InvariantLoss(), optimizer, trainable=lambda m: m.base.network)

    A delta that is a copy of the base begins as the base. One whose network answers 0 does not: the
    blend's prediction, of noise say, is then 1 - scale times the base's. The weights are the
    constant "groups", a `GroupWeights`.

    Args:
        variance: weight of the variance.
        loss: of one example.

    Reference: as of `GroupingLoss`.
    """

    variance: Number = number(1.0)
    loss: DenoisingLoss = DenoisingLoss()

    def __check_init__(self):
        check_number("variance", self.variance, least=0.0)
        check_kind("loss", self.loss, DenoisingLoss, "losses.DenoisingLoss()")

    def __call__(
        self, denoiser: Denoiser, key: PRNGKeyArray, batch: dict, frozen: Any
    ) -> tuple[Array, dict[str, Array]]:
        """The loss of a batch.

        Args:
            denoiser: the model that learns.
            key: typed key.
            batch: `{"x": (B, *event), "index": (B,), "cond": ...}`, "index" the numbers of the
                examples in the data set.
            frozen: has the "groups".

        Returns:
            The scalar loss, and `{"x0_mse": mean error, "spread": std_g L_g}`.

        Raises:
            ValueError: without "index" or "groups".
        """
        check_denoiser(denoiser)
        if "groups" not in frozen:
            raise ValueError(
                "`frozen` must have the weights of groups as the constant 'groups', got "
                f"{sorted(frozen)}. Pass `constants={{'groups': weights}}` to the step."
            )
        weights = jax.lax.stop_gradient(frozen["groups"](_index_of(batch)))

        def one(key, u, x0, cond):
            t = self.loss.time_law.quantile(denoiser.process, u)
            return self.loss.per_example(denoiser, key, x0, t, cond)

        losses, errors = each_example(one, key, batch)
        variance, mean = _variance(*_group_losses(weights, losses))
        metrics = {"x0_mse": errors.mean(), "spread": root(variance)}
        return mean + self.variance * variance, metrics


def _group_losses(weights: Array, losses: Array) -> tuple[Array, Array]:
    """The mean loss of every group, `(g,)`, and which of them have any weight."""
    total = jnp.sum(weights, 0)
    there = total > 0
    means = jnp.sum(weights * losses[:, None], 0) / jnp.where(there, total, 1)
    return means, there


def _variance(values: Array, there: Array) -> tuple[Array, Array]:
    """Unbiased variance, 0 of one value, and mean of those values that are there."""
    count = jnp.sum(there)
    mean = jnp.sum(jnp.where(there, values, 0)) / jnp.maximum(count, 1)
    squares = jnp.where(there, (values - mean) ** 2, 0)
    return jnp.sum(squares) / jnp.maximum(count - 1, 1), mean


def _index_of(batch: Any) -> Array:
    if not isinstance(batch, Mapping) or "index" not in batch:
        got = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"`batch` must have the examples' numbers in the data set as 'index', got {got}."
        )
    return batch["index"]

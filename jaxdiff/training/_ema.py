"""Exponential moving averages of weights, updated inside the training step."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, number


class EMA(eqx.Module):
    """An average of weights over training; its state holds one or more averages."""

    def init(self, params: PyTree) -> list[PyTree]:
        """The averages before the first step: the initial weights, in float32 at least."""

        def wide(leaf):
            return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))

        return [jax.tree.map(wide, params) for _ in range(self.num_averages)]

    @property
    def num_averages(self) -> int:
        """How many averages are kept."""
        return 1

    @abstractmethod
    def rates(self, count: Array) -> Sequence[Array]:
        """The weight of the new parameters in each average, at update `count` = 1., 2., ..."""

    def update(self, averages: list[PyTree], params: PyTree, count: Array) -> list[PyTree]:
        """average <- (1 - rate) * average + rate * params."""

        def mix(rate, average):
            return jax.tree.map(lambda a, p: a + rate.astype(a.dtype) * (p - a), average, params)

        return [mix(*pair) for pair in zip(self.rates(count), averages, strict=True)]


class ConstantEMA(EMA):
    """A constant decay, approached from below while there is little to average.

    decay_n = min(decay, (1 + n) / (10 + n)) at update n.

    Args:
        decay: in [0, 1); the average reaches back about 1 / (1 - decay) updates.

    Reference: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020,
    arXiv 2006.11239, appendix B (0.9999); the warm-up is TensorFlow's.
    """

    decay: Number = number(0.9999)

    def __check_init__(self):
        check_number("decay", self.decay, least=0.0, below=1.0)

    def rates(self, count: Array) -> Sequence[Array]:
        """A single rate, 1 - decay_n."""
        return [jnp.maximum(1 - self.decay, 9 / (10 + count))]


class PowerEMA(EMA):
    """Power-function averages, theta(t) = (gamma + 1) / t^(gamma + 1) int_0^t u^gamma theta(u) du.

    Their width is a fixed fraction of the training so far; from a few of them, stored now and
    then, `reconstruct_ema` makes any other width afterwards.

    Args:
        sigma_rels: relative widths, each in (0, 0.28); the paper keeps two, 0.05 and 0.10.

    Reference: Karras, Aittala, Lehtinen, Hellsten, Aila, Laine, "Analyzing and Improving the
    Training Dynamics of Diffusion Models", 2023, arXiv 2312.02696, section 3 and algorithm 2.
    """

    sigma_rels: tuple[float, ...] = eqx.field(static=True, default=(0.05, 0.10))

    def __check_init__(self):
        if not isinstance(self.sigma_rels, tuple):
            raise TypeError(
                f"`sigma_rels` must be a tuple, got {self.sigma_rels!r}. Pass (0.05, 0.1), say."
            )
        if not self.sigma_rels:
            raise ValueError("`sigma_rels` must have one width at least, got (). Pass (0.05, 0.1).")
        for width in self.sigma_rels:
            sigma_rel_to_gamma(width)

    @property
    def num_averages(self) -> int:
        """One for each width."""
        return len(self.sigma_rels)

    def rates(self, count: Array) -> Sequence[Array]:
        """1 - (1 - 1 / count)^(gamma + 1)."""
        # Late in training 1 - 1 / count has lost most digits of 1 / count in float32.
        log = jnp.log1p(-1 / count)
        return [-jnp.expm1((sigma_rel_to_gamma(s) + 1) * log) for s in self.sigma_rels]


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """The exponent gamma of the power profile of relative width sigma_rel.

    The largest root of sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).

    Raises:
        ValueError: for a width outside (0, 0.288), which no profile with gamma >= 0 has.

    Reference:
        Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", 2023,
        arXiv 2312.02696, equation 126.
    """
    if not 0 < sigma_rel < 12**-0.5:
        raise ValueError(
            f"`sigma_rel` must lie in (0, {12**-0.5:.3f}), got {sigma_rel}; 0.05 to 0.15 is usual."
        )
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def _inner_product(time_a, gamma_a, time_b, gamma_b):
    exponent = np.where(time_a < time_b, gamma_b, -gamma_a)
    ratio = (time_a / time_b) ** exponent
    scale = (gamma_a + gamma_b + 1) * np.maximum(time_a, time_b)
    return (gamma_a + 1) * (gamma_b + 1) * ratio / scale


def reconstruct_ema(
    snapshots: Sequence[tuple[float, float, PyTree]], *, step: float, sigma_rel: float
) -> PyTree:
    """The average of another width, from stored snapshots: post-hoc EMA.

    The least-squares combination of the stored profiles that is nearest to the wanted one.

    Args:
        snapshots: `(step, sigma_rel, params)` of stored averages of `PowerEMA`.
        step: the training step at which to reconstruct, usually the last.
        sigma_rel: the width wanted.

    Returns:
        Averaged weights, with the structure and dtypes of the snapshots'.

    Reference:
        Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", 2023,
        arXiv 2312.02696, algorithm 3.
    """
    times = np.asarray([float(s[0]) for s in snapshots])
    gammas = np.asarray([sigma_rel_to_gamma(s[1]) for s in snapshots])
    gram = _inner_product(times[:, None], gammas[:, None], times, gammas)
    target = _inner_product(times, gammas, float(step), sigma_rel_to_gamma(sigma_rel))
    weights = np.linalg.solve(gram, target)
    weights /= weights.sum()

    def combine(*leaves: Any) -> Array:
        total = sum(
            w * np.asarray(leaf, np.float64) for w, leaf in zip(weights, leaves, strict=True)
        )
        return jnp.asarray(total.astype(leaves[0].dtype))

    return jax.tree.map(combine, *(s[2] for s in snapshots))

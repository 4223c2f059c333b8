"""Negative guidance whose scale is the posterior odds: exactly the law without a class."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_callable, check_number
from jaxdiff._tree import Number, number
from jaxdiff.denoiser import Denoiser, DenoiserMap, Estimate, combined
from jaxdiff.guidance._scale import both_answers, check_condition


class PosteriorOdds(DenoiserMap):
    """D - odds (D_f - D), odds = r / (1 - r), r = p(f | x_t): the law of everything but f.

    Kind 1. With p = (1 - pi) p_r + pi p_f the score of what is left is
    s_r = s - odds (s_f - s) = s + grad log(1 - r). So negative guidance is exact with this scale,
    which depends on x and t, and with a constant one only where the odds happen to be it. Two
    evaluations, and one of the classifier.

    The two terms cancel where x_t is surely of f: with odds of 1e5 single precision loses a tenth
    of the answer, and they are cut at `most`. Guidance by a classifier of "not f",
    `ClassifierGuidance` at scale 1, is the same law without that, at the price of a derivative, and
    needs neither label nor D_f: trained on examples of f against all of them, in the true
    proportions, it unlearns without labels.

    Args:
        base: a denoiser; what is left is of the condition it is asked with, usually none.
        forget_cond: the condition of what is to be left out, in the entries that it names.
        log_odds: `(x_t, t) -> log (r / (1 - r))` of one example.
        most: the largest odds.

    Reference: by Bayes' rule; negative guidance at a constant scale is in Gandikota, Materzynska,
    Fiotto-Kaufman, Bau, "Erasing Concepts from Diffusion Models", 2023, arXiv 2303.07345.
    """

    base: Denoiser
    forget_cond: PyTree
    log_odds: Callable[[Array, Array], Array]
    most: Number = number(1e4)

    def __check_init__(self):
        check_callable("log_odds", self.log_odds, "lambda x, t: network(x, t)[0]")
        check_number("most", self.most, least=0.0)
        check_condition("forget_cond", self.forget_cond)

    def check_cond(self, cond: PyTree) -> None:
        """See `Denoiser`; the forgotten condition too."""
        super().check_cond(cond)
        super().check_cond(self.forget_cond)

    @property
    def evaluations(self) -> Array | int:
        """Twice the base denoiser's."""
        return 2 * self.base.evaluations

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        whole, part = both_answers(self.base, x, t, cond, self.forget_cond, key)
        log_odds = self.log_odds(x, t)
        if jnp.ndim(log_odds):
            raise ValueError(
                f"`log_odds` must return a scalar, got shape {jnp.shape(log_odds)}. Take the logit "
                "of the forgotten class alone."
            )
        # Odds depend on x: the derivative of the answer, by which densities are known, has theirs.
        scale = jnp.minimum(jnp.exp(jnp.minimum(log_odds, 80.0)), self.most).astype(x.dtype)
        return combined(lambda a, f: a - scale * (f - a), self.process, x, t, whole, part)

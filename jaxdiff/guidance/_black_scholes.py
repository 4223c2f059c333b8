"""Blending of conditions by the price of an option on each."""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm as normal
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_callable, check_number
from jaxdiff._tree import Number, number
from jaxdiff.conditions import as_entries, from_entries, take
from jaxdiff.denoiser import Denoiser, Estimate
from jaxdiff.guidance._training_free import check_scalar, or_worst
from jaxdiff.stepwise import Stepwise


def call_price(spot: Array, strike: Number, rate: Number, volatility: Array) -> Array:
    """The Black-Scholes price of a European call option.

    spot Phi(d1) - strike e^-rate Phi(d2), d1 = log(spot / strike) + rate + volatility^2 / 2 over
    volatility, d2 = d1 - volatility; without volatility max(spot - strike e^-rate, 0).

    Args:
        spot: price of what is optioned, > 0.
        strike: price that is agreed upon, >= 0.
        rate: of interest, times the time to maturity.
        volatility: times the root of that time.
    """
    later = strike * jnp.exp(-rate)
    wide = volatility > 0
    safe = jnp.where(wide, volatility, 1.0)
    d1 = jnp.log(spot / later) / safe + safe / 2
    price = spot * normal.cdf(d1) - later * normal.cdf(d1 - safe)
    return jnp.where(wide, price, jnp.maximum(spot - later, 0))


class BlackScholesBlending(Stepwise):
    """One of several conditions at each step: that whose option is the cheapest.

    After each step the estimate's likeness to every condition is the spot price S_i of an option;
    the next step is under the condition of the least price, the one that the image lacks most. The
    first step is under the example's own condition. With n = t / (t - s) steps to go,
    rate = t / t_max and volatility = std sqrt(n), std that of q(x_s | x_t, x0).

    Kind 2: remembers which condition is next, for each example; data of the example: the entry
    "concepts" of its condition, conditions of the network with a leading axis of k. Prices grow
    with S_i, so that, at one strike, the choice is that of the least likeness.

    Args:
        base: a conditional denoiser, or guidance of one.
        likeness: `(x0, concept) -> S > 0`, a scalar of one clean example; a pytree.
        strike: the authors' is 0.25, of likenesses about 20 to 30.

    Raises:
        ValueError: when called, without "concepts", or for a likeness that is no scalar.

    Reference: Kothandaraman, Lin, Manocha, "Prompt Mixing in Diffusion Models using the Black
    Scholes Algorithm", 2024, arXiv 2405.13685, by its code; n is the code's count on uniform grids.
    """

    base: Denoiser
    likeness: Callable[[Array, PyTree], Array]
    strike: Number = number(0.25)

    takes: ClassVar[tuple[str, ...]] = ("concepts",)

    def __check_init__(self):
        check_callable("likeness", self.likeness, "jax.tree_util.Partial(function, weights)")
        check_number("strike", self.strike, least=0.0)

    def check_cond(self, cond: PyTree) -> None:
        """See `Denoiser`: every concept, too."""
        entries = as_entries(cond)
        super().check_cond(cond)
        if "concepts" in entries:
            concepts, rest = take(cond, "concepts", by="BlackScholesBlending")
            self.base.check_cond(from_entries({**as_entries(rest), **as_entries(concepts)}))

    def init_memory(self, x: Array) -> Array:
        """The next condition: the example's own."""
        return -jnp.ones((), jnp.int32)

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        concepts, rest = take(cond, "concepts", by="BlackScholesBlending")
        chosen = self.step.memory
        own = as_entries(rest)

        def choose(concept, plain):
            return jnp.where(chosen < 0, plain, concept[jnp.maximum(chosen, 0)])

        picked = {
            name: jax.tree.map(choose, concept, own[name])
            for name, concept in as_entries(concepts).items()
        }
        found = self.base.estimate(x, t, from_entries({**own, **picked}), key=key)
        step, process = self.step, self.process
        left = step.t / (step.t - step.s)
        std = process.posterior_std(step.t, step.s)

        def price(concept):
            spot = check_scalar(self.likeness(found.x0, concept), "likeness")
            return call_price(spot, self.strike, step.t / process.t_max, std * jnp.sqrt(left))

        prices = jax.vmap(price)(concepts)
        return self.remember(found, jnp.argmax(or_worst(-prices)).astype(chosen.dtype))

"""Denoising MCMC: a Markov chain over states and noise levels, finished by any solver.

States are in the coordinates y = x / alpha, where every process is y = x0 + k n with the noise
level k = sigma / alpha.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, PRNGKeyArray, PyTree

from jaxdiff._checks import check_cond, check_count, check_key
from jaxdiff._tree import as_float_array, is_known, jit
from jaxdiff.denoiser import Denoiser, check_denoiser
from jaxdiff.oracles import GaussianMixture
from jaxdiff.stepwise import check_stepless


class ChainStates(eqx.Module):
    """The states that chains kept.

    Attributes:
        y: states x / alpha, `(num_chains, num_steps // keep_every, *event)`.
        level_index: noise level of each, an index into `levels`, without the event's axes.
    """

    y: Array
    level_index: Array


class OracleNoisePosterior(eqx.Module):
    """The exact p(k | y) of a closed-form denoiser: what a noise classifier would learn.

    log p(k | y) = log p(k) + log p(y | k) - log p(y), y = x0 + k n.

    Args:
        oracle: the oracle whose noisy densities are known.
        levels: noise levels k = sigma / alpha, `(num_levels,)`, > 0.
        log_prior: log p(k), `(num_levels,)`, up to a constant; None for a uniform prior.

    Reference: Kim, Ye, "Denoising MCMC for Accelerating Diffusion-Based Generative Models",
    2022, arXiv 2209.14593, section 3 (there a small classifier, trained).
    """

    oracle: GaussianMixture
    levels: Array = eqx.field(converter=jnp.asarray)
    log_prior: Array | None = None

    def __call__(self, y: Array, cond: PyTree = None) -> Array:
        """log p(k | y) of every level, `(num_levels,)`; y `(*event)`."""
        process = self.oracle.process
        times = process.unbounded_time(-2 * jnp.log(self.levels))

        def log_density(t):
            alpha = process.alpha(t)
            return self.oracle.log_prob(alpha * y, t, cond) + y.size * jnp.log(alpha)

        joint = jax.vmap(log_density)(times)
        return jax.nn.log_softmax(joint if self.log_prior is None else joint + self.log_prior)


class ChainState(NamedTuple):
    """One chain: the state x / alpha, `(*event)`, and the index of its noise level."""

    y: Array
    level_index: Array


class LangevinGibbs(eqx.Module):
    """The Markov kernel of `langevin_gibbs`, one step of one chain at a time.

        state = kernel.init(y, level_index)
        state = kernel.step(key, state, cond=cond)

    Args:
        denoiser: the denoiser, of any process.
        noise_posterior: as in `langevin_gibbs`.
        levels: noise levels k = sigma / alpha, `(num_levels,)`.
        step_sizes: eta of every level, `(num_levels,)`.
        sample_level: whether to draw the level, and not to take the most probable one.

    Reference: Kim, Ye, "Denoising MCMC for Accelerating Diffusion-Based Generative Models",
    2022, arXiv 2209.14593, equations 15 and 16.
    """

    denoiser: Denoiser
    noise_posterior: Callable[[Array, PyTree], Array]
    levels: Array
    step_sizes: Array
    sample_level: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        check_denoiser(self.denoiser)
        check_stepless(self.denoiser, "`langevin_gibbs`")

    def init(self, y: Array, level_index: Array) -> ChainState:
        """The start of a chain: y `(*event)`, and the index of its level, a scalar."""
        return ChainState(y, level_index)

    def step(self, key: PRNGKeyArray, state: ChainState, *, cond: PyTree = None) -> ChainState:
        """One step; costs one network evaluation."""
        process, (y, j) = self.denoiser.process, state
        noise_key, level_key = jax.random.split(key)
        level, eta = self.levels[j], self.step_sizes[j]
        t = process.unbounded_time(-2 * jnp.log(level))
        score = (self.denoiser(process.alpha(t) * y, t, cond) - y) / level**2
        noise = jax.random.normal(noise_key, y.shape, y.dtype)
        moved = (y + eta / 2 * score + jnp.sqrt(eta) * noise).astype(y.dtype)
        logits = self.noise_posterior(moved, cond)
        drawn = jax.random.categorical(level_key, logits) if self.sample_level else logits.argmax()
        return ChainState(moved, drawn.astype(j.dtype))


@jit
def _chains(key, start, cond, kernel, *, num_steps, keep_every, keep_smallest):
    def chain(index, start, cond):
        chain_key = jax.random.fold_in(key, index)

        def move(carry, i):
            state, kept = carry
            state = kernel.step(jax.random.fold_in(chain_key, i), state, cond=cond)
            smaller = kernel.levels[state.level_index] < kernel.levels[kept.level_index]
            keep = (i % keep_every == 0) | (not keep_smallest) | smaller
            kept = jax.tree.map(lambda new, old: jnp.where(keep, new, old), state, kept)
            return (state, kept), None

        def window(carry, steps):
            carry, _ = jax.lax.scan(move, carry, steps)
            return carry, ChainStates(*carry[1])

        steps = jnp.arange(num_steps).reshape(-1, keep_every)
        start = kernel.init(*start)
        return jax.lax.scan(window, (start, start), steps)[1]

    return jax.vmap(chain)(jnp.arange(len(start[0])), start, cond)


def langevin_gibbs(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    noise_posterior: Callable[[Array, PyTree], Array],
    y: Array,
    level_index: Array,
    levels: ArrayLike,
    *,
    step_size: ArrayLike,
    num_steps: int,
    keep_every: int = 1,
    sample_level: bool = True,
    keep_smallest: bool = False,
    cond: PyTree = None,
) -> ChainStates:
    """Denoising Langevin Gibbs: chains over (y, k) that wander between modes and noise levels.

    One step, at noise level k with step size eta,

        y <- y + (eta / 2) grad log p(y | k) + sqrt(eta) n
        k <- a draw of p(k | y), or its argmax

    and after every `keep_every` steps a state is kept, for any solver to finish. One network
    evaluation a step. To finish states `y` of levels `k`, each on a grid of its own:

        t = process.time(-2 * jnp.log(k))
        grid = lambda t: karras_times(process, num_steps, t_start=t)
        x = process.alpha(t).reshape(-1, 1, 1, 1) * y
        jaxdiff.denoise(key, denoiser, x, times=jax.vmap(grid)(t))

    With draws of the level and eta -> 0 the stationary law is p(k) p(y | k), p(k) being the prior
    that `noise_posterior` assumes. A finite eta biases it to first order: at one level, the
    variance V of a Gaussian becomes V / (1 - eta / (4 V)). The chain diverges where
    eta >= 4 V_min, V_min being the smallest variance of p(y | k), at least k^2, if k does not
    move on. The argmax is not a Gibbs step: its stationary law differs even for eta -> 0. The
    states of one chain are correlated; separate chains are independent.

    Args:
        key: typed PRNG key; chain i draws from `fold_in(key, i)`, whatever their number.
        denoiser: the denoiser, of any process.
        noise_posterior: `(y, cond) -> log p(k | y)` of every level, `(num_levels,)`, up to a
            constant, for one state: a classifier, or `OracleNoisePosterior`.
        y: first states x / alpha, `(num_chains, *event)`.
        level_index: their noise levels, integers `(num_chains,)` that index `levels`.
        levels: noise levels k = sigma / alpha, `(num_levels,)`, > 0, in any order.
        step_size: eta in squared units of y, > 0: one number, or one per level.
        num_steps: steps of each chain, a multiple of `keep_every`.
        keep_every: steps between kept states.
        sample_level: draw the level; False takes the most probable one.
        keep_smallest: of every `keep_every` states keep the first with the smallest level, which
            is cheapest to finish, instead of the last. The choice favours small levels and what
            made them likely: kept states no longer follow p(k) p(y | k).
        cond: pytree with a leading axis of `num_chains`, or None.

    Returns:
        A `ChainStates`.

    Raises:
        TypeError: if `key` is not a typed key.
        ValueError: if shapes do not match, or `num_steps` is not a multiple of `keep_every`.

    Reference: Kim, Ye, "Denoising MCMC for Accelerating Diffusion-Based Generative Models",
    2022, arXiv 2209.14593, equations 15 and 16. The authors' code takes the argmax, one eta for
    all levels, and the smallest level: `sample_level=False, keep_smallest=True`.
    """
    check_key(key)
    y, level_index = as_float_array(y), jnp.asarray(level_index)
    levels = as_float_array(levels)
    if level_index.shape != y.shape[:1] or not jnp.issubdtype(level_index.dtype, jnp.integer):
        raise ValueError(
            f"`level_index` must be integers of shape {y.shape[:1]}, one per chain of `y`, got "
            f"{level_index.dtype} of shape {level_index.shape}. Use e.g. jnp.zeros(len(y), int)."
        )
    if is_known(level_index):
        low, high = np.min(level_index), np.max(level_index)
        if low < 0 or high >= len(levels):
            raise ValueError(
                f"`level_index` must lie in [0, {len(levels) - 1}], got {low} to {high}."
            )
    check_count("keep_every", keep_every)
    if num_steps < 1 or num_steps % keep_every:
        raise ValueError(
            f"`num_steps` must be a positive multiple of `keep_every` = {keep_every}, got "
            f"{num_steps}. Use {max(-(-num_steps // keep_every), 1) * keep_every}."
        )
    step_size = jnp.asarray(step_size, levels.dtype)
    if step_size.shape not in ((), levels.shape):
        raise ValueError(
            f"`step_size` must be a number or one per level, shape {levels.shape}, got shape "
            f"{step_size.shape}."
        )
    check_cond(cond, y.shape[0])
    denoiser.check_cond(cond)
    step_sizes = jnp.broadcast_to(step_size, levels.shape)
    kernel = LangevinGibbs(denoiser, noise_posterior, levels, step_sizes, sample_level)
    return _chains(
        key, (y, level_index), cond, kernel, num_steps=num_steps, keep_every=keep_every,
        keep_smallest=keep_smallest,
    )  # fmt: skip

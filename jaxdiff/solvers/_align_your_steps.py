"""Align Your Steps: the grid that minimises a bound on the sampler's KL divergence."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, PRNGKeyArray, PyTree

from jaxdiff._checks import check_count, check_key
from jaxdiff._tree import batched, jit
from jaxdiff.denoiser import Denoiser
from jaxdiff.solvers._grids import Schedule, log_snr_times, monotone
from jaxdiff.solvers._times import check_times, clip_times

# Steps of the 1000-step tables of Stable Diffusion 1.5 and XL, for `table_times`; the published
# grids of ten steps, whose eleventh level is the table's step 0 or clean data.
# Reference: Sabour, Fidler, Kreis, "Align Your Steps", 2024, arXiv 2404.14507, project page.
STABLE_DIFFUSION_STEPS = (999, 850, 736, 645, 545, 455, 343, 233, 124, 24)
STABLE_DIFFUSION_XL_STEPS = (999, 845, 730, 587, 443, 310, 193, 116, 53, 13)


def _example_bound(key, x0, cond, denoiser: Denoiser, levels: Array, num_levels: int) -> Array:
    """The bound's integral for one clean example, over all steps; scalar."""
    process = denoiser.process

    def denoise(y, k):
        t = process.time(-2 * jnp.log(k))
        return denoiser((process.alpha(t) * y).astype(x0.dtype), t, cond)

    def step(key, high, low):
        level_key, start_key, bridge_key = jax.random.split(key, 3)
        start = x0 + high * jax.random.normal(start_key, x0.shape, x0.dtype)
        held = denoise(start, high)
        # In (0, 1], one in each stratum: at 0 the bridge has no derivative.
        uniform = jax.random.uniform(level_key, (num_levels,), levels.dtype)
        fraction = (jnp.arange(1, num_levels + 1) - uniform) / num_levels
        depth = jnp.log(high / low)

        def change(fraction, noise):
            # y at level k given x0 and y at level `high`: a Brownian bridge.
            ratio = jnp.exp(-2 * fraction * depth)
            k = high * jnp.exp(-fraction * depth)
            spread = k * jnp.sqrt(-jnp.expm1(-2 * fraction * depth))
            y = x0 + ratio * (start - x0) + spread * noise
            return jnp.sum((denoise(y, k) - held) ** 2) / k**2

        noise = jax.random.normal(bridge_key, (num_levels, *x0.shape), x0.dtype)
        return depth * jnp.mean(jax.vmap(change)(fraction, noise))

    keys = jax.random.split(key, levels.shape[0] - 1)
    return jnp.sum(jax.vmap(step)(keys, levels[:-1], levels[1:]))


@jit
def _bound(key, data, cond, denoiser, times, *, num_levels, batch_size):
    process = denoiser.process
    levels = jnp.exp(-0.5 * process.log_snr(jnp.clip(times, process.t_min, process.t_max)))

    def one(index, x0, cond):
        example_key = jax.random.fold_in(key, index)
        return _example_bound(example_key, x0, cond, denoiser, levels, num_levels)

    return batched(one, batch_size)(jnp.arange(data.shape[0]), data, cond)


def kl_upper_bound(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    data: Array,
    times: ArrayLike,
    *,
    cond: PyTree = None,
    num_levels: int = 8,
    batch_size: int | None = None,
) -> Array:
    """A bound on the KL divergence that a grid's steps cause, estimated on data.

    With k = sigma / alpha, y = x / alpha and grid levels k_0 > ... > k_N,

        sum_i int_{k_{i+1}}^{k_i} k^-3 E |D(y_k, k) - D(y_{k_i}, k_i)|^2 dk,

    under the forward process y_k = x0 + k eps, in nats. It bounds KL(p_{k_N} || q) for the samples
    q of the reverse SDE whose denoiser is held over each step (`Ancestral`, or
    `DPMSolverMultistep(1, eta=1)`) started at the true p_{k_0}. The reverse SDE has drift
    2 (D - y) / k and squared diffusion 2 k per unit of falling k; Girsanov's theorem gives the
    weight (2 / k)^2 / (2 * 2 k) = k^-3.

    For the exact denoiser, D(y_k) is a martingale and the expectation is mmse(k_i) - mmse(k):
    the bound is the error of a Riemann sum of the minimal mean square error over k^-2 / 2.

    Estimated with one noisy example per step and `num_levels` levels below it, stratified in
    log k and drawn from the bridge between the noisy and the clean example:
    num_steps (num_levels + 1) evaluations an example. Differentiable in `times`.

    Args:
        key: typed PRNG key.
        denoiser: the denoiser.
        data: clean examples, `(num_samples, *event)`.
        times: a decreasing grid. Ends beyond [t_min, t_max], such as 0, count as t_min and t_max:
            down to sigma = 0 the integral diverges.
        cond: pytree with a leading axis of `num_samples`, or None.
        num_levels: levels in each step's integral, >= 1.
        batch_size: examples computed at a time; None for all at once.

    Returns:
        Unbiased estimates, one per example, `(num_samples,)`; their mean is the bound.

    Raises:
        TypeError: if `key` is not a typed key.
        ValueError: see `check_times`.

    Reference: Sabour, Fidler, Kreis, "Align Your Steps: Optimizing Sampling Schedules in
    Diffusion Models", 2024, arXiv 2404.14507, section 3.2 and appendix A.2.
    """
    check_key(key)
    times = check_times(denoiser.process, times)
    return _bound(key, data, cond, denoiser, times, num_levels=num_levels, batch_size=batch_size)


@jit
def _align(key, data, cond, denoiser, times, *, optimiser, num_iterations, batch_size, num_levels):
    process = denoiser.process
    depth = -0.5 * process.log_snr(times)
    if optimiser is None:
        optimiser = optax.adam(optax.cosine_decay_schedule(0.05, num_iterations))

    def grid(logits):
        return monotone(logits, depth[0], depth[-1])

    def loss(logits, key):
        pick_key, key = jax.random.split(key)
        index = jax.random.randint(pick_key, (batch_size,), 0, data.shape[0])
        x0, labels = jax.tree.map(lambda leaf: leaf[index], (data, cond))
        levels = jnp.exp(grid(logits))

        def one(key, x0, cond):
            return _example_bound(key, x0, cond, denoiser, levels, num_levels)

        return jnp.mean(jax.vmap(one)(jax.random.split(key, batch_size), x0, labels))

    def iterate(carry, key):
        logits, state = carry
        value, gradient = jax.value_and_grad(loss)(logits, key)
        updates, state = optimiser.update(gradient, state, logits)
        return (optax.apply_updates(logits, updates), state), value

    logits = jnp.log(-jnp.diff(depth))
    keys = jax.random.split(key, num_iterations)
    (logits, _), history = jax.lax.scan(iterate, (logits, optimiser.init(logits)), keys)
    found = process.time(-2 * grid(logits)).at[0].set(times[0]).at[-1].set(times[-1])
    return Schedule(found, jnp.mean(history[-(num_iterations // 10 + 1) :]), history)


def align_your_steps(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    data: Array,
    times: int | ArrayLike,
    *,
    cond: PyTree = None,
    optimiser: optax.GradientTransformation | None = None,
    num_iterations: int = 300,
    batch_size: int = 64,
    num_levels: int = 4,
) -> Schedule:
    """The grid that minimises `kl_upper_bound`, by stochastic gradient descent.

    The ends stay; the interior levels move through the softmax of their gaps in log k, so that
    the grid decreases by construction. For many steps, follow the paper: align ten, then
    start from `interpolate_times(process, times, 20)`, and so on.

    The grid ends at t_min, with noise k_N left. To sample data, replace its last time by 0, as
    published grids are used.

    Differences from the paper: gradients instead of a search over one level at a time, and no
    stopping rule but `num_iterations`.

    Args:
        key: typed PRNG key.
        denoiser: the denoiser, differentiable in its time.
        data: clean examples, `(num_data, *event)`; each iteration draws from them.
        times: number of steps, to start from `log_snr_times`; or the grid to start from, its ends
            clipped to [t_min, t_max].
        cond: pytree with a leading axis of `num_data`, or None.
        optimiser: on the log gaps; None for Adam from 0.05, decayed to 0 along a cosine.
        num_iterations: gradient steps.
        batch_size: examples in each.
        num_levels: as in `kl_upper_bound`.

    Returns:
        A `Schedule`; its history is the estimated bound before each step, and its value the mean
        of the last tenth.

    Raises:
        TypeError: if `key` is not a typed key.
        ValueError: if `times` is not a grid, or has several times at or beyond t_min or t_max.

    Reference: Sabour, Fidler, Kreis, "Align Your Steps: Optimizing Sampling Schedules in
    Diffusion Models", 2024, arXiv 2404.14507, section 3.2.
    """
    check_key(key)
    process = denoiser.process
    if jnp.ndim(times) == 0:
        times = log_snr_times(process, check_count("times", times))
    times = clip_times(process, times)
    return _align(
        key, data, cond, denoiser, times, optimiser=optimiser, num_iterations=num_iterations,
        batch_size=batch_size, num_levels=num_levels,
    )  # fmt: skip

"""Unlearning by noisy gradient descent, with its guarantee."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from jaxdiff._checks import check_key, check_number
from jaxdiff._tree import Number, is_known


def noisy_descent(
    key: PRNGKeyArray, rate: Number, noise: Number, decay: Number = 0.0
) -> optax.GradientTransformation:
    """Gradient descent that adds noise: theta - rate (g + decay theta) + sqrt(2 rate) noise n.

    Learn with it, and after a request to delete go on for `unlearning_steps` on what is left, from
    the weights that were published. Momentum, averages and caches of batches all know what was
    deleted: begin them anew (`training.next_phase(fresh=...)`).

    Args:
        key: typed key, of all draws. Noise of a second phase must be new for the guarantee: give
            it another key, since a state that begins anew counts from 0.
        rate: eta.
        noise: sigma, >= 0.
        decay: lambda of the ridge (lambda / 2) |theta|^2 in the loss.

    Returns:
        An optax transformation; it needs the parameters.

    Reference: Chourasia, Shah, "Forget Unlearning: Towards True Data-Deletion in Machine
    Learning", 2022, arXiv 2210.08911, algorithm 1.
    """
    check_key(key)
    check_number("rate", rate, above=0.0)
    check_number("noise", noise, least=0.0)
    check_number("decay", decay, least=0.0)

    def init(params):
        del params
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("`params` must be given to an update of `noisy_descent`, got None.")
        own = jax.random.fold_in(key, state.count)
        leaves, structure = jax.tree.flatten(updates)
        keys = jax.tree.unflatten(structure, list(jax.random.split(own, len(leaves))))

        def move(g, w, key):
            n = jax.random.normal(key, g.shape, g.dtype)
            return (-rate * (g + decay * w) + jnp.sqrt(2 * rate) * noise * n).astype(g.dtype)

        moved = jax.tree.map(move, updates, params, keys)
        return moved, optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformation(init, update)


def learning_divergence(
    order: Number,
    lipschitz: Number,
    decay: Number,
    noise: Number,
    count: Number,
    rate: Number,
    steps: Number,
) -> Array:
    """Renyi differential privacy of noisy descent on a convex loss, between neighbouring data.

        4 q L^2 / (lambda sigma^2 n^2) (1 - exp(-lambda eta K / 2))

    Args:
        order: q > 1, of the Renyi divergence.
        lipschitz: L, of one example's loss without the ridge.
        decay: lambda > 0.
        noise: sigma > 0.
        count: n, of examples.
        rate: eta.
        steps: K.

    Reference: Chourasia, Shah, "Forget Unlearning: Towards True Data-Deletion in Machine
    Learning", 2022, arXiv 2210.08911.
    """
    check_number("order", order, above=1.0)
    for name, value in (("decay", decay), ("noise", noise), ("count", count), ("rate", rate)):
        check_number(name, value, above=0.0)
    scale = 4 * order * lipschitz**2 / (decay * noise**2 * count**2)
    return jnp.asarray(scale * -jnp.expm1(-decay * rate * steps / 2))


def unlearning_steps(learned: Number, wanted: Number, decay: Number, rate: Number) -> Array:
    """Steps on what is left until a deleted record is forgotten: 2 / (lambda eta) log(e_dp / e_dd).

    Args:
        learned: the divergence of learning, `learning_divergence`, > 0.
        wanted: that of the deletion, > 0; not below what is wanted, no step is needed.
        decay: lambda.
        rate: eta.

    Returns:
        A whole number, as a float scalar.

    Reference: Chourasia, Shah, "Forget Unlearning: Towards True Data-Deletion in Machine
    Learning", 2022, arXiv 2210.08911.
    """
    for name, value in (("learned", learned), ("wanted", wanted), ("decay", decay)):
        check_number(name, value, above=0.0)
    check_number("rate", rate, above=0.0)
    steps = 2 / (decay * rate) * jnp.log(jnp.asarray(learned) / wanted)
    return jnp.maximum(jnp.ceil(steps), 0)


def quadratic_divergence(
    order: Number, decay: Number, noise: Number, rate: Number, steps: Number, apart: Array
) -> Array:
    """The exact Renyi divergence where every loss is (lambda / 2) |theta - c|^2.

    Learning that ran for ever leaves N(c_D, v) with v = sigma^2 / (lambda (1 - eta lambda / 2));
    after K steps towards c_D' the law is N(c_D' + rho^K (c_D - c_D'), v), rho = 1 - eta lambda, and
    from that of learning anew it is q rho^(2 K) |c_D - c_D'|^2 / (2 v) away.

    Args:
        order: q.
        decay: lambda.
        noise: sigma.
        rate: eta < 2 / lambda.
        steps: K.
        apart: c_D - c_D', `(d,)`.

    Reference: derived; the bound that it is to respect is of Chourasia, Shah, 2022, arXiv
    2210.08911.
    """
    check_number("order", order, above=1.0)
    for name, value in (("decay", decay), ("noise", noise), ("rate", rate)):
        check_number(name, value, above=0.0)
    check_number("steps", steps, least=0.0)
    if is_known(rate) and is_known(decay) and not float(rate) * float(decay) < 2:
        raise ValueError(
            f"`rate` must be below 2 / decay, where learning has a law, got {rate} of {decay}."
        )
    rho = 1 - rate * decay
    variance = noise**2 / (decay * (1 - rate * decay / 2))
    return order * rho ** (2 * steps) * jnp.sum(jnp.asarray(apart) ** 2) / (2 * variance)

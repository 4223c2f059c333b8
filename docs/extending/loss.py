"""A loss of one's own, trained: a pseudo-Huber distance to x0.

A loss is a callable `(model, key, batch, frozen) -> (scalar, metrics)`. `each_example` gives every
example its own key and a time that is stratified over the batch.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxdiff
from jaxdiff import losses, networks, oracles, predictions, processes
from jaxdiff.data import array_source, make_loader
from jaxdiff.training import ConstantEMA, Player, fit, init_train_state, make_train_step


class PseudoHuber(eqx.Module):
    """E sqrt(|x0_hat - x0|^2 + c^2) - c, at uniform times."""

    c: jaxdiff.Number = jaxdiff.number(0.1)

    def __call__(self, denoiser, key, batch, frozen):
        """The mean over the batch, and the mean squared error beside it."""

        def one(key, u, x0, cond):
            noise_key, dropout_key = jax.random.split(key)
            process, t = denoiser.process, 0.01 + 0.98 * u
            noise = jax.random.normal(noise_key, x0.shape, x0.dtype)
            x = process.alpha(t) * x0 + process.sigma(t) * noise
            return jnp.sum((denoiser(x, t, cond, key=dropout_key) - x0) ** 2)

        squares = losses.each_example(one, key, batch)
        return jnp.mean(jnp.sqrt(squares + self.c**2) - self.c), {"mse": squares.mean()}


process = processes.RectifiedFlow()
truth = oracles.gaussian(process, jnp.asarray([1.0, -0.5]), jnp.diag(jnp.asarray([0.04, 0.25])))
data = jax.vmap(truth.sample_data)(jax.random.split(jax.random.key(0), 2000))

network = networks.MLP(2, hidden=64, num_blocks=2, rngs=nnx.Rngs(0))
denoiser = jaxdiff.NetworkDenoiser(network, process, predictions.Velocity())
players = {"model": Player(denoiser, PseudoHuber(), optax.adam(2e-3), ConstantEMA(0.99))}
state = fit(
    make_train_step(players),
    init_train_state(players, jax.random.key(1)),
    iter(make_loader(array_source(np.asarray(data)), 128, seed=0)),
    num_steps=600,
)
trained = state.players["model"].averaged()
samples = jaxdiff.sample(jax.random.key(2), trained, (2,), 2000, times=20).x
print("mean", samples.mean(0), "std", samples.std(0))
np.testing.assert_allclose(samples.mean(0), [1.0, -0.5], atol=0.08)
np.testing.assert_allclose(samples.std(0), [0.2, 0.5], atol=0.12)

"""A model small enough to train in every test: a linear map, and a constant beside it."""

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx

from jaxdiff._tree import Number, number


class Model(eqx.Module):
    network: nnx.Linear
    schedule: Number = number(0.1)  # must never learn


def make_model(seed=0, size=3):
    return Model(nnx.Linear(size, size, rngs=nnx.Rngs(seed)))


class Regression(eqx.Module):
    """Mean squared error of the linear map, with noise drawn from the key."""

    weight: Number = number(1.0)

    def __call__(self, model, key, batch, frozen):
        noise = 0.1 * jax.random.normal(key, batch["x"].shape)
        error = jax.vmap(model.network)(batch["x"] + noise) * model.schedule - batch["y"]
        return self.weight * jnp.mean(error**2), {"worst": jnp.abs(error).max()}


class Batches:
    """Batches by index, with a state like Grain's."""

    def __init__(self, size=16):
        self.size, self.next_index = size, 0

    def __iter__(self):
        return self

    def __next__(self):
        key = jax.random.fold_in(jax.random.key(9), self.next_index)
        self.next_index += 1
        x = jax.random.normal(key, (self.size, 3))
        return {"x": x, "y": jnp.roll(x, 1, axis=1)}

    def get_state(self):
        return {"next_index": self.next_index}

    def set_state(self, state):
        self.next_index = state["next_index"]

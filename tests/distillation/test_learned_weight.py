import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from students import GaussianJump

from jaxdiff import distillation, processes
from jaxdiff.training import ConstantEMA, Player, init_train_state, make_train_step

KEY = jax.random.key(0)
MEAN, STD = 0.3, 0.7


def exact(process):
    return distillation.Jump(GaussianJump.of(process, MEAN, STD), until="until")


def test_a_learned_weight_makes_every_level_count_alike(x64):
    """exp(w) l is 1 at every level; with the student as it was, and its average without w."""
    process = processes.TrigFlow()
    weight = distillation.LogWeight(jnp.zeros(8))
    assert weight(process, jnp.asarray(0.7)) == 0
    student = distillation.Weighted(exact(process), weight)
    loss = distillation.ContinuousConsistency(warmup=0, floor=None)
    plain = loss(student.model, KEY, {"x": jnp.ones((8, 1))}, {})[0]
    np.testing.assert_allclose(loss(student, KEY, {"x": jnp.ones((8, 1))}, {})[0], plain)

    class Levels(eqx.Module):
        """l = .01, 1, 25 at three times."""

        def __call__(self, model, key, batch, frozen):
            w = jax.vmap(lambda t: model.weight(process, t))(jnp.asarray([0.2, 0.7, 1.3]))
            weighted = jnp.exp(w) * jnp.asarray([0.01, 1.0, 25.0])
            return jnp.mean(weighted - w), {f"{i}": weighted[i] for i in range(3)}

    players = {"s": Player(student, Levels(), optax.adam(0.05), ema=ConstantEMA(0.9))}
    state, step = init_train_state(players, KEY), make_train_step(players)
    for _ in range(400):
        state, metrics = step(state, {"x": jnp.ones(1)})
    np.testing.assert_allclose([metrics[f"{i}"] for i in range(3)], 1, rtol=1e-3)
    found = state.players["s"]
    assert isinstance(found.averaged().model, distillation.Jump)
    assert np.any(found.model.weight.numbers != 0)
    np.testing.assert_array_equal(found.model.model.network["mean"], MEAN)
    cap = dataclasses.replace(weight, cap=2.0, numbers=1e3 * jnp.ones(8))
    np.testing.assert_allclose(cap(process, jnp.asarray(process.t_min)), 2.0)


def test_wrong_weights():
    with pytest.raises(TypeError, match="`weight` must be a function"):
        distillation.Weighted(exact(processes.TrigFlow()), 1.0)
    with pytest.raises(ValueError, match="`cap`"):
        distillation.LogWeight(jnp.zeros(4), 0.0)

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from students import GaussianJump

from jaxdiff import distillation, losses, oracles, processes
from jaxdiff.training import Player, init_train_state, make_train_step

KEY = jax.random.key(0)
MEAN, STD = 0.3, 0.5


def gaussian(process):
    return oracles.gaussian(process, jnp.full(1, MEAN), STD**2 * jnp.eye(1))


def exact(process, mean=MEAN, std=STD):
    return distillation.Jump(GaussianJump.of(process, mean, std), until="until")


def test_a_balance_makes_gradients_alike(x64):
    process = processes.EDM()
    student = exact(process, 0.0, 1.0)
    loss = distillation.ConsistencyTrajectory(steps=6, most=2, denoising=0.5)
    balanced = distillation.Balanced(loss, lambda m: m.network["mean"], least=0.0, most=1e4)
    batch, frozen = {"x": jnp.full((16, 1), 0.4)}, {"teacher": gaussian(process)}

    players = {"student": Player(student, balanced, optax.sgd(1.0))}
    state, step = init_train_state(players, KEY), make_train_step(players)
    key = jax.random.fold_in(jax.random.fold_in(KEY, 0), 0)  # as of the step

    @eqx.filter_jit
    def slopes(student):
        def term(name):
            return lambda m: loss.parts(m, key, batch, frozen)[0][name]

        return [eqx.filter_grad(term(name))(student) for name in ("consistency", "denoising")]

    first, second = (slope.network for slope in slopes(student))
    state, metrics = step(state, batch, frozen)
    balance, after = metrics["denoising_balance"], state.players["student"].model.network
    np.testing.assert_allclose(balance, abs(first["mean"]) / (abs(second["mean"]) + 1e-4))
    for name, before in student.network.items():
        moved = first[name] + 0.5 * balance * second[name]
        np.testing.assert_allclose(before - after[name], moved, rtol=1e-9)
    expected = metrics["consistency"] + 0.5 * balance * metrics["denoising"]
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-12)


def test_wrong_losses():
    with pytest.raises(TypeError, match="`loss` must be"):
        distillation.Balanced(losses.DenoisingLoss())
    with pytest.raises(ValueError, match="`most`"):
        distillation.Balanced(distillation.ConsistencyTrajectory(), least=2.0, most=1.0)

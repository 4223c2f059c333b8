import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import with_random_weights
from flax import nnx

import jaxdiff
from jaxdiff import distillation, networks, oracles, processes, solvers
from jaxdiff.denoiser import NetworkDenoiser


@pytest.mark.parametrize("kind", [processes.EDM, processes.Cosine, processes.RectifiedFlow])
def test_a_jump_is_a_step_of_ddim_and_the_identity_where_it_stands(kind):
    process = kind()
    teacher = oracles.gaussian(process, jnp.ones(2), jnp.eye(2))
    jump, x, t = distillation.Jump(teacher), jnp.asarray([0.3, -1.7]), jnp.asarray(0.7)
    np.testing.assert_array_equal(jump(x, t, t), x)
    np.testing.assert_array_equal(jump(x, process.t_min, process.t_min), x)
    x0 = teacher(x, t)
    s = jnp.asarray(0.2)
    eps = (x - process.alpha(t) * x0) / process.sigma(t)
    np.testing.assert_allclose(jump(x, t, s), process.marginal(x0, eps, s), rtol=1e-5)
    np.testing.assert_allclose(jump(x, t, jnp.asarray(0.0)), x0, rtol=1e-6)


def test_a_told_jump_hears_where_to_and_refuses_labels_out_of_range(x64):
    network = with_random_weights(
        lambda: networks.MLP(
            2, hidden=8, num_blocks=1, num_classes=3, scalars=("end",), rngs=nnx.Rngs(0)
        )
    )
    base = NetworkDenoiser(network, processes.Cosine())
    jump = distillation.Jump(base, "end", factor=10.0)
    x, t, s, label = jnp.asarray([0.3, -1.7]), jnp.asarray(0.7), jnp.asarray(0.2), jnp.asarray(1)
    told = base(x, t, {"label": label, "end": 10 * s})
    np.testing.assert_allclose(jump.clean(x, t, s, label), told, rtol=1e-12)
    expected = distillation.ddim_jump(base.process, x, told, t, s)
    np.testing.assert_allclose(jump(x, t, s, label), expected, rtol=1e-12)
    for model in (jump, distillation.Weighted(jump, distillation.LogWeight(jnp.zeros(4)))):
        with pytest.raises(ValueError, match=r"Labels must lie in \[0, 2\].*got 7"):
            jaxdiff.sample(
                jax.random.key(0), model, (2,), 2, cond=jnp.full(2, 7),
                solver=solvers.FlowMapSteps(), times=1,
            )  # fmt: skip

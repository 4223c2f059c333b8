"""Our convolution is JAX's, in every transformation; in loops on CPUs its operands are in order."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from numpy.testing import assert_allclose, assert_array_equal

from jaxdiff import networks
from jaxdiff.networks._conv import Conv, convolution

CASES = {
    "same": {"window_strides": (1, 1), "padding": "SAME"},
    "strided": {"window_strides": (2, 2), "padding": ((1, 1), (1, 1))},
    "one side": {"window_strides": (2, 1), "padding": "VALID"},
    "dilated": {"window_strides": (1, 1), "padding": "SAME", "rhs_dilation": (2, 2)},
    "grouped": {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 2},
}


def arguments(name, dtype=jnp.float64):
    rng, groups = np.random.default_rng(0), 2 if name == "grouped" else 1
    x, w = rng.normal(size=(3, 6, 7, 4)), rng.normal(size=(3, 3, 4 // groups, 6))
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype)


def both(name):
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), **CASES[name]}
    return (
        lambda x, w: convolution(x, w, **options),
        lambda x, w: lax.conv_general_dilated(x, w, **options),
    )


@pytest.mark.parametrize("name", CASES)
def test_values_and_derivatives_of_either_mode(x64, name):
    x, w = arguments(name)
    way = (jnp.cos(x), jnp.sin(w))

    def all_of(fn):
        def loss(x, w):
            return jnp.sum(jnp.tanh(fn(x, w)) ** 2)

        slope = jax.grad(loss, (0, 1))
        return {
            "value": fn(x, w),
            "forward": jax.jvp(fn, (x, w), way),
            "back": slope(x, w),
            "forward over back": jax.jvp(slope, (x, w), way)[1],
            "back over forward": jax.grad(lambda x: jax.jvp(loss, (x, w), way)[1])(x),
        }

    ours, plain = (jax.jit(lambda fn=fn: all_of(fn))() for fn in both(name))
    for mine, theirs in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert_allclose(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["same", "strided"])
@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (2, 3)])
def test_batches_of_either_operand(x64, name, axes):
    x, w = arguments(name)
    ours, plain = both(name)
    args = [
        leaf if axis is None else jnp.stack([leaf, 2 * leaf + 1], axis)
        for leaf, axis in zip((x, w), axes, strict=True)
    ]

    def slope(fn):
        return jax.vmap(jax.grad(lambda x, w: jnp.sum(fn(x, w) ** 2), (0, 1)), axes)(*args)

    assert_allclose(jax.vmap(ours, axes)(*args), jax.vmap(plain, axes)(*args), rtol=1e-10)
    for mine, theirs in zip(slope(ours), slope(plain), strict=True):
        assert_allclose(mine, theirs, rtol=1e-10)


def test_half_precision_and_no_compilation(x64):
    x, w = arguments("same", jnp.bfloat16)
    ours, plain = both("same")
    assert ours(x, w).dtype == jnp.bfloat16
    assert_allclose(ours(x, w).astype(float), plain(x, w).astype(float), rtol=0.02, atol=0.05)
    slope = jax.grad(lambda w: jnp.sum(ours(x, w).astype(jnp.float32)))(w)
    assert slope.dtype == jnp.bfloat16 and np.isfinite(slope.astype(float)).all()


def test_in_loops_gradients_find_their_operands_in_order():
    """Images, filters and results as the fast kernels want them, in every convolution."""

    def loss(w, x, fn):
        x, _ = lax.scan(lambda x, _: (jnp.tanh(fn(x, w)), None), x, None, length=3)
        return jnp.sum(x**2)

    x = jnp.ones((2, 6, 6, 4), jnp.float32)
    w = jnp.ones((3, 3, 4, 4), jnp.float32)
    orders = []
    for fn in both("same"):
        text = jax.jit(jax.grad(loss), static_argnums=2).lower(w, x, fn).compile().as_text()
        orders.append(set(re.findall(r"convolution\(.*dim_labels=(\w+->\w+)", text)))
    ours, plain = orders
    assert ours <= {"b01f_01io->b01f"}
    assert any(order.startswith("f01b") for order in plain)  # or XLA has learned it


def test_layers_are_flax_layers():
    ours, plain = (kind(3, 5, (3, 3), strides=2, rngs=nnx.Rngs(0)) for kind in (Conv, nnx.Conv))
    x = jax.random.normal(jax.random.key(0), (8, 8, 3))
    assert_array_equal(ours(x), plain(x))
    net = networks.UNet(
        8, image_size=8, in_channels=1, channel_mults=(1, 1), num_res_blocks=1,
        attention_resolutions=(), remat="dots_saveable", rngs=nnx.Rngs(0),
    )  # fmt: skip
    text = str(jax.make_jaxpr(lambda n, x: n(x, jnp.ones(())))(net, jnp.ones((8, 8, 1))))
    assert " convolution[" in text and "conv_general_dilated[" not in text

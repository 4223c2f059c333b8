"""Convolutions whose gradients are fast in loops on CPUs, too.

XLA's compiler for CPUs brings a convolution's operands into the order that its fast kernels want,
but in the outermost computation alone: the gradient of one inside a loop, as of a sampler that is
differentiated, runs twenty times longer. Here the order is written out, on CPUs; elsewhere this is
the plain convolution.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

# An operation like JAX's own, with its parameters, of which both modes of differentiation and
# `vmap` know all they need: its rules are those of JAX's, in terms of itself.
convolution_p = Primitive("convolution")
_plain_p = lax.conv_general_dilated_p


def convolution(lhs: Array, rhs: Array, *args: Any, **options: Any) -> Array:
    """`jax.lax.conv_general_dilated`, and its arguments."""
    return _in_own_terms(lambda x, w: lax.conv_general_dilated(x, w, *args, **options), lhs, rhs)


class Conv(nnx.Conv):
    """Flax's convolution."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs, conv_general_dilated=convolution)


def _in_own_terms(fn: Callable[..., Any], *args: Array) -> Any:
    """`fn` with every plain convolution in it replaced by this one."""
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    out = _evaluate(closed.jaxpr, closed.consts, args)
    return jax.tree.unflatten(jax.tree.structure(shape), out)


def _evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def value(atom):
        return atom.val if hasattr(atom, "val") else known[atom]

    for eqn in jaxpr.eqns:
        inputs = [value(atom) for atom in eqn.invars]
        if eqn.primitive is _plain_p:
            out = convolution_p.bind(*inputs, **eqn.params)
        elif "jaxpr" in eqn.params:
            inner = eqn.params["jaxpr"]
            out = _evaluate(inner.jaxpr, inner.consts, inputs)
        else:
            out = eqn.primitive.bind(*inputs, **eqn.params)
        outs = out if isinstance(out, (list, tuple)) else [out]
        known |= dict(zip(eqn.outvars, outs, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _plain(lhs: Array, rhs: Array, **params: Any) -> Array:
    return _plain_p.bind(lhs, rhs, **params)


def _ordered(lhs: Array, rhs: Array, *, dimension_numbers: Any, **params: Any) -> Array:
    """The same with images `(N, ..., C)` and filters `(..., I, O)`, whatever the caller's order."""
    x, w, y = dimension_numbers
    rank = lhs.ndim
    last = (0, rank - 1, *range(1, rank - 1))
    numbers = lax.ConvDimensionNumbers(last, (rank - 1, rank - 2, *range(rank - 2)), last)
    lhs = jnp.transpose(lhs, (x[0], *x[2:], x[1]))
    rhs = jnp.transpose(rhs, (*w[2:], w[1], w[0]))
    out = _plain_p.bind(lhs, rhs, dimension_numbers=numbers, **params)
    place = dict(zip(y, last, strict=True))
    return jnp.transpose(out, [place[i] for i in range(rank)])


def _to_lhs(ct: Any, lhs: Any, rhs: Array, **params: Any) -> Any:
    shape = jax.ShapeDtypeStruct(lhs.aval.shape, lhs.aval.dtype)

    def back(ct, rhs):
        return jax.linear_transpose(lambda x: _plain(x, rhs, **params), shape)(ct)[0]

    return _in_own_terms(back, ct, rhs)


def _to_rhs(ct: Any, lhs: Array, rhs: Any, **params: Any) -> Any:
    shape = jax.ShapeDtypeStruct(rhs.aval.shape, rhs.aval.dtype)

    def back(ct, lhs):
        return jax.linear_transpose(lambda w: _plain(lhs, w, **params), shape)(ct)[0]

    return _in_own_terms(back, ct, lhs)


def _batched(args: Sequence[Array], dims: Sequence[Any], **params: Any) -> tuple[Array, int]:
    mapped = jax.vmap(lambda x, w: _plain(x, w, **params), in_axes=tuple(dims))
    return _in_own_terms(mapped, *args), 0


convolution_p.def_impl(_plain)
convolution_p.def_effectful_abstract_eval(_plain_p.abstract_eval)
ad.defbilinear(convolution_p, _to_lhs, _to_rhs)
batching.primitive_batchers[convolution_p] = _batched
mlir.register_lowering(convolution_p, mlir.lower_fun(_plain, multiple_results=False))
mlir.register_lowering(
    convolution_p, mlir.lower_fun(_ordered, multiple_results=False), platform="cpu"
)

"""Functions that are not JAX: rewards and scores computed on the host."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxdiff._checks import check_callable


class HostFunction(eqx.Module):
    """Any function of many examples, as one of an example: `(x) -> scalar`.

    Under `jax.vmap`, however often, the function is called once, with all examples at once: once a
    step for a whole population or batch. It has no derivative, and runs on one host: `sample`
    refuses it on a mesh.

    Args:
        function: `(n, *event)` NumPy array to `(n,)`, without side effects: it may be called
            again.

    Raises:
        TypeError: where a derivative is asked for.
        jax.errors.JaxRuntimeError: when a result is waited for, in `sample` too, for a function
            that returns anything but one number an example, or raises; its text ends with that of
            what was raised on the host.
    """

    function: Callable[[np.ndarray], Any] = eqx.field(static=True)

    def __check_init__(self):
        check_callable("function", self.function, "a function of a NumPy array")

    def __call__(self, x: Array) -> Array:
        """The function's number for one example x `(*event)`, in float32."""
        return _call(self.function, x.ndim, x)


@jax.custom_jvp
def _refuse(x: Array) -> Array:
    return x


@_refuse.defjvp
def _refuse_derivative(primals, tangents):
    raise TypeError(
        "A HostFunction has no derivative, and a gradient of it was asked for. Use a method "
        "without gradients, such as SVDD or tree_sample, or write the function in JAX."
    )


def _call(function: Callable, ndim: int, x: Array) -> Array:
    def run(x):
        x = np.asarray(x)
        lead, event = x.shape[: x.ndim - ndim], x.shape[x.ndim - ndim :]
        found = np.asarray(function(x.reshape(-1, *event)), np.float32)
        if found.shape != (count := int(np.prod(lead)),):
            raise ValueError(
                f"A HostFunction must return one number an example, shape ({count},), got shape "
                f"{found.shape}."
            )
        return found.reshape(lead)

    out = jax.ShapeDtypeStruct((), jnp.float32)
    return jax.pure_callback(run, out, _refuse(x), vmap_method="broadcast_all")


def check_no_host(*trees: PyTree) -> None:
    """Reject functions of the host where examples are split over devices.

    Raises:
        ValueError: naming what to do.
    """
    leaves = jax.tree.leaves(trees, is_leaf=lambda node: isinstance(node, HostFunction))
    if any(isinstance(leaf, HostFunction) for leaf in leaves):
        raise ValueError(
            "A HostFunction runs on one host, and examples that are split over devices would be "
            "gathered there at every step. Write it in JAX, or sample on one device, sharding=None."
        )

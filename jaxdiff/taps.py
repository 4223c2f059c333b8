"""Taps: reading, editing and replacing a network's inner activations by name.

Networks take `tap` and pass every inner activation of interest through it,
`h = tap("mid", h)`. A `Tap` applies the edits it was given and keeps the values it was asked
for; the network is neither subclassed nor changed. Values are returned through any
`jax.checkpoint` a block runs under, so nothing leaks.
"""

from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree


class Tap:
    """What one call of a network does at its taps.

    Lives for a single call: it collects values while the network is traced. Use `read_taps`
    and `EditedNetwork`, which make one for each call.

    Args:
        edits: `{name: function from activation to activation}`.
        wanted: names of the taps whose (edited) values are kept.
    """

    def __init__(
        self, edits: dict[str, Callable[[Array], Array]] | None = None, wanted: Iterable[str] = ()
    ):
        self.edits = edits or {}
        self.wanted = frozenset(wanted)
        self.values: dict[str, Array] = {}
        self.names: list[str] = []

    def __call__(self, name: str, value: Array) -> Array:
        """The activation as the network should go on with it."""
        self.names.append(name)
        if name in self.edits:
            value = _edited(self.edits[name], name, value)
        if name in self.wanted:
            self.values[name] = value
        return value

    def checkpoint(self, fn: Callable[..., Any], *args: Any) -> Any:
        """`jax.checkpoint` of `fn(tap, *args)`."""

        def run(*args):
            # Made inside, so that nothing outside holds on to the inner trace's values.
            inner = Tap(self.edits, self.wanted)
            out = fn(inner, *args)
            self.names += inner.names
            return out, inner.values

        out, values = jax.checkpoint(run)(*args)
        self.values |= values
        return out

    def check(self, argument: str) -> None:
        """Raise ValueError if an edited or wanted name was not met on the way."""
        missing = (set(self.edits) | self.wanted) - set(self.names)
        if missing:
            raise ValueError(
                f"`{argument}` names taps that the network does not have: {sorted(missing)}. "
                f"Its taps are {self.names}."
            )


def _edited(edit: Callable[[Array], Array], name: str, value: Array) -> Array:
    edited = jnp.asarray(edit(value))
    if edited.shape != value.shape:
        raise ValueError(
            f"`edits[{name!r}]` must return an activation of the shape {value.shape} it was "
            f"given, got {edited.shape}."
        )
    return edited.astype(value.dtype)


def _as_pytrees(edits: dict[str, Callable]) -> dict[str, Callable]:
    # A plain function is no JAX type; as a Partial it crosses jax.jit as structure.
    return {
        name: jax.tree_util.Partial(edit) if jax.tree_util.all_leaves([edit]) else edit
        for name, edit in edits.items()
    }


class EditedNetwork(eqx.Module):
    """A network some of whose activations are edited or replaced.

    Itself a network: it can be edited again, read, or put into a `NetworkDenoiser`. Edits see
    one example's activation, and must keep its shape; the result is cast to its dtype. An edit
    that is an `equinox.Module` keeps its arrays as leaves, so that changing them does not
    recompile; a plain function is part of the structure.

    Args:
        network: any network with taps.
        edits: `{tap name: function from activation to activation}`.

    Raises:
        ValueError: when called, if the network has no tap of that name (lists those it has),
            or if an edit changes the shape.
    """

    network: Callable[..., Array]
    edits: dict[str, Callable[[Array], Array]] = eqx.field(converter=_as_pytrees)

    def check_cond(self, cond: PyTree) -> None:
        """What the network itself checks of its conditions."""
        if hasattr(self.network, "check_cond"):
            self.network.check_cond(cond)

    def __call__(
        self,
        x: Array,
        t: Array,
        cond: PyTree = None,
        *,
        key: PRNGKeyArray | None = None,
        tap: Tap | None = None,
    ) -> Array:
        """The edited network's output."""
        outer = Tap() if tap is None else tap
        edits = dict(self.edits)
        for name, edit in outer.edits.items():
            edits[name] = _then(edits[name], edit) if name in edits else edit
        inner = Tap(edits, outer.wanted)
        out = self.network(x, t, cond, key=key, tap=inner)
        Tap.check(_restricted(inner, self.edits), "edits")
        outer.values |= inner.values
        outer.names += inner.names
        return out


def _then(first: Callable, second: Callable) -> Callable:
    return lambda value: second(first(value))


def _restricted(tap: Tap, edits: dict) -> Tap:
    """The same call seen with fewer edits: an outer edit's name is its own caller's to check."""
    view = Tap(edits)
    view.names = tap.names
    return view


def read_taps(
    network: Callable[..., Array],
    names: Iterable[str],
    x: Array,
    t: Array,
    cond: PyTree = None,
    *,
    key: PRNGKeyArray | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Run a network on one example and return some of its activations too.

    A pure function: differentiate, linearize or vmap it like any other.

    Args:
        network: any network with taps.
        names: taps to read, e.g. `["mid"]`.
        x: one example, `(*event)`.
        t: scalar noise label.
        cond: condition.
        key: dropout key, or None.

    Returns:
        The network's output, and `{name: activation}`.

    Raises:
        ValueError: if the network has no tap of that name; lists those it has.
    """
    tap = Tap(wanted=names)
    out = network(x, t, cond, key=key, tap=tap)
    tap.check("names")
    return out, tap.values


def tap_names(
    network: Callable[..., Array], x: Array, t: Array, cond: PyTree = None
) -> tuple[str, ...]:
    """Names of a network's taps, in the order in which it meets them.

    Computes nothing: network and example may hold shapes only (`jax.ShapeDtypeStruct`).
    """
    tap = Tap()

    def run(network, x, t, cond):
        return network(x, t, cond, tap=tap)

    eqx.filter_eval_shape(run, network, x, t, cond)
    return tuple(tap.names)

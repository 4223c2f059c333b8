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

from jaxdiff._checks import check_network_cond


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

    def wants(self, name: str) -> bool:
        """Whether a tap is edited or read, so that its value must exist."""
        return name in self.edits or name in self.wanted

    def skip(self, name: str) -> None:
        """Meet a tap whose value is not computed, because nobody wants it."""
        self.names.append(name)

    def run(self, fn: Callable[..., Any], *args: Any, remat: bool | str = False) -> Any:
        """`fn(tap, *args)`, perhaps recomputed in the backward pass.

        Args:
            fn: a part of the network.
            args: its arguments.
            remat: whether to recompute it; or the name of a policy of `jax.checkpoint_policies`.
        """
        if not remat:
            return fn(self, *args)

        def run(*args):
            # Made inside, so that nothing outside holds on to the inner trace's values.
            inner = Tap(self.edits, self.wanted)
            out = fn(inner, *args)
            self.names += inner.names
            return out, inner.values

        out, values = _checkpoint(run, remat)(*args)
        self.values |= values
        return out

    def scan(
        self,
        fn: Callable[..., Array],
        layers: PyTree,
        h: Array,
        *,
        prefix: str,
        remat: bool | str = False,
    ) -> Array:
        """h <- fn(tap, layer, h, i) over equal layers that are stacked, as one `lax.scan`.

        A layer names its taps relative to itself: ".attn" of layer 3 is "<prefix>.3.attn". Edits
        of one layer are computed in all and used in that one; what is read of one is kept of all.

        Args:
            fn: one layer, of the tap, its weights, h and its index.
            layers: pytree of weights with a leading axis of layers.
            h: what the first layer is given.
            prefix: name of the layers.
            remat: as in `run`, for each layer.
        """
        count = len(jax.tree.leaves(layers)[0])
        edits: dict[str, dict[int, Callable]] = {}
        for i in range(count):
            for name, edit in self.edits.items():
                if _within(name, f"{prefix}.{i}"):
                    local = name.removeprefix(f"{prefix}.{i}")
                    edits.setdefault(local, {})[i] = edit
        wanted = {
            name.removeprefix(f"{prefix}.{i}")
            for i in range(count)
            for name in self.wanted
            if _within(name, f"{prefix}.{i}")
        }
        names: list[str] = []

        def layer_of(carry, row):
            weights, i = row
            inner = Tap({name: _where(i, those) for name, those in edits.items()}, wanted)
            out = fn(inner, weights, carry, i)
            names[:] = inner.names
            return out, inner.values

        body = _checkpoint(layer_of, remat) if remat else layer_of
        h, values = jax.lax.scan(body, h, (layers, jnp.arange(count)))
        for i in range(count):
            self.names += [f"{prefix}.{i}{local}" for local in names]
            found = {f"{prefix}.{i}{local}": kept[i] for local, kept in values.items()}
            self.values |= {name: v for name, v in found.items() if name in self.wanted}
        return h

    def check(self, argument: str) -> None:
        """Raise ValueError if an edited or wanted name was not met on the way."""
        missing = (set(self.edits) | self.wanted) - set(self.names)
        if missing:
            raise ValueError(
                f"`{argument}` names taps that the network does not have: {sorted(missing)}. "
                f"Its taps are {self.names}."
            )


def _checkpoint(fn: Callable[..., Any], remat: bool | str) -> Callable[..., Any]:
    policy = None if isinstance(remat, bool) else getattr(jax.checkpoint_policies, remat)
    return jax.checkpoint(fn, policy=policy)


def _within(name: str, layer: str) -> bool:
    """Whether a tap is of a layer: "block.1.attn" is of "block.1", "block.10" is not."""
    return name == layer or name.startswith(f"{layer}.")


def _where(i: Array, edits: dict[int, Callable[[Array], Array]]) -> Callable[[Array], Array]:
    """The edits of some layers, as one of layer i."""

    def edit(value):
        for index, own in edits.items():
            value = jnp.where(i == index, _edited(own, f"of layer {index}", value), value)
        return value

    return edit


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
        check_network_cond(self.network, cond)

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

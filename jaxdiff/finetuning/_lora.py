"""Low-rank adapters of any network: made, used, merged and stored apart from its weights."""

import dataclasses
import json
import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import tree_flatten_with_path, tree_map_with_path
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_count, check_key, check_kind, check_network_cond, check_number
from jaxdiff._tree import Number, as_number, dots, is_arraylike, number
from jaxdiff.denoiser import Denoiser, at_network
from jaxdiff.parallel import path_of
from jaxdiff.taps import Tap

# Layers with a kernel, its name, and whether outputs are its first axis.
_LAYERS: dict[type, tuple[str, bool]] = {
    nnx.Linear: ("kernel", False),
    nnx.Conv: ("kernel", False),
    eqx.nn.Linear: ("weight", True),
    eqx.nn.Conv: ("weight", True),
}


class LowRank(eqx.Module):
    """The change of one kernel, scale * down up, of rank r.

    Of a filter it is that of the matrix from all its inputs, height and width included, to its
    outputs: `down` is a filter of the same size to r channels, `up` one of size 1.

    Attributes:
        down: `(*layers, inputs, r)`.
        up: `(*layers, r, outputs)`.
        scale: factor, alpha / r.
        outputs_first: whether the kernel's first axis are the outputs, as in Equinox.
        fixed: whether `down` does not learn.
    """

    down: Array
    up: Array
    scale: Number = number(1.0)
    outputs_first: bool = eqx.field(static=True, default=False)
    fixed: bool = eqx.field(static=True, default=False)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a kernel of such a shape has these inputs and outputs."""
        stack, inputs, outputs = self.down.shape[:-2], self.down.shape[-2], self.up.shape[-1]
        own = shape[len(stack) :]
        last = own[:1] if self.outputs_first else own[-1:]
        same = shape[: len(stack)] == stack and last == (outputs,)
        return same and int(np.prod(own)) == inputs * outputs

    def change(self, kernel: Array) -> Array:
        """What is added to a kernel, in its shape and dtype."""
        change = self.scale * dots(self.down, self.up)
        change = change.swapaxes(-1, -2) if self.outputs_first else change
        return change.reshape(kernel.shape).astype(kernel.dtype)


class Adapter(eqx.Module):
    """Low-rank changes of some of a network's kernels, by their paths.

    Attributes:
        kernels: "blocks/0/first/kernel" -> `LowRank`.
    """

    kernels: dict[str, LowRank]

    def scaled(self, factor: float | Array) -> "Adapter":
        """The same adapter, so many times as strong: 0 is the base, -1 takes a merged one away."""
        kernels = {
            name: dataclasses.replace(low, scale=low.scale * as_number(factor))
            for name, low in self.kernels.items()
        }
        return Adapter(kernels)

    @property
    def learned(self) -> list[Array]:
        """The arrays that learn."""
        return [
            array
            for low in self.kernels.values()
            for array in ((low.up,) if low.fixed else (low.down, low.up))
        ]


def make_adapter(
    network: PyTree,
    key: PRNGKeyArray,
    *,
    rank: int = 8,
    alpha: float | None = None,
    layers: str = "",
) -> Adapter:
    """A new adapter, which changes nothing yet: W + (alpha / rank) down up, with up = 0.

    `down` is uniform in +-1 / sqrt(inputs), as PEFT has it.

    Args:
        network: any pytree with layers of Flax (`nnx.Linear`, `nnx.Conv`) or Equinox. Layers
            stored as one array are adapted each by itself.
        key: typed key; a layer's draw depends on the key and its path alone.
        rank: r; for small kernels at most the rank that they can have.
        alpha: strength; `rank` if None, so that the scale is 1.
        layers: regular expression, searched in the paths of layers, such as
            "blocks/0/attention/q"; all if empty.

    Returns:
        The adapter.

    Raises:
        ValueError: if no layer has such a path; names those there are.

    Reference: Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, "LoRA: Low-Rank Adaptation of
    Large Language Models", 2021, arXiv 2106.09685, section 4.1. Filters as in PEFT; no dropout.
    """
    check_key(key)
    check_count("rank", rank)
    check_number("alpha", alpha)

    def make(name: str, shape: tuple[int, ...], outputs_first: bool) -> LowRank:
        *stack, inputs, outputs = shape
        own = min(rank, inputs, outputs)
        limit = inputs**-0.5
        down = jax.random.uniform(
            _key_of(key, name), (*stack, inputs, own), minval=-limit, maxval=limit
        )
        up = jnp.zeros((*stack, own, outputs))
        return LowRank(down, up, (own if alpha is None else alpha) / own, outputs_first)

    return _adapter(network, layers, make)


def make_orthogonal_adapter(
    network: PyTree, key: PRNGKeyArray, index: int, *, rank: int = 8, layers: str = ""
) -> Adapter:
    """An adapter that does not disturb others of the same key and another index.

    `down` is fixed: columns index * rank, ... of one orthogonal matrix that the key makes for each
    layer, so that down_i^T down_j = 0 for i != j: inputs in the span of one are not seen by the
    other, and merged adapters do what each does by itself there.

    Args:
        network: as of `make_adapter`.
        key: typed key, the same for all adapters that are to go together.
        index: which of them, from 0; inputs / rank of a layer can be orthogonal.
        rank: the same for all of them.
        layers: as of `make_adapter`.

    Returns:
        The adapter, whose `up` learns.

    Raises:
        ValueError: for more adapters than a layer has room for.

    Reference: Po, Yang, Aberman, Wetzstein, "Orthogonal Adaptation for Modular Customization of
    Diffusion Models", 2024, arXiv 2312.02432, section 4.2. Columns there are drawn at random, and
    may be shared; here they are assigned.
    """
    check_key(key)
    check_count("rank", rank)
    first = check_count("index", index, least=0) * rank

    def make(name: str, shape: tuple[int, ...], outputs_first: bool) -> LowRank:
        *stack, inputs, outputs = shape
        if first + rank > inputs:
            raise ValueError(
                f"`index` must be below {inputs // rank}, for which {name!r} with {inputs} inputs "
                f"has room at rank {rank}, got {index}. Lower `rank`, or leave the layer out."
            )
        normal = jax.random.normal(_key_of(key, name), (*stack, inputs, inputs))
        basis, _ = jnp.linalg.qr(normal)
        down = basis[..., first : first + rank]
        return LowRank(down, jnp.zeros((*stack, rank, outputs)), 1.0, outputs_first, fixed=True)

    return _adapter(network, layers, make)


def merge(network: PyTree, *adapters: Adapter) -> PyTree:
    """The network with adapters' changes added to its kernels; differentiable by both.

    Args:
        network: of any kind.
        *adapters: any number, whose changes add up.

    Returns:
        A network of the same structure.

    Raises:
        ValueError: for an adapter of another network.
    """
    paths = {
        path_of(path) for path, leaf in tree_flatten_with_path(network)[0] if is_arraylike(leaf)
    }
    for adapter in adapters:
        check_kind("adapters", adapter, Adapter, "make_adapter(network, key)")
        if strange := sorted(set(adapter.kernels) - paths):
            raise ValueError(
                f"`adapters` must be of this network, got one for {strange[0]!r}, which it does "
                f"not have. It has {sorted(paths)[0]!r} and {len(paths) - 1} more."
            )

    def one(path, leaf):
        found = [a.kernels[name] for a in adapters if (name := path_of(path)) in a.kernels]
        for low in found:
            if not low.fits(leaf.shape):
                raise ValueError(
                    f"`adapters` must be of this network, got one of {low.down.shape[-2]} inputs "
                    f"and {low.up.shape[-1]} outputs, in {low.down.shape[:-2]} layers, for "
                    f"{path_of(path)!r}, which has the shape {leaf.shape}."
                )
        return leaf + sum(low.change(leaf) for low in found) if found else leaf

    return tree_map_with_path(one, network)


class AdaptedNetwork(eqx.Module):
    """A network with adapters, which are added to its kernels whenever it is called.

    Itself a network, with the taps of the one inside.

    Args:
        network: the base.
        adapters: any number.
    """

    network: Callable[..., Array]
    adapters: tuple[Adapter, ...]

    def __call__(
        self,
        x: Array,
        t: Array,
        cond: PyTree = None,
        *,
        key: PRNGKeyArray | None = None,
        tap: Tap | None = None,
    ) -> Array:
        """The adapted network's output."""
        taps = {} if tap is None else {"tap": tap}
        return self.merged()(x, t, cond, key=key, **taps)

    def check_cond(self, cond: PyTree) -> None:
        """What the network itself checks of its conditions."""
        check_network_cond(self.network, cond)

    def merged(self) -> Callable[..., Array]:
        """The network with its adapters merged, for good."""
        return merge(self.network, *self.adapters)


def adapt(denoiser: Denoiser, *adapters: Adapter) -> Denoiser:
    """The same denoiser with adapters on its network, inside guidance and other maps.

    Those it has already stay.

    To train them, and nothing else:

        Player(adapt(denoiser, adapter), loss, optimizer, trainable=adapter_weights)

    Args:
        denoiser: a network's denoiser, or maps of one.
        *adapters: made for its network.

    Returns:
        The denoiser.

    Raises:
        TypeError: if there is no network inside.
        ValueError: for adapters of another network.
    """

    def one(node):
        network, there = node.network, ()
        if isinstance(network, AdaptedNetwork):
            network, there = network.network, network.adapters
        eqx.filter_eval_shape(merge, network, *adapters)
        return eqx.tree_at(lambda d: d.network, node, AdaptedNetwork(network, (*there, *adapters)))

    return at_network(denoiser, one)


def merged(denoiser: Denoiser) -> Denoiser:
    """The same denoiser without adapters of its own: they are in the kernels, for good."""
    return jax.tree.map(
        lambda node: node.merged() if isinstance(node, AdaptedNetwork) else node,
        denoiser,
        is_leaf=lambda node: isinstance(node, AdaptedNetwork),
    )


def adapter_weights(model: PyTree) -> list[Array]:
    """What learns of a model with adapters: for `Player(trainable=)`.

    Of several adapters all learn. For the last one of each network alone:
    `lambda model: adapter_weights(model.network.adapters[-1])`.
    """
    leaves = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, Adapter))
    return [array for leaf in leaves if isinstance(leaf, Adapter) for array in leaf.learned]


def save_adapter(path: str | Path, adapter: Adapter) -> None:
    """Write an adapter, and nothing of its network, as an npz file.

    Args:
        path: of the file, "style.npz". It is there whole, or not at all.
        adapter: its weights.
    """
    path = Path(path)
    arrays: dict[str, Any] = {}
    info: dict[str, dict[str, Any]] = {}
    for name, low in adapter.kernels.items():
        # NumPy cannot read bfloat16 and its like back; float32 holds all of them.
        wide = np.promote_types(low.up.dtype, np.float32)
        arrays |= {
            f"{name}:{part}": np.asarray(getattr(low, part), wide) for part in ("down", "up")
        }
        info[name] = {
            "scale": float(low.scale), "outputs_first": low.outputs_first, "fixed": low.fixed,
            "dtypes": [low.down.dtype.name, low.up.dtype.name],
        }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        np.savez(file, info=np.array(json.dumps(info)), **arrays)
    temporary.replace(path)


def load_adapter(path: str | Path) -> Adapter:
    """Read what `save_adapter` has written.

    Raises:
        ValueError: for another file.
    """
    try:
        with Path(path).open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            info = json.loads(str(file["info"]))
            kernels = {}
            for name, about in info.items():
                down, up = (
                    jnp.asarray(file[f"{name}:{part}"], dtype)
                    for part, dtype in zip(("down", "up"), about.pop("dtypes"), strict=True)
                )
                kernels[name] = LowRank(down, up, **about)
    except (KeyError, OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(
            f"`path` must be a file that `save_adapter` wrote, got {str(path)!r}: {error}."
        ) from None
    return Adapter(kernels)


def _adapter(network: PyTree, layers: str, make: Callable[..., LowRank]) -> Adapter:
    def is_layer(node: Any) -> bool:
        return isinstance(node, tuple(_LAYERS))

    found, kernels = [], {}
    for path, node in tree_flatten_with_path(network, is_leaf=is_layer)[0]:
        if not is_layer(node):
            continue
        name = path_of(path)
        found.append(name)
        if not re.search(layers, name):
            continue
        field, outputs_first = next(v for kind, v in _LAYERS.items() if isinstance(node, kind))
        shape = getattr(node, field).shape
        path_in = f"{name}/{field}" if name else field
        kernels[path_in] = make(name, _as_matrix(node, shape), outputs_first)
    if not kernels:
        raise ValueError(
            f"`layers` must be found in the path of a layer, got {layers!r}, which is in none of "
            f"{found}."
        )
    return Adapter(kernels)


def _as_matrix(layer: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape `(*layers, inputs, outputs)` of a kernel as a matrix."""
    linear = isinstance(layer, (nnx.Linear, eqx.nn.Linear))
    own = 2 if linear else len(layer.kernel_size) + 2
    stack, own_shape = shape[: len(shape) - own], shape[len(shape) - own :]
    if isinstance(layer, (eqx.nn.Linear, eqx.nn.Conv)):
        own_shape = (*own_shape[1:], own_shape[0])
    return (*stack, int(np.prod(own_shape[:-1])), own_shape[-1])


def _key_of(key: PRNGKeyArray, name: str) -> PRNGKeyArray:
    return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)

"""Meshes and sharding: the only module that knows devices and processes.

A mesh has the axes data, fsdp and tensor, all of type Auto: jit propagates shardings from its
arguments, and these functions place the arguments. Batches are split over data and fsdp, weights
over fsdp and tensor. Where weights are used, those split over fsdp are gathered whole; what is
split over tensor stays so.
"""

import contextlib
import re
import socket
import time
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_map_with_path
from jaxtyping import PyTree

from jaxdiff._checks import check_count

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
MIN_SIZE = 2**12
"""Smaller arrays are not worth splitting."""
Rules = Sequence[tuple[str, tuple[str | None, ...]]]
"""Pairs of a regular expression, searched in the path of an array, and the mesh axis of each of its
last dimensions, e.g. `("first/kernel$", (None, "tensor"))`. The first that is found holds."""


def make_mesh(
    data: int | None = None,
    *,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh over all devices, or the given ones.

    Args:
        data: devices along the data axis; None for all that remain.
        fsdp: devices over which weights are split.
        tensor: devices over which single layers are split.
        devices: devices to use.

    Raises:
        TypeError: for an axis that is no whole number.
        ValueError: if the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    fsdp, tensor = check_count("fsdp", fsdp), check_count("tensor", tensor)
    rest = fsdp * tensor
    data = len(devices) // rest if data is None else check_count("data", data)
    if not devices or data * rest != len(devices):
        raise ValueError(
            f"`data` * `fsdp` * `tensor` must be the number of devices, {len(devices)}; got "
            f"{data} * {fsdp} * {tensor}. Pass fewer devices, or other axes."
        )
    return jax.make_mesh((data, fsdp, tensor), AXES, (AxisType.Auto,) * 3, devices=devices)


def initialize(
    coordinator: str | None = None,
    *,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: float = 300.0,
) -> None:
    """Join the processes of a run, before anything else is done with JAX.

    Without arguments, what the environment says: SLURM, Kubernetes, Cloud TPU and Open MPI are
    known to JAX. Several processes on CPUs talk through Gloo.

    Args:
        coordinator: address and port of process 0, "10.0.0.1:1234".
        num_processes: how many there are.
        process_id: which one this is, from 0.
        timeout: seconds to wait for the others.

    Raises:
        ValueError: for arguments that do not go together, or a coordinator that does not answer.
    """
    given = (coordinator, num_processes, process_id)
    if any(value is not None for value in given) and None in given:
        raise ValueError(
            "`coordinator`, `num_processes` and `process_id` must be given together or left out, "
            f"got {given}."
        )
    if None not in given and not 0 <= (process_id or 0) < (num_processes or 0):
        raise ValueError(
            f"`process_id` must lie in [0, {num_processes}), got {process_id}. It counts from 0."
        )
    begun = time.monotonic()
    if coordinator is not None and process_id:
        _reach(coordinator, timeout)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    left = max(int(timeout - (time.monotonic() - begun)), 1)
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, initialization_timeout=left
        )
    except (RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        if coordinator is None:
            raise ValueError(
                "`coordinator` must be given where the environment does not say it, as SLURM, "
                "Kubernetes, Cloud TPU and Open MPI do, with `num_processes` and `process_id`: "
                f"{reason}"
            ) from None
        raise ValueError(
            f"`coordinator` must be the address of process 0, which runs, got {coordinator}: "
            f"{reason}"
        ) from None


def _reach(coordinator: str, timeout: float) -> None:
    """Wait until the coordinator answers: JAX would abort the process, without an error.

    Raises:
        ValueError: if it does not, in time, or is no address and port.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(
            f'`coordinator` must be an address and a port, "10.0.0.1:1234", got {coordinator!r}.'
        )
    deadline, reason = time.monotonic() + timeout, ""
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, int(port)), timeout=5.0).close()
            return
        except OSError as error:
            reason = str(error)
        time.sleep(min(0.5, timeout / 10))
    raise ValueError(
        f"`coordinator` must be the address of process 0, which runs; nothing answered at "
        f"{coordinator} in {timeout:g} s: {reason}. Start process 0, and check address and port."
    )


def is_first() -> bool:
    """Whether this is process 0, the one that writes files."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Go on when every process has come here; at once where there is one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def fetch(tree: PyTree) -> PyTree:
    """Arrays as NumPy, whole in every process, wherever their parts are.

    Args:
        tree: arrays of any shape; other leaves stay as they are.

    Returns:
        The same tree.
    """

    def one(leaf):
        if not eqx.is_array(leaf):
            return leaf
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            if leaf.is_fully_replicated:
                return np.asarray(leaf.addressable_data(0))
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(one, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def batch_sharding_here() -> NamedSharding | None:
    """That of the mesh whose training step is being traced (`on_mesh`), or None."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(mesh.axis_names) != set(AXES):
        return None
    return NamedSharding(mesh, PartitionSpec(BATCH))


def place_batch(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Arrays, the same in every process, split as a sharding says; traced ones, too."""

    def place(leaf):
        traced = isinstance(leaf, jax.core.Tracer) or isinstance(sharding.mesh, AbstractMesh)
        put = jax.lax.with_sharding_constraint if traced else jax.device_put
        return put(leaf, sharding)

    return jax.tree.map(place, tree)


def batch_part(mesh: Mesh) -> tuple[int, int]:
    """Which part of a global batch this process's devices hold, and of how many.

    Processes along the tensor axis hold the same part, and must load the same examples: pass both
    numbers to `make_loader` as `process_index` and `process_count`.

    Args:
        mesh: the mesh.

    Returns:
        (index, count).

    Raises:
        ValueError: if the devices of a process are not one block of the batch's axes.
    """
    places = np.arange(mesh.devices.size // mesh.shape["tensor"])
    places = np.broadcast_to(places.reshape(*mesh.devices.shape[:2], 1), mesh.devices.shape)
    mine = jax.process_index()
    local = [device.process_index == mine for device in mesh.devices.ravel()]
    held = np.unique(places.ravel()[local])
    total = int(places.max()) + 1
    if len(held) == 0 or total % len(held) or (held != held[0] + np.arange(len(held))).any():
        raise ValueError(
            f"The devices of a process must be one block of the mesh's data and fsdp axes, got the "
            f"places {held.tolist()} of {total}. Choose axes that processes divide."
        )
    return int(held[0]) // len(held), total // len(held)


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Place a batch on the mesh, its leading axis split over data and fsdp.

    Args:
        batch: arrays `(n, ...)`; with several processes, this one's part of the global batch, as
            `batch_part` counts them.
        mesh: the mesh, whose devices divide n.

    Returns:
        The same tree, on the mesh.

    Raises:
        ValueError: if the leading axis is not divisible by the number of devices, or missing.
    """
    sharding, (_, parts) = batch_sharding(mesh), batch_part(mesh)
    count = mesh.shape["data"] * mesh.shape["fsdp"]
    for leaf in jax.tree.leaves(batch):
        if not np.ndim(leaf):
            raise ValueError(
                f"Every array of `batch` must have a leading axis of examples, got {leaf!r}. Pass "
                "what is no example as a constant."
            )
        size = np.shape(leaf)[0] * parts
        if size % count:
            raise ValueError(
                f"`batch` must be divisible by the {count} devices it is split over, got size "
                f"{size}. Use a multiple of {count}, or a mesh of fewer devices."
            )

    def place(leaf):
        leaf = np.asarray(leaf)
        shape = (leaf.shape[0] * parts, *leaf.shape[1:])
        return jax.make_array_from_process_local_data(sharding, leaf, shape)

    return jax.tree.map(place, batch)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Copy every array to every device of the mesh; other leaves stay as they are.

    Args:
        tree: arrays of any shape, typed keys included; the same in every process.
        mesh: the mesh.

    Returns:
        The same tree, on the mesh.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: _put(leaf, everywhere) if eqx.is_array(leaf) else leaf, tree)


def specs(
    tree: PyTree, mesh: Mesh | AbstractMesh, *, rules: Rules = (), min_size: int = MIN_SIZE
) -> PyTree:
    """How arrays are split over a mesh, by their paths and shapes alone.

    The first rule whose pattern is found in an array's path gives the axes of its last dimensions,
    as far as they divide them. Then the largest dimension that is left and that fsdp divides is
    split over fsdp, if the array has `min_size` elements.

    Args:
        tree: arrays of any shape, or their `jax.ShapeDtypeStruct`: weights, the optimiser's state,
            averages, or all of `TrainState.unpack()`.
        mesh: the mesh.
        rules: e.g. `networks.TENSOR_RULES`. Paths have the form "blocks/0/first/kernel".
        min_size: smaller arrays are not split over fsdp.

    Returns:
        The same tree, with a `PartitionSpec` for each array and None for what is none.

    Raises:
        ValueError: for a rule that is not a pattern and axes, of which only "tensor" is a rule's to
            give: batches are split over "data", and "fsdp" is chosen by size.
    """
    _check_rules(rules)
    count = mesh.shape["fsdp"]

    def choose(path, leaf):
        if not (eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)):
            return None
        spec: list[str | None] = [None] * leaf.ndim
        name = path_of(path)
        axes = next((axes for pattern, axes in rules if re.search(pattern, name)), ())
        for place, axis in zip(range(-len(axes), 0), axes, strict=True):
            fits = -place <= leaf.ndim and axis is not None
            if fits and leaf.shape[place] % mesh.shape[axis] == 0 and mesh.shape[axis] > 1:
                spec[place] = axis
        free = [i for i, n in enumerate(leaf.shape) if spec[i] is None and n % count == 0]
        if count > 1 and leaf.size >= min_size and free:
            spec[max(free, key=lambda i: leaf.shape[i])] = "fsdp"
        while spec and spec[-1] is None:  # as compiled programs write it
            spec.pop()
        return PartitionSpec(*spec)

    return tree_map_with_path(choose, tree)


def _check_rules(rules: Rules) -> None:
    for rule in rules:
        try:
            pattern, axes = rule
            good = bool(re.compile(pattern)) and set(axes) <= {None, "tensor"}
            good &= list(axes).count("tensor") < 2
        except (TypeError, ValueError, AttributeError, re.error):
            good = False
        if not good:
            raise ValueError(
                "`rules` must be pairs of a regular expression and the mesh axis of each of the "
                f'last dimensions, "tensor" once or None, got {rule!r}. Write e.g. '
                '("first/kernel$", (None, "tensor")).'
            )


def path_of(path: tuple) -> str:
    """The path of a leaf as rules see it: "players/model/model/network/blocks/0/first/kernel"."""
    return keystr(path, simple=True, separator="/").removesuffix("/value")


def shard_params(
    tree: PyTree, mesh: Mesh, *, rules: Rules = (), min_size: int = MIN_SIZE
) -> PyTree:
    """Split arrays over the mesh as `specs` says, and replicate the rest.

    Args:
        tree: weights, or of a whole run `TrainState.unpack()`, which `TrainState.pack` packs
            again; arrays of any shape, typed keys included, the same in every process. Or their
            `jax.ShapeDtypeStruct`s, which are told where they belong.
        mesh: the mesh.
        rules: as in `specs`.
        min_size: as in `specs`.

    Returns:
        The same tree, on the mesh.
    """
    chosen = specs(tree, mesh, rules=rules, min_size=min_size)

    def place(leaf, spec):
        return leaf if spec is None else _put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(place, tree, chosen)


def table(tree: PyTree, mesh: Mesh, *, rules: Rules = (), min_size: int = MIN_SIZE) -> str:
    """What `specs` does, as text: path, shape, how it is split, and bytes on each device.

    Args:
        tree: as in `specs`.
        mesh: the mesh.
        rules: as in `specs`.
        min_size: as in `specs`.

    Returns:
        A line for each array, and the sum.
    """
    chosen = specs(tree, mesh, rules=rules, min_size=min_size)
    rows = [("array", "shape", "split", "bytes per device")]
    sizes = []

    def row(path, leaf, spec):
        if spec is not None:
            parts = int(np.prod([mesh.shape[axis] for axis in spec if axis]))
            sizes.append(_bytes(leaf) // parts)
            axes = (*spec, *[None] * (leaf.ndim - len(spec)))
            split = ", ".join("-" if axis is None else axis for axis in axes)
            rows.append((path_of(path), str(leaf.shape), f"({split})", f"{sizes[-1]:,}"))

    tree_map_with_path(row, tree, chosen)
    rows.append(("all", "", "", f"{sum(sizes):,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    form = "  ".join(f"{{:<{width}}}" for width in widths[:3]) + f"  {{:>{widths[3]}}}"
    return "\n".join(form.format(*row) for row in rows)


def _bytes(leaf: Any) -> int:
    itemsize = 8 if _is_key(leaf) else np.dtype(leaf.dtype).itemsize
    return int(np.prod(leaf.shape, dtype=np.int64)) * itemsize


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _put(leaf: Any, sharding: NamedSharding) -> Any:
    """`jax.device_put`, which takes typed keys within a process only; shapes say where they are."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.update(sharding=sharding)
    if _is_key(leaf):
        data = jax.device_put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    return jax.device_put(leaf, sharding)


def join_devices(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Give every array all devices of a sharding, whole along the axes that it splits.

    What is split over fsdp, such as weights of `shard_params`, is gathered: once, and not at every
    step of a loop that follows. What is split over tensor stays so. Inside a traced function, where
    placements are not known, arrays become whole.

    Args:
        tree: arrays of any shape; other leaves stay as they are.
        sharding: of the batch.

    Returns:
        The same tree, on the devices.
    """
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())

    def place(leaf):
        if not isinstance(leaf, jax.Array):
            return leaf
        if isinstance(leaf, jax.core.Tracer):
            return jax.lax.with_sharding_constraint(leaf, everywhere)
        found = leaf.sharding
        if isinstance(found, NamedSharding) and found.device_set == sharding.device_set:
            whole = _without_batch_axes(found)
            return leaf if whole is found else _put(leaf, whole)
        return _put(leaf, everywhere)

    return jax.tree.map(place, tree)


def _without_batch_axes(sharding: NamedSharding) -> NamedSharding:
    """The same sharding, whole along the axes over which batches are split."""
    if not any(axis in BATCH for part in sharding.spec for axis in _names(part)):
        return sharding
    kept = [tuple(axis for axis in _names(part) if axis not in BATCH) for part in sharding.spec]
    return NamedSharding(sharding.mesh, PartitionSpec(*(axes or None for axes in kept)))


def _names(part: Any) -> tuple[str, ...]:
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def gather_weights(tree: PyTree, shardings: PyTree) -> PyTree:
    """Weights whole along fsdp where they are used; their gradients are split as they are.

    Without it the compiler may leave weights split and move activations instead, which are many
    times as large.

    Args:
        tree: weights of any shape, traced. Those of blocks that gather their own (`at_use`), and
            have the attribute `gathers_itself`, stay as they are.
        shardings: of the stored weights, a tree of `NamedSharding`; other leaves say nothing.

    Returns:
        The same tree.
    """

    def one(leaf, sharding):
        known = isinstance(sharding, NamedSharding) and eqx.is_inexact_array(leaf)
        return _gather(leaf, sharding) if known else leaf

    def gathers_itself(node):
        return getattr(node, "gathers_itself", False)

    return jax.tree.map(one, tree, shardings, is_leaf=gathers_itself)


def at_use(
    part: PyTree,
    *,
    rules: Rules = (),
    prefix: str = "",
    dtype: Any = None,
    layers: int = 1,
) -> PyTree:
    """The weights of a part of a network, gathered where the part computes.

    Inside a training step on a mesh (`on_mesh`) they become whole along fsdp, in the dtype in
    which they are used, and their gradients are split as `specs` says. Called inside a block that
    is recomputed in the backward pass, they are gathered again there and never kept. Elsewhere
    they are as they are.

    Args:
        part: weights of any shape, traced; other leaves stay as they are.
        rules: how the weights are split over tensor.
        prefix: path of the part in the network.
        dtype: in which matrices and filters compute; None for their own.
        layers: how many such parts are stored in one array.

    Returns:
        The same tree.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(mesh.axis_names) != set(AXES):
        return part
    min_size = -(-MIN_SIZE // layers)
    chosen = specs({prefix: part} if prefix else part, mesh, rules=rules, min_size=min_size)

    def one(leaf, spec):
        if spec is None or "fsdp" not in spec:
            return leaf
        matrix = leaf.ndim > 1 and dtype is not None
        return _gather(leaf.astype(dtype) if matrix else leaf, NamedSharding(mesh, spec))

    return jax.tree.map(one, part, chosen[prefix] if prefix else chosen)


def on_mesh(shardings: PyTree) -> contextlib.AbstractContextManager:
    """The context in which `at_use` gathers: that of the mesh of the first sharding, if any."""
    for sharding in jax.tree.leaves(shardings):
        return jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh)
    return contextlib.nullcontext()


def _gather(leaf: jax.Array, split: NamedSharding) -> jax.Array:
    """Whole along the batch's axes; the gradient is split. The sharding moves, and no number."""
    whole = _without_batch_axes(split)
    if whole is split:
        return leaf
    return _place_p.bind(leaf, here=whole, back=split)


def _placed(leaf: jax.Array, *, here: NamedSharding, back: NamedSharding) -> jax.Array:
    del back
    return jax.lax.with_sharding_constraint(leaf, here)


def _batched_place(args, dims, *, here, back):
    """Of a batch of weights the new axis lies where the compiler likes."""
    (leaf,), (dim,) = args, dims

    def longer(sharding):
        spec = [*sharding.spec, *[None] * (leaf.ndim - 1 - len(sharding.spec))]
        spec.insert(dim, PartitionSpec.UNCONSTRAINED)
        return NamedSharding(sharding.mesh, PartitionSpec(*spec))

    return _place_p.bind(leaf, here=longer(here), back=longer(back)), dim


# A linear map, of which both modes of differentiation and `vmap` know all they need; JAX's own
# constraint would have the gradient placed as the weights are.
_place_p = Primitive("place")
_place_p.def_impl(_placed)
_place_p.def_abstract_eval(lambda leaf, *, here, back: leaf)
ad.deflinear2(_place_p, lambda ct, leaf, *, here, back: [_place_p.bind(ct, here=back, back=here)])
batching.primitive_batchers[_place_p] = _batched_place
mlir.register_lowering(_place_p, mlir.lower_fun(_placed, multiple_results=False))

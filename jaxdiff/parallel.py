"""Meshes and sharding: the only module that knows devices.

A mesh has the axes data, fsdp and tensor, all of type Auto: jit propagates shardings from its
arguments, and these functions place the arguments.
"""

from collections.abc import Sequence

import equinox as eqx
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

AXES = ("data", "fsdp", "tensor")


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
        ValueError: if the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    rest = fsdp * tensor
    data = len(devices) // max(rest, 1) if data is None else data
    if data * rest != len(devices):
        raise ValueError(
            f"`data` * `fsdp` * `tensor` must be the number of devices, {len(devices)}; got "
            f"{data} * {fsdp} * {tensor}. Pass fewer devices, or other axes."
        )
    return jax.make_mesh((data, fsdp, tensor), AXES, (AxisType.Auto,) * 3, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Place a batch on the mesh, its leading axis split over data and fsdp.

    Args:
        batch: arrays `(n, ...)`; with several processes, this one's part of the global batch.
        mesh: the mesh, whose devices divide n.

    Returns:
        The same tree, on the mesh.

    Raises:
        ValueError: if the leading axis is not divisible by the number of devices, or missing.
    """
    sharding = batch_sharding(mesh)
    count = mesh.shape["data"] * mesh.shape["fsdp"]
    for leaf in jax.tree.leaves(batch):
        if not np.ndim(leaf):
            raise ValueError(
                f"Every array of `batch` must have a leading axis of examples, got {leaf!r}. Pass "
                "what is no example as a constant."
            )
        size = np.shape(leaf)[0] * jax.process_count()
        if size % count:
            raise ValueError(
                f"`batch` must be divisible by the {count} devices it is split over, got size "
                f"{size}. Use a multiple of {count}, or a mesh of fewer devices."
            )
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch
    )


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Copy every array to every device of the mesh; other leaves stay as they are.

    Args:
        tree: arrays of any shape.
        mesh: the mesh.

    Returns:
        The same tree, on the mesh.
    """
    arrays, rest = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.device_put(arrays, NamedSharding(mesh, PartitionSpec())), rest)


def join_devices(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Replicate over a sharding's devices every array that does not live on them yet.

    Arrays that do, such as weights split by `shard_params`, stay as they are.

    Args:
        tree: arrays of any shape; other leaves stay as they are.
        sharding: of the batch.

    Returns:
        The same tree, on the devices.
    """
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())

    def place(leaf):
        if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
            return leaf
        settled = leaf.sharding.device_set == sharding.device_set
        return leaf if settled else jax.device_put(leaf, everywhere)

    return jax.tree.map(place, tree)


def shard_params(tree: PyTree, mesh: Mesh, *, min_size: int = 2**12) -> PyTree:
    """Split large arrays over the fsdp axis, and replicate the rest.

    Each array of at least `min_size` elements is split along its largest axis that the fsdp
    axis divides.

    Args:
        tree: weights, optimiser state, or a whole `TrainState`; arrays of any shape.
        mesh: the mesh.
        min_size: arrays smaller than this are replicated.
    """
    count = mesh.shape["fsdp"]

    def place(leaf):
        if not eqx.is_array(leaf):
            return leaf
        divisible = [axis for axis, size in enumerate(leaf.shape) if size % count == 0]
        spec = [None] * leaf.ndim
        if leaf.size >= min_size and divisible:
            spec[max(divisible, key=lambda axis: leaf.shape[axis])] = "fsdp"
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(place, tree)

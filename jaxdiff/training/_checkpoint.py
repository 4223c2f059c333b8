"""Checkpoints: the only module that knows Orbax.

A checkpoint holds everything a run needs to go on as if it had never stopped: weights,
optimiser, averages, step, keys, the position of the data iterator, the configuration and the
versions of what wrote it. Orbax writes under a temporary name and renames, so a checkpoint is
there whole or not at all; a manifest of checksums, written last, tells a complete one, and finds
the one that a disk has damaged since.
"""

import json
import logging
import platform
import shutil
import warnings
import zlib
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import PyTree

# Orbax reports every save and restore at level INFO through absl's logger.
logging.getLogger("absl").setLevel(logging.WARNING)


MANIFEST = "manifest.json"


class CheckpointError(OSError):
    """A checkpoint could not be written."""


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """Array leaves by path; typed keys as their data."""

    def data(leaf):
        key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if key else leaf

    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(tree, eqx.is_array))
    return {jax.tree_util.keystr(path): data(leaf) for path, leaf in leaves}


def _checksums(directory: Path) -> dict[str, int]:
    """CRC-32 of every file of a checkpoint but its manifest."""
    files = (p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {str(p.relative_to(directory)): zlib.crc32(p.read_bytes()) for p in files}


def _describe(leaf: Any) -> list:
    return [list(leaf.shape), str(leaf.dtype)]


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("jaxdiff", "jax", "flax", "optax", "orbax-checkpoint", "diffrax", "equinox", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


class CheckpointStore:
    """The checkpoints of one run, the newest few kept.

    Args:
        directory: where they are; created at the first save.
        keep: how many to keep.
    """

    def __init__(self, directory: str | Path, *, keep: int = 3):
        self.directory = Path(directory).absolute()
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(
            int(p.name)
            for p in self.directory.iterdir()
            if p.name.isdigit() and (p / MANIFEST).is_file()
        )

    def _manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self.keep,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
        )
        return ocp.CheckpointManager(self.directory, options=options)

    def save(self, state: PyTree, *, step: int, data_state: Any = None, config: Any = None) -> None:
        """Write a checkpoint, unless there is one of this step already.

        Args:
            state: any pytree; its arrays are written, typed keys included.
            step: number of the checkpoint.
            data_state: what the data iterator's `get_state` returned; JSON.
            config: configuration of the run; JSON.

        Raises:
            CheckpointError: if it could not be written. Earlier checkpoints are intact.
        """
        if step in self.steps():
            return
        leaves = _named_leaves(state)
        meta = {
            "leaves": {path: _describe(leaf) for path, leaf in leaves.items()},
            "data_state": data_state,
            "config": config,
            "versions": _versions(),
        }
        args = ocp.args.Composite(
            arrays=ocp.args.StandardSave(list(leaves.values())), meta=ocp.args.JsonSave(meta)
        )
        directory = self.directory / str(step)
        try:
            if directory.exists():  # written, but killed before its manifest was
                shutil.rmtree(directory)
            with self._manager() as manager:
                manager.save(step, args=args)
                manager.wait_until_finished()
            write_json(directory / MANIFEST, _checksums(directory))
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"Could not write checkpoint {step} to {self.directory}: {reason}. Check free "
                f"space and permissions; earlier checkpoints {self.steps()} are intact."
            ) from None

    def _verify(self, step: int) -> None:
        """Raise ValueError if a file of the checkpoint is missing or differs from its manifest."""
        directory = self.directory / str(step)
        found = _checksums(directory)
        for name, checksum in json.loads((directory / MANIFEST).read_text()).items():
            if found.get(name) != checksum:
                raise ValueError(f"{name} is missing or differs from what was written")

    def _load_meta(self, step: int) -> dict:
        self._verify(step)
        with self._manager() as manager:
            args = ocp.args.Composite(meta=ocp.args.JsonRestore())
            return manager.restore(step, args=args)["meta"]

    def restore_latest(self, template: PyTree) -> tuple[PyTree, Any, Any] | None:
        """The newest checkpoint that is whole.

        Damaged ones are skipped with a warning. Arrays are placed as the template's are, so
        another number of devices may go on with the run.

        Args:
            template: a state of the right structure, e.g. the initial one.

        Returns:
            `(state, data_state, config)`, or None if there is no checkpoint.

        Raises:
            ValueError: if the checkpoint is of another model, naming the first difference; or
                if there are checkpoints and all are damaged.
        """
        return self._newest(lambda step: self._restore(step, template))

    def _newest(self, restore):
        steps = self.steps()
        for step in reversed(steps):
            try:
                return restore(step)
            except _Mismatch as mismatch:
                raise ValueError(str(mismatch)) from None
            except Exception as error:  # whatever a damaged file makes its reader raise
                reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                warnings.warn(
                    f"Checkpoint {step} in {self.directory} is damaged and skipped: {reason}",
                    stacklevel=3,
                )
        if steps:
            raise ValueError(
                f"All checkpoints in {self.directory} are damaged: {steps}. Remove the directory "
                "to begin again."
            )
        return None

    def _restore(self, step: int, template: PyTree):
        meta = self._load_meta(step)
        wanted = _named_leaves(template)
        _check_leaves(wanted, meta["leaves"], self.directory / str(step))
        targets = [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for leaf in wanted.values()
        ]
        with self._manager() as manager:
            args = ocp.args.Composite(arrays=ocp.args.StandardRestore(targets))
            arrays = iter(manager.restore(step, args=args)["arrays"])

        def fill(leaf):
            if not eqx.is_array(leaf):
                return leaf
            array = next(arrays)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf))
            return array

        return jax.tree.map(fill, template), meta["data_state"], meta["config"]

    def latest_config(self) -> Any | None:
        """Configuration in the newest readable checkpoint, or None if there is none."""
        return self._newest(lambda step: self._load_meta(step)["config"])


class _Mismatch(Exception):
    """A checkpoint that is whole, and of something else."""


def _check_leaves(wanted: dict, found: dict, where: Path) -> None:
    for path, leaf in wanted.items():
        if path not in found:
            raise _Mismatch(
                f"The checkpoint {where} is of another model: it has no {path}. Use the "
                "configuration it was trained with, or another run directory."
            )
        if found[path] != _describe(leaf):
            raise _Mismatch(
                f"The checkpoint {where} is of another model: {path} is "
                f"{found[path][1]}{found[path][0]} there, expected {leaf.dtype}{list(leaf.shape)}. "
                "Use the configuration it was trained with, or another run directory."
            )
    extra = set(found) - set(wanted)
    if extra:
        raise _Mismatch(
            f"The checkpoint {where} is of another model: it has {sorted(extra)[0]} besides. Use "
            "the configuration it was trained with, or another run directory."
        )


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON under a temporary name, then rename."""
    path = Path(path)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.rename(path)

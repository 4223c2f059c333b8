"""Checkpoints: the only module that knows Orbax.

A checkpoint holds everything a run needs to go on as if it had never stopped: weights,
optimiser, averages, step, keys, the position of the data iterator, the configuration and the
versions of what wrote it. It is written under a temporary name, with a manifest of checksums, and
then renamed: it is there whole or not at all, and damage done to it later is found.
"""

import json
import platform
import shutil
import warnings
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from jaxdiff._checks import check_count
from jaxdiff._tree import is_arraylike
from jaxdiff.parallel import is_first, wait_for_all

MANIFEST = "manifest.json"
UNFINISHED = ".unfinished"
# Counts the changes of how networks and training states arrange their arrays.
LAYOUT = 2


class CheckpointError(OSError):
    """A checkpoint could not be written."""


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """Array leaves by path; typed keys as their data."""
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(tree, is_arraylike))
    return {jax.tree_util.keystr(path): _data(leaf) for path, leaf in leaves}


def _data(leaf: Any) -> Any:
    if not _is_key(leaf):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.eval_shape(jax.random.key_data, leaf).update(sharding=leaf.sharding)
    return jax.random.key_data(leaf)


def _as_in(template: Any, array: Any) -> Any:
    """A restored array as the template's leaf was: a key, or a weakly typed number."""
    if _is_key(template):
        kinds: list[Any] = []
        jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), template)
        return jax.random.wrap_key_data(array, impl=kinds[0])
    # Files do not tell weak types; a strong one would promote what it meets, and recompile.
    if template.weak_type and template.ndim == 0:
        return jax.device_put(jnp.asarray(array.item()), _place(template))
    return array


def _place(template: Any) -> jax.sharding.Sharding:
    """Where an array belongs; a shape that does not say, to the first device."""
    return template.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _checksums(directory: Path) -> dict[str, int]:
    """CRC-32 of every file of a checkpoint but its manifest."""
    files = (p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {str(p.relative_to(directory)): _checksum(p) for p in files}


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

    Raises:
        ValueError: for a `keep` below 1, which would keep none.
    """

    def __init__(self, directory: str | Path, *, keep: int = 3):
        check_count("keep", keep)
        self.directory = Path(directory).absolute()
        self.keep = keep
        self._writing: tuple[int, Future] | None = None

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        if self.directory.exists() and not self.directory.is_dir():
            raise CheckpointError(f"`directory` must be a directory, got a file, {self.directory}.")
        if not self.directory.is_dir():
            return []
        return sorted(
            int(p.name)
            for p in self.directory.iterdir()
            if p.name.isdigit() and (p / MANIFEST).is_file()
        )

    def save(
        self,
        state: PyTree,
        *,
        step: int,
        data_state: Any = None,
        config: Any = None,
        wait: bool = True,
    ) -> None:
        """Write a checkpoint, in place of one of the same step.

        Of the checkpoints up to `step` the newest `keep` stay. One that is still being written is
        finished first.

        Args:
            state: any pytree; its arrays are written, typed keys included.
            step: number of the checkpoint.
            data_state: what the data iterator's `get_state` returned; JSON.
            config: configuration of the run; JSON.
            wait: until it is complete. Else only until the arrays are copied, so that the caller
                may donate them; the rest is written meanwhile, and `wait` waits for it, which a
                program must call before it ends.

        Raises:
            CheckpointError: if it, or the one before, could not be written. Earlier checkpoints
                are intact.
        """
        self.wait()
        step = check_count("step", step, least=0)
        if self.directory.exists() and not self.directory.is_dir():
            raise CheckpointError(f"`directory` must be a directory, got a file, {self.directory}.")
        leaves = _named_leaves(state)
        meta = {
            "leaves": {path: _describe(leaf) for path, leaf in leaves.items()},
            "data_state": data_state,
            "config": config,
            "layout": LAYOUT,
            "versions": _versions(),
        }
        meta = json.loads(json.dumps(meta))  # what is no JSON is told here
        args = ocp.args.Composite(
            arrays=ocp.args.PyTreeSave(list(leaves.values())), meta=ocp.args.JsonSave(meta)
        )
        unfinished = self.directory / f"{step}{UNFINISHED}"

        def finish(writer: ocp.AsyncCheckpointer) -> None:
            writer.wait_until_finished()
            writer.close()
            if is_first():  # Orbax writes from every process; names are for one
                write_json(unfinished / MANIFEST, _checksums(unfinished))
                self._finish(unfinished, step)

        try:
            if is_first():
                self._remove_unfinished()
            # A directory that cannot be made is told here, and not after minutes of waiting for it.
            options = ocp.AsyncOptions(create_directories_asynchronously=False)
            handler = ocp.CompositeCheckpointHandler()
            writer = ocp.AsyncCheckpointer(handler, async_options=options)
            writer.save(unfinished, args=args)
        except (OSError, ValueError, RuntimeError) as error:
            self._refuse(step, error)
        thread = ThreadPoolExecutor(1)
        self._writing = (step, thread.submit(finish, writer))
        thread.shutdown(wait=False)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until the checkpoint that is being written, if any, is complete.

        Raises:
            CheckpointError: if it could not be written. Earlier checkpoints are intact.
        """
        if self._writing is None:
            return
        step, writing = self._writing
        try:
            writing.result()
            wait_for_all("checkpoint has its name")
        except (OSError, ValueError, RuntimeError) as error:
            self._refuse(step, error)
        finally:
            if writing.done():  # Ctrl-C here leaves it being written
                self._writing = None

    def _refuse(self, step: int, error: Exception) -> None:
        self._remove_unfinished()
        raise CheckpointError(
            f"Could not write checkpoint {step} to {self.directory}: {_reason(error)}. Check "
            f"free space and permissions; earlier checkpoints {self.steps()} are intact."
        ) from None

    def _remove_unfinished(self) -> None:
        """Remove what a killed or failed save left behind."""
        for path in self.directory.glob(f"*{UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)

    def _finish(self, unfinished: Path, step: int) -> None:
        """Give a written checkpoint its name, and remove those too old to keep."""
        directory = self.directory / str(step)
        if directory.exists():
            shutil.rmtree(directory)
        unfinished.rename(directory)
        # Later ones are not counted: they may be damaged, and must not crowd out this one.
        for old in [s for s in self.steps() if s <= step][: -self.keep]:
            shutil.rmtree(self.directory / str(old))

    def _verify(self, step: int) -> None:
        """Raise _Damaged if a file of the checkpoint is missing or differs from its manifest."""
        directory = self.directory / str(step)
        try:
            manifest = dict(json.loads((directory / MANIFEST).read_bytes()))
            found = _checksums(directory)
        except (OSError, ValueError, TypeError) as error:
            raise _Damaged(_reason(error)) from None
        for name, checksum in manifest.items():
            if found.get(name) != checksum:
                raise _Damaged(f"{name} is missing or differs from what was written")

    def _load(self, step: int, name: str, args: ocp.args.CheckpointArgs) -> Any:
        """Read one part of a checkpoint."""
        args = ocp.args.Composite(**{name: args})
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(self.directory / str(step), args=args)[name]

    def _load_meta(self, step: int) -> dict:
        return self._load(step, "meta", ocp.args.JsonRestore())

    def restore_latest(
        self, template: PyTree, *, partial: bool = False
    ) -> tuple[PyTree, Any, Any] | None:
        """The newest checkpoint that is whole.

        Damaged ones are skipped with a warning. Arrays are placed as the template's are, so
        another number of devices may go on with the run.

        Args:
            template: a state of the right structure, e.g. the initial one, or its shapes, the
                `jax.ShapeDtypeStruct`s of `equinox.filter_eval_shape` and `shard_params`.
            partial: read only what the template has; to sample, put None in place of the
                optimiser's state.

        Returns:
            `(state, data_state, config)`, or None if there is no checkpoint.

        Raises:
            ValueError: if the checkpoint is of another model, naming the first difference; if it
                is of a version with another layout; or if there are checkpoints and all are
                damaged.
        """
        step = self._newest()
        return None if step is None else self._restore(step, template, partial)

    def restore(
        self, template: PyTree, *, step: int, partial: bool = False
    ) -> tuple[PyTree, Any, Any]:
        """The checkpoint of a step, as `restore_latest` returns one.

        Args:
            template: a state of the right structure.
            step: one of `steps()`.
            partial: read only what the template has.

        Returns:
            `(state, data_state, config)`.

        Raises:
            ValueError: if there is none of this step, if it is damaged, or of another model.
        """
        self.wait()
        if step not in self.steps():
            raise ValueError(
                f"`step` must be one of {self.steps()}, those in {self.directory}, got {step}."
            )
        try:
            self._verify(step)
        except _Damaged as damage:
            raise ValueError(
                f"Checkpoint {step} in {self.directory} is damaged: {damage}. Remove it."
            ) from None
        return self._restore(step, template, partial)

    def latest_config(self) -> Any | None:
        """Configuration in the newest checkpoint that is whole, or None if there is none."""
        step = self._newest()
        return None if step is None else self._load_meta(step)["config"]

    def _newest(self) -> int | None:
        """Step of the newest checkpoint that is whole."""
        self.wait()
        steps = self.steps()
        for step in reversed(steps):
            try:
                self._verify(step)
            except _Damaged as damage:
                warnings.warn(
                    f"Checkpoint {step} in {self.directory} is damaged and skipped: {damage}.",
                    stacklevel=3,
                )
            else:
                return step
        if steps:
            raise ValueError(
                f"All checkpoints in {self.directory} are damaged: {steps}. Remove the directory "
                "to begin again."
            )
        return None

    def _restore(self, step: int, template: PyTree, partial: bool):
        meta = self._load_meta(step)
        if meta.get("layout") != LAYOUT:
            raise ValueError(
                f"Checkpoint {step} in {self.directory} was written by jaxdiff "
                f"{meta['versions']['jaxdiff']}, whose networks and training states are laid out "
                "differently. Train again, or go on with that version."
            )
        wanted, stored = _named_leaves(template), meta["leaves"]
        _check_leaves(wanted, stored, self.directory / str(step), partial)
        # A list with a placeholder for each array that is not wanted.
        targets = [wanted.get(path, ocp.PLACEHOLDER) for path in stored]
        placed = [
            ocp.ArrayRestoreArgs(sharding=_place(wanted[path]))
            if path in wanted
            else ocp.RestoreArgs()
            for path in stored
        ]
        args = ocp.args.PyTreeRestore(item=targets, restore_args=placed)
        found = dict(zip(stored, self._load(step, "arrays", args), strict=True))
        arrays = iter([found[path] for path in wanted])
        state = jax.tree.map(
            lambda leaf: _as_in(leaf, next(arrays)) if is_arraylike(leaf) else leaf, template
        )
        return state, meta["data_state"], meta["config"]


class _Damaged(Exception):
    """A checkpoint that is not what was written."""


def _reason(error: Exception) -> str:
    """First line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _check_leaves(wanted: dict, stored: dict, where: Path, partial: bool) -> None:
    """Raise ValueError at the first array that is not in both, or not the same."""

    def refuse(difference):
        raise ValueError(
            f"The checkpoint {where} is of another model: {difference}. Use the configuration it "
            "was trained with, or another run directory."
        )

    for path, leaf in wanted.items():
        if path not in stored:
            refuse(f"it has no {path}, expected {leaf.dtype}{list(leaf.shape)}")
        if stored[path] != _describe(leaf):
            shape, dtype = stored[path]
            refuse(f"{path} is {dtype}{shape} there, expected {leaf.dtype}{list(leaf.shape)}")
    if extra := [path for path in stored if path not in wanted and not partial]:
        refuse(f"it also has {extra[0]}")


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON under a temporary name, then rename."""
    path = Path(path)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.rename(path)

"""The training loop: hooks, checkpoints, signals, and a stop at losses that are not finite."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from jaxdiff._checks import check_callable, check_count, check_kind
from jaxdiff.parallel import join_devices
from jaxdiff.training._checkpoint import CheckpointStore
from jaxdiff.training._step import TrainState

# The most steps that are queued on the device: deep enough to hide Python, and not so deep that
# their batches fill the memory or a signal has to wait for long.
RUN_AHEAD = 8


class Interrupted(Exception):  # noqa: N818 - not an error of the program
    """The run was told to stop, and has written a checkpoint.

    Attributes:
        signum: the signal; `128 + signum` is the customary exit status.
    """

    def __init__(self, signum: int, step: int):
        self.signum = signum
        super().__init__(f"Interrupted by {signal.Signals(signum).name} after step {step}.")


class NonFiniteLossError(FloatingPointError):
    """The loss, another metric, or a weight is NaN or infinite."""


Metrics = dict[str, float | np.ndarray]


class Hook(NamedTuple):
    """Something to do every few steps, and after the last.

    Attributes:
        every: number of steps.
        call: `call(step, state, metrics)`; `metrics` are means over the steps since the last
            call of a hook or checkpoint, floats or vectors. Those of a player that rests at some
            steps are means over its updates, and absent if there were none. Returning True ends
            the run after this step, with a checkpoint.
        before_checkpoint: whether it precedes a checkpoint of the same step: for records, so that
            a run which goes on from the checkpoint has them. Others follow it, as they may fail.
    """

    every: int
    call: Callable[[int, TrainState, Metrics], bool | None]
    before_checkpoint: bool = False


@contextlib.contextmanager
def _signals(received: list[int]):
    """Collect SIGTERM and SIGINT instead of dying of them; only the main thread may."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT)

    def act(number, _):
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # Ctrl-C is one for all processes, too
        else:
            received.append(number)

    if jax.process_count() > 1:
        numbers = (signal.SIGINT,)  # SIGTERM is JAX's, whose processes agree on a step
    previous = [signal.signal(n, act) for n in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def _finishing(store: CheckpointStore | None):
    """However training ends, what is being written is complete before it does."""
    try:
        yield
    finally:
        if store is not None:
            store.wait()


def _refuse(name: str, value: str, step: int, store: CheckpointStore | None) -> None:
    if store is not None:
        store.wait()  # one that is being written counts
    good = store.steps()[-1:] if store else []
    last = f"checkpoint {good[0]} in {store.directory}" if store and good else "none yet"
    raise NonFiniteLossError(
        f"{name} became {value} at step {step}; the run stops. Last good checkpoint: {last}. "
        "Lower the learning rate, clip the gradient, or check the data."
    )


class _Means:
    """Means of metrics over the steps since they were last asked for; stops at what is not finite.

    Args:
        store: named in the error.
        tolerance: how many steps in a row may have a metric that is not finite.
    """

    def __init__(self, store: CheckpointStore | None, tolerance: int):
        self.store, self.tolerance = store, tolerance
        self.history: list[dict] = []
        self.in_a_row = 0

    def take(self, step: int) -> tuple[Metrics, int]:
        """Means over the steps before `step` that were finite, and how many were not."""
        values = jax.device_get(self.history)
        self.history.clear()
        finite = []
        for at, metrics in enumerate(values, step - len(values)):
            bad = [name for name, value in metrics.items() if not np.isfinite(value).all()]
            self.in_a_row = self.in_a_row + 1 if bad else 0
            if self.in_a_row > self.tolerance:
                value = np.asarray(metrics[bad[0]])
                told = str(float(value)) if value.ndim == 0 else "NaN or infinite"
                often = f" for the {self.in_a_row}th step in a row" if self.tolerance else ""
                _refuse(f"`{bad[0]}`", told + often, at, self.store)
            if not bad:
                finite.append(metrics)
        means = {}
        for name in finite[0] if finite else ():
            flag = name.rpartition("/")[0] + "/updated" if "/" in name else "updated"
            updated = [m[name] for m in finite if flag == name or m.get(flag, 1)]
            if updated:
                mean = np.mean(np.asarray(updated, np.float64), axis=0)
                means[name] = float(mean) if mean.ndim == 0 else mean
        return means, len(values) - len(finite)


@jax.jit
def _all_finite(arrays: list) -> jax.Array:
    return jnp.stack([jnp.isfinite(a).all() for a in arrays]).all()


def _check_weights(state: TrainState, step: int, store: CheckpointStore | None) -> None:
    """Raise if a model or an average is not finite; its loss would tell one step too late."""
    parts = [(player.model, player.averages) for player in state.players.values()]
    arrays = [a for a in jax.tree.leaves(parts) if eqx.is_inexact_array(a)]
    if not _all_finite(arrays):
        _refuse("A weight", "NaN or infinite", step, store)


def _cond_checks(state: TrainState) -> list[Callable[[PyTree], None]]:
    """What the models check of conditions: labels outside the classes would train in silence."""
    models = [player.model for player in state.players.values()]
    return [model.check_cond for model in models if hasattr(model, "check_cond")]


def _check_batch(checks: list, batch: PyTree, wait: bool) -> None:
    cond = batch.get("cond") if isinstance(batch, dict) else None
    # Arrays on a device have to be waited for: of those, the first batch's alone.
    if wait or all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(cond)):
        for check in checks:
            check(cond)


def _placed(constants: dict[str, PyTree] | None, state: TrainState) -> PyTree:
    """Constants on the devices of the state, once and not at every step."""
    constants = jax.tree.map(
        lambda leaf: jnp.asarray(leaf) if eqx.is_array_like(leaf) else leaf, constants or {}
    )
    sharding = state.step.sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        return join_devices(constants, sharding)
    return constants


def fit(
    step: Callable[..., tuple[TrainState, dict]],
    state: TrainState,
    batches: Iterator[PyTree],
    *,
    num_steps: int,
    hooks: Sequence[Hook] = (),
    store: CheckpointStore | None = None,
    checkpoint_every: int = 1000,
    config: Any = None,
    place: Callable[[PyTree], PyTree] = lambda batch: batch,
    constants: dict[str, PyTree] | None = None,
    tolerance: int = 0,
) -> TrainState:
    """Train until step `num_steps`, beginning at `state.step`.

    Metrics stay on the device between hooks, so that the program runs ahead of Python. With the
    state and the iterator of a checkpoint, what follows is bit for bit what would have followed
    without a stop.

    Args:
        step: made by `make_train_step`.
        state: initial or restored state; donated.
        batches: iterator; with a store it needs `get_state()`, whose value is JSON.
        num_steps: total number of steps of the run.
        hooks: what to do every few steps.
        store: where to write checkpoints, or None.
        checkpoint_every: steps between checkpoints; another is written at the end.
        config: configuration of the run, kept in the checkpoints.
        place: puts a batch on the devices, e.g. `lambda b: shard_batch(b, mesh)`.
        constants: passed to the losses; placed on all devices of the state.
        tolerance: how many steps in a row may have a metric that is NaN or infinite, for
            optimisers that skip those, such as `optax.apply_if_finite`; means leave them out. The
            weights must stay finite.

    Returns:
        The final state.

    Raises:
        Interrupted: after SIGTERM or SIGINT, once a checkpoint is written.
        NonFiniteLossError: if a metric or weight is NaN or infinite; nothing is saved. Seen when
            a hook or checkpoint is due.
        ValueError: if the batches end too early, or hold labels that are no class of a model; of
            batches on a device the first is looked at alone.
        CheckpointError: if a checkpoint cannot be written.
    """
    check_count("num_steps", num_steps, least=0)
    check_count("checkpoint_every", checkpoint_every)
    for hook in hooks:
        check_kind("hooks", hook, Hook, "Hook(100, call)")
        check_callable("call", hook.call, "a function of (step, state, metrics)")
        check_count("every", hook.every, instead="It is the hook's number of steps.")
    if not hasattr(batches, "__next__"):
        raise TypeError(
            f"`batches` must be an iterator, got {type(batches).__name__}. Pass iter(loader)."
        )
    if store is not None:
        check_kind("store", store, CheckpointStore, "CheckpointStore(path)")
    if store is not None and not hasattr(batches, "get_state"):
        raise TypeError(
            "`batches` must have get_state, so that a checkpoint can hold its position, got "
            f"{type(batches).__name__}. Use data.make_loader, or leave `store` out."
        )
    index = begun = int(state.step)
    received: list[int] = []
    means_of = _Means(store, check_count("tolerance", tolerance, least=0))
    checks, constants = _cond_checks(state), _placed(constants, state)

    def save():
        if store is not None:
            _check_weights(state, index, store)
            position = batches.get_state()
            parts = state.unpack()
            store.save(parts, step=index, data_state=position, config=config, wait=False)

    with _signals(received), _finishing(store):
        while index < num_steps:
            batch = _next(batches, index, num_steps)
            _check_batch(checks, batch, index == begun)
            state, metrics = step(state, place(batch), constants)
            index += 1
            history = means_of.history
            history.append(metrics)
            if len(history) > RUN_AHEAD:
                jax.block_until_ready(history[-1 - RUN_AHEAD])
            if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(index):
                received.append(signal.SIGTERM)
            last = index == num_steps
            due = [hook for hook in hooks if index % hook.every == 0 or last]
            saving = last or index % checkpoint_every == 0
            if due or saving or received:
                means, skipped = means_of.take(index)
                if skipped:
                    _check_weights(state, index, store)
            ends = False
            for hook in due:
                if hook.before_checkpoint:
                    ends |= hook.call(index, state, means) is True
            if saving:
                save()
            for hook in due:
                if not hook.before_checkpoint:
                    if saving and store is not None:
                        store.wait()
                    ends |= hook.call(index, state, means) is True
            stop = list(received)  # perhaps during a hook or the save
            if (stop or ends) and not saving:
                save()
            if stop:
                raise Interrupted(stop[0], index)
            if ends:
                break
    return state


def _next(batches: Iterator[PyTree], index: int, num_steps: int) -> PyTree:
    try:
        return next(batches)
    except StopIteration:
        raise ValueError(
            f"`batches` ended after step {index} of `num_steps` = {num_steps}. Pass an endless "
            "iterator, or fewer steps."
        ) from None

"""The training loop: hooks, checkpoints, signals, and a stop at the first non-finite loss."""

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

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


class Hook(NamedTuple):
    """Something to do every few steps, and after the last.

    Attributes:
        every: number of steps.
        call: `call(step, state, metrics)`; `metrics` are means over the steps since the last
            call of a hook or checkpoint, as floats. Those of a player that rests at some steps
            are means over its updates, and absent if there were none.
        before_checkpoint: whether it precedes a checkpoint of the same step: for records, so that
            a run which goes on from the checkpoint has them. Others follow it, as they may fail.
    """

    every: int
    call: Callable[[int, TrainState, dict[str, float]], None]
    before_checkpoint: bool = False


@contextlib.contextmanager
def _signals(received: list[int]):
    """Collect SIGTERM and SIGINT instead of dying of them; only the main thread may."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = [signal.signal(n, lambda number, _: received.append(number)) for n in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)


def _refuse(name: str, value: str, step: int, store: CheckpointStore | None) -> None:
    good = store.steps()[-1:] if store else []
    last = f"checkpoint {good[0]} in {store.directory}" if good else "none yet"
    raise NonFiniteLossError(
        f"{name} became {value} at step {step}; the run stops. Last good checkpoint: {last}. "
        "Lower the learning rate, clip the gradient, or check the data."
    )


def _finite_means(history: list, step: int, store: CheckpointStore | None) -> dict[str, float]:
    """Means of the metrics of the steps before `step`; raises at the first not finite."""
    values = jax.device_get(history)
    for at, metrics in enumerate(values, step - len(values)):
        for name, value in metrics.items():
            if not math.isfinite(value):
                _refuse(f"`{name}`", str(float(value)), at, store)
    means = {}
    for name in values[0] if values else ():
        flag = name.rpartition("/")[0] + "/updated" if "/" in name else "updated"
        updated = [m for m in values if flag == name or m.get(flag, 1)]
        if updated:
            means[name] = float(sum(m[name] for m in updated) / len(updated))
    return means


@jax.jit
def _all_finite(arrays: list) -> jax.Array:
    return jnp.stack([jnp.isfinite(a).all() for a in arrays]).all()


def _check_weights(state: TrainState, step: int, store: CheckpointStore) -> None:
    """Raise if a model or an average is not finite; its loss would tell one step too late."""
    parts = [(player.model, player.averages) for player in state.players.values()]
    arrays = [a for a in jax.tree.leaves(parts) if eqx.is_inexact_array(a)]
    if not _all_finite(arrays):
        _refuse("A weight", "NaN or infinite", step, store)


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
        constants: passed to the losses.

    Returns:
        The final state.

    Raises:
        Interrupted: after SIGTERM or SIGINT, once a checkpoint is written.
        NonFiniteLossError: if a metric or weight is NaN or infinite; nothing is saved. Seen when
            a hook or checkpoint is due.
        ValueError: if the batches end too early.
        CheckpointError: if a checkpoint cannot be written.
    """
    index, history, received = int(state.step), [], []

    def save():
        if store is not None:
            _check_weights(state, index, store)
            store.save(state.unpack(), step=index, data_state=batches.get_state(), config=config)

    with _signals(received):
        while index < num_steps:
            batch = _next(batches, index, num_steps)
            state, metrics = step(state, place(batch), constants)
            index += 1
            history.append(metrics)
            if len(history) > RUN_AHEAD:
                jax.block_until_ready(history[-1 - RUN_AHEAD])
            last = index == num_steps
            due = [hook for hook in hooks if index % hook.every == 0 or last]
            saving = last or index % checkpoint_every == 0
            if due or saving or received:
                means = _finite_means(history, index, store)
                history.clear()
            for hook in due:
                if hook.before_checkpoint:
                    hook.call(index, state, means)
            if saving:
                save()
            for hook in due:
                if not hook.before_checkpoint:
                    hook.call(index, state, means)
            if stop := list(received):  # perhaps during a hook or the save
                if not saving:
                    save()
                raise Interrupted(stop[0], index)
    return state


def _next(batches: Iterator[PyTree], index: int, num_steps: int) -> PyTree:
    try:
        return next(batches)
    except StopIteration:
        raise ValueError(
            f"`batches` ended after step {index} of `num_steps` = {num_steps}. Pass an endless "
            "iterator, or fewer steps."
        ) from None

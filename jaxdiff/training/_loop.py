"""The training loop: hooks, checkpoints, signals, and a stop at the first non-finite loss."""

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from jaxdiff.training._checkpoint import CheckpointStore
from jaxdiff.training._step import TrainState


class Interrupted(Exception):  # noqa: N818 - not an error of the program
    """The run was told to stop, and has written a checkpoint.

    Attributes:
        signum: the signal; `128 + signum` is the customary exit status.
    """

    def __init__(self, signum: int, step: int):
        self.signum = signum
        super().__init__(f"Interrupted by {signal.Signals(signum).name} after step {step}.")


class NonFiniteLossError(FloatingPointError):
    """The loss or its gradient is NaN or infinite."""


class Hook(NamedTuple):
    """Something to do every few steps, and after the last.

    Attributes:
        every: number of steps.
        call: `call(step, state, metrics)`; `metrics` are means over the steps since the last
            call of a hook or checkpoint, as floats.
    """

    every: int
    call: Callable[[int, TrainState, dict[str, float]], None]


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


def _finite_means(history: list, step: int, store: CheckpointStore | None) -> dict[str, float]:
    """Means of the metrics of some steps; raises at the first that is not finite."""
    values = jax.device_get(history)
    for offset, metrics in enumerate(values):
        for name, value in metrics.items():
            if not math.isfinite(value):
                at = step - len(values) + offset
                good = store.steps()[-1:] if store else []
                last = f"checkpoint {good[0]} in {store.directory}" if good else "none yet"
                raise NonFiniteLossError(
                    f"`{name}` became {float(value)} at step {at}; the run stops. Last good "
                    f"checkpoint: {last}. Lower the learning rate, clip the gradient, or check "
                    "the data."
                )
    return {name: float(sum(m[name] for m in values) / len(values)) for name in values[0]}


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
        NonFiniteLossError: if a loss or gradient norm is NaN or infinite; nothing is written.
        CheckpointError: if a checkpoint cannot be written.
    """
    index, history, received = int(state.step), [], []

    def settle():
        means = _finite_means(history, index, store) if history else {}
        history.clear()
        return means

    def save():
        if store is not None:
            store.save(state.unpack(), step=index, data_state=batches.get_state(), config=config)

    with _signals(received):
        while index < num_steps:
            state, metrics = step(state, place(next(batches)), constants)
            index += 1
            history.append(metrics)
            last = index == num_steps
            due = [hook for hook in hooks if index % hook.every == 0 or last]
            saving = last or index % checkpoint_every == 0 or bool(received)
            if due or saving:
                means = settle()
                if saving:
                    save()
                for hook in due:
                    hook.call(index, state, means)
            if received and not last:
                raise Interrupted(received[0], index)
    return state

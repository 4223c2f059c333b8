"""What all recipes share: the loop with its log, and errors and signals as one line."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path
from tqdm import tqdm

from jaxdiff.training import Interrupted, TrainState


def run(fn: Callable[[], Any]) -> int:
    """Call `fn`; an error or a signal becomes one line and an exit status."""
    try:
        fn()
    except Interrupted as stop:
        print(f"\n{stop} A checkpoint is written; the same command goes on.", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        print(
            f"\nerror: {error.name} is missing. Install it: pip install 'jaxdiff[train]'",
            file=sys.stderr,
        )
        return 1
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    return 0


class MetricsLog:
    """Writes metrics as JSON lines and shows a progress bar; attribute `rate` is steps/s.

    Args:
        run_dir: where metrics.jsonl is, whose lines after `first_step` are forgotten.
        first_step: where the run begins or goes on.
        steps: where it ends.
        tensorboard: write TensorBoard events too.
    """

    def __init__(self, run_dir: Path, first_step: int, steps: int, *, tensorboard: bool = False):
        self.path = run_dir / "metrics.jsonl"
        self._forget_after(first_step)
        self.rate: float | None = None
        self.begun: tuple[int, float] | None = None  # the first interval holds the compilation
        self.bar = tqdm(total=steps, initial=first_step, unit="step", file=sys.stderr)
        self.writer: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self.writer = SummaryWriter(str(run_dir / "tensorboard"))

    def _forget_after(self, step: int) -> None:
        """Drop lines of steps after the checkpoint, which will be trained again."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):
                continue  # a line cut short by a kill
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        temporary.rename(self.path)

    def __call__(self, step: int, state: TrainState, metrics: dict[str, float]) -> None:
        """Write one line."""
        now = time.perf_counter()
        if self.begun is None:
            self.begun = (step, now)
        elif step > self.begun[0]:
            self.rate = (step - self.begun[0]) / (now - self.begun[1])
        self.add(step, {**metrics, "steps_per_second": self.rate})
        if "loss" in metrics:
            self.bar.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
        self.bar.update(step - self.bar.n)

    def add(self, step: int, record: dict[str, Any]) -> None:
        """Write one line of other numbers."""
        plain = {name: np.asarray(v).tolist() for name, v in record.items() if v is not None}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **plain}) + "\n")
        if self.writer is not None:
            for name, value in plain.items():
                if np.ndim(value) == 0:
                    self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Finish the progress bar and the event file."""
        self.bar.close()
        if self.writer is not None:
            self.writer.close()


def restore_weights(network: Any, found: Any) -> tuple[Any, Sequence[str], Sequence[str]]:
    """A network with the weights of another, where names and shapes are the same.

    Returns:
        The network, the names of its weights that were not found, and of those that were left.
    """
    there = {keystr(path): leaf for path, leaf in tree_leaves_with_path(found)}
    used: set[str] = set()

    def choose(path, leaf):
        name = keystr(path)
        other = there.get(name)
        if other is None or np.shape(other) != np.shape(leaf):
            return leaf
        used.add(name)
        return jnp.asarray(other, leaf.dtype)

    chosen = tree_map_with_path(choose, network)
    names = [keystr(path) for path, _ in tree_leaves_with_path(network)]
    return chosen, [n for n in names if n not in used], [n for n in there if n not in used]

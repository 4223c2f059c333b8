"""Where the numbers and pictures of a run go while it trains."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Writer(Protocol):
    """A place for what is logged."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers of a step."""

    def picture(self, step: int, name: str, path: Path) -> None:
        """Write a PNG file of a step."""

    def close(self) -> None:
        """Write what is left."""


class JSONLines:
    """One line of metrics.jsonl for each call; pictures are files already.

    Args:
        run_dir: where the file is.
        first_step: where the run begins or goes on; later lines are forgotten, since their steps
            will be trained again.
    """

    def __init__(self, run_dir: Path, first_step: int):
        self.path = run_dir / "metrics.jsonl"
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= first_step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError, TypeError):
                continue  # a line cut short by a kill
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        temporary.rename(self.path)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def picture(self, step: int, name: str, path: Path) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class TensorBoard:
    """Event files in the folder "tensorboard" of the run.

    Args:
        run_dir: the run's directory.
        first_step: where the run begins or goes on; TensorBoard hides later events.
    """

    def __init__(self, run_dir: Path, first_step: int):
        from tensorboardX import SummaryWriter

        self.events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write those that are single numbers."""
        for name, value in values.items():
            if np.ndim(value) == 0:
                self.events.add_scalar(name, value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Write a PNG file."""
        from PIL import Image

        with Image.open(path) as image:
            self.events.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
        self.events.close()


class WeightsAndBiases:
    """A run of Weights & Biases, in the folder "wandb" of the run.

    It goes on with the same run where its directory does. Whether anything is sent is the
    environment's choice: WANDB_MODE=offline keeps all on disk, WANDB_PROJECT names the project.

    Args:
        run_dir: the run's directory.
        first_step: where the run begins or goes on.
        config: shown beside the curves.
    """

    def __init__(self, run_dir: Path, first_step: int, config: Mapping[str, Any]):
        import wandb

        path = run_dir / "wandb_id"
        self.image = wandb.Image
        try:
            self.events = wandb.init(
                dir=run_dir,
                id=path.read_text() if path.exists() else None,
                name=run_dir.name,
                resume="allow",
                config=dict(config),
            )
        except wandb.errors.Error as error:
            raise ValueError(f"`writers` cannot use wandb: {error}") from None
        path.write_text(self.events.id)
        # Their own counter refuses steps that are trained again.
        self.events.define_metric("*", step_metric="train_step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write those that are single numbers."""
        plain = {name: value for name, value in values.items() if np.ndim(value) == 0}
        self.events.log({"train_step": step, **plain})

    def picture(self, step: int, name: str, path: Path) -> None:
        """Write a PNG file."""
        self.events.log({"train_step": step, name: self.image(str(path))})

    def close(self) -> None:
        """Write what is left."""
        self.events.finish()


def build_writers(names: tuple[str, ...], run_dir: Path, first_step: int, config) -> list[Writer]:
    """The writers of a run: always metrics.jsonl, and those that are named.

    Args:
        names: of `WriterName`.
        run_dir: the run's directory.
        first_step: where the run begins or goes on.
        config: the configuration as JSON.
    """
    writers: list[Writer] = [JSONLines(run_dir, first_step)]
    if "tensorboard" in names:
        writers.append(TensorBoard(run_dir, first_step))
    if "wandb" in names:
        writers.append(WeightsAndBiases(run_dir, first_step, config))
    return writers


def check_writers(names: tuple[str, ...]) -> None:
    """Refuse writers whose package is missing, before any work.

    Raises:
        ValueError: naming the first, and how to install it.
    """
    for name, package, extra in (
        ("tensorboard", "tensorboardX", "train"),
        ("wandb", "wandb", "wandb"),
    ):
        if name in names and find_spec(package) is None:
            raise ValueError(
                f"`writers` must be installed, and {package} is missing. Install it: pip install "
                f"'jaxdiff[{extra}]'"
            )

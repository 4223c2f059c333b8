"""What `train.analyze` measures of a run: options and presets."""

import dataclasses
from typing import Annotated, Literal

import tyro


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure; None for the preset's choice.

    Attributes:
        run_dir: directory written by train.pretrain.
        preset: None for the one that suits the size of the run's examples.
        out: folder of the report; None for geometry in the run directory.
        data_path: where the data are, if they have moved.
        seed: of the choice of examples and of all random numbers.
        tap: the activation H; "mid" is a UNet's h-space.
        num_samples: held-out examples.
        times: in (0, 1], as fractions of the process's customary grid, which are the times
            themselves for processes on [0, 1]; rounded to the steps of the inversion.
        inversion_steps: steps of the grid from data to noise.
        inversion_iterations: evaluations for each step of the inversion.
        num_values: singular values in the figure of spectra.
        rank: dimension of the subspaces that are compared.
        block: columns per step of the Lanczos method; half the size of a small event makes it
            exact.
        chunk: Jacobian products at a time; 0 for all at once.
        batch_size: points analysed at a time; more than 1 is for accelerators.
        cut: frequency below which energy counts as low, in cycles per pixel.
        num_labels: labels compared.
        label_samples: examples seen under these labels.
        edit_times: where examples are edited, like `times`.
        edit_samples: examples that are edited.
        num_directions: first directions that are followed, either way.
        edit_scale: size of a move of x-space guidance.
        num_edit_steps: moves.
        structure_samples: examples for the figure of the score's structure.
        trace_probes: random probes of traces; 0 for exact ones.
        num_probes: random probes of other estimates.
        normal_bundle: estimate the dimension from 4 d perturbations too.
        num_train: training examples to which a Gaussian is fitted.
        num_pairs: pairs of examples joined by curves.
        curve_times: where they are, like `times`.
        curve_steps: steps of a curve.
        geodesic_iterations: iterations that make arcs geodesic; 0 leaves geodesics out.
    """

    run_dir: Annotated[str, tyro.conf.Positional]
    preset: Literal["digits", "cifar10"] | None = None
    out: str | None = None
    data_path: str | None = None
    seed: int = 0
    tap: str = "mid"
    num_samples: int | None = None
    times: tuple[float, ...] | None = None
    inversion_steps: int | None = None
    inversion_iterations: int | None = None
    num_values: int | None = None
    rank: int | None = None
    block: int | None = None
    chunk: int | None = None
    batch_size: int | None = None
    cut: float | None = None
    num_labels: int | None = None
    label_samples: int | None = None
    edit_times: tuple[float, ...] | None = None
    edit_samples: int | None = None
    num_directions: int | None = None
    edit_scale: float | None = None
    num_edit_steps: int | None = None
    structure_samples: int | None = None
    trace_probes: int | None = None
    num_probes: int | None = None
    normal_bundle: bool | None = None
    num_train: int | None = None
    num_pairs: int | None = None
    curve_times: tuple[float, ...] | None = None
    curve_steps: int | None = None
    geodesic_iterations: int | None = None


PRESETS = {
    "digits": Options(
        "",
        num_samples=12,
        times=(0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0),
        inversion_steps=40,
        inversion_iterations=20,
        num_values=64,
        rank=10,
        block=32,
        chunk=0,
        batch_size=1,
        cut=0.2,
        num_labels=4,
        label_samples=3,
        edit_times=(0.9, 0.65, 0.35),
        edit_samples=4,
        num_directions=3,
        edit_scale=0.2,
        num_edit_steps=16,
        structure_samples=3,
        trace_probes=0,
        num_probes=16,
        normal_bundle=True,
        num_train=10_000,
        num_pairs=6,
        curve_times=(0.2, 0.5, 0.8, 1.0),
        curve_steps=16,
        geodesic_iterations=0,
    ),
    "cifar10": Options(
        "",
        num_samples=8,
        times=(0.1, 0.2, 0.4, 0.6, 0.8, 1.0),
        inversion_steps=50,
        inversion_iterations=20,
        num_values=50,
        rank=20,
        block=10,
        chunk=10,
        batch_size=1,
        cut=0.1,
        num_labels=3,
        label_samples=2,
        edit_times=(0.8, 0.6, 0.4),
        edit_samples=3,
        num_directions=3,
        edit_scale=0.1,
        num_edit_steps=16,
        structure_samples=2,
        trace_probes=4,
        num_probes=8,
        normal_bundle=False,
        num_train=10_000,
        num_pairs=3,
        curve_times=(0.2, 0.6, 1.0),
        curve_steps=16,
        geodesic_iterations=0,
    ),
}


# Values that must be at least so large.
_LEAST = {
    ("num_samples",): 2,
    ("inversion_steps", "inversion_iterations", "num_values", "block", "batch_size"): 1,
    ("num_edit_steps", "num_probes", "num_pairs", "curve_steps"): 1,
    ("num_train",): 2,
    ("num_labels", "chunk", "trace_probes", "geodesic_iterations", "seed"): 0,
}


def resolved(options: Options, size: int) -> Options:
    """The options with the preset's choices filled in.

    Args:
        options: as given.
        size: numbers in an example, which choose the preset if no name does.

    Raises:
        ValueError: for times outside (0, 1], or counts that do not fit each other.
    """
    name = options.preset or ("digits" if size <= 1024 else "cifar10")
    given = {k: v for k, v in dataclasses.asdict(options).items() if v is not None}
    options = dataclasses.replace(PRESETS[name], **{**given, "preset": name})
    for names, least in _LEAST.items():
        for name in names:
            if not getattr(options, name) >= least:
                raise ValueError(
                    f"`{name}` must be at least {least}, got {getattr(options, name)}."
                )
    for name in ("cut", "edit_scale"):
        if not 0 < getattr(options, name) < float("inf"):
            raise ValueError(f"`{name}` must be positive, got {getattr(options, name)}.")
    for field in ("times", "edit_times", "curve_times"):
        values = getattr(options, field)
        if not values or not all(0 < value <= 1 for value in values):
            raise ValueError(
                f"`{field}` must lie in (0, 1], 0 being data and 1 noise, got {values}. They are "
                "fractions of the process's grid."
            )
    limits = {
        "rank": "num_values",
        "edit_samples": "num_samples",
        "label_samples": "num_samples",
        "structure_samples": "num_samples",
        "num_directions": "rank",
    }
    for small, large in limits.items():
        low, high = getattr(options, small), getattr(options, large)
        least = 2 if small == "edit_samples" else 1  # directions are carried to another
        if not least <= low <= high:
            raise ValueError(
                f"`{small}` must lie between {least} and `{large}`, {high}, got {low}."
            )
    return options

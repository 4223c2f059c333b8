"""Distil a trained run into a student of few steps, and compare it with its teacher.

    python -m train.distill runs/digits --method consistency
    python -m train.distill runs/mnist --method dmd2 --steps 2000 --run-dir runs/mnist-dmd2

    python -m train.distill runs/digits --method guided --scales 1 3
    python -m train.distill runs/digits/distill/guided --method progressive --scales 1 3

writes a run directory of its own, which `train.sample` and `train.evaluate` take, and with which
the same command goes on; `comparison.md` in it has the student at one, two and four evaluations
beside its teacher at as many, and at many; and comparison/ their samples, of the same noise.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxdiff import parallel
from jaxdiff.denoiser import Denoiser
from train.core import measure, runner
from train.core.config import (
    LaunchConfig,
    MeshConfig,
    RunConfig,
    SamplingConfig,
    load_config,
    save_config,
)
from train.core.data import DataInfo, build_sources
from train.core.derived import chosen_of, derived, evaluated
from train.core.sampling import load_model
from train.distilling.pairs import pairs_of
from train.distilling.recipe import METHODS, Config, DistillConfig, Parts, start_of

# What a student learns for, by data: steps, batch size, rate.
PRESETS = {
    "toy": (3000, 256, 3e-4),
    "digits": (1000, 64, 3e-4),
    "mnist": (2000, 128, 3e-4),
    "cifar10": (50_000, 128, 1e-4),
}
EVALUATIONS = (1, 2, 4)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is distilled, and how; None for what suits the data.

    Attributes:
        base: directory written by train.pretrain.
        run_dir: of the student; None for distill/METHOD in the base's.
        method: which.
        guidance_scale: of the teacher; 1 is the plain conditional model.
        scales: least and most scale of a student that is told it; none for a student of one.
        grid_steps: of the teacher's grid, for methods that have one.
        generator_every: steps of the fake score for one of the generator.
        pairs: of noise and samples that the teacher makes, for methods that learn from them.
        steps: updates.
        batch_size: examples of an update.
        learning_rate: peak of Adam's.
        grad_clip: largest norm of the gradient.
        ema_decay: of the averaged weights.
        full_steps: of the teacher's sampler with many steps.
        num_samples: measured.
        sample_every: steps between pictures.
        checkpoint_every: steps between checkpoints.
        data_path: where the data are, if they have moved.
        seed: of everything; None for the base's.
        mesh: the devices.
        launch: the processes.
    """

    base: Annotated[str, tyro.conf.Positional]
    run_dir: str | None = None
    method: Literal[*METHODS] = "consistency"  # type: ignore[valid-type]
    guidance_scale: float = 1.0
    scales: tuple[float, ...] = ()
    grid_steps: int = 18
    generator_every: int = 2
    pairs: int = 10_000
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    grad_clip: float = 1.0
    ema_decay: float = 0.99
    full_steps: int = 100
    num_samples: int = 2000
    sample_every: int = 0
    checkpoint_every: int = 250
    data_path: str | None = None
    seed: int | None = None
    mesh: MeshConfig = MeshConfig()
    launch: LaunchConfig = LaunchConfig()


def configured(options: Options) -> Config:
    """The configuration of the student's run."""
    known = derived(options, PRESETS, folder=f"distill/{options.method}", warmup=100)
    config = Config(distill=chosen_of(DistillConfig, options), **known)
    config.check()
    # How it is sampled at the end, and by train.sample: one evaluation.
    base = load_model(load_config(config.base, RunConfig)).model
    evaluation = evaluated(config.base, sampling_of(config, 1, base), options.num_samples)
    return dataclasses.replace(config, evaluation=evaluation)


def sampling_of(config: Config, steps: int, base: Denoiser) -> SamplingConfig:
    """The student of a base at so many evaluations."""
    method = config.method
    scale = config.scales[0] if config.scales else 1.0
    if method.kind == "denoiser":
        return SamplingConfig(scale, "ddim", steps, batch_size=500)
    begin = start_of(base) if method.starts else None
    return SamplingConfig(scale, "flow_map", steps, start=begin, eta=method.gamma, batch_size=500)


def distil(config: Config):
    """Train, or go on: the student, its teacher, and the data."""
    runner.check(config)
    source, held_out = build_sources(config.data)
    method = config.method
    base = load_model(load_config(config.base, RunConfig)).model
    parts = Parts(config, base, DataInfo.of(source))
    players, teacher = method.build(parts), method.teacher(parts)
    seen = source
    if method.pairs:
        # They are of these settings: others are refused from here on.
        if parallel.is_first():
            save_config(config)
        seen = pairs_of(
            teacher, source, Path(config.run_dir) / "pairs.npz", config.distill.pairs, config.seed
        )
    state = runner.train(
        config,
        players,
        seen,
        held_out,
        sampled=method.sampled,
        constants={} if "teacher" in players else {"teacher": teacher},
    )
    student = state.players[method.sampled].averaged()
    return student, base, source, held_out, runner.build_mesh(config)


def rows_of(config: Config, student, base, full_steps: int) -> list[measure.Row]:
    """The student at few evaluations, its teacher's samplers at as many, and at many."""
    scale = config.scales[0] if config.scales else config.distill.guidance_scale
    size = config.evaluation.batch_size

    def of(solver, steps):
        return SamplingConfig(scale, solver, steps, batch_size=size)

    rows = [
        measure.Row(f"{config.distill.method}, {n}", student, sampling_of(config, n, base))
        for n in config.method.evaluations
    ]
    for n in EVALUATIONS:
        for solver in ("ddim", *(("dpmpp_2m", "unipc") if n > 1 else ())):
            rows.append(measure.Row(f"{solver}, {n}", base, of(solver, n)))
    return [*rows, measure.Row(f"ddim, {full_steps}", base, of("ddim", full_steps))]


def main(options: Options) -> dict[str, dict[str, float]]:
    """Distil, measure, and print the table."""
    config = configured(options)
    runner.launch(config)
    student, base, source, held_out, mesh = distil(config)
    rows = rows_of(config, student, base, options.full_steps)
    return measure.report(
        rows, config, source, held_out, mesh, count=options.num_samples, before="ddim, 1"
    )


def cli(args: list[str] | None = None) -> int:
    """The command line; the exit status."""
    options = tyro.cli(Options, args=args)
    return runner.run(lambda: main(options))


if __name__ == "__main__":
    sys.exit(cli())

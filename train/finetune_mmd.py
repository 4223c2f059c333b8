"""Tune the few-step sampler of a trained run by MMD, and compare it with others of as many steps.

    python -m train.finetune_mmd runs/digits
    python -m train.finetune_mmd runs/mnist --sampling-steps 5 --rank 8 --run-dir runs/mnist-lora

writes a run directory of its own, which `train.sample` and `train.evaluate` take, and with which
the same command goes on; `comparison.md` in it has the figures, of features that the loss did not
see. With --rank an adapter is learned, adapter.npz, for `train.sample RUN --adapter`.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxdiff import finetuning, parallel
from train.core import measure, runner
from train.core.classifiers import load_classifier
from train.core.config import (
    LaunchConfig,
    MeshConfig,
    RunConfig,
    SamplingConfig,
    SolverName,
    load_config,
)
from train.core.data import DataInfo, build_sources
from train.core.derived import chosen_of, data_of
from train.core.evaluation import classifiable, features_by
from train.finetuning import recipe
from train.finetuning.recipe import Config, MMDConfig


@dataclasses.dataclass(frozen=True)
class Options:
    """What is tuned, and how.

    Attributes:
        base: directory written by train.pretrain.
        run_dir: of the tuned run; None for mmd in the base's.
        solver: what is tuned, and sampled with afterwards.
        sampling_steps: its steps.
        guidance_scale: at which it is tuned; 1 is the plain conditional model.
        features: of a classifier of its own, or the pixels; "auto" for what the data have.
        kernel: on features.
        statistic: "u" is unbiased, "v" is not.
        reference: training examples that samples are compared with, chosen once; 0 compares with
            those of each batch.
        by_class: match within each class.
        last_k: differentiate through the last steps alone.
        micro_batch: samples drawn at a time.
        rank: of an adapter; 0 tunes all weights.
        steps: updates.
        batch_size: samples, and real examples, of an update.
        learning_rate: peak of Adam's.
        grad_clip: largest norm of the gradient.
        ema_decay: of the averaged weights.
        full_steps: of the sampler with many steps that it is compared with.
        num_samples: measured.
        sample_every: steps between pictures and the MMD of held-out features on held-out data.
        checkpoint_every: steps between checkpoints.
        data_path: where the data are, if they have moved.
        seed: of everything.
        mesh: the devices.
        launch: the processes.
    """

    base: Annotated[str, tyro.conf.Positional]
    run_dir: str | None = None
    solver: SolverName = "ddim"
    sampling_steps: int = 5
    guidance_scale: float = 1.0
    features: Literal["auto", "classifier", "pixels"] = "auto"
    kernel: Literal["poly1", "poly2", "poly3", "rbf", "energy"] = "energy"
    statistic: Literal["u", "v"] = "u"
    reference: int = 4096
    by_class: bool = False
    last_k: int | None = None
    micro_batch: int | None = None
    rank: int = 0
    steps: int = 300
    batch_size: int = 128
    learning_rate: float = 1e-4
    grad_clip: float = 1.0
    ema_decay: float = 0.98
    full_steps: int = 1000
    num_samples: int = 2000
    sample_every: int = 50
    checkpoint_every: int = 100
    data_path: str | None = None
    seed: int = 0
    mesh: MeshConfig = MeshConfig()
    launch: LaunchConfig = LaunchConfig()


def configured(options: Options) -> Config:
    """The configuration of the tuned run."""
    data = data_of(load_config(options.base, RunConfig), options.data_path)
    mmd = chosen_of(MMDConfig, options)
    run_dir = options.run_dir or str(Path(options.base) / "mmd")
    shared = ("steps", "batch_size", "learning_rate", "grad_clip", "ema_decay", "seed")
    shared += ("sample_every", "checkpoint_every", "mesh", "launch")
    return recipe.configure(
        options.base,
        run_dir=run_dir,
        mmd=mmd,
        data=data,
        warmup_steps=min(20, options.steps - 1),
        evaluation={"num_samples": options.num_samples},
        log_every=10,
        **{name: getattr(options, name) for name in shared},
    )


def tune(config: Config):
    """Train, or go on: the tuned model, its base, and the data."""
    runner.check(config)
    source, held_out = build_sources(config.data)
    mesh = runner.build_mesh(config)
    base = recipe.load_base(config)
    features = recipe.build_features(config, source, mesh)
    loss = recipe.build_loss(config, base, source, features, config.mmd.reference)
    watched = loss
    if classifiable(DataInfo.of(source)):
        # The kernel that is trained on can be met without better images: watch another's.
        other = features_by(load_classifier(config, source, mesh))
        watched = recipe.build_loss(config, base, source, other, 0)
    state = runner.train(
        config,
        {"model": recipe.build_player(config, base, loss)},
        source,
        held_out,
        sampled="model",
        held_out_loss=watched,
        describe=not config.mmd.rank,
    )
    model = state.players["model"].averaged()
    if config.mmd.rank and parallel.is_first():
        (adapter,) = model.network.adapters
        finetuning.save_adapter(Path(config.run_dir) / "adapter.npz", parallel.fetch(adapter))
    return model, base, source, held_out, mesh


def rows_of(config: Config, model, base, full_steps: int) -> list[measure.Row]:
    """The tuned sampler, its base's with as many steps, and the base's with many."""
    mmd = config.mmd

    def of(solver, steps):
        return SamplingConfig(
            solver=solver, sampling_steps=steps, guidance_scale=mmd.guidance_scale,
            batch_size=config.evaluation.batch_size,
        )  # fmt: skip

    steps = mmd.sampling_steps
    names = dict.fromkeys([mmd.solver, "ddim", *(("dpmpp_2m", "unipc") if steps > 1 else ())])
    rows = [measure.Row(f"tuned {mmd.solver}, {steps}", model, of(mmd.solver, steps))]
    rows += [measure.Row(f"{name}, {steps}", base, of(name, steps)) for name in names]
    return [*rows, measure.Row(f"ddim, {full_steps}", base, of("ddim", full_steps))]


def main(options: Options) -> dict[str, dict[str, float]]:
    """Tune, measure, and print the table."""
    config = configured(options)
    runner.launch(config)
    model, base, source, held_out, mesh = tune(config)
    rows = rows_of(config, model, base, options.full_steps)
    return measure.report(
        rows, config, source, held_out, mesh, count=options.num_samples, before=rows[1].name
    )


def cli(args: list[str] | None = None) -> int:
    """The command line; the exit status."""
    options = tyro.cli(Options, args=args)
    return runner.run(lambda: main(options))


if __name__ == "__main__":
    sys.exit(cli())

"""Make a trained run forget classes, and measure what is left of them.

    python -m train.unlearn runs/digits --method salun --forget 3
    python -m train.unlearn runs/digits --method score-forgetting --forget 3 --override 8

writes a run directory of its own, which `train.sample` and `train.evaluate` take, and with which
the same command goes on; forgotten.json and .md in it have the figures of the model before and
after: how many samples of a forgotten class are of it, under guidance and unasked; accuracy and
Frechet distance of what is kept; and the attacks that bring it back.
`python -m train.benchmark_unlearning` compares all methods.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from jaxdiff import parallel
from jaxdiff.denoiser import Denoiser
from jaxdiff.flow_map import FlowMap
from jaxdiff.training import (
    CheckpointStore,
    Player,
    init_train_state,
    load_run,
    save_model,
    write_json,
)
from train.core import figures, runner
from train.core.building import build_optimizer
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
from train.distilling.recipe import start_of
from train.unlearning.data import check_forget, joined, split
from train.unlearning.measure import Judge, steps_to_half
from train.unlearning.recipe import METHODS, Config, Parts, UnlearnConfig

# What a model forgets with, by data: steps, batch size, rate.
PRESETS = {
    "toy": (1000, 256, 2e-4),
    "digits": (200, 64, 2e-4),
    "mnist": (400, 128, 2e-4),
    "cifar10": (2000, 128, 1e-5),
}
TITLES = {
    "forgotten": ("still of the class", "{:.1%}"),
    "posterior": ("posterior", "{:.3f}"),
    "forgotten at 3": ("at scale 3", "{:.1%}"),
    "forgotten at 7.5": ("at 7.5", "{:.1%}"),
    "forgotten at -1": ("at -1", "{:.1%}"),
    "unasked": ("unasked", "{:.1%}"),
    "accuracy": ("kept accuracy", "{:.1%}"),
    "neighbour": ("neighbour", "{:.1%}"),
    "frechet": ("kept Frechet", "{:.3f}"),
    "relearned in": ("relearned in", "{:.1f}"),
    "inverted": ("inversion", "{:.1%}"),
    "shown at 1": ("shown at noise 1", "{:.1%}"),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is forgotten, and how; None for what suits the data, or the method.

    Attributes:
        base: directory written by train.pretrain.
        run_dir: of what comes of it; None for unlearn/METHOD in the base's.
        method: which.
        forget: the classes.
        override: the class that is said instead, for methods that have one.
        scale: of negative guidance.
        weight: of one term beside the other.
        parameters: parts of the paths of weights that learn; none for all.
        trajectory_steps: of the sampler that states are taken from.
        generator: directory of a distilled run that score forgetting begins with.
        generator_every: steps of the fake score for one of the generator.
        steps: updates.
        batch_size: examples of an update, kept ones and as many forgotten ones.
        learning_rate: peak of Adam's.
        grad_clip: largest norm of the gradient.
        ema_decay: of the averaged weights.
        num_samples: measured, of what is kept and of what is forgotten.
        sampling_steps: of DDIM, for what is measured.
        attack_updates: on a few forgotten examples, by which attacks bring it back; 0 for none.
        sample_every: steps between pictures.
        checkpoint_every: steps between checkpoints.
        data_path: where the data are, if they have moved.
        seed: of everything; None for the base's.
        mesh: the devices.
        launch: the processes.
    """

    base: Annotated[str, tyro.conf.Positional]
    run_dir: str | None = None
    method: Literal[*METHODS] = "salun"  # type: ignore[valid-type]
    forget: tuple[int, ...] = (0,)
    override: int | None = None
    scale: float | None = None
    weight: float | None = None
    parameters: tuple[str, ...] = ()
    trajectory_steps: int = 10
    generator: str = ""
    generator_every: int = 2
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    grad_clip: float = 1.0
    ema_decay: float = 0.95
    num_samples: int = 1000
    sampling_steps: int = 10
    attack_updates: int = 100
    sample_every: int = 0
    checkpoint_every: int = 250
    data_path: str | None = None
    seed: int | None = None
    mesh: MeshConfig = MeshConfig()
    launch: LaunchConfig = LaunchConfig()


def configured(options: Options) -> Config:
    """The configuration of the run."""
    folder = options.method.replace(", ", "-").replace(" ", "-")
    known = derived(options, PRESETS, folder=f"unlearn/{folder}", warmup=20)
    config = Config(unlearn=chosen_of(UnlearnConfig, options), **known)
    config.check()
    base = load_model(load_config(config.base, RunConfig)).model
    sampling = sampling_of(config, base, options.sampling_steps)
    evaluation = evaluated(config.base, sampling, options.num_samples)
    return dataclasses.replace(config, evaluation=evaluation)


def sampling_of(config: Config, base: Denoiser, steps: int) -> SamplingConfig:
    """How what comes of it is sampled: a generator at once, a denoiser by DDIM."""
    if config.method.kind == "generator":
        return SamplingConfig(1.0, "flow_map", 1, start=start_of(base), eta=1.0, batch_size=500)
    return SamplingConfig(1.0, "ddim", steps, batch_size=500)


def unlearn(config: Config) -> tuple[Denoiser | FlowMap, Denoiser, Judge, float]:
    """Forget, or go on: what comes of it, the model before, what judges both, and the seconds."""
    runner.check(config)
    chosen, method = config.unlearn, config.method
    source, held_out = build_sources(config.data)
    check_forget(source, chosen.forget)
    kept, forget = split(source, chosen.forget)  # type: ignore[arg-type]
    info, there = DataInfo.of(source), load_config(config.base, RunConfig)
    base = load_model(there).model
    generator = load_run(chosen.generator).model if chosen.generator else None
    parts = Parts(config, base, info, kept, forget, generator)
    mesh = runner.build_mesh(config)
    judge = Judge(config, source, held_out, chosen.forget, mesh, config.evaluation.num_samples)
    begun = time.perf_counter()
    if method.kind == "edit":
        model = method.build(parts)
        players = {"model": Player(model, parts.denoising, build_optimizer(config))}
        if parallel.is_first():
            Path(config.run_dir).mkdir(parents=True, exist_ok=True)
            save_config(config)
            save_model(config.run_dir, players, **dataclasses.asdict(info))
        store = CheckpointStore(Path(config.run_dir) / "checkpoints")
        if not store.steps():  # made again, it is the same
            state = init_train_state(players, jax.random.key(config.seed))
            store.save(state.unpack(), step=1)
        return model, base, judge, time.perf_counter() - begun
    state = runner.train(
        config,
        method.build(parts),
        joined(kept, forget),
        held_out,
        sampled=method.sampled,
        constants={"teacher": base, **method.constants(parts)},
    )
    seconds = time.perf_counter() - begun
    return state.players[method.sampled].averaged(), base, judge, seconds


def judged(
    judge: Judge, model: Denoiser | FlowMap, sampling: SamplingConfig, updates: int
) -> dict[str, Any]:
    """Every figure of a model, attacks of so many updates included where it can be attacked."""
    found = judge(model, sampling)
    if updates and isinstance(model, Denoiser):
        curve = judge.relearned(model, sampling, updates)  # type: ignore[arg-type]
        found["relearned"] = {str(n): share for n, share in curve.items()}
        found["relearned in"] = steps_to_half(curve)
        found["inverted"] = judge.inverted(model, sampling, 2 * updates)  # type: ignore[arg-type]
        shown = judge.reintroduced(model)
        found |= {f"shown at {level:g}": share for level, share in shown.items()}
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown, a row for each model."""
    names = [name for name in TITLES if any(name in row for row in found.values())]
    lines = ["| | " + " | ".join(TITLES[name][0] for name in names) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for label, row in found.items():
        cells = [TITLES[name][1].format(row[name]) if name in row else "-" for name in names]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(options: Options) -> dict[str, dict[str, Any]]:
    """Forget, measure, and print the table."""
    config = configured(options)
    runner.launch(config)
    model, base, judge, seconds = unlearn(config)
    plain = SamplingConfig(1.0, "ddim", options.sampling_steps, batch_size=500)
    found = {
        "before": judged(judge, base, plain, options.attack_updates),
        config.unlearn.method: {
            **judged(
                judge, model, sampling_of(config, base, options.sampling_steps),
                options.attack_updates,
            ),
            "seconds": seconds,
        },
    }  # fmt: skip
    if parallel.is_first():
        path = Path(config.run_dir) / "forgotten.json"
        write_json(path, found)
        figures.write_text(path.with_suffix(".md"), table(found) + "\n")
        print(f"\n{table(found)}")
    return found


def cli(args: list[str] | None = None) -> int:
    """The command line; the exit status."""
    options = tyro.cli(Options, args=args)
    return runner.run(lambda: main(options))


if __name__ == "__main__":
    sys.exit(cli())

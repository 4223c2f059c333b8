"""Guide a trained run by many methods at many scales, and measure them beside each other.

    python -m train.guide runs/digits
    python -m train.guide runs/digits --methods cfg apg classifier --scales 1 2 4 --seeds 0 1

All methods and scales start from the same noise. RUN/guide has the table, curves of fidelity
against variety, and one noise under growing scale for each method. What the table's file has
already is not done again: stop it at any time, and start it again, with more methods, scales or
seeds.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from train.classifier import prepared
from train.core import figures, lines, runner
from train.core.comparison import held_out_metrics
from train.core.config import RunConfig
from train.core.data import DataInfo, Source, build_sources
from train.core.evaluation import floors, references
from train.core.sampling import load_model
from train.guiding import draw
from train.guiding.measure import Program, Swept, blocks, figures_at
from train.guiding.recipe import (
    METHODS,
    Parts,
    abilities,
    build_parts,
    lacking,
    weaker_step,
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is swept.

    Attributes:
        run_dir: directory written by train.pretrain.
        methods: by name; none for all that the run can be guided by.
        scales: of all methods, 1 being the model without guidance.
        seeds: of the noise.
        num_samples: measured, of each method, scale and seed.
        sampling_steps: of DDIM.
        batch_size: samples of each scale at a time.
        weaker: which earlier checkpoint is the weaker model, as a share of the run's steps.
        equal_cost: measure plain guidance with as many evaluations as each method, too.
        classifier_steps: of the training of classifiers, those that guide and the one that
            measures; None for the run's own.
        data_path: where the data are, if they have moved.
        name: of the folder in the run's directory.
    """

    run_dir: Annotated[str, tyro.conf.Positional]
    methods: tuple[str, ...] = ()
    scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
    seeds: tuple[int, ...] = (0,)
    num_samples: int = 1000
    sampling_steps: int = 10
    batch_size: int = 100
    weaker: float = 0.5
    equal_cost: bool = True
    classifier_steps: int | None = None
    data_path: str | None = None
    name: str = "guide"

    def check(self) -> None:
        """Refuse numbers that make no sweep, before any work.

        Raises:
            ValueError: naming the first field.
        """
        for field, least in (("num_samples", 16), ("sampling_steps", 2), ("batch_size", 1)):
            if getattr(self, field) < least:
                raise ValueError(f"`{field}` must be at least {least}, got {getattr(self, field)}.")
        if not 0 < self.weaker < 1:
            raise ValueError(f"`weaker` must lie in (0, 1), got {self.weaker}.")
        for field in ("scales", "seeds"):
            values = getattr(self, field)
            if not values or len(set(values)) < len(values) or not np.isfinite(values).all():
                raise ValueError(
                    f"`{field}` must be different numbers, one at least, got {values}."
                )
        if min(self.scales) < 0 or min(self.seeds) < 0:
            raise ValueError(
                f"`scales` and `seeds` must not be negative, got {self.scales} and {self.seeds}."
            )


class Sweep:
    """What all methods share, and the file of what was found.

    Args:
        options: of the command.
        config: of the run.
        source: the data it was trained on.
        held_out: the data it is measured against.
        parts: what it has to guide with.
    """

    def __init__(
        self, options: Options, config: RunConfig, source: Source, held_out: Source, parts: Parts
    ):
        self.options, self.config, self.parts = options, config, parts
        self.info, self.folder = DataInfo.of(source), Path(config.run_dir) / options.name
        self.out = self.folder / "table.jsonl"
        names = ("frechet", "kid", "recall", "density", "coverage", "vendi")
        self.chosen = held_out_metrics(config, source, None, names)
        self.reference = held_out[references(len(held_out))]
        some = np.random.default_rng(0).permutation(len(source))[: options.num_samples]
        self.real = source[np.sort(some)]
        self.classes = blocks(self.info.classes, options.num_samples)
        self.settings = settings_of(options, config)
        self.plain: Program | None = None

    def rows(self) -> list[dict[str, Any]]:
        """What was found so far."""
        return lines.read(self.out)

    def run(self, name: str, steps: int, scales: tuple[float, ...]) -> None:
        """Measure what is missing of a method, and draw it: figures first, then the picture.

        Args:
            name: of the method.
            steps: of the solver.
            scales: of it.
        """
        method = METHODS[name]
        done = {draw.key_of(row) for row in self.rows()}
        seeds = [
            seed for seed in self.options.seeds
            if any((name, steps, scale, seed) not in done for scale in scales)
        ]  # fmt: skip
        picture = self.folder / "strips" / f"{name}.png"
        wanted = steps == self.options.sampling_steps and method.scaled
        first = self.options.seeds[0]
        unseen = wanted and (first in seeds or not picture.exists())
        if not seeds and not unseen:
            return
        program = self.program(name, steps, scales)
        for seed in sorted({*seeds, *([first] if unseen else [])}):
            swept = self.draw(program, seed)
            ratio = swept.seconds / self.unguided()
            found = [
                {
                    "method": name, "steps": steps, "scale": scale, "seed": seed,
                    "settings": self.settings, "time": ratio,
                    **figures_at(swept, i, method, self.classes, self.chosen, self.reference),
                }
                for i, scale in enumerate(scales)
                if (name, steps, scale, seed) not in done
            ]  # fmt: skip
            lines.add(self.out, *found)
            if unseen and seed == first:
                picture.parent.mkdir(exist_ok=True)
                draw.strip(swept.x, self.classes, scales, self.info, picture)
        runner.say(f"{name}, {steps} steps, {1e3 * swept.seconds:.1f} ms a sample.")

    def program(self, name: str, steps: int, scales: tuple[float, ...]) -> Program:
        """A method, compiled."""
        size = min(self.options.batch_size, self.options.num_samples)
        return Program(METHODS[name], self.parts, self.info, scales, steps, size)

    def draw(self, program: Program, seed: int) -> Swept:
        """Its samples from one noise, which is that of no evaluation of the run."""
        key = jax.random.fold_in(jax.random.key(self.config.seed + 2), seed)
        return program(key, self.options.num_samples, self.classes)

    def unguided(self) -> float:
        """Seconds of a sample without guidance, now: others may use the machine, too."""
        if self.plain is None:
            self.plain = self.program("unguided", self.options.sampling_steps, (1.0,))
        return self.draw(self.plain, self.options.seeds[0]).seconds

    def write(self, lacks: dict[str, str]) -> str:
        """The table and the curves of the whole file."""
        steps, rows = self.options.sampling_steps, self.rows()
        known = floors(self.chosen, self.reference, self.real)
        text = draw.table(rows, known, steps, lacks)
        figures.write_text(self.folder / "table.md", text + "\n")
        draw.curves(rows, steps, self.folder / "curves.png")
        return text


def settings_of(options: Options, config: RunConfig) -> dict[str, Any]:
    """What lines of one file have in common."""
    return {
        "run": Path(config.run_dir).name,
        "step": load_model(config).step,
        "num_samples": options.num_samples,
        "sampling_steps": options.sampling_steps,
        "weaker": weaker_step(config, options.weaker),
        "classifier_steps": config.evaluation.classifier_steps,
    }


def main(options: Options) -> list[dict[str, Any]]:
    """Sweep what is missing, and write the table."""
    options.check()
    config = prepared(options.run_dir, options.classifier_steps, options.data_path)
    source, held_out = build_sources(config.data)
    info = DataInfo.of(source)
    if info.cond:
        raise ValueError(
            f"`run_dir` must be a run on data of classes or of none, got conditions {info.cond}."
        )
    lines.check_settings(
        path := Path(config.run_dir) / options.name / "table.jsonl",
        lines.read(path),
        settings_of(options, config),
        "name",
    )
    has, _ = abilities(config, info, load_model(config).model)
    lacks = {name: need for name, method in METHODS.items() if (need := lacking(method, has))}
    names = options.methods or tuple(name for name in METHODS if name not in lacks)
    sweep = Sweep(
        options, config, source, held_out, build_parts(config, source, names, options.weaker)
    )
    for name in names:
        scales = options.scales if METHODS[name].scaled else (1.0,)
        sweep.run(name, options.sampling_steps, scales)
    if options.equal_cost and "cfg" not in lacks:
        needed = draw.equal_steps(sweep.rows(), options.sampling_steps).values()
        for steps in sorted(set(needed)):
            sweep.run("cfg", steps, options.scales)
    text = sweep.write({} if options.methods else lacks)
    runner.say(f"\n{text}\n\nThe table, curves and pictures are in {sweep.folder}.")
    return sweep.rows()


def cli(args: list[str] | None = None) -> int:
    """The command line; the exit status."""
    options = tyro.cli(Options, args=args)
    return runner.run(lambda: main(options))


if __name__ == "__main__":
    sys.exit(cli())

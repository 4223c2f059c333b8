"""Ablations of MMD fine-tuning: one factor at a time around a default, over several trained runs.

    python -m train.finetuning.study runs/digits-0 runs/digits-1
    python -m train.finetuning.study --out train/results/mmd/digits.jsonl --table

Each run is a seed: of the base, of the tuning and of the samples. What the file has already is not
done again, and a line is there whole or not at all: stop it at any time, and start it again.
"""

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from train.core import figures, lines, measure, runner
from train.core.comparison import TITLES, difference, held_out_metrics, mean_of
from train.core.config import MeshConfig, RunConfig, SamplingConfig, load_config
from train.core.data import build_sources
from train.finetune_mmd import Options, configured, tune
from train.finetuning import recipe

STEPS = (2, 5, 10, 15, 20)
SOLVERS = ("ddim", "dpmpp_2m", "unipc")
# One factor at a time; "default" is five steps of DDIM, energy distance, unbiased, all weights.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    **{f"{n} steps": {"sampling_steps": n} for n in STEPS if n != 5},
    "kernel of degree 1": {"kernel": "poly1"},
    "kernel of degree 2": {"kernel": "poly2"},
    "kernel of degree 3": {"kernel": "poly3"},
    "RBF kernel": {"kernel": "rbf"},
    "V-statistic": {"statistic": "v"},
    "examples of the batch": {"reference": 0},
    "within classes": {"by_class": True, "reference": 0},
    "batch of 32": {"batch_size": 32},
    "batch of 256": {"batch_size": 256, "micro_batch": 64},
    "last step": {"last_k": 1},
    "last 3 steps": {"last_k": 3},
    "DPM-Solver++": {"solver": "dpmpp_2m"},
    "UniPC": {"solver": "unipc"},
    "pixels": {"features": "pixels"},
    "adapter of rank 4": {"rank": 4, "learning_rate": 1e-3},
    "adapter of rank 16": {"rank": 16, "learning_rate": 1e-3},
}
FIGURES = ("frechet", "kid", "accuracy", "density", "coverage")


@dataclasses.dataclass(frozen=True)
class Study:
    """What is done, and where it is written.

    Attributes:
        bases: directories of trained runs, of different seeds.
        out: JSON lines.
        variants: names of those to tune; none for all.
        steps: updates of a tuning.
        batch_size: samples of an update.
        num_samples: measured.
        full_steps: of the sampler with many steps.
        data_path: where the data are, if they have moved.
        mesh: the devices.
        table: write the table and the figure beside the file, and do nothing else.
    """

    bases: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    out: Path = Path("train/results/mmd/digits.jsonl")
    variants: tuple[str, ...] = ()
    steps: int = 200
    batch_size: int = 128
    num_samples: int = 2000
    full_steps: int = 1000
    data_path: str | None = None
    mesh: MeshConfig = MeshConfig()
    table: bool = False


def labels(study: Study, base: str, name: str, seed: int) -> dict[str, Any]:
    """What a line is of."""
    return {"base": Path(base).name, "name": name, "seed": seed, "settings": settings_of(study)}


def settings_of(study: Study) -> dict[str, int]:
    """What lines of one file have in common."""
    return {name: getattr(study, name) for name in ("steps", "batch_size", "num_samples")}


def check(study: Study, rows: list[dict[str, Any]]) -> None:
    """Refuse what would be mixed up.

    Raises:
        ValueError: for bases of one name or seed, or a file of other settings.
    """
    lines.check_bases(study.bases, rows)
    lines.check_settings(study.out, rows, settings_of(study))


def options_of(study: Study, base: str, variant: str) -> Options:
    """How a variant is tuned."""
    common = {
        "steps": study.steps, "batch_size": study.batch_size, "num_samples": study.num_samples,
        "sample_every": 0, "checkpoint_every": study.steps, "data_path": study.data_path,
        "seed": load_config(base, RunConfig).seed, "mesh": study.mesh,
    }  # fmt: skip
    # Of other settings the tuning is another one.
    name = f"{variant} {study.steps} {study.batch_size}"
    folder = "".join(c if c.isalnum() else "-" for c in name)
    run_dir = str(Path(base) / "study" / folder)
    return Options(base, run_dir=run_dir, **{**common, **VARIANTS[variant]})


def baselines(study: Study, base: str, done: set[tuple[str, str]]) -> None:
    """The base's own samplers, untuned."""
    wanted = {f"{solver}, {n}": (solver, n) for solver in SOLVERS for n in STEPS}
    wanted[f"ddim, {study.full_steps}"] = ("ddim", study.full_steps)
    missing = {name: w for name, w in wanted.items() if (Path(base).name, name) not in done}
    if not missing:
        return
    config = configured(options_of(study, base, "default"))
    source, held_out = build_sources(config.data)
    mesh, model = runner.build_mesh(config), recipe.load_base(config)
    chosen = held_out_metrics(config, source, mesh)
    for name, (solver, n) in missing.items():
        sampling = SamplingConfig(1.0, solver, n, batch_size=config.evaluation.batch_size)
        found = measure.compare(
            [measure.Row(name, model, sampling)], config, source, held_out, mesh,
            count=study.num_samples, chosen=chosen,
        )  # fmt: skip
        lines.add(study.out, {**labels(study, base, name, config.seed), **found[name]})


def variant(study: Study, base: str, name: str) -> None:
    """Tune one, and measure it."""
    config = configured(options_of(study, base, name))
    model, _, source, held_out, mesh = tune(config)
    sampling = recipe.sampling_of(config.mmd)
    sampling = dataclasses.replace(sampling, batch_size=config.evaluation.batch_size)
    chosen = held_out_metrics(config, source, mesh)
    found = measure.compare(
        [measure.Row(name, model, sampling)], config, source, held_out, mesh,
        count=study.num_samples, chosen=chosen,
    )  # fmt: skip
    logged = figures.read_metrics(Path(config.run_dir))
    speed = [line["steps_per_second"] for line in logged if "steps_per_second" in line]
    rate = float(np.median(speed)) if speed else None
    updates = {"updates": config.steps, "updates_per_second": rate}
    lines.add(
        study.out,
        {**labels(study, base, name, config.seed), **found[name], **updates},
    )
    shutil.rmtree(Path(config.run_dir) / "checkpoints")


def summary(rows: list[dict[str, Any]], full: str) -> str:
    """The table: means over seeds and their standard errors; of one seed, errors by resampling.

    What is tuned has also how much nearer to the data it is than the best of the untuned samplers
    of as many evaluations, and how much of the gap from its own untuned sampler to the full one is
    closed.
    """
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["name"], {})[row["seed"]] = row
    header = ["", "evaluations", *(TITLES[f][0] for f in FIGURES)]
    header += ["below the best untuned", "gap closed", "seeds"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name, seeds in by_name.items():
        cells = [name, str(next(iter(seeds.values()))["nfe"])]
        for figure in FIGURES:
            form = TITLES[figure][1]
            there = [seeds[s] for s in sorted(seeds) if figure in seeds[s]]
            errors = [row.get(f"{figure}_standard_error") for row in there]
            cells.append(mean_of([row[figure] for row in there], form, errors))
        tuned = [row for row in seeds.values() if name in VARIANTS]
        gains = [gain for row in tuned for gain in _gain(row, by_name)]
        shares = [_share(row, by_name, full) for row in tuned]
        known = [share for share in shares if share is not None]
        cells.append(mean_of([g[0] for g in gains], "{:.3f}", [g[1] for g in gains]))
        cells += [mean_of(known, "{:.0%}"), str(len(seeds))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _gain(row: dict[str, Any], by_name: dict[str, Any]) -> list[tuple[float, float]]:
    """How much nearer to the data than the best untuned sampler of as many steps, and its error."""
    steps = VARIANTS[row["name"]].get("sampling_steps", 5)
    others = [by_name.get(f"{solver}, {steps}", {}).get(row["seed"]) for solver in SOLVERS]
    known = [other for other in others if other is not None]
    best = min(known, key=lambda other: other["frechet"], default=None)
    return [] if best is None else [difference(best, row)]


def _share(row: dict[str, Any], by_name: dict[str, Any], full: str) -> float | None:
    """Of the same seed: from DDIM of as many steps, untuned, to DDIM of many.

    None where that is no longer than its error.
    """
    steps = VARIANTS[row["name"]].get("sampling_steps", 5)
    start = by_name.get(f"ddim, {steps}", {}).get(row["seed"])
    end = by_name.get(full, {}).get(row["seed"])
    if start is None or end is None:
        return None
    gap, error = measure.difference(start, end)
    return None if gap < error else measure.gap_closed(row, start, end)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Frechet distance by evaluations: untuned samplers, and what was tuned."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    means: dict[str, tuple[float, float]] = {}
    for name in {row["name"]: None for row in rows}:
        found = [(row["nfe"], row["frechet"]) for row in rows if row["name"] == name]
        means[name] = (found[0][0], float(np.mean([f for _, f in found])))
    for solver in SOLVERS:
        line = [means[f"{solver}, {n}"] for n in STEPS if f"{solver}, {n}" in means]
        axes.plot(*zip(*line, strict=True), "o-", label=solver, markersize=3)
    names = {2: "2 steps", 5: "default", 10: "10 steps", 15: "15 steps", 20: "20 steps"}
    line = [means[names[n]] for n in STEPS if names[n] in means]
    if line:
        axes.plot(*zip(*line, strict=True), "s-", label="ddim, tuned", color="black")
    for name, (nfe, value) in means.items():
        if nfe > max(STEPS):
            axes.axhline(value, color="grey", linestyle=":", label=name)
    axes.set(xlabel="network evaluations", ylabel="Frechet distance")
    axes.legend(fontsize=8)
    figures.save_figure(figure, path)


def main(study: Study) -> None:
    """Do what is missing; or write the table."""
    if study.table:
        rows = lines.read(study.out)
        if not rows:
            raise ValueError(f"`out` must be a file of results, got {study.out}, which has none.")
        figures.write_text(
            study.out.with_suffix(".md"), summary(rows, f"ddim, {study.full_steps}") + "\n"
        )
        draw(rows, study.out.with_suffix(".png"))
        return
    names = study.variants or tuple(VARIANTS)
    if unknown := sorted(set(names) - set(VARIANTS)):
        raise ValueError(f"`variants` must be among {list(VARIANTS)}, got {unknown[0]!r}.")
    check(study, lines.read(study.out))
    for base in study.bases:
        runner.launch(configured(options_of(study, base, "default")))
        done = {(row["base"], row["name"]) for row in lines.read(study.out)}
        baselines(study, base, done)
        for name in names:
            if (Path(base).name, name) not in done:
                variant(study, base, name)


def cli(args: list[str] | None = None) -> int:
    """The command line; the exit status."""
    study = tyro.cli(Study, args=args)
    return runner.run(lambda: main(study))


if __name__ == "__main__":
    sys.exit(cli())

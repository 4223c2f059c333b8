"""Every method of distillation on the same teachers: students at one, two and four evaluations.

    python -m train.distilling.study runs/digits-0 runs/digits-1 runs/digits-2
    python -m train.distilling.study --out train/results/distillation/digits.jsonl --table

Each run is a seed: of the teacher, of the student and of the samples, whose noise and reference all
methods share. What the file has already is not done again, and a line is there whole or not at
all: stop it at any time, and start it again.
"""

import dataclasses
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from train.core import figures, lines, measure, runner
from train.core.comparison import difference, held_out_metrics, mean_of
from train.core.config import MeshConfig
from train.core.data import DataInfo, build_sources
from train.distill import EVALUATIONS, Options, configured, distil, rows_of
from train.distilling.recipe import METHODS, Config


@dataclasses.dataclass(frozen=True)
class Study:
    """What is done, and where it is written.

    Attributes:
        bases: directories of trained runs, of different seeds.
        out: JSON lines.
        methods: their names; none for all that suit the data.
        guidance_scale: of the teacher.
        steps: updates of a student; None for what suits the data.
        batch_size: examples of an update.
        num_samples: measured.
        full_steps: of the teacher's sampler with many steps.
        data_path: where the data are, if they have moved.
        mesh: the devices.
        keep: keep the students' run directories, with their checkpoints.
        table: write the table and the figure beside the file, and do nothing else.
    """

    bases: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    out: Path = Path("train/results/distillation/digits.jsonl")
    methods: tuple[str, ...] = ()
    guidance_scale: float = 1.0
    steps: int | None = None
    batch_size: int | None = None
    num_samples: int = 2000
    full_steps: int = 100
    data_path: str | None = None
    mesh: MeshConfig = MeshConfig()
    keep: bool = False
    table: bool = False


SETTINGS = ("guidance_scale", "steps", "batch_size", "num_samples", "full_steps")


def options_of(study: Study, base: str, method: str) -> Options:
    """How a method is run."""
    common = {name: getattr(study, name) for name in (*SETTINGS, "data_path", "mesh")}
    # Of other settings the student is another one.
    parts = (method, *(str(getattr(study, name)) for name in SETTINGS))
    folder = "-".join(parts).replace(".", "_")
    run_dir = str(Path(base) / "distill" / folder)
    return Options(base, run_dir=run_dir, method=method, **common)


def settings_of(study: Study) -> dict[str, Any]:
    """What lines of one file have in common."""
    return {name: getattr(study, name) for name in SETTINGS}


def check(study: Study, rows: list[dict[str, Any]]) -> None:
    """Refuse what would be mixed up.

    Raises:
        ValueError: for unknown methods, bases of one name or seed, or a file of other settings.
    """
    if unknown := sorted(set(study.methods) - set(METHODS)):
        raise ValueError(f"`methods` must be among {list(METHODS)}, got {unknown[0]!r}.")
    lines.check_bases(study.bases, rows)
    lines.check_settings(study.out, rows, settings_of(study))


def cost_of(config: Config, seconds: float) -> dict[str, Any]:
    """What a student took: operations, and minutes on this machine."""
    logged = figures.read_metrics(Path(config.run_dir))
    rates = [
        (line["tflops_per_second"], line["steps_per_second"])
        for line in logged
        if "tflops_per_second" in line
    ]
    tflops = rates[-1][0] / rates[-1][1] * config.steps if rates else None
    return {"updates": config.steps, "teraflops": tflops, "minutes": seconds / 60}


def run(study: Study, base: str, method: str) -> None:
    """Distil one, measure it, and its teacher if that is not there yet."""
    config = configured(options_of(study, base, method))
    runner.launch(config)
    done = {(row["base"], row["name"]) for row in lines.read(study.out)}
    name = Path(base).name
    if (name, f"{method}, {METHODS[method].evaluations[-1]}") in done:
        return
    begun = time.perf_counter()
    student, teacher, source, held_out, mesh = distil(config)
    cost = cost_of(config, time.perf_counter() - begun)
    rows = rows_of(config, student, teacher, study.full_steps)
    rows = [row for row in rows if (name, row.name) not in done]
    found = measure.compare(
        rows, config, source, held_out, mesh, count=study.num_samples,
        # Neighbours among ten thousand references take longer than a student.
        chosen=held_out_metrics(config, source, mesh, ("frechet", "kid")),
        folder=study.out.with_suffix("") / name,
    )  # fmt: skip
    added = []
    for row, numbers in found.items():
        label = {"base": name, "seed": config.seed, "name": row, "settings": settings_of(study)}
        own = {**cost, "method": method} if row.startswith(f"{method}, ") else {}
        added.append({**label, **numbers, **own})
    lines.add(study.out, *added)
    if not study.keep:
        shutil.rmtree(config.run_dir)


def summary(rows: list[dict[str, Any]], full: str) -> str:
    """The table: a line for each method, and for each of its teacher's samplers.

    Frechet distances, means over seeds with their standard errors, or of one seed with that of
    resampling; the share of the way from one step of DDIM to the full sampler that one evaluation
    goes; operations, in those of the cheapest method; minutes.
    """
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["name"], {})[row["seed"]] = row
    methods = list(dict.fromkeys(row["method"] for row in rows if "method" in row))
    header = [
        "",
        *(f"{n} evaluations" for n in EVALUATIONS),
        "share of the way",
        "nearer than start",
    ]
    header += ["operations", "minutes", "seeds"]
    said = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    least = min((r["teraflops"] for r in rows if r.get("teraflops")), default=None)

    def cell(name: str) -> str:
        there = list(by_name.get(name, {}).values())
        errors = [row.get("frechet_standard_error") for row in there]
        return mean_of([row["frechet"] for row in there], "{:.3f}", errors)

    def one(method: str) -> float:
        return float(np.mean([row["frechet"] for row in by_name[f"{method}, 1"].values()]))

    for method in sorted(methods, key=one):
        seeds = by_name[f"{method}, 1"]
        shares, gains = [], []
        for seed, row in seeds.items():
            start, end = (by_name.get(n, {}).get(seed) for n in ("ddim, 1", full))
            if start is None or end is None:
                continue
            share = measure.gap_closed(row, start, end)
            shares += [] if share is None else [share]
            gains.append(difference(start, row))
        cells = [method, *(cell(f"{method}, {n}") for n in EVALUATIONS)]
        cells += [
            mean_of(shares, "{:.0%}"),
            mean_of([g[0] for g in gains], "{:+.3f}", [g[1] for g in gains]),
        ]
        flops = [row["teraflops"] for row in seeds.values() if row.get("teraflops")]
        cells.append("" if not flops or not least else f"{np.mean(flops) / least:.1f}")
        cells += [f"{np.mean([row['minutes'] for row in seeds.values()]):.1f}", str(len(seeds))]
        said.append("| " + " | ".join(cells) + " |")
    for solver in ("ddim", "dpmpp_2m", "unipc"):
        cells = [solver, *(cell(f"{solver}, {n}") for n in EVALUATIONS)]
        said.append("| " + " | ".join([*cells, *[""] * (len(header) - len(cells))]) + " |")
    said.append("| " + " | ".join([full, cell(full), *[""] * (len(header) - 2)]) + " |")
    return "\n".join(said)


def draw(rows: list[dict[str, Any]], full: str, path: Path) -> None:
    """Frechet distance by evaluations, a line for each method."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    names = dict.fromkeys(row["name"].rsplit(", ", 1)[0] for row in rows)
    for i, name in enumerate(names):
        values = []
        for n in EVALUATIONS:
            found = [row["frechet"] for row in rows if row["name"] == f"{name}, {n}"]
            values += [(n, float(np.mean(found)))] if found else []
        style = {"color": "black", "linestyle": "--"} if name in ("ddim", "unipc") else {}
        style = style or {"color": plt.cm.turbo(i / max(len(names) - 1, 1))}
        axes.plot(*zip(*values, strict=True), marker="o", label=name, markersize=3, **style)
    many = [row["frechet"] for row in rows if row["name"] == full]
    if many:
        axes.axhline(float(np.mean(many)), color="grey", linestyle=":", label=full)
    axes.set(xlabel="network evaluations", ylabel="Frechet distance", yscale="log")
    axes.set_xticks(EVALUATIONS, [str(n) for n in EVALUATIONS])
    axes.legend(fontsize=7, ncols=2)
    figures.save_figure(figure, path)


def main(study: Study) -> None:
    """Do what is missing; or write the table."""
    rows = lines.read(study.out)
    full = f"ddim, {study.full_steps}"
    if study.table:
        if not rows:
            raise ValueError(f"`out` must be a file of results, got {study.out}, which has none.")
        figures.write_text(study.out.with_suffix(".md"), summary(rows, full) + "\n")
        draw(rows, full, study.out.with_suffix(".png"))
        return
    check(study, rows)
    for base in study.bases:
        data = DataInfo.of(build_sources(configured(options_of(study, base, "sds")).data)[0])
        suits = [n for n, m in METHODS.items() if data.null_cond is not None or not m.conditions]
        for method in study.methods or suits:
            run(study, base, method)


def cli(args: list[str] | None = None) -> int:
    """The command line; the exit status."""
    study = tyro.cli(Study, args=args)
    return runner.run(lambda: main(study))


if __name__ == "__main__":
    sys.exit(cli())

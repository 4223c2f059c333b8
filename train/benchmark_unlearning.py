"""Every method of unlearning on the same models: what is left, what was lost, and attacks.

    python -m train.pretrain digits --seed 0 --data.exclude-class 3 --run-dir runs/without-0
    python -m train.benchmark_unlearning runs/digits-0 --retrained runs/without-0 --forget 3
    python -m train.benchmark_unlearning --out train/results/unlearning/digits.jsonl --table

Each run is a seed: of the model, of the method and of the samples, whose noise, classifier and
reference all methods share; --retrained has a run of the same seed that never saw the classes. What
the file has already is not done again: stop it at any time, and start it again.
"""

import dataclasses
import itertools
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from train.core import figures, lines, runner
from train.core.comparison import difference, mean_of
from train.core.config import MeshConfig, RunConfig, SamplingConfig, load_config
from train.core.sampling import load_model
from train.unlearn import TITLES, Options, configured, judged, sampling_of, unlearn
from train.unlearning.measure import Judge
from train.unlearning.recipe import METHODS


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What is done, and where it is written.

    Attributes:
        bases: directories of trained runs, of different seeds.
        retrained: directories of runs that never saw the classes, of the same seeds.
        out: JSON lines.
        methods: their names; none for all.
        forget: the classes.
        override: the class that is said instead; None for any that is kept.
        steps: updates; None for what suits the data.
        batch_size: examples of an update.
        num_samples: measured.
        sampling_steps: of DDIM.
        attack_updates: of attacks; 0 for none.
        data_path: where the data are, if they have moved.
        mesh: the devices.
        keep: keep the run directories, with their checkpoints.
        table: write the table and the figure beside the file, and do nothing else.
    """

    bases: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    retrained: tuple[str, ...] = ()
    out: Path = Path("train/results/unlearning/digits.jsonl")
    methods: tuple[str, ...] = ()
    forget: tuple[int, ...] = (3,)
    override: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    num_samples: int = 1000
    sampling_steps: int = 10
    attack_updates: int = 100
    data_path: str | None = None
    mesh: MeshConfig = MeshConfig()
    keep: bool = False
    table: bool = False


SETTINGS = ("override", "steps", "batch_size", "num_samples", "sampling_steps", "attack_updates")
BEFORE, RETRAINED = "before", "retrained"
# By these methods are ranked, seed by seed: what is left, and what is lost.
RANKED = ("forgotten", "frechet", "relearned in")


def options_of(plan: Benchmark, base: str, method: str) -> Options:
    """How a method is run."""
    common = {name: getattr(plan, name) for name in (*SETTINGS, "forget", "data_path", "mesh")}
    parts = (method, *plan.forget, *(getattr(plan, name) for name in SETTINGS))
    folder = "-".join(map(str, parts)).replace(".", "_").replace(", ", "-").replace(" ", "-")
    run_dir = str(Path(base) / "unlearn" / folder)
    if "override" not in METHODS[method].takes:
        common["override"] = None
    return Options(base, run_dir=run_dir, method=method, **common)


def settings_of(plan: Benchmark) -> dict[str, Any]:
    """What lines of one file have in common."""
    return {"forget": list(plan.forget), **{name: getattr(plan, name) for name in SETTINGS}}


def seed_of(run_dir: str) -> int:
    """Of a run."""
    return load_config(run_dir, RunConfig).seed


def check(plan: Benchmark, rows: list[dict[str, Any]]) -> None:
    """Refuse what would be mixed up.

    Raises:
        ValueError: for unknown methods, bases of one name or seed, a retrained run of another seed
            or that saw the classes, or a file of other settings.
    """
    if unknown := sorted(set(plan.methods) - set(METHODS)):
        raise ValueError(f"`methods` must be among {list(METHODS)}, got {unknown[0]!r}.")
    seeds = lines.check_bases(plan.bases, rows)
    if len({seed_of(run_dir) for run_dir in plan.retrained}) < len(plan.retrained):
        raise ValueError(f"`retrained` must be of different seeds, got {plan.retrained}.")
    for run_dir in plan.retrained:
        without = load_config(run_dir, RunConfig).data.exclude_class
        if seed_of(run_dir) not in seeds.values() or set(plan.forget) != set(without):
            raise ValueError(
                f"`retrained` must be runs of the seeds {sorted(seeds.values())} that never saw "
                f"the classes {plan.forget} (--data.exclude-class), got {run_dir} of seed "
                f"{seed_of(run_dir)} without {without}."
            )
    lines.check_settings(plan.out, rows, settings_of(plan))
    for row in rows:
        if row["base"] not in seeds and row["seed"] in seeds.values():
            raise ValueError(
                f"`out` has lines of the seed {row['seed']} of {row['base']!r}, which are one with "
                "others of that seed. Pass another file."
            )


def run(plan: Benchmark, base: str, method: str, retrained: dict[int, str]) -> None:
    """One method, measured; and the model before, and without, if they are not there yet."""
    config = configured(options_of(plan, base, method))
    runner.launch(config)
    done = {(row["base"], row["name"]) for row in lines.read(plan.out)}
    name = Path(base).name
    if (name, method) in done:
        return
    model, before, judge, seconds = unlearn(config)
    plain = SamplingConfig(1.0, "ddim", plan.sampling_steps, batch_size=500)
    label = {"base": name, "seed": config.seed, "settings": settings_of(plan)}
    if config.seed in retrained:
        without = load_model(load_config(retrained[config.seed], RunConfig)).model
        judge.law = judge.unasked(without, plain)
        if (name, RETRAINED) not in done:
            figure = judged(judge, without, plain, plan.attack_updates)
            lines.add(plan.out, {**label, "name": RETRAINED, **figure})
    if (name, BEFORE) not in done:
        figure = judged(judge, before, plain, plan.attack_updates)
        lines.add(plan.out, {**label, "name": BEFORE, **figure})
    sampling = sampling_of(config, before, plan.sampling_steps)
    figure = judged(judge, model, sampling, plan.attack_updates)
    own = {"data": METHODS[method].data, "seconds": seconds, "updates": config.steps}
    pictured(judge, model, sampling, plan.out.with_suffix("") / name / f"{method}.png")
    lines.add(plan.out, {**label, "name": method, **figure, **own})
    if not plan.keep:
        shutil.rmtree(config.run_dir)


def pictured(judge: Judge, model: Any, sampling: SamplingConfig, path: Path) -> None:
    """Samples of every class, a row each, from the noise that all methods have."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    classes = np.sort(np.concatenate([judge.kept, judge.forget]))
    x = judge.samples(model, sampling, np.tile(classes, 10))
    if x.ndim != 4:
        return
    shape = (10, len(classes), *x.shape[1:])
    rows = (x.reshape(shape).transpose(1, 2, 0, 3, 4) + 1) / 2
    side = x.shape[1]
    picture = rows.reshape(len(classes) * side, 10 * side, -1).clip(0, 1)
    figure, axes = plt.subplots(figsize=(3, 3), layout="constrained")
    axes.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=1)
    labels = [f"{c}, forgotten" if c in judge.forget else str(c) for c in classes]
    axes.set_yticks([side * (i + 0.5) for i in range(len(classes))], labels, fontsize=7)
    axes.set_xticks([])
    figures.save_figure(figure, path)


def by_name(rows: list[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """Model -> seed -> its line."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["name"], {})[row["seed"]] = row
    return found


def summary(rows: list[dict[str, Any]]) -> str:
    """The table: means over seeds with their standard errors; of one seed, errors of resampling.

    With how much farther from the data than the model before what is kept is, by pairs of samples,
    and how many updates bring the class back, in those of the retrained model.
    """
    models = by_name(rows)
    names = [n for n in (*TITLES, "law") if any(n in row for row in rows)]
    titles = {**TITLES, "law": ("law from retrained", "{:.3f}")}
    header = ["", *(titles[n][0] for n in names), "Frechet above before", "relearned, ratio"]
    header += ["data", "seconds", "seeds"]
    said = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name, seeds in models.items():
        there = [seeds[seed] for seed in sorted(seeds)]
        cells = [name]
        for figure in names:
            known = [row[figure] for row in there if row.get(figure) is not None]
            errors = [row.get(f"{figure}_standard_error") for row in there]
            cells.append(mean_of(known, titles[figure][1], errors))
        pairs = [
            difference(row, models[BEFORE][row["seed"]])
            for row in there
            if row["seed"] in models.get(BEFORE, {}) and name != BEFORE
        ]
        cells.append(mean_of([p[0] for p in pairs], "{:+.3f}", [p[1] for p in pairs]))
        ratios = [
            row["relearned in"] / models[RETRAINED][row["seed"]]["relearned in"]
            for row in there
            if "relearned in" in row and row["seed"] in models.get(RETRAINED, {})
        ]
        cells.append(mean_of([r for r in ratios if np.isfinite(r)], "{:.2f}"))
        seconds = [row["seconds"] for row in there if "seconds" in row]
        cells.append(there[0].get("data", ""))
        cells += [f"{np.mean(seconds):.0f}" if seconds else "", str(len(there))]
        said.append("| " + " | ".join(cells) + " |")
    return "\n".join([*said, "", *agreement(models)])


def agreement(models: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    """How alike methods are ranked by two seeds: Kendall's tau-b, mean and least over the pairs."""
    own = {name: seeds for name, seeds in models.items() if name not in (BEFORE, RETRAINED)}
    shared = sorted(set.intersection(*(set(s) for s in own.values()))) if own else []
    said = []
    for figure in RANKED:
        values = {
            seed: [row[seed][figure] for row in own.values() if figure in row[seed]]
            for seed in shared
        }
        pairs = itertools.combinations(shared, 2)
        taus = [kendall(values[a], values[b]) for a, b in pairs if len(values[a]) > 2]
        if taus:
            said.append(
                f"Rank correlation of methods by {figure!r} between seeds: {np.mean(taus):.2f}, "
                f"least {min(taus):.2f}."
            )
    return said


def kendall(a: list[float], b: list[float]) -> float:
    """Kendall's tau-b of two lists of numbers, ties accounted for; infinity is the largest."""
    with np.errstate(invalid="ignore"):
        signs = [np.nan_to_num(np.sign(np.subtract.outer(v, v))) for v in (a, b)]
    upper = np.triu_indices(len(a), 1)
    x, y = (s[upper] for s in signs)
    size = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / size) if size else 1.0


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """What is left against what was lost, and against the updates that bring it back."""
    import matplotlib.pyplot as plt

    models = by_name(rows)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    for i, (name, seeds) in enumerate(models.items()):
        known = name in (BEFORE, RETRAINED)
        style = {"color": "black" if known else plt.cm.turbo(i / max(len(models) - 1, 1))}
        style |= {"marker": {BEFORE: "s", RETRAINED: "*"}.get(name, "o")}
        left = [row["forgotten"] for row in seeds.values()]
        lost = [row["frechet"] for row in seeds.values()]
        axes[0].scatter(left, lost, label=name, **style)
        if all("relearned" in row for row in seeds.values()):
            curves = [list(row["relearned"].values()) for row in seeds.values()]
            steps = [int(n) for n in next(iter(seeds.values()))["relearned"]]
            axes[1].plot(
                steps, np.mean(curves, 0), color=style["color"], label=name,
                lw=2 if known else 1, ls={BEFORE: "--", RETRAINED: ":"}.get(name, "-"),
            )  # fmt: skip
    axes[0].set(xlabel="samples still of the class", ylabel="Frechet distance of what is kept")
    axes[0].set(yscale="log")
    axes[1].set(xlabel="updates on a few forgotten examples", ylabel="samples of the class")
    axes[1].set_xscale("symlog", linthresh=1)
    axes[0].legend(fontsize=6, ncols=2)
    figures.save_figure(figure, path)


def main(plan: Benchmark) -> None:
    """Do what is missing; or write the table."""
    rows = lines.read(plan.out)
    if plan.table:
        if not rows:
            raise ValueError(f"`out` must be a file of results, got {plan.out}, which has none.")
        figures.write_text(plan.out.with_suffix(".md"), summary(rows) + "\n")
        draw(rows, plan.out.with_suffix(".png"))
        return
    check(plan, rows)
    retrained = {seed_of(run_dir): run_dir for run_dir in plan.retrained}
    for base in plan.bases:
        for method in plan.methods or tuple(METHODS):
            run(plan, base, method, retrained)


def cli(args: list[str] | None = None) -> int:
    """The command line; the exit status."""
    plan = tyro.cli(Benchmark, args=args)
    return runner.run(lambda: main(plan))


if __name__ == "__main__":
    sys.exit(cli())

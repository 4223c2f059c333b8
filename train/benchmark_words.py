"""Every method that makes a model of captions forget a word, and attacks by words and vectors.

    python -m train.pretrain prompts --seed 0 --run-dir runs/prompts-0
    python -m train.benchmark_words runs/prompts-0 --forget red
    python -m train.benchmark_words --out train/results/unlearning/words.jsonl --table

Of samples whose captions say the word: how many show it, and how many what else they say; of those
that say another in its place, how many show that; of those that leave the place open, how many show
the word. Then attacks: guidance the other way; words before the caption, and a vector in the word's
place, searched for on a few images. What a method does to captions is done to the attacker's, too.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jaxdiff
from jaxdiff import unlearning
from train.core import figures, lines, runner
from train.core.comparison import mean_of
from train.core.config import RunConfig, load_config
from train.core.data import build_sources
from train.core.evaluation import PromptAttribute
from train.core.sampling import load_model
from train.unlearning.words import METHODS, Parts, Speaker, table_of


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What is done, and where it is written.

    Attributes:
        bases: directories of runs of train.pretrain prompts, of different seeds.
        out: JSON lines.
        methods: their names; none for all.
        forget: the word.
        steps: updates of methods that learn.
        num_samples: of each kind.
        sampling_steps: of DDIM.
        guidance_scale: of what is measured.
        attack_steps: of each search.
        table: write the table beside the file, and do nothing else.
    """

    bases: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    out: Path = Path("train/results/unlearning/words.jsonl")
    methods: tuple[str, ...] = ()
    forget: str = "red"
    steps: int = 100
    num_samples: int = 96
    sampling_steps: int = 10
    guidance_scale: float = 2.0
    attack_steps: int = 60
    table: bool = False


SETTINGS = ("forget", "steps", "num_samples", "sampling_steps", "guidance_scale", "attack_steps")
TITLES = {
    "said": "says the word",
    "rest": "what else it says",
    "others": "other words",
    "unasked": "unasked",
    "arithmetic": "guidance the other way",
    "words": "words before it",
    "vector": "a vector in its place",
}
ATTRIBUTES = ("size", "colour", "place")
ATTACKED = 16  # images that a search is given


class Judge:
    """The captions and the noise that all models of a seed share."""

    def __init__(self, plan: Benchmark, parts: Parts):
        self.plan, self.parts = plan, parts
        columns = {measure.column: measure for measure in map(PromptAttribute, ATTRIBUTES)}
        if parts.column not in columns:
            raise ValueError(
                "`forget` must be a word that samples show for certain, of a size, colour or "
                f"place, got {plan.forget!r}."
            )
        self.own = columns.pop(parts.column)
        self.rest = list(columns.values())
        rng = np.random.default_rng(parts.seed)
        said = np.asarray(parts.source.cond["tokens"])  # type: ignore[index]
        whole = said[(said != parts.none).all(1)]
        self.captions = whole[rng.choice(len(whole), plan.num_samples)].astype(np.int32)
        self.key = jax.random.key(parts.seed + 1)
        rows = rng.choice(len(parts.forget), ATTACKED)
        self.images = jnp.asarray(parts.forget[rows]["x"])
        self.about = parts.forget[rows]["cond"]["tokens"].astype(np.int32)

    def saying(self, word: Any) -> np.ndarray:
        """The captions with another word, or words, in its place."""
        captions = self.captions.copy()
        captions[:, self.parts.column] = word
        return captions

    def samples(self, speaker: Speaker, vectors: Any, scale: float) -> np.ndarray:
        """Of captions' vectors `(n, m, size)`."""
        heard = jax.vmap(speaker.heard)(vectors)
        x = jaxdiff.sample(
            self.key, speaker.at(scale), self.images.shape[1:], len(heard),
            cond={"tokens": heard}, times=self.plan.sampling_steps, batch_size=32,
        ).x  # fmt: skip
        return np.clip(np.asarray(x), -1, 1)

    def __call__(self, speaker: Speaker) -> tuple[dict[str, Any], np.ndarray]:
        """Every figure of a model, and samples that are asked for the word."""
        parts, scale = self.parts, self.plan.guidance_scale
        table, column, word = table_of(speaker.model), self.parts.column, self.parts.word
        asked, empty = self.saying(word), self.saying(parts.none)
        others = self.saying(np.resize(parts.others, len(asked)))
        x = self.samples(speaker, table[asked], scale)

        def share(x, captions, *attributes):
            """Of samples that show what their captions say, in the mean of some attributes."""
            batch = {"x": x, "cond": {"tokens": captions}}
            return np.mean([attribute(batch, {})[0] for attribute in attributes])

        def back(vectors, scale=scale):
            """The share that shows the word, whatever was said."""
            return share(self.samples(speaker, vectors, scale), asked, self.own)

        found: dict[str, Any] = {
            "said": share(x, asked, self.own),
            "rest": share(x, asked, *self.rest),
            "others": share(self.samples(speaker, table[others], scale), others, self.own),
            "unasked": back(table[empty]),
            "arithmetic": back(table[asked], -1.0),
        }
        # The attacker's captions leave the place open: the word itself may be what is found.
        about = self.about.copy()
        about[:, column] = parts.none
        batch = {"x": self.images, "cond": {"tokens": table[about]}}
        words, _ = unlearning.attack_words(
            jax.random.fold_in(self.key, 1), speaker.model, batch, table[:-1], count=2,
            steps=self.plan.attack_steps, rate=0.1, decay=0.0,
        )  # fmt: skip
        before = jnp.broadcast_to(table[words], (len(empty), 2, table.shape[1]))
        found["words"] = back(jnp.concatenate([before, table[empty]], 1))
        found["found"] = [str(parts.source.words[int(n)]) for n in words]  # type: ignore[index]
        vector, _ = unlearning.attack(
            jax.random.fold_in(self.key, 2), speaker.model, batch, table[word],
            lambda v, cond: {"tokens": cond["tokens"].at[column].set(v)},
            steps=self.plan.attack_steps, rate=0.1, decay=0.0,
        )  # fmt: skip
        moved = table[empty].at[:, column].set(vector)
        found["vector"] = back(moved)
        return {k: v if k == "found" else float(v) for k, v in found.items()}, x


def settings_of(plan: Benchmark) -> dict[str, Any]:
    """What lines of one file have in common."""
    return {name: getattr(plan, name) for name in SETTINGS}


def check(plan: Benchmark, rows: list[dict[str, Any]]) -> None:
    """Refuse what would be mixed up.

    Raises:
        ValueError: for unknown methods, bases of one name, or a file of other settings.
    """
    if unknown := sorted(set(plan.methods) - set(METHODS)):
        raise ValueError(f"`methods` must be among {list(METHODS)}, got {unknown[0]!r}.")
    for name, least in (
        ("steps", 1), ("num_samples", 16), ("sampling_steps", 1), ("attack_steps", 1)
    ):  # fmt: skip
        if getattr(plan, name) < least:
            raise ValueError(f"`{name}` must be at least {least}, got {getattr(plan, name)}.")
    lines.check_bases(plan.bases, rows)
    lines.check_settings(plan.out, rows, settings_of(plan))


def run(plan: Benchmark, base: str) -> None:
    """All methods on one model."""
    config = load_config(base, RunConfig)
    source, _ = build_sources(config.data)
    parts = Parts(load_model(config).model, source, plan.forget, plan.steps, config.seed)
    judge, name = Judge(plan, parts), Path(base).name
    chosen = plan.methods or tuple(METHODS)
    for method, build in {"before": lambda p: Speaker(p.base), **METHODS}.items():
        done = {(row["base"], row["name"]) for row in lines.read(plan.out)}
        if (name, method) in done or method not in ("before", *chosen):
            continue
        begun = time.perf_counter()
        speaker = build(parts)
        seconds = time.perf_counter() - begun
        found, x = judge(speaker)
        pictured(x[:16], plan.out.with_suffix("") / name / f"{method}.png")
        label = {"base": name, "seed": config.seed, "name": method, "settings": settings_of(plan)}
        lines.add(plan.out, {**label, **found, "seconds": seconds})


def pictured(x: np.ndarray, path: Path) -> None:
    """Samples that were asked for the word, in rows of eight."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [np.concatenate(row, 1) for row in x.reshape(-1, 8, *x.shape[1:])]
    picture = (np.concatenate(rows) + 1) / 2
    figure, axes = plt.subplots(figsize=(4, 1.2), layout="constrained")
    axes.imshow(picture.clip(0, 1))
    axes.set_axis_off()
    figures.save_figure(figure, path)


def summary(rows: list[dict[str, Any]]) -> str:
    """The table: shares, means over seeds with their standard errors; of one seed, of samples."""
    header = ["", *TITLES.values(), "words found", "seconds"]
    said = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name in dict.fromkeys(row["name"] for row in rows):
        there = [row for row in rows if row["name"] == name]
        cells = [name]
        for figure in TITLES:
            values = [row[figure] for row in there]
            counts = [row["settings"]["num_samples"] for row in there]
            errors = [(v * (1 - v) / n) ** 0.5 for v, n in zip(values, counts, strict=True)]
            cells.append(mean_of(values, "{:.0%}", errors))
        cells.append(" ".join(there[0]["found"]))
        cells.append(f"{np.mean([row['seconds'] for row in there]):.0f}")
        said.append("| " + " | ".join(cells) + " |")
    return "\n".join(said)


def main(plan: Benchmark) -> None:
    """Do what is missing; or write the table."""
    rows = lines.read(plan.out)
    if plan.table:
        if not rows:
            raise ValueError(f"`out` must be a file of results, got {plan.out}, which has none.")
        figures.write_text(plan.out.with_suffix(".md"), summary(rows) + "\n")
        return
    check(plan, rows)
    for base in plan.bases:
        run(plan, base)


def cli(args: list[str] | None = None) -> int:
    """The command line; the exit status."""
    plan = tyro.cli(Benchmark, args=args)
    return runner.run(lambda: main(plan))


if __name__ == "__main__":
    sys.exit(cli())

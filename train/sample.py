"""Sample a trained run; its directory is all that is needed.

python -m train.sample runs/digits --num-samples 64 --labels 3 8 --guidance-scale 2
"""

import dataclasses
import itertools
import sys
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxdiff import parallel
from jaxdiff.data import save_images
from train.core.config import RunConfig, load_config
from train.core.data import DataInfo
from train.core.evaluation import picture
from train.core.runner import run
from train.core.sampling import SamplingOptions, changed, draw, load_model, requested_classes


@dataclasses.dataclass(frozen=True)
class Options(SamplingOptions):
    """What to sample, and how; None for what the run's own evaluation does.

    Attributes:
        num_samples: how many.
        labels: classes, by number or name, taken in turn; none for all that were trained.
        prompts: captions, as "large red three left", of words in any order, taken in turn.
        cond: npz file of conditions, "cond" or "cond/age" and so on, taken in turn.
        seed: seed of the samples.
        out: directory of the samples, new or empty; None for samples-<seed> in the run directory,
            or samples-<seed>-2 and so on where there are some.
    """

    num_samples: int = 64
    labels: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    cond: str | None = None
    seed: int = 0
    out: str | None = None


def main(options: Options) -> None:
    """Draw samples and write them: arrays, a picture, and images of their own by class."""
    if options.num_samples < 1 or not 0 <= options.seed < 2**32:
        raise ValueError(
            "`num_samples` must be positive and `seed` in [0, 2^32), got "
            f"{options.num_samples} and {options.seed}."
        )
    config = changed(load_config(options.run_dir, RunConfig), options)
    settings, count = config.evaluation, options.num_samples
    model, step, stored, _ = load_model(config, options.adapter)
    info = DataInfo.from_json(stored)
    cond = conditions(options, info)
    target = new_directory(options)
    key = jax.random.key(options.seed)
    out, rate = draw(settings, model, info, parallel.make_mesh(), key, cond, count)

    samples = np.asarray(out.x)
    arrays = {"x": samples}
    if isinstance(cond, dict):
        arrays |= {f"cond/{name}": np.asarray(values) for name, values in cond.items()}
    elif cond is not None:
        arrays["cond"] = np.asarray(cond)
    np.savez(target / "samples.npz", **arrays)
    labels = None if info.cond or cond is None else np.asarray(cond)
    if info.pixels and info.event_shape[-1] in (1, 3):
        save_images(target / "images", samples, labels, class_names=info.class_names)
    picture(target / "samples.png", samples, cond, None, settings, info)
    print(
        f"{count} samples of step {step}, {int(out.nfe[0])} evaluations each, "
        f"{rate:.1f} images/s (compilation included), in {target}"
    )


def new_directory(options: Options) -> Path:
    """Where the samples go: a directory of their own, in which no earlier ones are lost or mixed.

    Raises:
        ValueError: for a name that is taken.
    """
    if options.out is None:
        first = Path(options.run_dir) / f"samples-{options.seed}"
        names = (first.with_name(f"{first.name}-{i}") for i in itertools.count(2))
        target = next(path for path in itertools.chain([first], names) if not path.exists())
    else:
        target = Path(options.out)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ValueError(f"`out` must be a new or empty directory, got {target}.")
    target.mkdir(parents=True, exist_ok=True)
    return target


def conditions(options: Options, info: DataInfo) -> Any:
    """What to sample with, one for each sample.

    Raises:
        ValueError: for classes or conditions that the run was not trained with.
    """
    given = [name for name in ("labels", "prompts", "cond") if getattr(options, name)]
    if len(given) > 1:
        raise ValueError(f"Only one of `{'`, `'.join(given)}` can be given.")
    if options.prompts:
        rows = [tokens_of(prompt, info) for prompt in options.prompts]
        return {"tokens": jnp.asarray(np.resize(rows, (options.num_samples, len(rows[0]))))}
    if options.cond is not None:
        try:
            # Opened here, because NumPy leaves a damaged archive open.
            with open(options.cond, "rb") as stream, np.load(stream) as file:
                found = {
                    name.removeprefix("cond/"): file[name]
                    for name in file
                    if name == "cond" or name.startswith("cond/")
                }
        except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"`cond` must be an npz file, got {options.cond}: {error}.") from None
        found = {"label" if name == "cond" else name: rows for name, rows in found.items()}
        wanted = set(info.cond) | ({"label"} if info.num_classes is not None else set())
        if set(found) != wanted:
            raise ValueError(
                f"`cond` must hold the conditions {sorted(wanted)}, got {sorted(found)}."
            )
        bad = [n for n, v in found.items() if not v.ndim or not len(v) or v.dtype.kind not in "iuf"]
        if bad or not found:
            what = f"{bad[0]!r}" if bad else "none"
            raise ValueError(
                f"`cond` must hold numbers of one sample at least in each condition, got {what} of "
                f"{options.cond}."
            )
        if len(counts := {len(values) for values in found.values()}) > 1:
            raise ValueError(f"`cond` must hold as many of every condition, got {sorted(counts)}.")
        rows = np.arange(options.num_samples) % len(next(iter(found.values())))
        chosen = {name: jnp.asarray(values[rows]) for name, values in found.items()}
        return chosen["label"] if set(chosen) == {"label"} else chosen
    if info.cond:
        raise ValueError(
            f"`cond` must say what to sample: the run was trained with {sorted(info.cond)}. Pass "
            "an npz file."
        )
    # A class that is called "1" is that one, whatever its number.
    names = {str(label): label for label in range((info.num_classes or -1) + 1)}
    names |= {info.name_of(label): label for label in range(info.num_classes or 0)}
    if unknown := [label for label in options.labels if label not in names]:
        if not names or info.num_classes is None:
            raise ValueError("`labels` must be left out: the run has no classes.")
        known = f"{sorted(names)}, {info.num_classes} for none"
        raise ValueError(f"`labels` must be among {known}, got {unknown[0]!r}.")
    classes = tuple(names[label] for label in options.labels) or info.classes
    return requested_classes(options.num_samples, classes)


def tokens_of(prompt: str, info: DataInfo) -> np.ndarray:
    """A caption as indices of its words; their order does not matter.

    Raises:
        ValueError: for a run without captions, or a word that none of them has.
    """
    if info.words is None:
        raise ValueError("`prompts` must be left out: the run has no captions.")
    words, said = info.words, prompt.split()
    if unknown := [word for word in said if word not in words]:
        known = " ".join(words)
        raise ValueError(f"`prompts` must be of the words {known}, got {unknown[0]!r}.")
    if len(said) > (length := info.cond["tokens"][0]):
        raise ValueError(f"`prompts` must have at most {length} words, got {prompt!r}.")
    none = [len(words)] * (length - len(said))
    return np.asarray([*map(words.index, said), *none], np.int32)


def cli(args: list[str] | None = None) -> int:
    """The command line; the exit status."""
    options = tyro.cli(Options, args=args)
    return run(lambda: main(options))


if __name__ == "__main__":
    sys.exit(cli())

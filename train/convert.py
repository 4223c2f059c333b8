"""Write a data set as records, which are read as they are needed: for sets larger than memory.

    python -m train.convert records/photos --data.name folder --data.path photos --data.resize 64
    python -m train.pretrain folder --data.name records --data.path records/photos --data.resize 64

Both sides are written, what a run on the data would train on and what it would hold out. The same
command goes on where it was interrupted.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from jaxdiff import data
from train.core.data import DataConfig, build_sources
from train.core.runner import run


@dataclasses.dataclass(frozen=True)
class Options:
    """What to convert.

    Attributes:
        out: directory of the records, new or that of the same command before.
        data: what is read, and how; flips are left to training.
        encoding: of images; PNG makes smaller files of photographs, but is slower to read.
    """

    out: Annotated[str, tyro.conf.Positional]
    data: DataConfig = DataConfig()
    encoding: Literal["raw", "png"] = "raw"


def main(options: Options) -> None:
    """Write out/train and out/test.

    Raises:
        ValueError: for a directory that holds anything else, and what the reader refuses.
        OSError: where writing fails, as on a full disk.
    """
    lazy = options.data.name == "folder"
    sources = build_sources(dataclasses.replace(options.data, lazy=lazy))
    for side, source in zip(("train", "test"), sources, strict=True):
        with tqdm(total=len(source), desc=side, unit="example", file=sys.stderr) as bar:
            try:
                data.to_records(
                    source,
                    Path(options.out) / side,
                    encoding=options.encoding,
                    progress=lambda count, bar=bar: bar.update(count - bar.n),
                )
            except RuntimeError as error:
                raise OSError(
                    f"`out` cannot be written: {error}. The same command goes on."
                ) from None
    train, test = map(len, sources)
    print(f"{train} examples to train on and {test} to hold out, in {options.out}.")


def cli(args: list[str] | None = None) -> int:
    """The command line; the exit status."""
    options = tyro.cli(Options, args=args)
    return run(lambda: main(options))


if __name__ == "__main__":
    sys.exit(cli())

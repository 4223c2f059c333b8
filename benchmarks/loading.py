"""How many images a second the input pipeline yields."""

from collections.abc import Iterator

import numpy as np

from benchmarks.measure import Record, paired, seconds
from jaxdiff import data

COUNT, BATCH, BATCHES, ROUNDS = 20_000, 128, 100, 15


def loader_rate() -> Iterator[Record]:
    """`make_loader` on images in memory: against indexing by hand, and alone."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (COUNT, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, COUNT, np.int32)
    source = data.array_source(images, labels, num_classes=10)
    name = f"make_loader, 32x32x3 in memory, batch {BATCH}"

    def by_hand():
        while True:
            order = rng.permutation(COUNT)
            for now in order[: COUNT - COUNT % BATCH].reshape(-1, BATCH):
                yield {"x": images[now].astype(np.float32) / 127.5 - 1, "cond": labels[now]}

    def loaded(threads, flip=False):
        return iter(data.make_loader(source, BATCH, seed=0, flip=flip, num_threads=threads))

    yield paired(f"{name} / indexing by hand", draw(loaded(0)), draw(by_hand()))
    for threads, flip in ((0, False), (1, False), (2, False), (2, True)):
        batches = draw(loaded(threads, flip))
        batches()
        rates = [BATCH * BATCHES / seconds(batches) for _ in range(ROUNDS)]
        label = f"{name}, {threads} threads{', flipped' if flip else ''}"
        yield Record.of(label, rates, "images/s", "rate")


def draw(batches):
    """A call that takes the next ones."""

    def take():
        for _ in range(BATCHES):
            next(batches)

    return take

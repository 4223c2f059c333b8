"""A set of 200,000 images on disk, through processes of their own."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxdiff.data import write_records

COUNT = 200_000
PLACES = np.array([1, 256, 65536])

COMMON = """
import json, re, sys, time, zlib
from pathlib import Path
import numpy as np
from jaxdiff.data import make_loader, records

def peak():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) / 1e3

options = json.loads(sys.argv[1])
"""

# So many batches from a position on: what they are, where that ends, and the memory it took.
STREAM = """
import grain, jax
before = peak()
batches = iter(make_loader(records(options["path"]), 250, seed=5, flip=True, num_threads=2))
if options["state"] is not None:
    batches.set_state(options["state"])
labels, checksums = [], []
for _ in range(options["batches"]):
    batch = next(batches)
    labels.extend(batch["cond"].tolist())
    checksums.append(zlib.crc32(batch["x"]))
print(json.dumps({
    "labels": labels, "checksums": checksums, "state": batches.get_state(), "grown": peak() - before
}))
"""

# Images a second: read, consumed by a small step that always has the same batch, and by one that
# is fed from the records.
TRAIN = """
import itertools
import jax, optax
from flax import nnx
import jaxdiff
from jaxdiff import losses, networks, processes
from jaxdiff.training import Hook, Player, fit, init_train_state, make_train_step

source, rates, size = records(options["path"]), {}, 64
for threads in (1, 2):
    batches = iter(make_loader(source, size, seed=0, num_threads=threads))
    next(batches)
    begun, seen = time.perf_counter(), 0
    while time.perf_counter() - begun < 10:
        seen += len(next(batches)["x"])
    rates[f"read by {threads}"] = seen / (time.perf_counter() - begun)

network = networks.DiT(
    image_size=32, in_channels=3, patch_size=4, hidden=64, depth=2, num_heads=2, rngs=nnx.Rngs(0)
)
model = jaxdiff.NetworkDenoiser(network, processes.Cosine())
players = {"model": Player(model, losses.DenoisingLoss(), optax.adam(1e-4))}
step = make_train_step(players)
state = init_train_state(players, jax.random.key(0))

def images(batches):
    for batch in batches:
        yield {"x": batch["x"]}

feeds = {
    "one batch": itertools.repeat({"x": source[np.arange(size)]["x"]}),
    "records": images(make_loader(source, size, seed=0)),
}
state, done, spent = fit(step, state, feeds["one batch"], num_steps=3), 3, {n: 0.0 for n in feeds}
for _ in range(5):
    for name, feed in feeds.items():
        begun, done = time.perf_counter(), done + 40
        state = jax.block_until_ready(fit(step, state, feed, num_steps=done))
        spent[name] += time.perf_counter() - begun
print(json.dumps(rates | {name: 200 * size / seconds for name, seconds in spent.items()}))
"""


def ran(program, **options):
    """What a fresh process prints, with the programs that users get."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-c", COMMON + program, json.dumps(options)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**environment, "JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Records of photograph-like images, each with its own number as a class."""
    rng = np.random.default_rng(0)
    ground = rng.integers(0, 256, (70, 70, 3)).repeat(30, 0).repeat(30, 1)
    ground = (ground + rng.integers(0, 32, ground.shape)).clip(0, 255).astype(np.uint8)

    def stream():
        for i, (a, b) in enumerate(rng.integers(0, 2068, (COUNT, 2))):
            x = ground[a : a + 32, b : b + 32].copy()
            x[0, 0] = (i // PLACES) % 256
            yield {"x": x, "cond": np.int32(i)}

    path = tmp_path_factory.mktemp("records") / "set"
    begun = time.perf_counter()
    write_records(path, stream(), num_classes=COUNT, shard_bytes=2**27)
    size = sum(file.stat().st_size for file in path.iterdir())
    return path, COUNT / (time.perf_counter() - begun), size


def test_a_set_on_disk_streams_in_little_memory_and_goes_on_exactly(path, measured):
    path, rate, size = path
    whole = ran(STREAM, path=str(path), state=None, batches=1600)
    epochs = np.array(whole["labels"]).reshape(2, COUNT)
    assert np.array_equal(np.sort(epochs, 1), np.broadcast_to(np.arange(COUNT), (2, COUNT)))
    assert not np.array_equal(*epochs)
    pieces, state = [], None
    for batches in (300, 777, 523):
        part = ran(STREAM, path=str(path), state=state, batches=batches)
        pieces.extend(part["checksums"])
        state = part["state"]
    assert pieces == whole["checksums"] and state == whole["state"]
    measured(
        f"{COUNT} images of 32 x 32 x 3, {COUNT * 3072 / 1e6:.0f} MB of pixels, {size / 1e6:.0f} MB"
        f" on disk, written at {rate:.0f} a second: two epochs grew memory by {whole['grown']:.0f} "
        "MB, every image once an epoch; in three processes bit for bit the same batches"
    )
    assert whole["grown"] < 300


def test_a_set_on_disk_is_read_faster_than_a_small_step_consumes_it(path, measured):
    rates = ran(TRAIN, path=str(path[0]))
    measured("images a second: " + ", ".join(f"{n} {rate:.0f}" for n, rate in rates.items()))
    assert rates["read by 1"] > 3 * rates["one batch"]
    assert rates["records"] > 0.7 * rates["one batch"]

"""Beside PyTorch: networks of diffusers and of jaxdiff with the same weights, in one process.

    python -m benchmarks.parity
    python -m benchmarks.parity --models dit_s2 --forward 1 8 --ddim --train --out parity.json
    XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= python -m benchmarks.parity --models unet64

Needs `pip install -e '.[parity]'`, best in an environment of its own. Both sides have the
same cores, which take turns in every round; flags of XLA are jaxdiff's alone. DDIM takes 20 steps,
a training step is the plain loss of the noise and Adam. Half an hour on two cores.
"""

import copy
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU's memory is for both

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import tyro
from diffusers import DDIMScheduler

import jaxdiff
from benchmarks import peers
from benchmarks.measure import Record, alternate, seconds
from benchmarks.networks import forward
from benchmarks.results import run
from jaxdiff import losses, predictions, processes
from jaxdiff.training import Player, init_train_state, make_train_step

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
MODELS = {
    "unet35m": lambda dtype: peers.unets(128, dtype),
    "unet64": lambda dtype: peers.unets(64, dtype),
    "dit_s2": peers.dits,
}
STEPS, RATE = 20, 1e-4
# Threads of the framework that has just finished still wait for work, busily.
PAUSE, LEAST_SECONDS = 0.2, 0.5


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure, and what becomes of it.

    Attributes:
        models: DDPM's UNet of 35.7M weights, one of 64 channels, DiT-S/2 of latents.
        forward: batch sizes of one evaluation; none to leave it out.
        ddim: batch sizes of sampling.
        train: batch sizes of a training step.
        dtype: of both sides' products; weights stay float32.
        compiled: also `torch.compile`; None for on a GPU.
        threads: cores that both sides use.
        rounds: rounds of a measurement.
        out: JSON file to write.
        baseline: JSON file, written by `out`, to compare with.
    """

    models: tuple[Literal[*MODELS], ...] = tuple(MODELS)
    forward: tuple[int, ...] = (1, 8, 32)
    ddim: tuple[int, ...] = (8,)
    train: tuple[int, ...] = (8,)
    dtype: Literal["float32", "bfloat16"] = "float32"
    compiled: bool | None = None
    threads: int = 2
    rounds: int = 7
    out: Path | None = None
    baseline: Path | None = None


@dataclasses.dataclass(frozen=True)
class Batch:
    """What both sides are given: images `(N, H, W, C)`, noise labels, and classes if any."""

    x: np.ndarray
    t: np.ndarray
    labels: np.ndarray | None

    @classmethod
    def of(cls, pair: peers.Pair, size: int) -> "Batch":
        """A random one."""
        x = np.random.default_rng(0).standard_normal((size, *pair.ours.shape), np.float32)
        labels = np.arange(size) % peers.CLASSES if pair.classes else None
        return cls(x, np.linspace(1, 999, size, dtype=np.float32), labels)


def our_forward(network, batch: Batch):
    """One evaluation of jaxdiff's network."""
    compiled = jax.jit(forward)
    arrays = jax.device_put((batch.x, batch.t, batch.labels))
    return lambda: compiled(network, *arrays)


def our_ddim(network, batch: Batch):
    """`jaxdiff.sample`."""
    denoiser, key = jaxdiff.NetworkDenoiser(network, processes.VP()), jax.random.key(0)
    cond = None if batch.labels is None else jnp.asarray(batch.labels, jnp.int32)
    count, *shape = batch.x.shape
    return lambda: jaxdiff.sample(key, denoiser, tuple(shape), count, cond=cond, times=STEPS).x


def our_train(network, batch: Batch):
    """A step of `make_train_step`."""
    loss = losses.DenoisingLoss(losses.Uniform(predictions.Eps()))
    denoiser = jaxdiff.NetworkDenoiser(network, processes.VP())
    players = {"model": Player(denoiser, loss, optax.adam(RATE))}
    state, step = [init_train_state(players, jax.random.key(0))], make_train_step(players)
    arrays = {"x": batch.x}
    if batch.labels is not None:
        arrays["cond"] = batch.labels.astype(np.int32)

    def train():
        state[0], metrics = step(state[0], arrays)
        return metrics["loss"]

    return train


def tensors(batch: Batch):
    """Images `(N, C, H, W)`, noise labels and classes, on the device."""
    x = torch.tensor(batch.x).permute(0, 3, 1, 2).contiguous()
    labels = None if batch.labels is None else torch.tensor(batch.labels).to(DEVICE)
    return x.to(DEVICE), torch.tensor(batch.t).to(DEVICE), labels


def their_forward(model, batch: Batch):
    """One evaluation of diffusers' network."""
    x, t, labels = tensors(batch)
    return torch.inference_mode()(lambda: model(x, t, labels))


def their_ddim(model, batch: Batch):
    """Sampling as diffusers' pipelines do."""
    x, _, labels = tensors(batch)
    scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False)

    @torch.inference_mode()
    def sample():
        scheduler.set_timesteps(STEPS)
        y = torch.randn_like(x)
        for t in scheduler.timesteps:
            noise = model(y, t.expand(len(y)).to(DEVICE), labels)
            y = scheduler.step(noise, t, y).prev_sample
        return y

    return sample


def their_train(model, batch: Batch):
    """DDPM's loss and Adam."""
    x, _, labels = tensors(batch)
    optimizer = torch.optim.Adam(model.train().parameters(), lr=RATE)
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0).to(DEVICE)

    def train():
        t = torch.randint(0, 1000, (len(x),), device=DEVICE)
        alpha, eps = alphas[t].view(-1, 1, 1, 1), torch.randn_like(x)
        out = model(alpha.sqrt() * x + (1 - alpha).sqrt() * eps, t, labels)
        loss = torch.nn.functional.mse_loss(out.float(), eps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return train


TASKS = {
    "forward": (our_forward, their_forward),
    "ddim": (our_ddim, their_ddim),
    "train": (our_train, their_train),
}


def contestants(pair: peers.Pair, task: str, size: int, options: Options) -> dict[str, Callable]:
    """Calls that do the same work, by name, jaxdiff's first."""
    batch, (ours, theirs) = Batch.of(pair, size), TASKS[task]
    calls = {"jaxdiff": ours(pair.ours, batch)}
    compiles = CUDA if options.compiled is None else options.compiled
    for name in ("PyTorch eager", "PyTorch compiled")[: 1 + compiles]:
        model = copy.deepcopy(pair.theirs).to(DEVICE).eval()
        if name.endswith("compiled"):
            torch.compiler.reset()
            model = torch.compile(model, dynamic=False)
        calls[name] = in_torch(theirs(model, batch), options.dtype)
    return calls


def in_torch(fn: Callable, dtype: str) -> Callable:
    """The call, in the precision asked for, until its result is there."""

    def call():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16"):
            result = fn()
        if CUDA:
            torch.cuda.synchronize()
        return result

    return call


def compete(label: str, calls: dict[str, Callable], rounds: int) -> Iterator[Record]:
    """Milliseconds of each, and jaxdiff's share of every other's in the same round."""
    counts = []
    for call in calls.values():
        jax.block_until_ready(call())
        counts.append(max(1, round(LEAST_SECONDS / seconds(call))))
    several = [repeated(call, n) for call, n in zip(calls.values(), counts, strict=True)]
    spent = alternate(*several, rounds=rounds, warm=0, pause=PAUSE)
    ours, *_ = rows = [np.array(row) / n for row, n in zip(spent, counts, strict=True)]
    for name, row in zip(calls, rows, strict=True):
        yield Record.of(f"{label}, {name}", (1e3 * row).tolist(), "ms", "seconds")
    for name, row in list(zip(calls, rows, strict=True))[1:]:
        yield Record.of(f"{label}, jaxdiff / {name}", (ours / row).tolist(), "", "ratio")


def repeated(call: Callable[[], Any], count: int) -> Callable[[], None]:
    """Several calls, one after another."""

    def several():
        for _ in range(count):
            jax.block_until_ready(call())

    return several


def measurements(options: Options) -> Iterator[Record]:
    """Every model, task and batch size."""
    dtype = jnp.bfloat16 if options.dtype == "bfloat16" else None
    for model in options.models:
        pair = MODELS[model](None)
        print(f"{pair.name}: outputs agree to {peers.check(pair):.1e}", flush=True)
        if dtype is not None:
            pair = MODELS[model](dtype)
        for task in TASKS:
            for size in getattr(options, task):
                label = f"{pair.name}, {options.dtype}, {task}, batch {size}"
                yield from compete(label, contestants(pair, task, size, options), options.rounds)


def main(options: Options) -> None:
    """See the module."""
    if hasattr(os, "sched_setaffinity"):  # XLA has a thread for each core that it may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("high")  # as XLA multiplies on a GPU; nothing on a CPU
    run(measurements(options), options.out, options.baseline)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

"""Compile the training step or the sampler for accelerators that are not there, and say its costs.

    python -m train.compile_aot dit-xl --topology v5e:16x16 --per-chip 32 --fsdp 16
    python -m train.compile_aot unet --topology v5e:4x4 --per-chip 64 --sample

Needs the package libtpu (`pip install 'jaxdiff[tpu]'`), and no TPU. For each chip: memory,
operations and bytes, and what it sends to others, by kind and by whether it stands in a loop; and
how long each would take at the rates that the maker publishes, which bounds the utilisation.
"""

import dataclasses
import functools
import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import tyro
from jax.experimental import topologies

import jaxdiff
from jaxdiff import networks, parallel, solvers
from jaxdiff.costs import Program, chip_of, count_flops, read_program
from jaxdiff.networks import TENSOR_RULES
from jaxdiff.training import TrainState, init_train_state, make_train_step
from train.core.config import NetworkConfig, RematName
from train.core.data import DataInfo
from train.core.runner import run
from train.pretraining.recipe import Config, build_denoiser, build_player

NetworkName = Literal["unet", "dit-s", "dit-b", "dit-l", "dit-xl"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compiled.

    Attributes:
        network: the UNet of DDPM for 32x32 images, 35.7M weights; or a DiT with patches of 2 for
            latents of 256x256 images, (32, 32, 4), of 1000 classes.
        topology: kind of chip and shape of the slice, as "v5e:4x4" or "v5p:8x8x16".
        per_chip: batch of each chip.
        fsdp: chips over which weights are split.
        tensor: chips over which single layers are split.
        remat: what is recomputed in the backward pass.
        float32: compute in float32 and not in bfloat16.
        unstacked: a program of every block, and not one loop over stacked ones.
        sample: the sampler, and not the training step.
        sampling_steps: steps of DDIM, with guidance.
        out: JSON-lines file to which the result is appended.
        text: file for the text of the compiled program.
    """

    network: Annotated[NetworkName, tyro.conf.Positional]
    topology: str = "v5e:4x4"
    per_chip: int = 32
    fsdp: int = 1
    tensor: int = 1
    remat: RematName = "blocks"
    float32: bool = False
    unstacked: bool = False
    sample: bool = False
    sampling_steps: int = 50
    out: str | None = None
    text: str | None = None


def configured(options: Options) -> tuple[Config, DataInfo]:
    """The pretraining recipe's configuration, and its data."""
    common: dict[str, Any] = {"bfloat16": not options.float32, "remat": options.remat}
    if options.network == "unet":
        network = NetworkConfig(
            channels=128, channel_mults=(1, 2, 2, 2), num_res_blocks=2,
            attention_resolutions=(16,), scale_shift=False, **common,
        )  # fmt: skip
        shape, classes = (32, 32, 3), 10
    else:
        size = networks.DIT_SIZES[options.network.removeprefix("dit-").upper()]
        network = NetworkConfig(
            "dit", channels=size["hidden"], depth=size["depth"], num_heads=size["num_heads"],
            stacked=not options.unstacked, **common,
        )  # fmt: skip
        shape, classes = (32, 32, 4), 1000
    pixels = options.network == "unet"
    info = DataInfo(shape, classes, classes=tuple(range(classes)), pixels=pixels)
    return Config(network=network), info


def compiled(options: Options) -> dict[str, Any]:
    """Compile it, and read what it costs."""
    begun = time.perf_counter()
    devices = topologies.get_topology_desc(options.topology, "tpu").devices
    mesh = parallel.make_mesh(fsdp=options.fsdp, tensor=options.tensor, devices=devices)
    chip = chip_of(devices[0])
    if chip is None:
        raise ValueError(
            f"Nothing is known of {devices[0].device_kind!r}. See jaxdiff.costs.CHIPS."
        )
    config, info = configured(options)
    lower = lower_sampler if options.sample else lower_step
    lowered, flops, weights = lower(options, config, info, mesh)
    traced = time.perf_counter() - begun
    program = lowered.compile()
    seconds = time.perf_counter() - begun - traced
    text = program.as_text()
    if options.text:
        Path(options.text).write_text(text)
    memory = program.memory_analysis()
    found = {
        **dataclasses.asdict(options),
        "chips": len(devices),
        "weights": weights,
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "memory": chip.memory,
        "seconds_traced": traced,
        "seconds_compiled": seconds,
    }
    steps = options.sampling_steps if options.sample else 1
    return found | bounds(read_program(text, trips=steps), flops / len(devices), chip)


def bounds(program: Program, flops: float, chip: Any) -> dict[str, Any]:
    """Bytes, and seconds at published rates: the longest of them is the least that a call takes.

    Sending is counted along one axis of the network alone, as if nothing else went on at the time.
    """
    sent: dict[str, dict[str, float]] = defaultdict(lambda: {"count": 0, "bytes": 0, "sent": 0})
    for one in program.collectives:
        row = sent[f"{one.kind} {'in loop' if one.in_loop else 'outside'}"]
        row["count"] += one.times
        row["bytes"] += one.bytes * one.times
        row["sent"] += one.sent
    seconds = {
        "compute": flops / chip.flops,
        "memory": program.bytes / chip.bandwidth,
        "communication": sum(row["sent"] for row in sent.values()) / chip.link,
    }
    return {
        "flops": flops,
        "bytes": program.bytes,
        "collectives": dict(sent),
        "seconds": seconds,
        "bound": seconds["compute"] / max(seconds.values()),
    }


def lower_step(options: Options, config: Config, info: DataInfo, mesh):
    """The training step of the recipe."""
    players = eqx.filter_eval_shape(lambda: {"model": build_player(config, info)})
    shapes = eqx.filter_eval_shape(init_train_state, players, jax.random.key(0))
    placed = parallel.shard_params(shapes.unpack(), mesh, rules=TENSOR_RULES)
    state, step = TrainState.pack(**placed), make_train_step(players)
    batch = examples(options, info, mesh)
    weights = networks.num_params(players["model"].model.network)
    return step.lower(state, batch, platform="tpu"), step.flops(state, batch), weights


def lower_sampler(options: Options, config: Config, info: DataInfo, mesh):
    """DDIM with classifier-free guidance."""
    model = eqx.filter_eval_shape(lambda: build_denoiser(config, info))
    model = parallel.shard_params(model, mesh, rules=TENSOR_RULES)
    arrays, rest = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    cond = examples(options, info, mesh)["cond"]
    sharding = parallel.batch_sharding(mesh)

    def draw(arrays, key, cond):
        guided = jaxdiff.guidance.ClassifierFree(eqx.combine(arrays, rest), info.null_cond, 1.5)
        return jaxdiff.sample(
            key, guided, info.event_shape, cond.shape[0], cond=cond, solver=solvers.DDIM(),
            times=options.sampling_steps, sharding=sharding,
        ).x  # fmt: skip

    key = jax.eval_shape(functools.partial(jax.random.key, 0))
    traced = jax.jit(draw).trace(arrays, key, cond)
    flops = count_flops(draw, arrays, key, cond, trips=options.sampling_steps)
    weights = networks.num_params(model.network)
    return traced.lower(lowering_platforms=("tpu",)), flops, weights


def examples(options: Options, info: DataInfo, mesh) -> dict[str, Any]:
    """Shapes of a batch."""
    count, split = options.per_chip * mesh.size, parallel.batch_sharding(mesh)
    shape = (count, *info.event_shape)
    return {
        "x": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split),
        "cond": jax.ShapeDtypeStruct((count,), jnp.int32, sharding=split),
    }


def report(found: dict[str, Any]) -> str:
    """The result, to read."""
    giga = 2**30
    lines = [
        f"{found['network']} on {found['topology']}, {found['weights'] / 1e6:.1f}M weights, "
        f"{found['per_chip']} examples a chip; compiled in {found['seconds_compiled']:.0f} s",
        f"memory of a chip: {found['arguments'] / giga:.2f} GiB of arguments, "
        f"{found['temporary'] / giga:.2f} temporary, {found['peak'] / giga:.2f} at the peak, "
        f"of {found['memory'] / giga:.0f}",
        f"{found['flops'] / 1e12:.2f} TFLOP, {found['bytes'] / 1e9:.1f} GB of its memory",
    ]
    for kind, row in sorted(found["collectives"].items()):
        lines.append(f"{kind}: {row['count']} of {row['bytes'] / 1e6:.1f} MB in all")
    seconds = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in found["seconds"].items())
    lines.append(f"at published rates: {seconds}; utilisation at most {found['bound']:.0%}")
    return "\n".join(lines)


def main(options: Options) -> None:
    """Compile, print, and keep the result."""
    # Programs of machines that are not there cannot be loaded again.
    jax.config.update("jax_enable_compilation_cache", False)
    found = compiled(options)
    print(report(found))
    if options.out:
        with Path(options.out).open("a") as file:
            file.write(json.dumps(found) + "\n")


def cli(args: list[str] | None = None) -> int:
    """The command line; the exit status."""
    options = tyro.cli(Options, args=args)
    # The compiler asks a metadata server what machine this is, and waits.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    jax.config.update("jax_platforms", "cpu")
    return run(lambda: main(options))


if __name__ == "__main__":
    sys.exit(cli())

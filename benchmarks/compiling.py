"""How long the digits preset's programs take to trace, lower and compile, and what they hold."""

import collections
from collections.abc import Callable, Iterator
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

import jaxdiff
from benchmarks.measure import Record, seconds
from jaxdiff.training import init_train_state, make_train_step
from train.core.data import DataInfo
from train.pretraining import recipe

STAGES = {
    "trace": "/jax/core/compile/jaxpr_trace_duration",
    "lower": "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "compile": "/jax/core/compile/backend_compile_duration",
}
SPENT: collections.Counter[str] = collections.Counter()


def _listen(event: str, duration: float, **_: Any) -> None:
    SPENT[event] += duration


def first_calls(name: str, call: Callable[[], Any], repeats: int = 3) -> Iterator[Record]:
    """Seconds of a first call and of its stages, of all programs that it needs, by JAX's count."""
    rows = collections.defaultdict(list)
    for _ in range(repeats):
        jax.clear_caches()
        SPENT.clear()
        rows["first call"].append(seconds(call))
        for stage, event in STAGES.items():
            rows[stage].append(SPENT[event])
    for stage, values in rows.items():
        yield Record.of(f"{name}, {stage}", values, "s", "seconds")


def memory(name: str, lowered: jax.stages.Lowered) -> Record:
    """Arguments, results and temporary buffers of a program, by XLA's count."""
    stats = lowered.compile().memory_analysis()
    total = stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes
    total -= stats.alias_size_in_bytes  # results in the place of arguments
    return Record.of(f"{name}, memory", [total / 1e6], "MB", "bytes")


def compile_times() -> Iterator[Record]:
    """The training step, and samplers of 64 examples, with nothing kept from before."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # else a process that began with one keeps it
    jax.monitoring.register_event_duration_secs_listener(_listen)
    config = recipe.PRESETS["digits"][1]
    info = DataInfo((8, 8, 1), num_classes=10, pixels=True)
    players = {"model": recipe.build_player(config, info)}
    step, state = make_train_step(players), init_train_state(players, jax.random.key(0))
    count = config.batch_size
    batch = {"x": jnp.zeros((count, 8, 8, 1)), "cond": jnp.zeros(count, jnp.int32)}
    model, key, labels = players["model"].model, jax.random.key(1), batch["cond"]

    def train():
        return step(jax.tree.map(jnp.copy, state), batch)  # the step donates its state

    yield from first_calls("digits train step", train)
    yield memory("digits train step", step.lower(state, batch))
    times = model.process.times(config.evaluation.sampling_steps, model.process.t_min)
    for solver in (jaxdiff.solvers.DDIM(), diffrax.Heun()):

        def sample(model, key, labels, solver=solver):
            options = {"cond": labels, "solver": solver, "times": times}
            return jaxdiff.sample(key, model, (8, 8, 1), count, **options).x

        name = f"digits sampler, {type(solver).__name__}"
        yield from first_calls(name, lambda sample=sample: sample(model, key, labels))
        yield memory(name, jax.jit(sample).lower(model, key, labels))

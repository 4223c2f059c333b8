"""What all recipes share: the loop with its log, and errors and signals as one line."""

import contextlib
import dataclasses
import os
import platform
import re
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path
from tqdm import tqdm

from jaxdiff import parallel
from jaxdiff._tree import jit
from jaxdiff.costs import chip_of
from jaxdiff.data import make_loader
from jaxdiff.denoiser import Denoiser
from jaxdiff.flow_map import FlowMap
from jaxdiff.networks import TENSOR_RULES
from jaxdiff.training import (
    CheckpointStore,
    Hook,
    Interrupted,
    Player,
    TrainState,
    fit,
    init_train_state,
    load_run,
    make_train_step,
    outline,
    save_model,
)
from train.core import figures
from train.core.config import RunConfig, check_same, save_config, to_json
from train.core.data import DataInfo, Source
from train.core.evaluation import check_metrics, evaluate, picture
from train.core.sampling import check_sampling, draw, load_model, requested
from train.core.writers import Writer, build_writers, check_writers


def run(fn: Callable[[], Any]) -> int:
    """Call `fn`; an error or a signal becomes one line and an exit status."""
    keep_programs()
    try:
        fn()
    except Interrupted as stop:
        print(f"\n{stop} A checkpoint is written; the same command goes on.", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        print(
            f"\nerror: {error.name} is missing. Install it: pip install 'jaxdiff[train]'",
            file=sys.stderr,
        )
        return 1
    except jax.errors.JaxRuntimeError as error:
        reason = (str(error).splitlines() or [""])[0]
        if jax.process_count() > 1:
            print(
                f"\nerror: {reason}. This ends all processes, or another one has ended: start all "
                "of them again, and the same command goes on from the last checkpoint.",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)  # an orderly end would wait for the process that is gone
        print(f"\nerror: {reason}", file=sys.stderr)
        return 1
    except (ValueError, TypeError, OSError, ArithmeticError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    return 0


def keep_programs() -> None:
    """Keep compiled programs for the next start, in ~/.cache/jaxdiff/.

    JAX_COMPILATION_CACHE_DIR names another directory, JAX_ENABLE_COMPILATION_CACHE=0 keeps none.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if folder is None:
        # Programs for one processor may be none for another that shares the home directory.
        cpu = Path("/proc/cpuinfo")
        flags = re.search("^flags.*$", cpu.read_text(), re.M) if cpu.exists() else None
        kind = f"{platform.machine()}-{zlib.crc32(flags[0].encode()) if flags else 0:08x}"
        folder = str(Path.home() / ".cache" / "jaxdiff" / kind)
    jax.config.update("jax_compilation_cache_dir", folder)
    # Small programs are many; the second start of a command compiles none of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


def say(text: str) -> None:
    """Print once, however many processes there are."""
    if parallel.is_first():
        print(text)


class Log:
    """Hands what is logged to the writers, and shows a progress bar; `rate` is steps/s.

    Attributes:
        flops: operations of a step on all devices, once they are known.

    Args:
        writers: where numbers and pictures go.
        first_step: where the run begins or goes on.
        steps: where it ends.
        batch_size: examples of a step.
        sampled: the player whose loss is the run's.
    """

    def __init__(
        self,
        writers: Sequence[Writer],
        first_step: int,
        steps: int,
        batch_size: int,
        sampled: str = "model",
    ):
        self.writers, self.sampled = writers, sampled
        self.rate: float | None = None
        self.flops: int | None = None
        self.batch_size = batch_size
        self.begun: tuple[int, float] | None = None  # the first interval holds the compilation
        hidden = not parallel.is_first()
        self.bar = tqdm(
            total=steps, initial=first_step, unit="step", file=sys.stderr, disable=hidden
        )

    def __call__(self, step: int, state: TrainState, metrics: dict[str, float]) -> None:
        """Log the metrics of a step."""
        now = time.perf_counter()
        if self.begun is None:
            self.begun = (step, now)
        elif step > self.begun[0]:
            self.rate = (step - self.begun[0]) / (now - self.begun[1])
        if f"{self.sampled}/loss" in metrics:  # of several players
            metrics = {**metrics, "loss": metrics[f"{self.sampled}/loss"]}
        self.scalars(step, {**metrics, **self.speed()})
        if "loss" in metrics:
            self.bar.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
        self.bar.update(step - self.bar.n)

    def speed(self) -> dict[str, float | None]:
        """Steps, examples and operations a second, and the share of what the devices could do.

        Operations are those of the model alone, in units of 10^12; what devices could do is what
        their makers say of bfloat16, whatever the run computes in.
        """
        if self.rate is None:
            return {}
        speed: dict[str, float | None] = {
            "steps_per_second": self.rate,
            "examples_per_second": self.rate * self.batch_size,
        }
        if self.flops is not None:
            done, chip = self.rate * self.flops, chip_of(jax.devices()[0])
            speed["tflops_per_second"] = done / 1e12
            speed["utilisation"] = done / (chip.flops * jax.device_count()) if chip else None
        return speed

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Log other numbers; None is left out."""
        plain = {name: np.asarray(v).tolist() for name, v in values.items() if v is not None}
        for writer in self.writers:
            writer.scalars(step, plain)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Log a PNG file."""
        for writer in self.writers:
            writer.picture(step, name, path)

    def close(self) -> None:
        """Finish the progress bar and the writers."""
        self.bar.close()
        for writer in self.writers:
            writer.close()


@jit
def _loss_of(loss, model, key, batch):
    return loss(model, key, batch, {})[0]


class Watch:
    """Between steps: a picture of samples, and the loss of the averaged weights on held-out data.

    The same examples, times and noise each time, so that the curve shows the model alone.

    Args:
        config: of the run.
        held_out: the data of the loss.
        mesh: the devices.
        log: where both go.
        sampled: name of the player that is sampled.
        loss: of a model alone, or None.
    """

    def __init__(self, config: RunConfig, held_out: Source, mesh, log: Log, sampled: str, loss):
        self.config, self.mesh, self.log = config, mesh, log
        self.sampled, self.loss, self.info = sampled, loss, DataInfo.of(held_out)
        chosen = np.random.default_rng(config.seed).permutation(len(held_out))
        self.batch = held_out[np.sort(chosen[: min(256, len(held_out))])]
        classes = len(self.info.classes)
        self.count = config.evaluation.per_class * classes if classes else 64
        self.cond = requested(held_out, self.info, self.count)

    def __call__(self, step: int, state: TrainState, metrics: dict[str, float]) -> None:
        """Write samples/<step>.png, and one line of the log."""
        config, key = self.config, jax.random.key(self.config.seed + 1)
        model = state.players[self.sampled].averaged(index=config.evaluation.average)
        if self.mesh.size > 1:
            model = parallel.join_devices(model, parallel.batch_sharding(self.mesh))
        if self.loss is not None:
            value = _loss_of(self.loss, model, key, self.batch)
            self.log.scalars(step, {"held_out_loss": float(value)})
        out, _ = draw(config.evaluation, model, self.info, self.mesh, key, self.cond, self.count)
        samples = parallel.fetch(out.x)
        if parallel.is_first():
            folder = Path(config.run_dir) / "samples"
            folder.mkdir(exist_ok=True)
            path = folder / f"{step:08d}.png"
            picture(path, samples, self.cond, self.batch["x"], config.evaluation, self.info)
            self.log.picture(step, "samples", path)


def launch(config: RunConfig) -> None:
    """Join the other processes of the run, if there are any; before anything else.

    Of a run by itself the cores of a CPU make as many devices as its mesh has.

    Raises:
        ValueError: for a coordinator that does not answer, and numbers that do not fit.
    """
    given = dataclasses.asdict(config.launch)
    detect, timeout = given.pop("detect"), given.pop("timeout")
    if detect or any(value is not None for value in given.values()):
        parallel.initialize(**given, timeout=timeout)
        say(
            f"{jax.process_count()} processes. If one is killed, JAX ends the others within two "
            "minutes: start all of them again, and the same command goes on."
        )
    elif config.mesh.data is not None:
        count = config.mesh.data * config.mesh.fsdp * config.mesh.tensor
        # Too late where JAX has its devices already; a mesh that does not fit them is refused.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)


def build_mesh(config: RunConfig) -> jax.sharding.Mesh:
    """The mesh of the configuration."""
    return parallel.make_mesh(config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)


def check(config: RunConfig) -> None:
    """Refuse a run that cannot be, before any work.

    Raises:
        ValueError: for numbers that make no run, for options that the solver does not have, for
            what is not installed, for a batch that the devices cannot share, or for a
            configuration that contradicts the run in the directory.
    """
    config.check()
    check_sampling(config.evaluation)
    run_dir = Path(config.run_dir)
    for path in (run_dir, run_dir / "checkpoints"):
        if path.exists() and not path.is_dir():
            raise ValueError(f"`run_dir` must be a directory, got the file {path}.")
    check_writers(config.writers)
    mesh = build_mesh(config)
    count = mesh.size // mesh.shape["tensor"]
    if config.batch_size % count:
        raise ValueError(
            f"`batch_size` must be divisible by the {count} devices, got {config.batch_size}."
        )
    check_same(config)


class Profiled:
    """A step some of whose calls the profiler watches.

    Args:
        step: the step.
        count: how many calls.
        folder: where the trace goes, for TensorBoard's or XProf's profile page.
        after: how many calls pass first.
    """

    def __init__(self, step: Callable[..., Any], count: int, folder: Path, after: int = 5):
        self.step, self.folder, self.calls = step, folder, 0
        self.first, self.last = after, after + count

    def __call__(self, *args: Any) -> Any:
        """The step."""
        if self.calls == self.first:
            jax.block_until_ready(args)
            jax.profiler.start_trace(str(self.folder))
        out = self.step(*args)
        self.calls += 1
        if self.calls == self.last:
            jax.block_until_ready(out)
            jax.profiler.stop_trace()
        return out

    def close(self) -> None:
        """Finish a trace that the run's end has cut short."""
        if self.first < self.calls < self.last:
            jax.profiler.stop_trace()
        elif self.calls <= self.first:
            say(
                f"The profiler saw nothing: it lets {self.first} steps pass, and no more were left."
            )


def train(
    config: RunConfig,
    build: Callable[[], Mapping[str, Player]] | Mapping[str, Player],
    source: Source,
    held_out: Source,
    *,
    sampled: str,
    held_out_loss: Callable[..., Any] | None = None,
    describe: bool = True,
    constants: Mapping[str, Any] | None = None,
) -> TrainState:
    """What every recipe does with its players: begin or go on, log, watch, keep, and evaluate.

    Args:
        config: the recipe's configuration, which `check` has passed.
        build: makes the players, by name. On several devices it is compiled, and each makes its
            own part. Or the players themselves, such as those of another run.
        source: the data to train on.
        held_out: the data to measure against.
        sampled: the player whose averaged model is sampled and measured.
        held_out_loss: `(model, key, batch, frozen)`, logged where samples are; None for none.
        describe: whether the run's directory alone is to make its models; critics and the like,
            which make no samples, are not in it.
        constants: what losses find by name beside the players, such as a teacher.

    Returns:
        The state at the end.

    Raises:
        ValueError: before any work, for metrics that cannot be taken of the data, and whatever
            the directory, `init_from` or the data are refused for.
    """
    run_dir, info, mesh = Path(config.run_dir), DataInfo.of(source), build_mesh(config)
    first = parallel.is_first()
    index, count = parallel.batch_part(mesh)
    check_metrics(info, config.evaluation, len(held_out))
    loader = make_loader(
        source,
        config.batch_size,
        seed=config.seed,
        flip=config.data.flip,
        process_index=index,
        process_count=count,
        num_threads=config.data.threads,
    )
    store = CheckpointStore(run_dir / "checkpoints", keep=config.keep_checkpoints)
    several = mesh if mesh.size > 1 else None
    begin: Any = build
    if not callable(build):
        begin = dict(build)
    elif config.init_from and not store.steps():
        begin = dict(build())
        begin[sampled] = begin_from(begin[sampled], config.init_from)
    elif several is None:
        begin = build()
    players = outline(begin) if callable(begin) else begin
    if first:
        run_dir.mkdir(parents=True, exist_ok=True)
    if first and describe:
        models = {n: p for n, p in players.items() if isinstance(p.model, Denoiser | FlowMap)}
        save_model(run_dir, models, sampled=sampled, **dataclasses.asdict(info))
    key = jax.random.key(config.seed)
    state = init_train_state(begin, key, mesh=several, rules=TENSOR_RULES)
    batches = iter(loader)
    restored = store.restore_latest(state.unpack())
    if restored is not None:
        unpacked, data_state, _ = restored
        state = TrainState.pack(**unpacked)
        batches.set_state(data_state)
        say(f"Going on from step {int(state.step)} of {config.steps} in {run_dir}.")
    done = int(state.step)
    writers = []
    if first:
        save_config(config)
        writers = build_writers(config.writers, run_dir, done, to_json(config))
    log = Log(writers, done, config.steps, config.batch_size, sampled)
    hooks = [Hook(config.log_every, log, before_checkpoint=True)]
    if config.sample_every:
        watch = Watch(config, held_out, mesh, log, sampled, held_out_loss)
        hooks.append(Hook(config.sample_every, watch))
    step = make_train_step(players)
    begun, known = state, dict(constants or {})

    def place(batch):
        batch = parallel.shard_batch(batch, mesh)
        if log.flops is None:
            log.flops = step.flops(begun, batch, known)
        return batch

    profiled = None
    if config.profile and first:
        profiled = Profiled(step, config.profile, run_dir / "profile")
    try:
        state = fit(
            profiled or step,
            state,
            batches,
            num_steps=config.steps,
            hooks=hooks,
            store=store,
            checkpoint_every=config.checkpoint_every,
            config=to_json(config),
            place=place,
            constants=known,
        )
    finally:
        log.close()
        if profiled is not None:
            profiled.close()
    if first:
        figures.loss_curve(run_dir)
    settings = config.evaluation
    if settings.ema_width is None:
        model = state.players[sampled].averaged(index=settings.average)
    else:
        model = load_model(config).model
    evaluate(config, model, source, held_out, mesh, steps_per_second=log.rate)
    return state


def begin_from(player: Player, run_dir: str) -> Player:
    """A player whose network begins with the averaged weights of another run."""
    found = load_run(run_dir)
    network, missing, left = restore_weights(player.model.network, found.model.network)
    say(f"Beginning with the weights of step {found.step} in {run_dir}.")
    for names, what in ((missing, "begin anew"), (left, "are left out")):
        if names:
            say(f"  {len(names)} weights {what}: {', '.join(names)}")
    return eqx.tree_at(lambda p: p.model.network, player, network)


def restore_weights(network: Any, found: Any) -> tuple[Any, Sequence[str], Sequence[str]]:
    """A network with the weights of another, where names and shapes are the same.

    Returns:
        The network, the names of its weights that were not found, and of those that were left.
    """
    there = {keystr(path): leaf for path, leaf in tree_leaves_with_path(found)}
    used: set[str] = set()

    def choose(path, leaf):
        name = keystr(path)
        other = there.get(name)
        if other is None or np.shape(other) != np.shape(leaf):
            return leaf
        used.add(name)
        return jnp.asarray(other, leaf.dtype)

    chosen = tree_map_with_path(choose, network)
    names = [keystr(path) for path, _ in tree_leaves_with_path(network)]
    return chosen, [n for n in names if n not in used], [n for n in there if n not in used]

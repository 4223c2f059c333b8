"""A run directory on its own: what its models are, beside their weights.

`model.json` names classes of jaxdiff and the arguments they were made with, and nothing else; to
load it executes no code but theirs.
"""

import dataclasses
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from jaxdiff._tree import is_arraylike
from jaxdiff.networks import Network
from jaxdiff.training._checkpoint import CheckpointStore, write_json
from jaxdiff.training._ema import PowerEMA, reconstruct_ema
from jaxdiff.training._step import Player, PlayerState, check_players

MODEL = "model.json"
# Where the classes are that a file may name.
MODULES = tuple(
    f"jaxdiff{part}" for part in ("", ".networks", ".processes", ".predictions", ".distillation")
)


class Run(NamedTuple):
    """A trained model, and what one must know to use it.

    Attributes:
        model: with its trained or averaged weights, usually a denoiser.
        step: how many steps it was trained.
        info: what `save_model` was given beside the players, e.g. the shape of the data.
        config: the configuration in the checkpoint, or None.
    """

    model: Any
    step: int
    info: dict[str, Any]
    config: Any


def save_model(
    run_dir: str | Path, players: Mapping[str, Player], *, sampled: str | None = None, **info: Any
) -> None:
    """Write what `load_run` needs beside the checkpoints: `model.json` in the run directory.

    Args:
        run_dir: the run's directory, whose checkpoints are in "checkpoints"; made if it is missing.
        players: as for `make_train_step`, or some of them; their models are made of classes of
            jaxdiff.
        sampled: the player that `load_run` loads if it is not told which; None for the only one.
        info: what else one must know to use them, as JSON, e.g. `event_shape=(32, 32, 3)`.

    Raises:
        TypeError: for a model that holds anything but classes of jaxdiff, numbers, text and
            arrays of the constants, naming it.
    """
    check_players(players)
    described = {
        name: {
            "model": to_json(player.model, name),
            "averages": player.ema.num_averages if player.ema else 0,
            "widths": player.ema.sigma_rels if isinstance(player.ema, PowerEMA) else (),
        }
        for name, player in players.items()
    }
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    chosen = {} if sampled is None else {"sampled": sampled}
    write_json(run_dir / MODEL, {"players": described, "info": info, **chosen})


def load_run(
    run_dir: str | Path,
    *,
    player: str | None = None,
    average: int | None = 0,
    sigma_rel: float | None = None,
    step: int | None = None,
) -> Run:
    """A trained model from its run directory: no data, no optimiser, no code of the run.

    Args:
        run_dir: what `save_model` and a `CheckpointStore` in its "checkpoints" have written.
        player: whose model; None for the one that is sampled, or the only one.
        average: which of its averages; None for the weights as they were trained, as also for a
            player without averages.
        sigma_rel: the relative width of an average that is made here (`reconstruct_ema`), of
            those of a `PowerEMA` in all checkpoints; instead of one of them.
        step: of the checkpoint; None for the newest that is whole.

    Returns:
        The model of the checkpoint, its step, and what was saved beside it.

    Raises:
        ValueError: if the directory holds no run, no such checkpoint, player or average, or
            names a class that is not jaxdiff's; or for a `sigma_rel` of a player without
            power-function averages.
    """
    path = Path(run_dir) / MODEL
    try:
        stored = json.loads(path.read_bytes())
        players, info = dict(stored["players"]), dict(stored["info"])
        described = {name: (int(p["averages"]), p["model"]) for name, p in players.items()}
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"`run_dir` must be the directory of a run, got {str(run_dir)!r}: it has no {MODEL}. "
            "`save_model` writes one, and so does going on with the run."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}.") from None
    if player is None:
        player = stored.get("sampled", next(iter(players)) if len(players) == 1 else None)
    if player not in players:
        raise ValueError(f"`player` must be one of {sorted(players)}, got {player!r}.")
    count, written = described[player]
    average = None if count == 0 and average == 0 else average
    if average is not None and not 0 <= average < count:
        raise ValueError(
            f"`average` must be None or below {count}, the number of averages of {player!r}, "
            f"got {average}."
        )
    widths = tuple(players[player].get("widths", ()))
    if sigma_rel is not None and not widths:
        raise ValueError(
            f"`sigma_rel` must be None for {player!r}, whose averages are not of PowerEMA, got "
            f"{sigma_rel}. Train with an ema of PowerEMA()."
        )
    try:
        model = from_json(written)
    except TypeError as error:  # arguments that the class does not have
        raise ValueError(f"{path} is damaged: {error}.") from None
    if not isinstance(model, eqx.Module | Network):
        raise ValueError(f"{path} is damaged: the model of {player!r} is {written!r:.60}.")
    # Averages are of the network; None in place of those that are not wanted.
    averages: list[PyTree] = []
    weights = eqx.filter(getattr(model, "network", None), _is_weight)
    if sigma_rel is not None:
        averages = [weights] * len(widths)
    elif average is not None:
        averages = [None] * average + [weights]
    template = {
        "players": {player: PlayerState(model, None, averages)},
        "step": jnp.zeros((), jnp.int32),
    }
    store = CheckpointStore(Path(run_dir) / "checkpoints")
    restored = (
        store.restore_latest(template, partial=True)
        if step is None
        else store.restore(template, step=step, partial=True)
    )
    if restored is None:
        raise ValueError(f"The run in {run_dir} has no checkpoint yet. Train it first.")
    found, _, config = restored
    state, reached = found["players"][player], int(found["step"])
    if sigma_rel is not None:
        snapshots: list[tuple[float, float, PyTree]] = []
        for at in store.steps():
            if at <= reached:
                there = store.restore(template, step=at, partial=True)[0]["players"][player]
                snapshots += zip((at,) * len(widths), widths, there.averages, strict=True)
        made = reconstruct_ema(snapshots, step=reached, sigma_rel=sigma_rel)
        state, average = dataclasses.replace(state, averages=[made]), 0
    model = state.model if average is None else state.averaged(index=average)
    return Run(model, reached, info, config)


def _is_weight(leaf: Any) -> bool:
    return is_arraylike(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)


def to_json(value: Any, where: str) -> Any:
    """A model as JSON: classes of jaxdiff, by name, and their arguments.

    Raises:
        TypeError: for anything else, naming where it is.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [to_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return np.asarray(value).tolist()
    if isinstance(value, (np.dtype, type, type(jnp.float32))):
        return {"dtype": jnp.dtype(value).name}
    arguments = _arguments(value)
    module = _module_of(type(value))
    if arguments is None or module is None:
        raise TypeError(
            f"`{where}` must be of a class of jaxdiff to be written, got {type(value).__name__} of "
            f"{type(value).__module__}. Keep the code that makes it, and restore the weights with "
            "`CheckpointStore.restore_latest`."
        )
    items = {name: to_json(item, f"{where}.{name}") for name, item in arguments.items()}
    return {"class": f"{module}.{type(value).__name__}", **items}


def _arguments(value: Any) -> dict[str, Any] | None:
    """What an object was made with, or None for one that does not tell."""
    if hasattr(value, "arguments"):
        return dict(value.arguments)
    if isinstance(value, eqx.Module) and dataclasses.is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return None


def from_json(value: Any) -> Any:
    """What `to_json` wrote, with shapes in place of weights.

    Raises:
        ValueError: for a class that is not jaxdiff's.
    """
    if isinstance(value, list):
        return tuple(from_json(item) for item in value)
    if not isinstance(value, dict):
        return value
    if set(value) == {"dtype"}:
        return jnp.dtype(value["dtype"]).type
    module, _, name = str(value.get("class")).rpartition(".")
    kind = getattr(importlib.import_module(module), name, None) if module in MODULES else None
    if not isinstance(kind, type) or not issubclass(kind, (eqx.Module, Network)):
        raise ValueError(f"{MODEL} must name classes of jaxdiff, got {value.get('class')!r}.")
    arguments = {name: from_json(item) for name, item in value.items() if name != "class"}
    if issubclass(kind, Network):
        # Weights come from the checkpoint: to draw some first takes longer than to read them.
        build: Any = kind
        return nnx.eval_shape(lambda: build(**arguments, rngs=nnx.Rngs(0)))
    return kind(**arguments)


def _module_of(kind: type) -> str | None:
    """The public module that has a class, or None."""
    for module in MODULES:
        if getattr(importlib.import_module(module), kind.__name__, None) is kind:
            return module
    return None

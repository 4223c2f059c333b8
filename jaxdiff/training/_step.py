"""Players and the training step."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_key
from jaxdiff._tree import traced_floats
from jaxdiff.training._ema import EMA


def _arrays(state: "TrainState") -> tuple:
    return state.step, state.key, state.arrays


def _network(model: Any) -> Any:
    return model.network


class Player(eqx.Module):
    """A model that learns: what it minimises, and how.

    Args:
        model: any pytree, usually a `NetworkDenoiser`.
        loss: `loss(model, key, batch, frozen) -> (scalar, metrics)`; `frozen` holds the other
            players' current models and the constants, by name.
        optimizer: an optax transformation; gradient clipping (`optax.chain`) and accumulation
            (`optax.MultiSteps`) are its business.
        ema: average of the weights, or None. Updated at every update of the player; with
            `optax.MultiSteps` that is every micro-step, so count its decay in those.
        every: update only at steps divisible by this.
        trainable: which part of the model learns, `model -> subtree`. Everything else, such as
            the constants of a noise schedule, never changes.
    """

    model: PyTree
    loss: Callable[..., tuple[Array, dict[str, Array]]]
    optimizer: optax.GradientTransformation = eqx.field(static=True)
    ema: EMA | None = None
    every: int = eqx.field(static=True, default=1)
    trainable: Callable[[PyTree], PyTree] = eqx.field(static=True, default=_network)

    def __check_init__(self):
        if self.every < 1:
            raise ValueError(
                f"`every` must be at least 1, got {self.every}. Pass 1 for every step."
            )


class PlayerState(eqx.Module):
    """A player's model, its optimiser's state, and the averages of its weights."""

    model: PyTree
    opt_state: PyTree
    averages: list[PyTree]

    def averaged(self, trainable: Callable[[PyTree], PyTree] = _network, index: int = 0) -> PyTree:
        """The model with its averaged weights, as one samples from it."""
        if not self.averages:
            return self.model
        weights = eqx.combine(self.averages[index], trainable(self.model))
        return eqx.tree_at(trainable, self.model, weights)


class TrainState(eqx.Module):
    """All of a training run that changes: step, key, and every player.

    The players are held as a flat list of arrays, because taking apart and rebuilding a network
    of hundreds of layers costs more Python than a step on an accelerator takes. `players`
    rebuilds them; `unpack` and `pack` convert to and from a plain dict, e.g. for checkpoints.
    """

    step: Array
    key: PRNGKeyArray
    arrays: list[Array]
    structure: Any = eqx.field(static=True)
    rest: tuple[Any, ...] = eqx.field(static=True)

    @classmethod
    def pack(
        cls, *, step: Array, key: PRNGKeyArray, players: dict[str, PlayerState]
    ) -> "TrainState":
        """The state of these parts."""
        leaves, structure = jax.tree.flatten(players)
        arrays = [leaf for leaf in leaves if eqx.is_array(leaf)]
        rest = tuple(None if eqx.is_array(leaf) else leaf for leaf in leaves)
        return cls(step, key, arrays, structure, rest)

    @property
    def players(self) -> dict[str, PlayerState]:
        """Every player's state, rebuilt."""
        arrays = iter(self.arrays)
        leaves = [next(arrays) if leaf is None else leaf for leaf in self.rest]
        return jax.tree.unflatten(self.structure, leaves)

    def unpack(self) -> dict[str, Any]:
        """`{"step": ..., "key": ..., "players": {name: PlayerState}}`."""
        return {"step": self.step, "key": self.key, "players": self.players}


def init_train_state(players: dict[str, Player], key: PRNGKeyArray) -> TrainState:
    """The state before the first step. Copies the models, since training donates its state.

    Raises:
        TypeError: if `key` is not a typed key.
    """
    check_key(key)
    state = TrainState.pack(
        step=jnp.zeros((), jnp.int32),
        key=key,
        players={name: _init_player(player) for name, player in players.items()},
    )
    return jax.tree.map(jnp.array, state)


def _init_player(player: Player) -> PlayerState:
    model = traced_floats(player.model)
    # Updates return strong types; weakly typed weights would compile the step twice.
    strong = jax.tree.map(
        lambda leaf: leaf.astype(leaf.dtype) if eqx.is_inexact_array(leaf) else leaf,
        player.trainable(model),
    )
    model = eqx.tree_at(player.trainable, model, strong)
    params = eqx.filter(strong, eqx.is_inexact_array)
    averages = player.ema.init(params) if player.ema else []
    return PlayerState(model, player.optimizer.init(params), averages)


def _update(player: Player, state: PlayerState, key, batch, frozen, step):
    """One update of one player."""
    params, rest = eqx.partition(player.trainable(state.model), eqx.is_inexact_array)

    def with_weights(params):
        return eqx.tree_at(player.trainable, state.model, eqx.combine(params, rest))

    def objective(params):
        return player.loss(with_weights(params), key, batch, frozen)

    (value, metrics), grads = jax.value_and_grad(objective, has_aux=True)(params)
    updates, opt_state = player.optimizer.update(grads, state.opt_state, params)
    params = optax.apply_updates(params, updates)
    averages = state.averages
    if player.ema is not None:
        count = (step // player.every + 1).astype(float)
        averages = player.ema.update(averages, params, count)
    metrics = {"loss": value, "grad_norm": optax.tree.norm(grads), **metrics}
    return PlayerState(with_weights(params), opt_state, averages), metrics


def make_train_step(
    players: dict[str, Player],
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """One compiled training step over all players.

    `step(state, batch, constants=None) -> (state, metrics)`. Pure; `state` is donated, so keep
    only the returned one. Models, losses' numbers, batch and constants are all arguments of the
    program: new values never recompile it. Its randomness is `fold_in(state.key, state.step)`.

    Players are updated in the order given, each seeing the current models of the others, those
    before it already updated. Metrics are the loss, the norm of its gradient and the loss's own,
    named "player/metric" if there are several players. A player with `every` above 1 also reports
    "updated", 1 or 0, and zeros where it is 0.

    Args:
        players: `{name: Player}`, the ones `init_train_state` was given.
    """
    # Pairs, since a dict is rebuilt in the order of its keys.
    rules = [
        (
            name,
            dataclasses.replace(
                p, model=None, loss=traced_floats(p.loss), ema=traced_floats(p.ema)
            ),
        )
        for name, p in players.items()
    ]

    # Only what the compiled program returns is rebuilt; its structure never changes, so that
    # keeping the first one's makes later comparisons of structures a comparison of identity.
    def step(state: TrainState, batch: PyTree, constants: dict[str, PyTree] | None = None):
        arrays, rest = eqx.partition((rules, traced_floats(constants or {})), eqx.is_array)
        leaves, structure = jax.tree.flatten(rest)
        after, metrics = _run((structure, tuple(leaves)), state, arrays, batch)
        return TrainState(*_arrays(after), state.structure, state.rest), metrics

    return step


# Outside of `make_train_step`, so that steps that differ in numbers only share one program.
@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _run(static: tuple, state: TrainState, arrays: PyTree, batch: PyTree):
    """One update of every player whose turn it is."""
    rules, constants = eqx.combine(arrays, jax.tree.unflatten(*static))
    key = jax.random.fold_in(state.key, state.step)
    states, metrics = state.players, {}
    for index, (name, player) in enumerate(rules):
        models = {other: s.model for other, s in states.items() if other != name}
        args = (jax.random.fold_in(key, index), batch, {**constants, **models}, state.step)
        update = eqx.Partial(_update, player)
        if player.every == 1:
            states[name], own = update(states[name], *args)
        else:
            states[name], own = _sometimes(update, player.every, states[name], args)
        prefix = f"{name}/" if len(rules) > 1 else ""
        metrics |= {prefix + metric: value for metric, value in own.items()}
    return TrainState.pack(step=state.step + 1, key=state.key, players=states), metrics


def _sometimes(update, every, state, args):
    """`update` at steps divisible by `every`; else the state as it is, and metrics of zero."""
    arrays, rest = eqx.partition(state, eqx.is_array)

    def act(arrays):
        state, metrics = update(eqx.combine(arrays, rest), *args)
        return eqx.filter(state, eqx.is_array), {**metrics, "updated": jnp.ones(())}

    shapes = jax.eval_shape(act, arrays)[1]
    idle = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    arrays, metrics = jax.lax.cond(args[-1] % every == 0, act, lambda a: (a, idle), arrays)
    return eqx.combine(arrays, rest), metrics

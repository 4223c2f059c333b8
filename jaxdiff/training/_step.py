"""Players and the training step."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import (
    check_callable,
    check_count,
    check_key,
    check_kind,
    check_number,
    check_scalars,
)
from jaxdiff._tree import Number, is_arraylike, is_known, number, traced_floats
from jaxdiff.costs import flops_of
from jaxdiff.networks import without_remat
from jaxdiff.parallel import MIN_SIZE, Rules, gather_weights, on_mesh, shard_params
from jaxdiff.training._ema import EMA

# The key that players share is folded in here, far from their numbers.
_SHARED = 2**31


def _network(model: Any) -> Any:
    return model.network


class Player(eqx.Module):
    """A model that learns: what it minimises, and how.

    A loss is any callable `loss(model, key, batch, frozen) -> (scalar, metrics)`; metrics are
    numbers or vectors. `frozen` is a `Frozen`: the other players' current models and the constants
    by name, the training step, everybody's averages, and a key that all players share. A loss may
    be more than that:

        loss.init_state(model) -> state     it keeps a state, any pytree: it finds it in
                                            `frozen.state` and returns the next one third,
                                            `(scalar, metrics, state)`
        loss.gradient(model, key, batch, frozen) -> (scalar, metrics[, state]), gradient
                                            it makes its own gradient, a model with gradients in
                                            place of weights, as of `equinox.filter_grad`
        loss.gradients(...) -> (scalar, metrics[, state]), gradients
        loss.combine(*gradients) -> gradient
                                            it has several, and a rule for those of the weights that
                                            learn, of which a mask leaves others out

    Args:
        model: any pytree, usually a `NetworkDenoiser`.
        loss: what is minimised; or, without an optimiser, a rule
            `rule(model, key, batch, frozen) -> (next model, metrics[, state])`, such as `Follow`.
        optimizer: an optax transformation; gradient clipping (`optax.chain`) and accumulation
            (`optax.MultiSteps`) are its business. None for a rule.
        ema: average of the weights, or None. Updated at every update of the player; with
            `optax.MultiSteps` that is every micro-step, so count its decay in those.
        every: update only at steps divisible by this; or a function of the step that says whether
            to, for warm-ups, offsets and alternation.
        trainable: which part of the model learns, `model -> subtree`. Everything else, such as
            the constants of a noise schedule, never changes.
        mask: which entries of that part learn: booleans, broadcast to the weights, as a pytree of
            its structure or a prefix of it. The others see no gradient and stay bit for bit,
            whatever the optimiser does. None for all.
    """

    model: PyTree
    loss: Callable[..., Any]
    optimizer: optax.GradientTransformation | None = eqx.field(static=True, default=None)
    ema: EMA | None = None
    every: int | Callable[[Array], Array] = 1
    trainable: Callable[[PyTree], PyTree] = eqx.field(static=True, default=_network)
    mask: PyTree = None

    def __check_init__(self):
        check_callable("loss", self.loss, "losses.DenoisingLoss()")
        optimizer = self.optimizer
        if optimizer is not None and not (
            hasattr(optimizer, "init") and hasattr(optimizer, "update")
        ):
            raise TypeError(
                f"`optimizer` must be an optax transformation or None, got {optimizer!r:.60}. Pass "
                "optax.adam(1e-3), say."
            )
        if self.ema is not None:
            check_kind("ema", self.ema, EMA, "ConstantEMA(0.999)")
        if not callable(self.every):
            remedy = "Pass 1 for every step, or a function of the step."
            check_count("every", self.every, instead=remedy)


class PlayerState(eqx.Module):
    """A player's model, its optimiser's state, the averages of its weights, and its loss's state.

    Attributes:
        model: the current model.
        opt_state: the optimiser's; None for a rule.
        averages: averaged weights, one pytree for each average.
        updates: how often the player has been updated.
        loss_state: what the loss keeps; None for one without a state.
        trainable: which part of the model learns.
    """

    model: PyTree
    opt_state: PyTree
    averages: list[PyTree]
    updates: Array | None = None
    loss_state: PyTree = None
    trainable: Callable[[PyTree], PyTree] = eqx.field(static=True, default=_network)

    def averaged(
        self, trainable: Callable[[PyTree], PyTree] | None = None, *, index: int = 0
    ) -> PyTree:
        """The model with its averaged weights, as one samples from it.

        Args:
            trainable: another part of the model than the one that learned.
            index: which of several averages.
        """
        if not self.averages:
            return self.model
        if not 0 <= index < len(self.averages):
            raise ValueError(
                f"`index` must be below {len(self.averages)}, the number of averages, got {index}."
            )
        part = self.trainable if trainable is None else trainable
        weights = eqx.combine(self.averages[index], part(self.model))
        return eqx.tree_at(part, self.model, weights)


class Frozen(eqx.Module, Mapping):  # type: ignore[misc]
    """What a loss is given beside its model, key and batch; a mapping of models and constants.

    Attributes:
        entries: the other players' current models, and the constants, by name: `frozen["teacher"]`.
        step: the training step, an integer that is 0 at the first.
        key: a key of the step that all players share, for those that must see the same noise.
        players: every player's state, the own one included.
        state: what the loss itself keeps from step to step.
    """

    entries: dict[str, PyTree] = eqx.field(default_factory=dict)
    step: Array | int = 0
    key: PRNGKeyArray | None = None
    players: dict[str, PlayerState] = eqx.field(default_factory=dict)
    state: PyTree = None

    def averaged(self, name: str, index: int = 0) -> PyTree:
        """A player's model with its averaged weights; the own one too."""
        return self.players[name].averaged(index=index)

    def __getitem__(self, name: str) -> PyTree:
        """The model or constant of this name.

        Raises:
            KeyError: naming those there are.
        """
        if name not in self.entries:
            raise KeyError(f"no player or constant {name!r}; there are {sorted(self.entries)}")
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class Follow(eqx.Module):
    """A rule, for a player without an optimiser: its weights follow those of another player.

    weights <- decay weights + (1 - decay) theirs

    Args:
        player: whom to follow.
        decay: in [0, 1); 0 copies.
        part: which part of both models, `model -> subtree`.
    """

    player: str = eqx.field(static=True)
    decay: Number = number(0.0)
    part: Callable[[PyTree], PyTree] = eqx.field(static=True, default=_network)

    def __check_init__(self):
        check_number("decay", self.decay, least=0.0, below=1.0)

    def __call__(
        self, model: PyTree, key: PRNGKeyArray, batch: PyTree, frozen: Frozen
    ) -> tuple[PyTree, dict[str, Array]]:
        """The next model, and no metrics."""
        del key, batch

        def mix(mine, theirs):
            if not eqx.is_inexact_array(mine):
                return mine
            return (self.decay * mine + (1 - self.decay) * theirs).astype(mine.dtype)

        mixed = jax.tree.map(mix, self.part(model), self.part(frozen[self.player]))
        return eqx.tree_at(self.part, model, mixed), {}


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
        arrays = [leaf for leaf in leaves if is_arraylike(leaf)]
        rest = tuple(None if is_arraylike(leaf) else leaf for leaf in leaves)
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


def init_train_state(
    players: dict[str, Player] | Callable[[], dict[str, Player]],
    key: PRNGKeyArray,
    *,
    mesh: Mesh | None = None,
    rules: Rules = (),
    min_size: int = MIN_SIZE,
) -> TrainState:
    """The state before the first step. Copies the models, since training donates its state.

    Args:
        players: by name; or a function that makes them. On a mesh that function is compiled, and
            each device makes its own part: nothing is ever whole on one. `make_train_step` then
            takes `outline(players)`.
        key: typed PRNG key, a scalar, of which every step has its own.
        mesh: the devices over which the state is split, see `parallel.shard_params`; None for
            one device.
        rules: likewise.
        min_size: likewise.

    Returns:
        A `TrainState` at step 0.

    Raises:
        TypeError: if `key` is not a typed key.
        ValueError: for a player that has nothing to learn.
    """
    check_key(key)

    def make() -> TrainState:
        found = players() if callable(players) else players
        check_players(found)
        states = {name: _init_player(name, player) for name, player in found.items()}
        state = TrainState.pack(step=jnp.zeros((), jnp.int32), key=key, players=states)
        return jax.tree.map(jnp.array, state)

    options: dict[str, Any] = {"rules": rules, "min_size": min_size}
    if mesh is None:
        return _together(make())
    if not callable(players):
        return TrainState.pack(**shard_params(make().unpack(), mesh, **options))
    shapes = eqx.filter_eval_shape(make)
    shapes = TrainState.pack(**shard_params(shapes.unpack(), mesh, **options))
    placed = jax.tree.map(lambda leaf: leaf.sharding, jax.tree.leaves(shapes))
    leaves = jax.jit(lambda: jax.tree.leaves(make()), out_shardings=placed)()
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _together(state: TrainState) -> TrainState:
    """All arrays bound to the device that some are bound to, such as weights from a checkpoint.

    A step's results are bound to where they are: it would compile again for them.
    """
    arrays = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
    if not all(map(is_known, arrays)):  # inside a traced function
        return state
    places = {leaf.sharding for leaf in arrays if leaf.committed}
    if len(places) != 1 or not isinstance(place := places.pop(), SingleDeviceSharding):
        return state
    return jax.tree.map(lambda leaf: jax.device_put(leaf, place), state)


def outline(build: Callable[[], dict[str, Player]]) -> dict[str, Player]:
    """Players with shapes in place of their models' arrays, and all else as it is.

    For `make_train_step`, where no device could hold the models, and to restore into.

    Args:
        build: makes the players. It is traced: arrays of losses and masks must be in their fields,
            and not closed over.

    Returns:
        The players by name.
    """
    shapes = eqx.filter_eval_shape(build)
    check_players(shapes)

    # The compiler leaves out the models, which are not returned.
    @eqx.filter_jit
    def rest():
        return {name: dataclasses.replace(p, model=None) for name, p in build().items()}

    found = rest()
    return {name: dataclasses.replace(found[name], model=p.model) for name, p in shapes.items()}


def check_players(players: Any) -> None:
    """Reject anything but players by name.

    Raises:
        TypeError: for anything else.
        ValueError: for none at all.
    """
    if not isinstance(players, Mapping) or not all(
        isinstance(player, Player) for player in players.values()
    ):
        got = type(players).__name__
        if isinstance(players, Mapping):
            got += f" of {sorted({type(player).__name__ for player in players.values()})}"
        raise TypeError(
            f'`players` must be a dict of players by name, got {got}. Pass {{"model": player}}.'
        )
    if not players:
        raise ValueError("`players` must have one player at least, got an empty dict.")


def next_phase(
    state: TrainState,
    players: dict[str, Player],
    *,
    fresh: Collection[str] = (),
    mesh: Mesh | None = None,
    rules: Rules = (),
    min_size: int = MIN_SIZE,
) -> TrainState:
    """The state of a run that goes on with other players, losses or optimisers.

    Step and key go on, and so does all of a player that was there before: model, optimiser,
    averages and the loss's state. Those named in `fresh`, and those that were not there, begin
    anew with the models they are given, such as the teacher of the next round of a distillation.
    With the players of a checkpoint's phase this is also the template to restore it to.

    Args:
        state: at the end of the phase before.
        players: those of the next one, as for `make_train_step`.
        fresh: names of the players that begin anew.
        mesh: the devices over which the state is split, as for `init_train_state`; what goes on
            keeps the place that this gives it.
        rules: likewise.
        min_size: likewise.

    Raises:
        ValueError: for a player that is to go on and has a state of another structure, or one that
            has nothing to learn.
    """
    if isinstance(fresh, str) or (unknown := set(fresh) - set(players)):
        raise ValueError(
            f"`fresh` must name players, of {sorted(players)}, got "
            f"{fresh if isinstance(fresh, str) else sorted(unknown)!r}. Pass e.g. ('student',)."
        )
    before, states = state.players, {}
    for name, player in players.items():
        states[name] = _init_player(name, player)
        if name in before and name not in fresh:
            old, new = (_parts(s) for s in (before[name], states[name]))
            if differing := [part for part in old if _form(old[part]) != _form(new[part])]:
                raise ValueError(
                    f"The player {name!r} cannot go on: its {differing[0]} has another structure "
                    f"than before. Name it in `fresh` to begin anew with the model it is given."
                )
            states[name] = dataclasses.replace(before[name], trainable=player.trainable)
    after = TrainState.pack(step=state.step, key=state.key, players=states)
    after = jax.tree.map(jnp.array, after)
    if mesh is None:
        return after
    return TrainState.pack(**shard_params(after.unpack(), mesh, rules=rules, min_size=min_size))


def _parts(state: PlayerState) -> dict[str, PyTree]:
    return {
        "model": state.model,
        "optimiser": state.opt_state,
        "average": state.averages,
        "loss's state": state.loss_state,
    }


def _form(tree: PyTree) -> Any:
    arrays = [leaf for leaf in jax.tree.leaves(tree) if eqx.is_array(leaf)]
    return jax.tree.structure(tree), [(a.shape, a.dtype) for a in arrays]


def _strong(tree: PyTree) -> PyTree:
    """Arrays without weak types: updates return strong ones, and would compile the step twice."""
    return jax.tree.map(
        lambda leaf: leaf.astype(leaf.dtype) if eqx.is_array(leaf) and not _is_key(leaf) else leaf,
        tree,
    )


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _init_player(name: str, player: Player) -> PlayerState:
    model = traced_floats(player.model)
    part = _strong(player.trainable(model))
    model = eqx.tree_at(player.trainable, model, part)
    params = eqx.filter(part, eqx.is_inexact_array)
    if player.optimizer is not None and not jax.tree.leaves(params):
        raise ValueError(
            f"The player {name!r} has nothing to learn: the part of its model that `trainable` "
            f"selects, a {type(part).__name__}, holds no floating-point arrays. A closure or "
            "functools.partial hides its weights; bind them with "
            "jax.tree_util.Partial(apply, weights), or write an equinox.Module or nnx.Module."
        )
    _check_mask(name, player.mask, params)
    averages = player.ema.init(params) if player.ema else []
    opt_state = player.optimizer.init(params) if player.optimizer else None
    loss_state = None
    if hasattr(player.loss, "init_state"):
        loss_state = jax.tree.map(jnp.asarray, player.loss.init_state(model))
        loss_state = _strong(loss_state)
    updates = jnp.zeros((), jnp.int32)
    return PlayerState(model, opt_state, averages, updates, loss_state, player.trainable)


def _check_mask(name: str, mask: PyTree, params: PyTree) -> None:
    """Reject masks that are not of the weights.

    Raises:
        ValueError: naming the first leaf that does not fit.
    """
    if mask is None:
        return

    def check(path, part, weights):
        for leaf in jax.tree.leaves(weights):
            shape = jnp.shape(part)
            fits = len(shape) <= leaf.ndim and all(
                a in (1, b) for a, b in zip(reversed(shape), reversed(leaf.shape), strict=False)
            )
            if not fits or not jnp.issubdtype(jnp.result_type(part), bool):
                raise ValueError(
                    f"`mask{jax.tree_util.keystr(path)}` of the player {name!r} must be boolean "
                    f"and broadcast to weights of shape {leaf.shape}, got "
                    f"{jnp.result_type(part)} of shape {shape}."
                )

    try:
        jax.tree_util.tree_map_with_path(check, mask, params)
    except (ValueError, TypeError) as error:
        if "`mask" in str(error):
            raise
        raise ValueError(
            f"`mask` of the player {name!r} must be a pytree of the structure of the part that "
            f"learns, or a prefix of it: {str(error).splitlines()[0]}"
        ) from None


def _update(name: str, player: Player, used, state: PlayerState, key, batch, frozen):
    """One update of one player; `used` gathers the weights of its model."""
    part = player.trainable(state.model)
    params, rest = eqx.partition(part, eqx.is_inexact_array)
    args = key, batch, frozen

    def with_weights(params):
        return eqx.tree_at(player.trainable, state.model, eqx.combine(params, rest))

    if player.optimizer is None:
        model, *found = _returned(name, player.loss(used(state.model), *args), "model")
        if eqx.is_array_like(model) and not eqx.is_array_like(state.model):
            raise TypeError(
                f"The player {name!r} has no optimiser, and so a rule that returns the next model, "
                "got a number. Pass `optimizer` to minimise a loss."
            )
        metrics, loss_state = _metrics_and_state(name, state, found)
        model = _as_before(name, "model", state.model, model)
        moved = eqx.filter(player.trainable(model), eqx.is_inexact_array)
        moved, opt_state = _masked(player.mask, moved, params), None
        model = eqx.tree_at(player.trainable, model, eqx.combine(moved, player.trainable(model)))
    else:
        rule: Any = player.loss
        if hasattr(rule, "combine"):
            result, each = rule.gradients(used(state.model), *args)
            value, *found = _returned(name, result)
            learned = [eqx.filter(player.trainable(g), eqx.is_inexact_array) for g in each]
            # The rule is for what learns.
            grads = rule.combine(
                *(_masked(player.mask, g, jax.tree.map(jnp.zeros_like, g)) for g in learned)
            )
        elif hasattr(rule, "gradient"):
            result, grads = rule.gradient(used(state.model), *args)
            value, *found = _returned(name, result)
            grads = eqx.filter(player.trainable(grads), eqx.is_inexact_array)
        else:

            def objective(params):
                value, *found = _returned(name, player.loss(used(with_weights(params)), *args))
                if jnp.ndim(value) or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
                    raise TypeError(
                        f"The loss of the player {name!r} must be a scalar of floats, got "
                        f"{jnp.result_type(value)} of shape {jnp.shape(value)}. Take its mean."
                    )
                return value, found

            (value, found), grads = jax.value_and_grad(objective, has_aux=True)(params)
        metrics, loss_state = _metrics_and_state(name, state, found)
        grads = _masked(player.mask, grads, jax.tree.map(jnp.zeros_like, grads))
        updates, opt_state = player.optimizer.update(grads, state.opt_state, params)
        moved = _masked(player.mask, optax.apply_updates(params, updates), params)
        model = with_weights(moved)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(grads), **metrics}
    averages, count = state.averages, jnp.asarray(state.updates) + 1
    if player.ema is not None:
        averages = player.ema.update(averages, moved, count.astype(float))
    after = PlayerState(model, opt_state, averages, count, loss_state, state.trainable)
    return after, metrics


def _masked(mask: PyTree, new: PyTree, old: PyTree) -> PyTree:
    """`new` where the mask is, else `old`."""
    if mask is None:
        return new

    def choose(mask, new, old):
        return jax.tree.map(lambda n, o: jnp.where(mask, n, o), new, old)

    return jax.tree.map(choose, mask, new, old)


def _returned(name: str, result: Any, first: str = "scalar") -> tuple:
    """What a loss or rule returned, after checking that a step can read it."""
    parts = result if isinstance(result, tuple) else (result,)
    if not 2 <= len(parts) <= 3 or not isinstance(parts[1], dict):
        kinds = ", ".join([first, *(type(part).__name__ for part in parts[1:])])
        raise TypeError(
            f"The loss of the player {name!r} must return ({first}, metrics), or with a state "
            f"({first}, metrics, state), metrics a dict; got ({kinds})."
        )
    return parts


def _metrics_and_state(name: str, state: PlayerState, found: list) -> tuple[dict, PyTree]:
    """What a loss returned beside its value, after checking that its state is what it was."""
    if taken := sorted({"loss", "grad_norm", "updated"} & set(found[0])):
        raise ValueError(
            f"The loss of the player {name!r} names a metric {taken[0]!r}, which the step reports "
            "itself. Give it another name."
        )
    if (len(found) > 1) != (state.loss_state is not None):
        raise ValueError(
            f"The loss of the player {name!r} must return its next state third if and only if it "
            f"has an `init_state`, got {1 + len(found)} values."
        )
    if len(found) == 1:
        return found[0], None
    return found[0], _as_before(name, "loss state", state.loss_state, found[1])


def _as_before(name: str, what: str, old: PyTree, new: PyTree) -> PyTree:
    """`new`, in the dtypes of `old`, after checking that it is of the same structure and shapes."""
    described = [
        [(jnp.shape(leaf) if eqx.is_array_like(leaf) else leaf) for leaf in jax.tree.leaves(tree)]
        for tree in (old, new)
    ]
    structures: list[Any] = [jax.tree.structure(tree) for tree in (old, new)]
    if structures[0] != structures[1] or described[0] != described[1]:
        raise ValueError(
            f"The {what} of the player {name!r} must keep its structure and shapes, got "
            f"{jax.tree.map(jnp.shape, eqx.filter(new, eqx.is_array))} for "
            f"{jax.tree.map(jnp.shape, eqx.filter(old, eqx.is_array))}."
        )

    def cast(old, new):
        if not eqx.is_array(old) or _is_key(old):
            return new
        # What was not touched keeps its weak type, and the step its one program.
        return new if new is old else jax.lax.convert_element_type(new, old.dtype)

    return jax.tree.map(cast, old, new)


def _unbound(leaf: Any) -> Array:
    """An array that goes where the state is, though it was made of weights bound to one device."""
    bound = isinstance(leaf, jax.Array) and len(leaf.devices()) == 1
    return jnp.asarray(np.asarray(leaf) if bound else leaf)


class TrainStep:
    """A compiled training step; see `make_train_step`."""

    def __init__(self, players: dict[str, Player]):
        check_players(players)

        # Pairs, since a dict is rebuilt in the order of its keys.
        def rule(name: str, player: Player) -> Player:
            numbers = (player.loss, player.mask, player.ema, player.every)
            if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(numbers)):
                raise ValueError(
                    f"The player {name!r} must have numbers in its loss, mask, average and "
                    "`every`, got shapes; its model alone may have them. Pass outline(build)."
                )
            check_scalars(player.loss, player.ema)
            numbers = traced_floats((player.loss, player.ema, player.every))
            loss, ema, every = numbers
            mask = jax.tree.map(_unbound, player.mask)
            return dataclasses.replace(
                player, model=None, loss=loss, ema=ema, every=every, mask=mask
            )

        self._rules = [(name, rule(name, player)) for name, player in players.items()]

    def __call__(
        self, state: TrainState, batch: PyTree, constants: dict[str, PyTree] | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        """The next state, and metrics.

        Args:
            state: donated.
            batch: a tree of arrays with a leading axis of examples.
            constants: models and numbers that losses find in `frozen` by name.
        """
        after, metrics = _run(*self._arguments(state, batch, constants))
        # Only what the compiled program returns is rebuilt; its structure never changes, so that
        # keeping the first one's makes later comparisons of structures a comparison of identity.
        kept = dataclasses.replace(after, structure=state.structure, rest=state.rest)
        return kept, metrics

    def lower(
        self,
        state: TrainState,
        batch: PyTree,
        constants: dict[str, PyTree] | None = None,
        *,
        platform: str | None = None,
    ) -> jax.stages.Lowered:
        """The program of these shapes and placements, not run: to read, to compile, to measure.

        Args:
            state: arrays, or their `jax.ShapeDtypeStruct`s, as of `jax.eval_shape` and
                `parallel.shard_params`.
            batch: likewise.
            constants: likewise.
            platform: for which the program is, "tpu" say; None for this machine's.
        """
        static, state, arrays, batch = self._arguments(state, batch, constants)
        traced = _run.trace(static, state, jax.tree.map(_shape_of, arrays), batch)
        return traced.lower(lowering_platforms=None if platform is None else (platform,))

    def flops(
        self, state: TrainState, batch: PyTree, constants: dict[str, PyTree] | None = None
    ) -> int:
        """Floating-point operations of a step on all devices, without those it does twice.

        What blocks recompute in the backward pass (`remat`) is no use to the model, and left out.

        Args:
            state: arrays or shapes.
            batch: likewise.
            constants: likewise.
        """
        kept = without_remat(state.players)
        state = TrainState.pack(step=state.step, key=state.key, players=kept)
        return flops_of(_run.trace(*self._arguments(state, batch, constants)).jaxpr)

    def _arguments(self, state, batch, constants):
        tree = (self._rules, traced_floats(constants or {}))
        arrays, rest = eqx.partition(tree, is_arraylike)
        leaves, structure = jax.tree.flatten(rest)
        return (structure, tuple(leaves), placement(state)), state, arrays, batch


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """An array's shape; its placement only if it is on a mesh, and not just on this machine."""
    sharding = getattr(leaf, "sharding", None)  # arrays of NumPy have none
    return jax.ShapeDtypeStruct(
        leaf.shape,
        leaf.dtype,
        sharding=sharding if isinstance(sharding, NamedSharding) else None,
        weak_type=getattr(leaf, "weak_type", False),
    )


def make_train_step(players: dict[str, Player]) -> TrainStep:
    """One compiled training step over all players.

    `step(state, batch, constants=None) -> (state, metrics)`. Pure; `state` is donated, so keep
    only the returned one. Models, losses' numbers, masks, batch and constants are all arguments of
    the program: new values never recompile it. Its randomness is `fold_in(state.key, state.step)`.
    `step.lower` makes the program from shapes alone.

    Players are updated in the order given, each seeing the current models of the others, those
    before it already updated. Metrics are the loss, the norm of its gradient and the loss's own,
    named "player/metric" if there are several players. A player that rests at some steps also
    reports "updated", 1 or 0, and zeros where it is 0.

    A state on a mesh stays where it is, leaf by leaf, and so does the next one; weights split over
    fsdp are gathered where they are used.

    Args:
        players: `{name: Player}`, the ones `init_train_state` was given.
    """
    return TrainStep(players)


# Outside of `TrainStep`, so that steps that differ in numbers only share one program.
@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _run(static: tuple, state: TrainState, arrays: PyTree, batch: PyTree):
    """One update of every player whose turn it is."""
    rest, leaves, shardings = static
    rules, constants = eqx.combine(arrays, jax.tree.unflatten(rest, leaves))
    key = jax.random.fold_in(state.key, state.step)
    shared = jax.random.fold_in(key, _SHARED)
    states: dict[str, PlayerState] = state.players
    if set(states) != {name for name, _ in rules}:
        raise ValueError(
            f"The step trains the players {sorted(name for name, _ in rules)}, got a state of "
            f"{sorted(states)}. Make the state with the same players, or by next_phase."
        )
    placed = None if shardings is None else dataclasses.replace(state, arrays=shardings).players
    metrics: dict[str, Array] = {}
    for index, (name, player) in enumerate(rules):

        def used(other, model, placed=placed):
            return model if placed is None else gather_weights(model, placed[other].model)

        seen = states if placed is None else _seen(states, placed)
        models = {other: s.model for other, s in seen.items() if other != name}
        own = states[name].loss_state
        frozen = Frozen({**constants, **models}, state.step, shared, dict(seen), own)
        args = (jax.random.fold_in(key, index), batch, frozen)
        update = eqx.Partial(_update, name, player, eqx.Partial(used, name))
        with on_mesh(shardings):
            if callable(player.every) or player.every > 1:
                states[name], own = _sometimes(update, player.every, states[name], args)
            else:
                states[name], own = update(states[name], *args)
        prefix = f"{name}/" if len(rules) > 1 else ""
        metrics |= {prefix + metric: value for metric, value in own.items()}
    after = TrainState.pack(step=state.step + 1, key=state.key, players=states)
    if shardings is not None:
        # Where it came from: else the compiler moves some, and the next step is another program.
        kept = jax.lax.with_sharding_constraint(after.arrays, list(shardings))
        after = dataclasses.replace(after, arrays=kept)
    return after, metrics


def _seen(states: dict[str, PlayerState], placed: dict[str, PlayerState]) -> dict[str, PlayerState]:
    """Players as losses see them: models and averages whole. What nobody uses costs nothing."""

    def whole(state, where):
        averages = gather_weights(state.averages, where.averages)
        return dataclasses.replace(
            state, model=gather_weights(state.model, where.model), averages=averages
        )

    return {name: whole(state, placed[name]) for name, state in states.items()}


def placement(state: TrainState) -> tuple[NamedSharding, ...] | None:
    """Where the arrays of a state are on a mesh; None on one device."""
    # What is traced, as in a loop over steps, does not say where it is.
    found = [getattr(array, "sharding", None) for array in state.arrays]
    named = tuple(sharding for sharding in found if isinstance(sharding, NamedSharding))
    return named if found and len(named) == len(found) else None


def _sometimes(update, every, state, args):
    """`update` at the player's steps; else the state as it is, and metrics of zero."""
    arrays, rest = eqx.partition(state, eqx.is_array)

    def act(arrays):
        state, metrics = update(eqx.combine(arrays, rest), *args)
        return eqx.filter(state, eqx.is_array), {**metrics, "updated": jnp.ones(())}

    shapes = jax.eval_shape(act, arrays)[1]
    idle = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    step = args[-1].step
    now = every(step) if callable(every) else step % every == 0
    arrays, metrics = jax.lax.cond(now, act, lambda a: (a, idle), arrays)
    return eqx.combine(arrays, rest), metrics

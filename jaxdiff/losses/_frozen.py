"""Models among what a loss is given beside its own: teachers, and targets."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from jaxdiff._checks import check_same_process
from jaxdiff.denoiser import Denoiser, check_denoiser
from jaxdiff.flow_map import FlowMap


def still(tree: PyTree) -> PyTree:
    """The same tree, through which no gradient goes."""
    arrays, rest = eqx.partition(tree, eqx.is_inexact_array)
    return eqx.combine(jax.lax.stop_gradient(arrays), rest)


def teacher_of(frozen: Any, student: Any = None, name: str = "teacher") -> Denoiser:
    """The teacher among what a loss is given, all of it constant.

    Args:
        frozen: as a loss finds it.
        student: a model of the same process, or None.
        name: of the constant, or of another player.

    Raises:
        ValueError: if there is none, or one of another process.
        TypeError: if it is no denoiser.
    """
    if name not in frozen:
        raise ValueError(
            f"`frozen` must have a denoiser {name!r}, got {sorted(frozen)}. Pass "
            f"`constants={{{name!r}: denoiser}}` to the step, or train a player of this name."
        )
    teacher = frozen[name]
    check_denoiser(teacher, name)
    if student is not None:
        check_same_process(name, teacher.process, student.process)
    return still(teacher)


def player_of(frozen: Any, name: str) -> PyTree:
    """Another player's model, a student say, all of it constant.

    Raises:
        ValueError: if there is none.
    """
    if name not in frozen:
        raise ValueError(
            f"`frozen` must have the student {name!r}, got {sorted(frozen)}. Train a player of "
            "this name, or name another by `student`."
        )
    return still(frozen[name])


def said_by(teacher: Denoiser, x: Array, t: Array, cond: PyTree = None) -> Array:
    """What a teacher says of x0, `(*event)`, of which its noise follows.

    Raises:
        ValueError: for one that states another noise, which solvers go on with.
    """
    found = teacher.estimate(x, t, cond)
    if found.eps is not None:
        raise ValueError(
            "`teacher` must have the noise that its x0 implies, got one that states another, as "
            "guidance.CFGPlusPlus does. Distil it from what its sampler makes: ReflowLoss or "
            "PairRegression, or ConsistencyDistillation, which steps by the solver."
        )
    return found.x0


def target_of(frozen: Any, name: str | None, model: PyTree) -> PyTree:
    """Whose answer is the target of a loss, all of it constant.

    Args:
        frozen: as a loss finds it.
        name: None for the model as it is; another player, such as one that `Follow`s; or the own
            player, for its average.
        model: as of the loss.

    Raises:
        TypeError: for a denoiser beside a student that is a `FlowMap`.
        ValueError: for a name that is no player, or a player without an average.
    """
    if name is None:
        return still(model)
    if name in frozen:
        if isinstance(model, FlowMap) and not isinstance(frozen[name], FlowMap):
            raise TypeError(
                f"`target` must be a map between two times, as the student is, got {name!r}, a "
                f"{type(frozen[name]).__name__}. Name a player that follows the student."
            )
        return still(frozen[name])
    players = getattr(frozen, "players", {})
    if name not in players or not players[name].averages:
        raise ValueError(
            f"`target` must be None, another player, or the own player if it has an average; got "
            f"{name!r} among {sorted({*players, *frozen})}. Pass `ema=ConstantEMA(...)`, say."
        )
    return still(frozen.averaged(name))

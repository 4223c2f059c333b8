"""Models among what a loss is given beside its own: teachers, and targets."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree

from jaxdiff._checks import check_same_process
from jaxdiff.denoiser import Denoiser, check_denoiser


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


def target_of(frozen: Any, name: str | None, model: PyTree) -> PyTree:
    """Whose answer is the target of a loss, all of it constant.

    Args:
        frozen: as a loss finds it.
        name: None for the model as it is; another player, such as one that `Follow`s; or the own
            player, for its average.
        model: as of the loss.

    Raises:
        ValueError: for a name that is no player, or a player without an average.
    """
    if name is None:
        return still(model)
    if name in frozen:
        return still(frozen[name])
    players = getattr(frozen, "players", {})
    if name not in players or not players[name].averages:
        raise ValueError(
            f"`target` must be None, another player, or the own player if it has an average; got "
            f"{name!r} among {sorted({*players, *frozen})}. Pass `ema=ConstantEMA(...)`, say."
        )
    return still(frozen.averaged(name))

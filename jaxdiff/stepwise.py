"""Denoisers that draw, remember or decide once a step of a solver.

A solver tells every `Stepwise` inside its denoiser, wherever it stands in a nest of maps, which
step it is in. All evaluations of one step, the inner stages of a method of several among them,
see the same step: the same key, the same memory, the same decision.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff.denoiser import Denoiser, DenoiserMap, Estimate

# Keys of maps are folded in from here on, far from the indices that a solver may fold in.
_FIRST_SLOT = 2**31


class Step(eqx.Module):
    """One step of one example, from time t to time s: what a solver and a `Stepwise` map know.

    Attributes:
        t: current time.
        s: target time.
        key: the step's own key; a map's own, other than the solver's. None where nothing is
            random.
        plan: this step's row of the solver's `plan`; None for maps.
        memory: what the previous step left: the solver's, or the map's.
        index: number of the step on its grid, or None.
        notes: what the previous step left for the maps inside the denoiser, by slot.
        shared: of a population, the step's key that all particles see; or None.
        num_steps: of the grid, or None.
    """

    t: Array
    s: Array
    key: PRNGKeyArray
    plan: PyTree = None
    memory: PyTree = None
    index: Array | None = None
    notes: dict[int, PyTree] = eqx.field(default_factory=dict)
    shared: PRNGKeyArray | None = None
    num_steps: int | None = eqx.field(static=True, default=None)

    @property
    def axes(self) -> "Step":
        """Which parts belong to the examples of a batch, for `jax.vmap`."""
        own = 0 if jnp.ndim(self.t) else None
        # Axes in place of arrays.
        axes: Any = Step
        return axes(own, own, 0, own, 0, None, 0, None, self.num_steps)


class Stepwise(DenoiserMap):
    """Base of the maps that draw, remember or decide once a step.

    A map reads `self.step`: draw with `self.step.key`, decide by `self.step.t` or
    `self.step.index`, and find in `self.step.memory` what `init_memory` made before the first step
    and `remember` left after that. What the first evaluation of a step remembers counts; those of
    later stages are forgotten. A decision that examples share, such as one by the time of a shared
    grid, goes through `jax.lax.cond` and skips what is not needed; `evaluations` may depend on
    the step, so that the count is right.

    Only the solvers of this library tell a map its step. Without one, where the map is called
    directly, `bound` is None, and `self.step` an error; a map that has a meaning without steps
    looks at `bound`. Stock diffrax solvers, `invert` and `log_likelihood` refuse these maps.
    """

    bound: Step | None = eqx.field(default=None, kw_only=True)
    slot: int | None = eqx.field(default=None, kw_only=True, static=True)

    @property
    def step(self) -> Step:
        """The step that is being made."""
        if self.bound is None:
            name = type(self).__name__
            raise TypeError(
                f"`{name}` draws, remembers or decides once a step, and was called outside of one. "
                "Sample it with a solver of this library."
            )
        return self.bound

    def init_memory(self, x: Array) -> PyTree:
        """What the first step finds in `step.memory`, for one example x `(*event)`."""
        del x

    def remember(self, found: Estimate, memory: PyTree) -> Estimate:
        """The estimate, with what the next step is to find in `step.memory`."""
        if self.slot is None:
            return found
        expected, given = (_described(tree) for tree in (self.step.memory, memory))
        if expected != given:
            raise ValueError(
                f"What `{type(self).__name__}` remembers must keep the structure, shapes and "
                f"dtypes that its `init_memory` began with, {expected}, got {given}."
            )
        return dataclasses.replace(found, notes={**found.notes, self.slot: memory})


def _described(memory: PyTree) -> PyTree:
    """Shapes and dtypes, in the structure."""
    return jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}", memory)


def stepwise_maps(denoiser: PyTree) -> list[Stepwise]:
    """Every `Stepwise` inside, in the order of their slots."""
    found = []

    def note(node):
        found.append(node)
        return node

    _each(denoiser, note)
    return found


def _each(tree: PyTree, change: Callable[[Stepwise], Stepwise]) -> PyTree:
    """The tree with every `Stepwise` inside changed, inner ones first."""

    def visit(node):
        if not isinstance(node, Stepwise):
            return node

        def inside(child):
            return isinstance(child, Stepwise) and child is not node

        return change(jax.tree.map(visit, node, is_leaf=inside))

    return jax.tree.map(visit, tree, is_leaf=lambda node: isinstance(node, Stepwise))


def init_notes(denoiser: Denoiser, x: Array) -> dict[int, PyTree]:
    """What the maps inside find before the first step, by slot; none of those without memory."""
    memories = {slot: node.init_memory(x) for slot, node in enumerate(stepwise_maps(denoiser))}
    return {slot: memory for slot, memory in memories.items() if memory is not None}


def at_step(denoiser: Denoiser, step: Step) -> Denoiser:
    """The denoiser whose maps know the step they are in."""
    slots = itertools.count()

    def bind(node):
        slot = next(slots)
        key = None if step.key is None else jax.random.fold_in(step.key, _FIRST_SLOT + slot)
        memory = step.notes.get(slot)
        own = Step(step.t, step.s, key, None, memory, step.index, num_steps=step.num_steps)
        return dataclasses.replace(node, bound=own, slot=slot)

    return _each(denoiser, bind)


def noted(denoiser: Denoiser) -> set[int]:
    """Slots of the maps inside that know their step and have a memory."""
    found = ((node.slot, node.bound) for node in stepwise_maps(denoiser))
    return {
        slot for slot, bound in found if slot is not None and bound and bound.memory is not None
    }


def index_of(node: Stepwise) -> Array:
    """The number of a map's step on its grid.

    Raises:
        ValueError: where steps have no number.
    """
    if node.step.index is None:
        raise ValueError(
            f"`{type(node).__name__}` decides by the number of the step, and this step has none. "
            "Sample on a grid of times."
        )
    return node.step.index


def row_of(node: Stepwise, table: Array, argument: str) -> Array:
    """The row of a table with one for each step, after checking its length where that is known.

    Args:
        node: the map whose table it is.
        table: `(num_steps, ...)`.
        argument: what an error calls it.

    Raises:
        ValueError: where steps have no number, or the grid has another one of them.
    """
    index, expected = index_of(node), node.step.num_steps
    if expected is not None and len(table) != expected:
        raise ValueError(
            f"`{argument}` of `{type(node).__name__}` must have one row per step of the grid, "
            f"{expected}, got {len(table)}. Sample on the grid it was made for."
        )
    return jax.lax.dynamic_index_in_dim(table, index, keepdims=False)


def kept_notes(denoiser: Denoiser) -> dict[int, PyTree]:
    """What the maps inside remember, unchanged: of a step in which they are not asked."""
    return {
        node.slot: node.bound.memory
        for node in stepwise_maps(denoiser)
        if node.slot is not None and node.bound is not None and node.bound.memory is not None
    }


def check_remembered(denoiser: Denoiser, wanted: Iterable[int], notes: dict, asker: str) -> None:
    """Reject an estimate, or a step, that lost what a map remembers.

    Args:
        denoiser: where the map is.
        wanted: slots that should have been noted.
        notes: those that were.
        asker: who goes without, for the error.

    Raises:
        ValueError: naming the map.
    """
    for slot in wanted:
        if slot not in notes:
            name = type(stepwise_maps(denoiser)[slot]).__name__
            raise ValueError(
                f"What `{name}` remembers was lost on the way to {asker}. The map must call "
                "`self.remember(found, memory)`; maps around it must return the notes of what they "
                "call, by `found.replace(x0=...)`, of several by `notes={**a.notes, **b.notes}`; "
                "and a solver those of its first estimate, as an ExplicitSolver does."
            )


def check_stepless(denoiser: Denoiser, by: str) -> None:
    """Reject denoisers that need to know the step, where nobody can tell them.

    Raises:
        TypeError: naming the map.
    """
    for node in stepwise_maps(denoiser):
        raise TypeError(
            f"`{type(node).__name__}` draws, remembers or decides once a step, which {by} cannot "
            "tell it. Sample it with a solver of this library."
        )

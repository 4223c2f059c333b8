"""Erasing a concept where an attack on its condition has moved it."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_count, check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.conditions import as_entries, from_entries
from jaxdiff.denoiser import Denoiser, check_denoiser
from jaxdiff.losses._batch import wide
from jaxdiff.losses._frozen import still, teacher_of
from jaxdiff.unlearning._erased_concepts import ErasedConcepts
from jaxdiff.unlearning._shared import Seen, asked, forget_of
from jaxdiff.unlearning._states import OnTrajectory


class AdversarialErasing(eqx.Module):
    """Erase a concept under the condition near its own at which the model still says it best.

        delta* = argmin over |delta| <= radius of |D(x_t, t, f + delta) - D*(x_t, t, f)|^2,
        mean of weight(t) |D(x_t, t, f + delta*) - target(x_t, t, f)|^2,

    D* the frozen teacher, the target that of `erased` under f itself, and delta* a constant, of
    each example its own: `steps` of descent of a fixed length that falls to 0, from a random point
    of the ball and back into it. `steps` forward and backward passes of the student more.

    A condition is attacked where it holds vectors: tokens `(n, size)`, which networks with words of
    their own take, too (`network.words(tokens)`), or any scalar or vector entry. A class has no
    neighbours, and nothing to attack.

    **Fixed point**: the target of `erased` on the ball around f. Beyond it nothing is learned, and
    robustness means this radius and no more: for a linear network an unbounded attack always wins.
    Keep other conditions by a second loss, `Both(this, ...)`.

    Args:
        erased: target, states and weighting.
        entry: of the condition that is attacked; None for the condition itself.
        radius: of the ball, the root of the sum of squares of delta, > 0.
        steps: of the attack, >= 1.

    Raises:
        TypeError: when called, for a model that is no denoiser.
        ValueError: when called, without a "teacher", a batch without "forget", or for an entry that
            is not there or holds integers.

    Reference: Zhang, Chen, Jia, Zhang, Fan, Liu, Hong, Ding, Liu, "Defensive Unlearning with
    Adversarial Training for Robust Concept Erasure in Diffusion Models", 2024, arXiv 2405.15234.
    There a token is put before the prompt, searched for without a bound by Adam, and goes on from
    the one before; here the condition stays in a ball, which says what is defended.
    """

    erased: ErasedConcepts
    entry: str | None = eqx.field(static=True, default="tokens")
    radius: Number = number(1.0)
    steps: int = eqx.field(static=True, default=30)

    def __check_init__(self):
        check_kind("erased", self.erased, ErasedConcepts, "unlearning.ErasedConcepts(null_cond)")
        check_number("radius", self.radius, above=0.0)
        check_count("steps", self.steps)

    def _given(self, cond: PyTree) -> Array:
        entries = {} if self.entry is None else as_entries(cond)
        value = cond if self.entry is None else entries.get(self.entry)
        moves = isinstance(value, jax.Array | np.ndarray | float)
        if not moves or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise ValueError(
                f"`entry` must name numbers of the condition that may be moved, got {self.entry!r} "
                f"of {sorted(entries) or type(cond).__name__}, which are none. Pass tokens as "
                "vectors, network.words(tokens)."
            )
        return jnp.asarray(value)

    def _moved(self, cond: PyTree, delta: Array) -> PyTree:
        moved = (self._given(cond) + delta).astype(self._given(cond).dtype)
        if self.entry is None:
            return moved
        return from_entries({**as_entries(cond), self.entry: moved})

    def attack(
        self, model: Denoiser, teacher: Denoiser, key: PRNGKeyArray, seen: Seen, cond: PyTree
    ) -> PyTree:
        """The conditions that an attack has moved.

        Args:
            model: the student, which is attacked.
            teacher: that still knows.
            key: typed key; example i draws from its fold_in with i.
            seen: states.
            cond: those to be forgotten, leading axis B.
        """
        model = still(model)
        goal = jax.lax.stop_gradient(asked(teacher, seen.x, seen.t, cond))

        def one(i, x, t, cond, goal):
            given = self._given(cond)
            axes = tuple(range(given.ndim))

            def size(v):
                return jnp.maximum(jnp.sqrt(jnp.sum(v**2, axes)), 1e-30)

            def error(delta):
                return jnp.mean(wide(model(x, t, self._moved(cond, delta)) - goal) ** 2)

            def step(delta, n):
                slope = jax.grad(error)(delta)
                length = 2 * self.radius * (1 - n / self.steps) / jnp.sqrt(n + 1.0)
                delta = delta - length * slope / size(slope)
                return delta * jnp.minimum(1, self.radius / size(delta)), None

            start = jax.random.normal(jax.random.fold_in(key, i), given.shape, wide(given).dtype)
            start = start * 0.5 * self.radius / size(start)
            delta = jax.lax.scan(step, start, jnp.arange(self.steps))[0]
            return self._moved(cond, delta)

        rows = jnp.arange(len(seen.x)), seen.x, seen.t, cond, goal
        return jax.lax.stop_gradient(jax.vmap(one)(*rows))

    def __call__(
        self, model: Denoiser, key: PRNGKeyArray, batch: dict[str, Any], frozen: Any
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            model: the denoiser that forgets.
            key: typed key; example i draws from its fold_in with i.
            batch: with "forget".
            frozen: holds the teacher.

        Returns:
            The scalar loss, and `{"said": mean squares between the attacked student and the teacher
            under f}`, which an attack that wins makes small.
        """
        check_denoiser(model)
        teacher, rows = teacher_of(frozen, model), forget_of(batch)
        self._given(rows["cond"])
        state_key, attack_key, own_key = jax.random.split(key, 3)
        erased, cond = self.erased, rows["cond"]
        seen = (erased.states or OnTrajectory(erased.null_cond))(state_key, rows, teacher)
        goal, said = (
            jax.lax.stop_gradient(asked(d, seen.x, seen.t, cond))
            for d in (erased.target(teacher), teacher)
        )
        attacked = self.attack(model, teacher, attack_key, seen, cond)
        answer = asked(model, seen.x, seen.t, attacked, own_key)
        loss = seen.error(erased.weighting, model, answer - goal).mean()
        near = jnp.mean(wide(jax.lax.stop_gradient(answer) - said) ** 2)
        return loss, {"said": near}

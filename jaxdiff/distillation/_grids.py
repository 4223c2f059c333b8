"""Grids of a student's noise levels, whose number of steps may grow while it learns."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff._checks import check_count, check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.losses import TimeLaw
from jaxdiff.processes import GaussianProcess
from jaxdiff.training import EMA


def rounds(first: Any, last: Any = 1) -> tuple[int, ...]:
    """The numbers of steps of the students, each half of the one before: (8, 4, 2, 1).

    Args:
        first: of the first student; its teacher has twice as many.
        last: of the last student, >= 1.

    Raises:
        ValueError: if halving does not lead from the first to the last.
    """
    count, last = check_count("first", first), check_count("last", last)
    counts = [count]
    while count > last and count % 2 == 0:
        count //= 2
        counts.append(count)
    if count != last:
        raise ValueError(
            f"`first` must be `last` = {last} times a power of 2, got {first}. Pass "
            f"{8 * last}, say."
        )
    return tuple(counts)


class Curriculum(eqx.Module):
    """Base of the schedules of N, the number of steps of a grid, over training."""

    @abstractmethod
    def __call__(self, step: Array) -> Array:
        """N at a training step, a float scalar >= 1."""


class FixedSteps(Curriculum):
    """Always `count` steps."""

    count: Number = number(18.0)

    def __check_init__(self):
        check_number("count", self.count, least=1.0)

    def __call__(self, step: Array) -> Array:
        """See `Curriculum`."""
        return jnp.floor(jnp.asarray(self.count))


class RootSteps(Curriculum):
    """N = ceil(sqrt(k / K ((last + 1)^2 - first^2) + first^2) - 1) at step k of K.

    Args:
        total: K.
        first: the paper's 2.
        last: the paper's 150.

    Reference: Song, Dhariwal, Chen, Sutskever, "Consistency Models", 2023, arXiv 2303.01469,
    appendix C; there N counts the times of the grid, one more.
    """

    total: Number = number(100_000.0)
    first: Number = number(2.0)
    last: Number = number(150.0)

    def __check_init__(self):
        check_number("total", self.total, above=0.0)
        check_number("first", self.first, least=1.0)
        check_number("last", self.last, least=1.0)

    def __call__(self, step: Array) -> Array:
        """See `Curriculum`."""
        share = jnp.clip(step / self.total, 0, 1)
        squared = share * ((self.last + 1) ** 2 - self.first**2) + self.first**2
        return jnp.maximum(jnp.ceil(jnp.sqrt(squared) - 1), 1)


class DoublingSteps(Curriculum):
    """N = min(first 2^floor(k / K'), last) at step k.

    K' = floor(K / (log2(floor(last / first)) + 1)), so that K steps double it to the last.

    Args:
        total: K.
        first: 10.
        last: 1280.

    Reference: Song, Dhariwal, "Improved Techniques for Training Consistency Models", 2023, arXiv
    2310.14189, section 3.4.
    """

    total: Number = number(400_000.0)
    first: Number = number(10.0)
    last: Number = number(1280.0)

    def __check_init__(self):
        check_number("total", self.total, above=0.0)
        check_number("first", self.first, least=1.0)
        check_number("last", self.last, least=1.0)

    def __call__(self, step: Array) -> Array:
        """See `Curriculum`."""
        rounds = jnp.log2(jnp.floor(self.last / self.first)) + 1
        length = jnp.maximum(jnp.floor(self.total / rounds), 1)
        return jnp.minimum(self.first * 2 ** jnp.floor(step / length), self.last)


class HalvingSteps(Curriculum):
    """N = max(first / 2^floor(k / length), last) at step k: rounds of progressive distillation.

    Args:
        first: of the first round, `last` times a power of 2.
        last: of the last one, which goes on to the end.
        length: steps of a round.

    Raises:
        ValueError: for numbers that halving does not lead to.

    Reference: Salimans, Ho, "Progressive Distillation for Fast Sampling of Diffusion Models",
    2022, arXiv 2202.00512, algorithm 2.
    """

    first: Number = number(8.0)
    last: Number = number(1.0)
    length: Number = number(50_000.0)

    def __check_init__(self):
        check_number("first", self.first, least=1.0)
        check_number("last", self.last, least=1.0)
        check_number("length", self.length, least=1.0)
        if isinstance(self.first, float) and isinstance(self.last, float):
            rounds(*(int(n) if n == int(n) else n for n in (self.first, self.last)))

    def __call__(self, step: Array) -> Array:
        """See `Curriculum`."""
        return jnp.maximum(self.first / 2 ** jnp.floor(step / self.length), self.last)

    def begins(self, step: Array) -> Array:
        """Whether a step is the first of a round, but of the first one: a boolean scalar.

        Then the student becomes the teacher of the next, `Player(..., every=halving.begins)`; in
        the last round, however long, it does not become its own.
        """
        before = jnp.maximum(jnp.asarray(step) - 1, 0)
        return self(jnp.asarray(step)) < self(before)


class CurriculumEMA(EMA):
    """decay = first_decay^(first / N) with the steps N of a curriculum: slower as grids get finer.

    Args:
        steps: the curriculum.
        decay: mu_0, where N is `first`.
        first: s_0.

    Reference: Song, Dhariwal, Chen, Sutskever, "Consistency Models", 2023, arXiv 2303.01469,
    appendix C.
    """

    steps: Curriculum = RootSteps()
    decay: Number = number(0.9)
    first: Number = number(2.0)

    def __check_init__(self):
        check_kind("steps", self.steps, Curriculum, "distillation.RootSteps()")
        check_number("decay", self.decay, least=0.0, below=1.0)
        check_number("first", self.first, above=0.0)

    def rates(self, count: Array) -> Sequence[Array]:
        """A single rate, 1 - decay."""
        return [1 - self.decay ** (self.first / self.steps(count - 1))]


def cell(
    grid: TimeLaw, law: TimeLaw | None, process: GaussianProcess, u: Array, steps: Array
) -> tuple[Array, Array]:
    """The ends (t, s), t > s, of one of the N cells of a grid, and they are the grid's own times.

    The grid's times are grid.quantile(n / N), n = 0..N, from t_min to t_max.

    Args:
        grid: how its times lie.
        law: of the cell: its probability is that which the law, cut off at t_min and t_max, gives
            it; None for all cells alike.
        process: the forward process.
        u: levels in [0, 1), a scalar or an array.
        steps: N, a whole number as a float.
    """
    if law is not None:
        ends = jnp.asarray([process.t_min, process.t_max], jnp.result_type(u))
        low, high = law.level(process, ends)
        t = law.quantile(process, low + u * (high - low))
        u = grid.level(process, t)
    index = jnp.clip(jnp.floor(u * steps), 0, steps - 1)
    return grid.quantile(process, (index + 1) / steps), grid.quantile(process, index / steps)

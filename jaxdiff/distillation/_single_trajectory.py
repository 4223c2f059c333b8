"""Single-trajectory distillation: from partly noised data, along trajectories that are kept."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_callable, check_count, check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.distillation._adversarial import (
    Adversarial,
    Hinge,
    critic_loss,
    critic_of,
    logits,
    student_of,
)
from jaxdiff.distillation._consistency import Pairs, teacher_step
from jaxdiff.distillation._jump import check_told
from jaxdiff.distillation._shared import (
    Distance,
    PseudoHuber,
    noised,
    scale_range,
)
from jaxdiff.flow_map import FlowMap
from jaxdiff.losses import TimeLaw, UniformTime
from jaxdiff.losses._batch import check_batch
from jaxdiff.losses._frozen import still, teacher_of
from jaxdiff.processes import GaussianProcess
from jaxdiff.solvers import DDIM
from jaxdiff.training import Frozen


class TrajectoryBank(eqx.Module):
    """Trajectories of a teacher that are on their way: some places for every row of a batch.

    Attributes:
        x: states, `(B, slots, *event)`.
        index: number n of the grid's time that a state is at, `(B, slots)`; 0 where none is.
        cond: conditions, with leading axes `(B, slots)`.
        scale: of guidance, `(B, slots)`; 0 without.
    """

    x: Array
    index: Array
    cond: PyTree
    scale: Array

    @classmethod
    def empty(cls, batch: dict[str, Any], slots: int = 4) -> "TrajectoryBank":
        """Without trajectories.

        Args:
            batch: as of training; its shapes and dtypes are what counts.
            slots: how many places a row has.
        """
        check_batch(batch)
        check_count("slots", slots)

        def places(leaf):
            return jnp.zeros((len(leaf), slots, *jnp.shape(leaf)[1:]), jnp.result_type(leaf))

        x = places(batch["x"])
        index = jnp.zeros(x.shape[:2], jnp.int32)
        cond = jax.tree.map(places, batch.get("cond"))
        return cls(x, index, cond, jnp.zeros(x.shape[:2], x.dtype))

    def take(self, key: PRNGKeyArray, keep: Number, fresh: "TrajectoryBank"):
        """Of one row: a trajectory that is on its way, or a new one.

        One that is there is taken with probability `keep`, and if no place is free; all alike.

        Args:
            key: typed key.
            keep: in [0, 1].
            fresh: the start of a new one, without the axis of places.

        Returns:
            The state, without the axis of places; its place; and whether it was there.
        """
        keep_key, place_key = jax.random.split(key)
        there = self.index > 0
        resumed = jnp.any(there) & (jnp.all(there) | jax.random.bernoulli(keep_key, keep))
        order = jnp.where(there, jax.random.uniform(place_key, there.shape), -1)
        slot = jnp.where(resumed, jnp.argmax(order), jnp.argmin(there))
        taken = jax.tree.map(lambda old, new: jnp.where(resumed, old[slot], new), self, fresh)
        return taken, slot, resumed

    def put(self, slot: Array, state: "TrajectoryBank") -> "TrajectoryBank":
        """Of one row: with a state in a place; one at index 0 leaves it free."""
        return jax.tree.map(lambda old, new: old.at[slot].set(new), self, state)


class SingleTrajectory(eqx.Module):
    """A student that says the same from two neighbouring states of one trajectory of the teacher.

        distance(G(x_t, t, s), stop_gradient(G(x_u, u, s))),    t > u >= s of the grid,

    u the time before t and x_u the teacher's step. States x_t are no noised data: a trajectory
    starts from data at the time `strength` of the way up, one step is made at every visit, and a
    bank keeps it for the next, as the loss's state (`training.Player`). So every state is on one
    trajectory of few starts, which a student of image or video editing begins at. Added to the mean
    is `gan` times the loss by which a critic "critic" takes G(x_t, t, s) for real at s, see
    `SingleTrajectoryCritic`.

    One pass of the student with a gradient and one without, and one step of the solver with the
    teacher.

    **Fixed point**: without a critic, the map composed of the solver's steps, between times of the
    grid up to `strength` and up to `reach` apart; there the loss is 0. The critic is shown real
    examples of less noise than s has, by intention, and moves this to sharper x_s: its gradient is
    not 0 at the exact student.

    Args:
        bank: `TrajectoryBank.empty(batch)` of a batch as of training.
        distance: of two examples; any function of two.
        grid: how the times lie.
        steps: N.
        strength: where trajectories start, as a share of N, in (0, 1].
        keep: probability to go on with a trajectory that is there, in [0, 1].
        reach: the longest jump, as a share of the whole trajectory, in (0, 1]; all are alike.
        solver: of the teacher's step.
        gan: weight of the adversarial term; None to leave it out.
        adversarial: its loss.
        scales: guidance scales of the teacher, of which every trajectory has its own, told to the
            student; None for the teacher as it is.

    Raises:
        TypeError: when called, for a student that is no `FlowMap` with a clean end.
        ValueError: when called, for a `Jump` that is not told where to, without a teacher or a
            critic that is asked for, or for a batch of another size than the bank's.

    Reference: Xu, Wang, Zhu, Song, Chen, Tang, Hu, "Single Trajectory Distillation for Accelerating
    Image and Video Style Transfer", 2024, arXiv 2412.18945. There the scale is drawn again at each
    visit, and not told.
    """

    bank: TrajectoryBank
    distance: Distance | Any = PseudoHuber(1e-3)
    grid: TimeLaw = UniformTime()
    steps: Number = number(50.0)
    strength: Number = number(0.75)
    keep: Number = number(0.8)
    reach: Number = number(0.5)
    solver: diffrax.AbstractSolver = DDIM()
    gan: Number | None = number(0.7)
    adversarial: Adversarial = Hinge()
    scales: tuple[Number, Number] | None = scale_range()

    def __check_init__(self):
        check_callable("distance", self.distance, "distillation.PseudoHuber(1e-3)")
        check_kind("grid", self.grid, TimeLaw, "losses.UniformTime()")
        check_number("steps", self.steps, least=1.0)
        check_number("strength", self.strength, above=0.0, most=1.0)
        check_number("keep", self.keep, least=0.0, most=1.0)
        check_number("reach", self.reach, above=0.0, most=1.0)
        check_number("gan", self.gan, least=0.0)
        check_kind("adversarial", self.adversarial, Adversarial, "distillation.Hinge()")

    def init_state(self, model: PyTree) -> TrajectoryBank:
        """The bank before the first visit."""
        del model
        return self.bank

    def time(self, process: GaussianProcess, n: Array) -> Array:
        """The n-th time of the grid, from t_min at 0."""
        return self.grid.quantile(process, n / jnp.floor(jnp.asarray(self.steps)))

    def visit(
        self, model: FlowMap, key: PRNGKeyArray, batch: dict[str, Any], bank: TrajectoryBank
    ) -> tuple[Pairs, Array, Array, Array]:
        """A state of a trajectory for every row of a batch, and where to jump from there.

        Args:
            model: the student.
            key: typed key; row i draws from its fold_in with i.
            batch: as of a call.
            bank: of the trajectories.

        Returns:
            States x at t, to jump to s from; the numbers n of their times, their places, and
            whether they were there, `(B,)` each.
        """
        check_batch(batch)
        if len(batch["x"]) != len(bank.x):
            raise ValueError(
                f"The batch must have the size of the bank, {len(bank.x)} rows, got "
                f"{len(batch['x'])}. Pass TrajectoryBank.empty(batch) of such a batch."
            )
        process = model.process
        first = jnp.ceil(self.strength * jnp.floor(jnp.asarray(self.steps)))
        longest = jnp.ceil(self.reach * first)

        def one(i, x0, cond, row):
            take_key, draw_key, jump_key = jax.random.split(jax.random.fold_in(key, i), 3)
            begun = self.time(process, first)
            eps, x, scale, own = noised(process, draw_key, x0, begun, self.scales)
            scale = jnp.zeros((), row.scale.dtype) if scale is None else scale
            start = TrajectoryBank(
                x, first.astype(row.index.dtype), cond, scale.astype(row.scale.dtype)
            )
            state, slot, resumed = row.take(take_key, self.keep, start)
            n = state.index.astype(first.dtype)
            least = jnp.maximum(n - longest, 0)
            k = least + jnp.floor(jax.random.uniform(jump_key) * (n - least))
            t, s = self.time(process, n), self.time(process, k)
            scale = None if self.scales is None else state.scale
            pairs = Pairs(x0, eps, state.x, t, s, state.cond, scale, own)
            return pairs, n, slot, resumed

        rows = jnp.arange(len(batch["x"]))
        return jax.vmap(one)(rows, batch["x"], batch.get("cond"), bank)

    def __call__(
        self, model: FlowMap, key: PRNGKeyArray, batch: dict[str, Any], frozen: Frozen
    ) -> tuple[Array, dict[str, Array], TrajectoryBank]:
        """Mean loss of a batch, and the bank after it.

        Args:
            model: the student, a `Jump` that is told where to.
            key: typed key; row i draws from its fold_in with i.
            batch: `{"x": (B, *event), "cond": pytree with leading axis B}`.
            frozen: the teacher, the critic if there is one, and the bank as its state.

        Returns:
            The scalar loss; its terms and the share of rows that were "resumed"; the bank.
        """
        check_told(model)
        teacher = teacher_of(frozen, model)
        critic = None if self.gan is None else critic_of(frozen)
        bank = frozen.state
        visit_key, teacher_key = jax.random.split(key)
        pairs, n, slot, resumed = self.visit(model, visit_key, batch, bank)
        u = self.time(model.process, n - 1).astype(pairs.t.dtype)
        here = Pairs(pairs.x0, pairs.eps, pairs.x, pairs.t, u, pairs.cond, pairs.scale, pairs.keys)
        x_u = teacher_step(teacher, teacher_key, here, self.solver).astype(pairs.x.dtype)

        def jump(model, x, t):
            def one(x, t, s, cond, key):
                return model(x, t, s, cond, key=key)

            return jax.vmap(one)(x, t, pairs.s, pairs.told, pairs.keys)

        x_s = jump(model, pairs.x, pairs.t)
        goal = jax.lax.stop_gradient(jump(still(model), x_u, u))
        total = jax.vmap(self.distance)(x_s, goal).mean()
        metrics = {"consistency": total, "resumed": resumed.mean(dtype=pairs.t.dtype)}
        if critic is not None:
            told = logits(critic, x_s, pairs.s, pairs.cond)
            metrics["adversarial"] = self.adversarial.generator(told).mean()
            total = total + jnp.asarray(self.gan) * metrics["adversarial"]
        scale = bank.scale[:, 0] * 0 if pairs.scale is None else pairs.scale
        moved = TrajectoryBank(x_u, (n - 1).astype(bank.index.dtype), pairs.cond, scale)
        bank = jax.lax.stop_gradient(jax.vmap(TrajectoryBank.put)(bank, slot, moved))
        return total, jax.lax.stop_gradient(metrics), bank


class SingleTrajectoryCritic(eqx.Module):
    """What the critic of `SingleTrajectory` minimises: its jumps to s, and data noised to r <= s.

    The critic is told s of both. r is uniform on [least s, s]: at 0, as published, real
    examples have less noise than what the student is to make, and it learns to leave some out; at 1
    the two agree, and the exact student has no gradient in the mean.

    States to jump from are those of the student's bank, and it stays as it is. One pass of the
    student, and one of the critic over real and fake together.

    Args:
        loss: the student's own.
        least: in [0, 1].
        student: name of the player that jumps.

    Raises:
        ValueError: when called, without the student.

    Reference: Xu, Wang, Zhu, Song, Chen, Tang, Hu, "Single Trajectory Distillation for Accelerating
    Image and Video Style Transfer", 2024, arXiv 2412.18945, its asymmetric adversarial loss.
    """

    loss: SingleTrajectory
    least: Number = number(0.0)
    student: str = eqx.field(static=True, default="student")

    def __check_init__(self):
        check_kind("loss", self.loss, SingleTrajectory, "SingleTrajectory(bank)")
        check_number("least", self.least, least=0.0, most=1.0)

    def __call__(
        self, model: PyTree, key: PRNGKeyArray, batch: dict[str, Any], frozen: Frozen
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            model: the critic, a callable pytree `(x, t, cond) -> logit`.
            key: typed key; row i draws from its fold_in with i.
            batch: `{"x": (B, *event), "cond": pytree with leading axis B}`.
            frozen: the student, and all players.

        Returns:
            The scalar loss, and the mean logits, `{"real": ..., "fake": ...}`.
        """
        student = student_of(frozen, self.student)
        bank = frozen.players[self.student].loss_state
        visit_key, example_key = jax.random.split(key)
        pairs, *_ = self.loss.visit(student, visit_key, batch, bank)

        def one(i, x0, x, t, s, told):
            noise_key, level_key = jax.random.split(jax.random.fold_in(example_key, i))
            share = self.least + (1 - self.least) * jax.random.uniform(level_key)
            real = student.process.noise(noise_key, x0, (share * s).astype(s.dtype))
            return real, student(x, t, s, told)

        rows = jnp.arange(len(pairs.x))
        real, fake = jax.vmap(one)(rows, pairs.x0, pairs.x, pairs.t, pairs.s, pairs.told)
        given, made = (real, batch.get("cond")), (fake, pairs.cond)
        return critic_loss(model, self.loss.adversarial, pairs.s, given, made)

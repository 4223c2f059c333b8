"""Consistency models: distilled from a teacher, or trained on data alone."""

from abc import abstractmethod
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_callable, check_kind
from jaxdiff._tree import Number
from jaxdiff.denoiser import Denoiser
from jaxdiff.distillation._grids import Curriculum, DoublingSteps, FixedSteps, cell
from jaxdiff.distillation._shared import (
    Distance,
    PseudoHuber,
    Squared,
    at_scale,
    check_flow_map,
    noised,
    scale_range,
    told_scale,
)
from jaxdiff.flow_map import FlowMap
from jaxdiff.losses import Karras, LogNormal, TimeLaw, stratified_uniform
from jaxdiff.losses._batch import check_batch
from jaxdiff.losses._frozen import target_of, teacher_of
from jaxdiff.sampling import denoise
from jaxdiff.solvers import DDIM
from jaxdiff.training import Frozen


class Pairs(eqx.Module):
    """Two neighbouring states of every example of a batch, and what the student is told.

    Attributes:
        x0: the clean examples, `(B, *event)`.
        eps: the noise in x, `(B, *event)`.
        x: x_t, `(B, *event)`.
        t: the noisier times, `(B,)`.
        s: the cleaner times, `(B,)`.
        cond: conditions, with leading axis B.
        scale: of guidance, `(B,)`, or None.
        keys: of the network's own randomness, the same for student and target, `(B,)`.
    """

    x0: Array
    eps: Array
    x: Array
    t: Array
    s: Array
    cond: PyTree
    scale: Array | None
    keys: PRNGKeyArray

    @property
    def told(self) -> PyTree:
        """The condition of a student."""
        return told_scale(self.cond, self.scale)


class Consistency(eqx.Module):
    """Base: what a student says at a time, and what its target says at the time before.

        mean of weight distance(f(x_t, t), stop_gradient(f'(x_s, s)))

    f(x, t) = model(x, t, t_min), and t and s are neighbours of a grid. Both passes share noise and
    dropout. A subclass knows x_s.
    """

    distance: eqx.AbstractVar[Any]
    grid: eqx.AbstractVar[TimeLaw]
    steps: eqx.AbstractVar[Curriculum]
    time_law: eqx.AbstractVar[TimeLaw | None]
    target: eqx.AbstractVar[str | None]
    inverse_step: eqx.AbstractVar[bool]
    scales: eqx.AbstractVar[tuple[Number, Number] | None]

    def __check_init__(self):
        check_callable("distance", self.distance, "distillation.Squared()")
        check_kind("grid", self.grid, TimeLaw, "losses.Karras()")
        check_kind("steps", self.steps, Curriculum, "distillation.FixedSteps(18)")
        if self.time_law is not None:
            check_kind("time_law", self.time_law, TimeLaw, "losses.LogNormal(-1.1, 2.0)")

    @abstractmethod
    def earlier(self, model: FlowMap, key: PRNGKeyArray, pairs: Pairs, frozen: Frozen) -> Array:
        """x_s `(B, *event)`, which no gradient passes."""

    def pairs(
        self, model: FlowMap, key: PRNGKeyArray, batch: dict[str, Any], step: Array | int
    ) -> Pairs:
        """Noisy examples of a batch, at the ends of cells of the grid.

        Args:
            model: the student.
            key: typed key; example i draws from its fold_in with i.
            batch: as of a call.
            step: the training step.
        """
        check_batch(batch)
        x0, process = batch["x"], model.process
        time_key, example_key = jax.random.split(key)
        u = stratified_uniform(time_key, len(x0))
        t, s = cell(self.grid, self.time_law, process, u, self.steps(jnp.asarray(step)))

        def one(i, x0, t):
            return noised(process, jax.random.fold_in(example_key, i), x0, t, self.scales)

        eps, x, scale, keys = jax.vmap(one)(jnp.arange(len(x0)), x0, t)
        return Pairs(x0, eps, x, t, s, batch.get("cond"), scale, keys)

    def __call__(
        self, model: FlowMap, key: PRNGKeyArray, batch: dict[str, Any], frozen: Frozen
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            model: the student, such as a `Jump`.
            key: typed key; example i draws from its fold_in with i.
            batch: `{"x": (B, *event), "cond": pytree with leading axis B}`.
            frozen: other models; its step is that of the curriculum.

        Returns:
            The scalar loss, and `{"steps": N}`.
        """
        check_flow_map(model)
        pair_key, earlier_key = jax.random.split(key)
        pairs = self.pairs(model, pair_key, batch, getattr(frozen, "step", 0))
        x_s = jax.lax.stop_gradient(self.earlier(model, earlier_key, pairs, frozen))
        target = target_of(frozen, self.target, model)
        end = jnp.full_like(pairs.t, model.process.t_min)

        def to_data(model, x, t):
            def one(x, t, s, cond, key):
                return model(x, t, s, cond, key=key)

            return jax.vmap(one)(x, t, end, pairs.told, pairs.keys)

        y = to_data(model, pairs.x, pairs.t)
        goal = jax.lax.stop_gradient(to_data(target, x_s.astype(y.dtype), pairs.s))
        losses = jax.vmap(self.distance)(y, goal)
        if self.inverse_step:
            high, low = (jnp.exp(-0.5 * model.process.log_snr(t)) for t in (pairs.t, pairs.s))
            losses = losses / (high - low)
        return losses.mean(), {"steps": self.steps(jnp.asarray(getattr(frozen, "step", 0)))}


class ConsistencyDistillation(Consistency):
    """A student that says the same all along a trajectory of the teacher, which a solver steps on.

    x_s is one step of `solver` with the teacher, from the noised example x_t. Two passes of the
    student, one of them without a gradient, and the solver's evaluations of the teacher: 3 with
    DDIM, 4 with Heun's method.

    **Fixed point**: the map composed of the N steps of that solver, at which the loss is 0; not
    the exact flow map, which it misses by O(1/N) with DDIM and O(1/N^2) with Heun. At the exact
    flow map the two sides differ by one local error, O(1/N^2) or O(1/N^3).

    With a `scales` range this is **latent consistency** on whatever space the model has: the
    teacher is guided, the student is told the scale as the entry "scale" of its condition
    (`networks.UNet(scalars=("scale",))`), and the paper's skipped steps are a grid of 50.

    Args:
        distance: of two examples; any function of two.
        grid: how the times lie.
        steps: how many.
        time_law: of the cell; None for all alike.
        target: whose weights the target has: None for the student's own, the own player for its
            average, or another player.
        inverse_step: divide by what the noise level sigma / alpha is lower at s than at t.
        scales: guidance scales of the teacher, drawn uniformly; None for the teacher as it is.
        solver: of the teacher's step.

    Raises:
        TypeError: when called, for a student that is no `FlowMap`.
        ValueError: when called, without a teacher, or one of another process.

    Reference: Song, Dhariwal, Chen, Sutskever, "Consistency Models", 2023, arXiv 2303.01469,
    algorithm 2. There the student is skip(t) x + out(t) F with skip(t_min) = 1; here it is any map
    that is the identity at its end, as a `Jump` is. Luo, Tan, Huang, Li, Zhao, "Latent Consistency
    Models: Synthesizing High-Resolution Images with Few-Step Inference", 2023, arXiv 2310.04378,
    algorithm 1, whose w is scale - 1.
    """

    distance: Distance | Any = Squared()
    grid: TimeLaw = Karras()
    steps: Curriculum = FixedSteps(18)
    time_law: TimeLaw | None = None
    target: str | None = eqx.field(static=True, default=None)
    inverse_step: bool = eqx.field(static=True, default=False)
    scales: tuple[Number, Number] | None = scale_range()
    solver: diffrax.AbstractSolver = DDIM()

    def earlier(self, model: FlowMap, key: PRNGKeyArray, pairs: Pairs, frozen: Frozen) -> Array:
        """See `Consistency`: a step of the teacher's solver."""
        teacher = teacher_of(frozen, model)
        return teacher_step(teacher, key, pairs, self.solver)


def teacher_step(
    teacher: Denoiser, key: PRNGKeyArray, pairs: Pairs, solver: diffrax.AbstractSolver
) -> Array:
    """x_s `(B, *event)` by a step of a solver from x_t, each example with its own times and scale.

    Args:
        teacher: a denoiser; with a `scale` where the pairs have one.
        key: typed key, for solvers that draw noise.
        pairs: where from, and where to.
        solver: any.
    """
    times = jnp.stack([pairs.t, pairs.s], axis=1)
    if pairs.scale is None:
        return denoise(key, teacher, pairs.x, cond=pairs.cond, solver=solver, times=times).x

    def one(i, x, times, cond, scale):
        guided = at_scale(teacher, scale)
        rows = jax.tree.map(lambda leaf: leaf[None], (x, cond))
        own = jax.random.fold_in(key, i)
        return denoise(own, guided, rows[0], cond=rows[1], solver=solver, times=times).x[0]

    return jax.vmap(one)(jnp.arange(len(times)), pairs.x, times, pairs.cond, pairs.scale)


class ConsistencyTraining(Consistency):
    """A student that says the same of two noised copies of one example, with the same noise.

    x_s = alpha_s x0 + sigma_s eps: the teacher's step of `ConsistencyDistillation`, with the clean
    example in place of E[x0 | x_t]. No teacher; two passes of the student.

    **Fixed point**: f_{n+1}(x) = E[f_n(x_n) | x_{n+1} = x], off the exact flow map by O(1/N). At
    the exact flow map the mean of the residual given x_t is O(1/N^2), but that of an example is
    O(1/N), so that the loss there is not 0.

    The defaults are those of **improved consistency training**: the student's own weights for a
    target, a pseudo-Huber distance over the step, a grid that doubles, levels by a log-normal law.
    Those of the first paper are `(Squared(), Karras(), RootSteps(), None, "student")` with a player
    "student" that averages by `CurriculumEMA`.

    With a `scales` range and a latent consistency model to start from, this is its **fine-tuning**
    on data, without a teacher. The pair knows nothing of guidance: the fixed point is the same for
    every scale, that of the conditional law, and guidance is slowly unlearned. Stop early.

    Args:
        distance: of two examples; any function of two.
        grid: how the times lie.
        steps: how many.
        time_law: of the cell; None for all alike.
        target: as of `ConsistencyDistillation`.
        inverse_step: divide by what the noise level sigma / alpha is lower at s than at t.
        scales: of guidance, told to the student; None for a student that knows no scale.

    Raises:
        TypeError: when called, for a student that is no `FlowMap`.

    Reference: Song, Dhariwal, Chen, Sutskever, "Consistency Models", 2023, arXiv 2303.01469,
    algorithm 3; Song, Dhariwal, "Improved Techniques for Training Consistency Models", 2023, arXiv
    2310.14189, table 1; Luo, Tan, Huang, Li, Zhao, arXiv 2310.04378, section 4.4.
    """

    distance: Distance | Any = PseudoHuber()
    grid: TimeLaw = Karras()
    steps: Curriculum = DoublingSteps()
    time_law: TimeLaw | None = LogNormal(-1.1, 2.0)
    target: str | None = eqx.field(static=True, default=None)
    inverse_step: bool = eqx.field(static=True, default=True)
    scales: tuple[Number, Number] | None = scale_range()

    def earlier(self, model: FlowMap, key: PRNGKeyArray, pairs: Pairs, frozen: Frozen) -> Array:
        """See `Consistency`: the same example and noise."""
        del key, frozen
        return jax.vmap(model.process.marginal)(pairs.x0, pairs.eps, pairs.s)

"""Progressive distillation: students that halve the steps of their teacher."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxdiff._checks import check_count, check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.denoiser import Denoiser, check_denoiser
from jaxdiff.distillation._grids import Curriculum
from jaxdiff.distillation._jump import ddim_jump
from jaxdiff.distillation._shared import (
    guided_or_told,
    noised,
    scale_range,
    told_scale,
)
from jaxdiff.losses import TimeLaw, TruncatedSNR, UniformTime, Weighting, each_example
from jaxdiff.losses._batch import wide
from jaxdiff.losses._frozen import said_by, teacher_of
from jaxdiff.processes import GaussianProcess


class ProgressiveDistillation(eqx.Module):
    """A student whose one step of DDIM is two steps of its teacher: one round of the method.

        mean of weight(t) |D(x_t, t) - x~|^2,    x~ = D1 + w (D2 - D1)

    D1 and D2 are what the teacher says at t and, after a step of half the length, at t'; x~ is the
    clean example whose single step of DDIM from t to s ends where those two steps end. With
    k = sigma / alpha, w = (1 - k_s / k_t') / (1 - k_s / k_t), which is 1 where s is 0.

    The students of `steps` N live on the times grid.quantile(n / N), n = 1..N, and 0: see `times`.
    The half steps are on the grid of 2 N, so that the grids of all rounds nest. Unlike other grids
    of distillation they end at 0, where the last step returns the student's own answer, as the
    samplers of this library do.

    A round needs no code of its own: train with N, take the student for the teacher, go on with
    N / 2 (`rounds`, `training.next_phase`). `steps` is a number: all rounds are one program. With
    `halving = HalvingSteps(8, 1, length)` they are one run, too, whose teacher is a player that
    follows the student:

        {"teacher": Player(denoiser, Follow("student"), every=halving.begins),
         "student": Player(denoiser, ProgressiveDistillation(halving), ...)}

    One pass of the student, and two of the teacher without a gradient.

    **Fixed point**: the two-step DDIM map of the teacher, at which the loss is 0. After all rounds
    it is the composed map of the first teacher's grid: errors of its N_0 steps are never repaired.
    Only as N grows is x~ what the teacher says itself.

    With a `scales` range the student is told the scale of guidance as the entry "scale" of its
    condition. A teacher with a `scale` is guided by it; one without, such as the student of
    `GuidedDistillation` or of the round before, is told it too: the **second stage of guided
    distillation**.

    Args:
        steps: N, a whole number >= 1; or a `Curriculum` of it.
        grid: how the times lie.
        weighting: factor on the error in x0.
        shifts: how many grids there are, each later than the one before by 1 / shifts of a step;
            all their steps are learned. 1 for DDIM. 2 for `solvers.DoubleJump` of 2 N steps, which
            starts from the times between as well. None for steps from anywhere. Steps that would
            end below 0 end there.
        scales: guidance scales, drawn uniformly; None for the teacher as it is.

    Raises:
        TypeError: when called, for a student or a teacher that is no denoiser.
        ValueError: when called, without a teacher, or one of another process.

    Reference: Salimans, Ho, "Progressive Distillation for Fast Sampling of Diffusion Models",
    2022, arXiv 2202.00512, algorithm 2. Meng, Rombach, Gao, Kingma, Ermon, Ho, Salimans, "On
    Distillation of Guided Diffusion Models", 2022, arXiv 2210.03142. Predict `X0`, `V` or the
    like: the noise says nothing of x0 where alpha vanishes.
    """

    steps: Number | Curriculum = number(4.0)
    grid: TimeLaw = UniformTime()
    weighting: Weighting = TruncatedSNR()
    shifts: int | None = eqx.field(static=True, default=1)
    scales: tuple[Number, Number] | None = scale_range()

    def __check_init__(self):
        if not isinstance(self.steps, Curriculum):
            check_number("steps", self.steps, least=1.0)
        check_kind("grid", self.grid, TimeLaw, "losses.UniformTime()")
        check_kind("weighting", self.weighting, Weighting, "losses.TruncatedSNR()")
        if self.shifts is not None:
            check_count("shifts", self.shifts, instead="Pass None for steps from anywhere.")

    def times(self, process: GaussianProcess, steps: int | None = None) -> Array:
        """The decreasing grid that a student of N steps is sampled on, `(N + 1,)`.

        Args:
            process: the forward process.
            steps: N; the loss's own if None, which must be a known number then.
        """
        if steps is None and not isinstance(self.steps, float):
            raise ValueError(
                "`steps` must be given for a loss that has no known number of its own, got "
                f"{self.steps!r:.60}."
            )
        own: Any = self.steps
        count = int(own) if steps is None else check_count("steps", steps)
        return self._time(process, jnp.arange(count, -1, -1) / count)

    def _time(self, process: GaussianProcess, level: Array) -> Array:
        return jnp.where(level > 0, self.grid.quantile(process, level), 0)

    def cell(
        self, process: GaussianProcess, u: Array, step: Array | int = 0
    ) -> tuple[Array, Array, Array]:
        """Start, middle and end of one of the student's steps, in times.

        Args:
            process: the forward process.
            u: levels in [0, 1), a scalar or an array.
            step: the training step, for a curriculum.
        """
        steps = self.steps(jnp.asarray(step)) if isinstance(self.steps, Curriculum) else self.steps
        if self.shifts is None:
            start = 1 - u
            end = jnp.maximum(start - 1 / steps, 0)
        else:
            count = self.shifts * jnp.floor(jnp.asarray(steps))
            n = jnp.clip(jnp.floor(u * count), 0, count - 1) + 1
            start, end = n / count, jnp.maximum(n - self.shifts, 0) / count
        levels = start, (start + end) / 2, end
        t, middle, s = (self._time(process, level) for level in levels)
        return t, middle, s

    def __call__(
        self, model: Denoiser, key: Array, batch: dict[str, Any], frozen: Any
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            model: the student, a denoiser.
            key: typed key; example i draws from its fold_in with i.
            batch: `{"x": (B, *event), "cond": pytree with leading axis B}`.
            frozen: with the "teacher".

        Returns:
            The scalar loss, and `{"x0_mse": mean error without the weight}`.
        """
        check_denoiser(model, "model")
        teacher, process = teacher_of(frozen, model), model.process
        step = getattr(frozen, "step", 0)

        def one(key, u, x0, cond):
            t, middle, s = self.cell(process, u, step)
            _, x, scale, own = noised(process, key, x0, t, self.scales)
            guided, given = guided_or_told(teacher, cond, scale)
            goal = two_step_answer(guided, x, (t, middle, s), given)
            answer = model(x, t, told_scale(cond, scale), key=own)
            error = jnp.mean(wide(answer - jax.lax.stop_gradient(goal)) ** 2)
            return self.weighting(process, t, self.grid.density(process, t)) * error, error

        losses, errors = each_example(one, key, batch)
        return losses.mean(), {"x0_mse": errors.mean()}


def two_step_answer(
    teacher: Denoiser, x: Array, times: tuple[Array, Array, Array], cond: PyTree = None
) -> Array:
    """x~ `(*event)`, whose single step of DDIM is the teacher's two: two passes of the teacher.

    A weighted mean of its two answers, and so without the cancellation of solving for it.

    Args:
        teacher: a denoiser.
        x: the state at the first time, `(*event)`.
        times: t > t' > s, scalars; s may be 0.
        cond: of the teacher.
    """
    process, (t, middle, s) = teacher.process, times
    first = said_by(teacher, x, t, cond)
    second = said_by(teacher, ddim_jump(process, x, first, t, middle), middle, cond)

    def decay(t):
        return process.alpha(t) * process.sigma(s) / (process.alpha(s) * process.sigma(t))

    weight = (1 - decay(middle)) / (1 - decay(t))
    return (first + weight * (second - first)).astype(x.dtype)

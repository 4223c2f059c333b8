"""Diff-Instruct: a generator follows the difference of two scores."""

from typing import Any

from jaxtyping import Array, PyTree

from jaxdiff._checks import check_callable, check_kind
from jaxdiff._tree import Number
from jaxdiff.distillation._generated import start_times
from jaxdiff.distillation._matching import ScoreDifference
from jaxdiff.distillation._shared import scale_range
from jaxdiff.losses import LogNormal, TimeLaw, Uniform, Weighting
from jaxdiff.predictions import X0


class DiffInstruct(ScoreDifference):
    """A gradient w(t) (D_fake(x_t) - D_teacher(x_t)) on what a generator makes.

    x_g = model(z, start, 0), x_t = alpha x_g + sigma eps. With an exact fake score its mean is
    (w sigma^2 / alpha^2) d KL(q_t | p_t), of the noised laws of generator and teacher: the integral
    of KL over noise levels, seeking modes. One pass of the generator, one of the fake score, one of
    the teacher; no data.

    **Fixed point**: the teacher's law, where the gradient of every example is 0.

    Args:
        weighting: w, a factor in x0; `Uniform(X0())` is 1.
        time_law: of the noise level.
        start: where the generator starts: a time; its times of several steps, decreasing, of which
            each example draws one; None for the process's t_max.
        scales: guidance scales of the teacher, drawn uniformly and told to the generator and the
            fake score as the entry "scale"; None for the teacher as it is, guided or not.

    Raises:
        TypeError: when called, for a generator that is no `FlowMap`.
        ValueError: when called, without a "teacher" or a "fake", or of another process.

    Reference: Luo, Hu, Zhang, Sun, Li, Zhang, "Diff-Instruct: A Universal Approach for
    Transferring Knowledge From Pre-trained Diffusion Models", 2023, arXiv 2305.18455, algorithm 1.
    """

    weighting: Weighting = Uniform(X0())
    time_law: TimeLaw = LogNormal()
    start: tuple[Number, ...] | None = start_times()
    scales: tuple[Number, Number] | None = scale_range()

    def __check_init__(self):
        check_callable("weighting", self.weighting, "losses.Uniform(predictions.X0())")
        check_kind("time_law", self.time_law, TimeLaw, "losses.LogNormal()")

    def reference(self, fake: Any, x0: Array, x: Array, t: Array, cond: PyTree) -> Array:
        """See `ScoreDifference`."""
        del x0
        return fake(x, t, cond)

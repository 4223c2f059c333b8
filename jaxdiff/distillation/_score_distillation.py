"""Score distillation of single examples and of particles: SDS, VSD and ESD."""

from typing import Any

import equinox as eqx
from jaxtyping import Array, PyTree

from jaxdiff._checks import check_callable, check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.distillation._generated import start_times
from jaxdiff.distillation._matching import ScoreDifference
from jaxdiff.distillation._shared import scale_range
from jaxdiff.flow_map import FlowMap
from jaxdiff.guidance import ClassifierFree
from jaxdiff.losses import TimeLaw, UniformTime, Weighting
from jaxdiff.processes import GaussianProcess
from jaxdiff.training import Frozen


class NoiseVariance(Weighting):
    """alpha sigma on x0: a gradient sigma^2 (eps_hat - eps), as score distillation is written.

    eps_hat - eps = alpha / sigma (x0 - x0_hat), once and not squared: of a gradient, and not of an
    error.
    """

    def __call__(self, process: GaussianProcess, t: Array, density: Array) -> Array:
        """alpha sigma."""
        del density
        return process.alpha(t) * process.sigma(t)


class _Distillation(ScoreDifference):
    """Base: what the three check of their fields."""

    def __check_init__(self):
        check_callable("weighting", self.weighting, "distillation.NoiseVariance()")
        check_kind("time_law", self.time_law, TimeLaw, "losses.UniformTime()")


class SDS(_Distillation):
    """Score distillation sampling: w(t) (eps_teacher(x_t) - eps) on what a generator makes.

    In x0 this is w' (x_g - D_teacher(x_t)), w' = w alpha / sigma: the example itself is the fake
    score's answer, as if the generator made nothing else. One pass of the generator, one of the
    teacher, through which no gradient goes; no data, no other player. The generator is a map of
    noise, or one of conditions, such as views of a scene, that leaves its noise alone.

    **Fixed point**: a mode, and not the law. A Gaussian teacher draws every example to its mean,
    whatever its variance. Trap: in scores, the noise of x_t is -eps / sigma; eps itself beside a
    score is another sign and another scale.

    Args:
        weighting: w', a factor in x0; `NoiseVariance()` is w = sigma^2.
        time_law: of the noise level; the paper's is uniform on [0.02, 0.98].
        start: as of `DiffInstruct`.
        scales: as of `DiffInstruct`.

    Raises:
        TypeError: when called, for a generator that is no `FlowMap`.
        ValueError: when called, without a "teacher", or one of another process.

    Reference: Poole, Jain, Barron, Mildenhall, "DreamFusion: Text-to-3D using 2D Diffusion", 2022,
    arXiv 2209.14988, equation 3.
    """

    weighting: Weighting = NoiseVariance()
    time_law: TimeLaw = UniformTime()
    start: tuple[Number, ...] | None = start_times()
    scales: tuple[Number, Number] | None = scale_range()

    def fake_of(self, frozen: Frozen, model: FlowMap) -> None:
        """None."""

    def reference(self, fake: Any, x0: Array, x: Array, t: Array, cond: PyTree) -> Array:
        """See `ScoreDifference`: the example."""
        del fake, x, t, cond
        return x0


class VSD(_Distillation):
    """Variational score distillation: w(t) (eps_teacher(x_t) - eps_fake(x_t)) on what is made.

    `DiffInstruct` with the weights of score distillation, for particles or scenes: the fake score
    is a player "fake", usually the teacher with adapters, whose condition has the view too. One
    pass of the generator, one of the fake score, one of the teacher.

    **Fixed point**: the teacher's law. Where the fake score knows each example, as that of a single
    particle does, it is `SDS` example by example.

    Args:
        weighting: a factor in x0, as of `SDS`.
        time_law: likewise.
        start: as of `DiffInstruct`.
        scales: as of `DiffInstruct`.

    Raises:
        TypeError: when called, for a generator that is no `FlowMap`.
        ValueError: when called, without a "teacher" or a "fake", or of another process.

    Reference: Wang, Lu, Wang, Bao, Li, Su, Zhu, "ProlificDreamer: High-Fidelity and Diverse
    Text-to-3D Generation with Variational Score Distillation", 2023, arXiv 2305.16213, equation 9.
    """

    weighting: Weighting = NoiseVariance()
    time_law: TimeLaw = UniformTime()
    start: tuple[Number, ...] | None = start_times()
    scales: tuple[Number, Number] | None = scale_range()

    def reference(self, fake: Any, x0: Array, x: Array, t: Array, cond: PyTree) -> Array:
        """See `ScoreDifference`."""
        del x0
        return fake(x, t, cond)


class ESD(_Distillation):
    """Entropic score distillation: VSD whose fake score is between that of a view and of all.

        w(t) (lam D_fake(x_t) + (1 - lam) D_fake(x_t, cond) - D_teacher(x_t))

    in x0, the first with `null_cond` in place of the view: classifier-free guidance of the fake
    score, of scale 1 - lam. lam = 0 is `VSD`, and with one example a view it is `SDS`; lam = 1 the
    law of all views together. One pass of the generator, one of the teacher, and one of the fake
    score over both conditions; train it with `FakeScoreLoss(DenoisingLoss(null_cond=...))`.

    **Fixed point**, at one t, for a teacher N(mu, tau^2) and one example a view: mean mu and
    variance max(0, lam tau^2 - (1 - lam) sigma^2 / alpha^2) over the views.

    Args:
        null_cond: the fake score's condition that means "no view"; of a mapping, the entries that
            it names.
        lam: in [0, 1], weight of the entropy.
        weighting: a factor in x0, as of `SDS`.
        time_law: likewise.
        start: as of `DiffInstruct`.
        scales: as of `DiffInstruct`.

    Raises:
        TypeError: when called, for a generator that is no `FlowMap`.
        ValueError: when called, without a "teacher" or a "fake", or for a condition that lacks
            what `null_cond` replaces.

    Reference: Wang, Xu, Fan, Wang, Mohan, Iandola, Ranjan, Li, Liu, Wang, Chandra, "Taming Mode
    Collapse in Score Distillation for Text-to-3D Generation", 2023, arXiv 2401.00909.
    """

    null_cond: PyTree = eqx.field(kw_only=True)
    lam: Number = number(0.5)
    weighting: Weighting = NoiseVariance()
    time_law: TimeLaw = UniformTime()
    start: tuple[Number, ...] | None = start_times()
    scales: tuple[Number, Number] | None = scale_range()

    def __check_init__(self):
        check_number("lam", self.lam, least=0.0, most=1.0)

    def reference(self, fake: Any, x0: Array, x: Array, t: Array, cond: PyTree) -> Array:
        """See `ScoreDifference`."""
        del x0
        return ClassifierFree(fake, self.null_cond, 1 - self.lam)(x, t, cond)

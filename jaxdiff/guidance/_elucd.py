"""Guidance by an ordinary classifier of clean examples: its input, its output, its strength."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_callable, check_number
from jaxdiff._tree import Number, number
from jaxdiff.conditions import as_entries, check_classes, num_classes_of, take
from jaxdiff.denoiser import Denoiser, Estimate
from jaxdiff.guidance._scale import Scale, check_scale, norm, scale_at
from jaxdiff.guidance._training_free import with_cond
from jaxdiff.solvers import DiffusionSolver, EDMHeun, SolverWrapper
from jaxdiff.solvers._ancestral import ancestral_std
from jaxdiff.solvers._base import Moved, Problem
from jaxdiff.stepwise import Step, Stepwise

_CLASSIFIER = "jax.tree_util.Partial(function, classifier)"


def tempered_log_prob(logits: Array, y: Array, tau1: Number = 1.0, tau2: Number = 1.0) -> Array:
    """tau1 f_y - log sum_i exp(tau2 f_i), which is log p(y | x) where both are 1.

    Its gradient is tau1 grad f_y - tau2 sum_i softmax(tau2 f)_i grad f_i: conditional at tau2 = 1,
    and the joint direction, towards likely examples of the class, at tau2 = 0.

    Args:
        logits: f, `(classes,)`, of one example.
        y: scalar integer class.
        tau1: of the class's own logit.
        tau2: of all logits.

    Returns:
        A scalar, in float32 at least.

    Raises:
        ValueError: for logits that are no vector, or a class that is none of theirs.
    """
    if jnp.ndim(logits) != 1:
        raise ValueError(
            f"`logits` must be (classes,) for one example, got shape {jnp.shape(logits)}. Use "
            "jax.vmap for a batch."
        )
    check_classes(y, len(logits))
    if jnp.ndim(y):
        raise ValueError(
            f"`y` must be an integer class for each example, got shape {jnp.shape(y)}."
        )
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return tau1 * wide[y] - jax.nn.logsumexp(tau2 * wide)


def rms(x: Array) -> Array:
    """The root mean square over the numbers of one example."""
    return norm(x) / x.size**0.5


def _unit(slope: Array) -> Array:
    """The gradient at a root mean square of 1, and 0 where it vanishes."""
    size = rms(slope)
    return slope / jnp.where(size > 0, size, 1)


def _check_choice(argument: str, value: object, choices: tuple) -> None:
    if value not in choices:
        names = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{argument}` must be one of {names}, got {value!r}.")


class EluCD(Stepwise):
    """D + weight g, g the gradient of tau1 f_y - log sum_i exp(tau2 f_i), f a clean classifier's.

    Kind 2, with data of the example: the entry "y" of its condition, a class. One evaluation of
    the base, and one forward and backward pass of the classifier; with `wrt="xt"` and the input
    "x0" a backward pass of the base, too.

    With `shift="mean"` the mean of an ancestral step from t to s moves by

        scale (Var + gamma sin(pi s / t_0) V_max) g,

    Var the step's variance, t_0 the grid's first time and V_max = sigma_t^2 (1 - e^-2h) of its
    first step. In x0 that is a move by as much over alpha_s (1 - e^-2h), of any solver; it is known
    within a step, and remembered from the first. On a uniform grid s / t_0 is the number of steps
    to go over that of all. Nothing is guided in a step to sigma = 0 without noise.

    With `shift="score"` it is D + scale (sigma^2 / alpha) g: Bayes' rule where g is the gradient of
    log p(y | x_t), which `wrt="xt"` makes of what is known of x_t; a gradient by x0 in its place
    leaves out dx0 / dx_t. Needs no step.

    Calibration of the classifier along the way is how to choose its input, activation and
    temperatures: see `metrics.trajectory_calibration`, `networks.softened`.

    Args:
        base: any denoiser. `Clipped` inside for the paper's estimate.
        logits: `x -> (classes,)` of one clean example; a pytree whose weights are leaves.
        scale: on the shift; a number, or a `ScaleSchedule`.
        tau1: see `tempered_log_prob`.
        tau2: likewise; the paper's is 1/2.
        gamma: of the sine; 0 leaves it out. For `shift="mean"`.
        variance: of the ancestral step, as of `Ancestral`, for `shift="mean"`; where the base
            estimates one, that.
        low: what the classifier sees of x0 is clipped from here; -infinity does not clip.
        high: and up to here.
        input: what the classifier sees: "x0", D clipped; "xt", the noisy x; "rms", x over its
            root mean square, or over 1 where that is more.
        wrt: what the gradient is taken by: "input", with D a constant; or "xt".
        shift: "mean" or "score".
        normalise: "rms" for gradients of a root mean square of 1, by example; None for none.

    Raises:
        ValueError: when called, without "y", or for logits that are no vector.

    Reference: Ma, Hu, Wang, Sun, "Elucidating The Design Space of Classifier-Guided Diffusion
    Generation", 2023, arXiv 2310.11311. V_max is that of the process, and not of a pixel.
    """

    base: Denoiser
    logits: Callable[[Array], Array]
    scale: Scale = number(1.0)
    tau1: Number = number(1.0)
    tau2: Number = number(0.5)
    gamma: Number = number(0.3)
    variance: Number = number(0.0)
    low: Number = number(-1.0)
    high: Number = number(1.0)
    input: str = eqx.field(static=True, default="x0", kw_only=True)
    wrt: str = eqx.field(static=True, default="input", kw_only=True)
    shift: str = eqx.field(static=True, default="mean", kw_only=True)
    normalise: str | None = eqx.field(static=True, default=None, kw_only=True)

    takes: ClassVar[tuple[str, ...]] = ("y",)

    def __check_init__(self):
        check_callable("logits", self.logits, _CLASSIFIER)
        check_scale(self.scale)
        for name in ("tau1", "tau2", "gamma", "variance"):
            check_number(name, getattr(self, name))
        for name in ("low", "high"):
            check_number(name, getattr(self, name), finite=False)
        _check_choice("input", self.input, ("x0", "xt", "rms"))
        _check_choice("wrt", self.wrt, ("input", "xt"))
        _check_choice("shift", self.shift, ("mean", "score"))
        _check_choice("normalise", self.normalise, (None, "rms"))

    def check_cond(self, cond: PyTree) -> None:
        """See `Denoiser`; the class too, of a classifier that says how many it has."""
        super().check_cond(cond)
        check_classes(as_entries(cond).get("y"), num_classes_of(self.logits))

    @property
    def bounded_start(self) -> bool:
        """Of scores: a trained classifier's slope does not vanish with alpha."""
        return self.shift == "score" or super().bounded_start

    def init_memory(self, x: Array) -> Array | None:
        """The grid's first time, and the variance of its first step: not known yet."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.zeros(2, wide) if self.shift == "mean" else None

    def _seen(self, x: Array, x0: Array) -> Array:
        """What the classifier sees."""
        if self.input == "x0":
            return jnp.clip(x0, self.low, self.high)
        return x if self.input == "xt" else _levelled(x)

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        y, rest = take(cond, "y", by="EluCD")

        def log_prob(seen):
            return tempered_log_prob(self.logits(seen), y, self.tau1, self.tau2)

        def through(x):
            found = self.base.estimate(x, t, rest, key=key)
            return log_prob(self._seen(x, found.x0)), found

        if self.wrt == "xt" and self.input == "x0":
            slope, found = jax.grad(through, has_aux=True)(x)
        else:
            found = self.base.estimate(x, t, rest, key=key)
            if self.wrt == "xt":
                slope = jax.grad(lambda x: log_prob(self._seen(x, found.x0)))(x)
            else:
                slope = jax.grad(log_prob)(self._seen(x, found.x0))
        if self.normalise == "rms":
            slope = _unit(slope)
        scale = scale_at(self.scale, self.process, t)
        if self.shift == "score":
            weight = scale * self.process.sigma(t) ** 2 / self.process.alpha(t)
            return found.moved(self.process, t, found.x0 + weight * slope)
        weight, memory = self._weight(found)
        moved = found.moved(self.process, t, found.x0 + scale * weight * slope)
        return self.remember(moved, memory)

    def _weight(self, found: Estimate) -> tuple[Array, Array]:
        """The move of x0 that moves an ancestral mean by its variances, and what to remember."""
        process, step, memory = self.process, self.step, self.step.memory
        t, s = step.t, step.s
        added = process.added_std(s, t) ** 2  # sigma_t^2 (1 - e^-2h)
        own = jnp.stack([t, added]).astype(memory.dtype)
        start, largest = memory = jnp.where(memory[0] > 0, memory, own)
        learned = found.variance
        share = self.variance if learned is None else jnp.clip(learned, 0.0, 1.0)
        spread = ancestral_std(process, t, s, share) ** 2
        sine = self.gamma * jnp.maximum(jnp.sin(jnp.pi * s / start), 0) * largest
        return (spread + sine) * process.sigma(t) ** 2 / (process.alpha(s) * added), memory


def _levelled(x: Array) -> Array:
    """x over its root mean square, or over 1 where that is more."""
    return x / jnp.maximum(rms(x), 1).astype(x.dtype)


class EluCDSteps(SolverWrapper):
    """A solver each of whose steps starts from x + w r g, g a classifier's gradient of rms 1.

    A solver around a solver, with data of the example: the entry "y" of its condition, a class.
    r is the root mean square of x, and g the gradient of `tempered_log_prob` by u = x / max(r, 1),
    which the classifier sees. In step i of N

        w_i = max(scale (N + 1 - i) / (N + 1), 1e-5) + scale sine sin(pi i / N),

    of the solver's own grid. The length of the gradient does not matter: x moves by w of its own
    size. The denoiser's evaluations are those of the base.

    Args:
        base: any solver.
        logits: `x -> (classes,)` of one example; a pytree whose weights are leaves.
        scale: of w.
        sine: of its second part, in units of `scale`.
        tau1: see `tempered_log_prob`.
        tau2: likewise.

    Raises:
        ValueError: without "y", or for logits that are no vector.

    Reference: as of `EluCD`; its code for EDM.
    """

    base: DiffusionSolver = EDMHeun()
    logits: Callable[[Array], Array] = eqx.field(kw_only=True)
    scale: Number = number(0.004)
    sine: Number = number(0.3)
    tau1: Number = number(1.0)
    tau2: Number = number(0.0)

    def __check_init__(self):
        check_callable("logits", self.logits, _CLASSIFIER)
        for name in ("scale", "sine", "tau1", "tau2"):
            check_number(name, getattr(self, name))

    def check_cond(self, cond: PyTree) -> None:
        """See `DiffusionSolver`; the class too, of a classifier that says how many it has."""
        super().check_cond(cond)
        check_classes(as_entries(cond).get("y"), num_classes_of(self.logits))

    def own_plan(self, problem: Problem) -> Array:
        """w of every step, `(num_steps,)`."""
        steps = problem.num_steps
        i = jnp.arange(steps, dtype=problem.times.dtype)
        falling = jnp.maximum(self.scale * (steps + 1 - i) / (steps + 1), 1e-5)
        return falling + self.scale * self.sine * jnp.sin(jnp.pi * i / steps)

    def update(self, problem: Problem, x: Array, step: Step) -> Moved:
        """See `DiffusionSolver`."""
        y, rest = take(problem.cond, "y", by="EluCDSteps")

        def log_prob(seen):
            return tempered_log_prob(self.logits(seen), y, self.tau1, self.tau2)

        push = step.plan.own * rms(x) * _unit(jax.grad(log_prob)(_levelled(x)))
        return self.move_base(with_cond(problem, rest), (x + push).astype(x.dtype), step)

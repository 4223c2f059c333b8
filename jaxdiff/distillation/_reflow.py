"""Rectified flow on its own couplings, and one step learned from them."""

from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PRNGKeyArray, PyTree

from jaxdiff._checks import check_callable, check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.denoiser import Denoiser, check_denoiser
from jaxdiff.distillation._shared import Distance, Squared, check_flow_map
from jaxdiff.flow_map import FlowMap
from jaxdiff.losses import TimeLaw, Uniform, UniformTime, Weighting, each_example
from jaxdiff.losses._batch import check_batch, wide
from jaxdiff.predictions import Velocity
from jaxdiff.processes import GaussianProcess
from jaxdiff.sampling import invert, resolve_grid, sample
from jaxdiff.solvers import DDIM


def reflow_pairs(
    key: PRNGKeyArray,
    teacher: Denoiser | FlowMap,
    shape: tuple[int, ...],
    num_samples: int,
    *,
    cond: PyTree = None,
    solver: diffrax.AbstractSolver = DDIM(),
    times: int | ArrayLike = 50,
    batch_size: int | None = None,
    first_index: int | Array = 0,
) -> dict[str, PyTree]:
    """Starts, and the samples that the probability-flow ODE makes of them: a batch to learn from.

    The noise is the one that, with the sample, makes the start: x_T = alpha_T x + sigma_T noise,
    also where alpha_T is not 0. So the line of a pair goes through both ends of its trajectory.

    Args:
        key: typed key; example i draws from its fold_in with its index.
        teacher: the denoiser; or the last student, to do it once more.
        shape: of one example.
        num_samples: how many.
        cond: pytree with a leading axis of `num_samples`, or None.
        solver: a deterministic one; the same for all pairs of a training.
        times: as of `sample`.
        batch_size: as of `sample`.
        first_index: as of `sample`.

    Returns:
        `{"x": samples, "noise": (num_samples, *event), "cond": cond}`; "cond" only if given.

    Raises:
        ValueError: for a solver that draws.

    Reference: Liu, Gong, Liu, "Flow Straight and Fast: Learning to Generate and Transfer Data with
    Rectified Flow", 2022, arXiv 2209.03003, algorithm 1.
    """
    if getattr(solver, "stochastic", False):
        raise ValueError(
            f"`solver` must be deterministic to couple noise and samples, got {solver}. Use DDIM()."
        )
    times = resolve_grid(teacher, times, solver, num_samples)
    found = sample(
        key, teacher, shape, num_samples, cond=cond, solver=solver, times=times,
        batch_size=batch_size, first_index=first_index, saveat=diffrax.SaveAt(t0=True),
    )  # fmt: skip
    assert found.trajectory is not None
    return _pairs(teacher.process, found.x, found.trajectory.x[:, 0], times[..., 0], cond)


def inverted_pairs(
    teacher: Denoiser,
    x: Array,
    *,
    cond: PyTree = None,
    solver: diffrax.AbstractSolver = DDIM(),
    times: int | ArrayLike = 50,
    batch_size: int | None = None,
) -> dict[str, PyTree]:
    """Data, and the noise that the probability-flow ODE makes of them; see `reflow_pairs`.

    Args:
        teacher: the denoiser.
        x: examples `(num_samples, *event)`.
        cond: pytree with a leading axis of `num_samples`, or None.
        solver: a deterministic one.
        times: as of `invert`.
        batch_size: as of `invert`.

    Returns:
        As of `reflow_pairs`.
    """
    times = resolve_grid(teacher, times, solver, len(x), increasing=True)
    found = invert(teacher, x, cond=cond, solver=solver, times=times, batch_size=batch_size)
    return _pairs(teacher.process, x, found.x, times[..., -1], cond)


def _pairs(process: GaussianProcess, x: Array, start: Array, t: Array, cond: PyTree) -> dict:
    t = t.reshape(*t.shape, *[1] * (x.ndim - 1)) if t.ndim else t
    noise = ((start - process.alpha(t) * x) / process.sigma(t)).astype(x.dtype)
    return {"x": x, "noise": noise} | ({} if cond is None else {"cond": cond})


class ReflowLoss(eqx.Module):
    """Flow matching, or denoising, on a given coupling of examples and noise.

        mean of weight(t) |x - D(alpha_t x + sigma_t noise, t)|^2

    One pass of the student.

    **Fixed point**: E[x | x_t] of the coupling. Of pairs of one trajectory each, whose lines do not
    cross, D is the end of the line through x_t: paths are straight, and one step of the ODE is all
    of it. So it is in one dimension after one round; in general lines cross less with every round,
    and no convex cost of transport grows.

    Args:
        weighting: factor on the error in x0; the default is 1 on the velocity's.
        time_law: law of the training time.

    Raises:
        TypeError: when called, for a student that is no denoiser.
        ValueError: when called, for a batch without noise.

    Reference: Liu, Gong, Liu, "Flow Straight and Fast: Learning to Generate and Transfer Data with
    Rectified Flow", 2022, arXiv 2209.03003, equation 1. Data are at t = 0 here, and the process may
    be any.
    """

    weighting: Weighting = Uniform(Velocity())
    time_law: TimeLaw = UniformTime()

    def __check_init__(self):
        check_kind("weighting", self.weighting, Weighting, "losses.Uniform(predictions.Velocity())")
        check_kind("time_law", self.time_law, TimeLaw, "losses.UniformTime()")

    def __call__(
        self, model: Denoiser, key: PRNGKeyArray, batch: dict[str, Any], frozen: Any
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            model: the student, a denoiser.
            key: typed key; example i draws from its fold_in with i.
            batch: as of `reflow_pairs`.
            frozen: other models; not used.

        Returns:
            The scalar loss, and `{"x0_mse": mean error without the weight}`.
        """
        check_denoiser(model, "model")
        check_pairs(batch)
        process = model.process

        def one(key, u, pair, cond):
            t = self.time_law.quantile(process, u)
            x0, noise = pair
            x = process.marginal(x0, noise, t).astype(x0.dtype)
            error = jnp.mean(wide(x0 - model(x, t, cond, key=key)) ** 2)
            return self.weighting(process, t, self.time_law.density(process, t)) * error, error

        losses, errors = _each_pair(one, key, batch)
        return losses.mean(), {"x0_mse": errors.mean()}


class PairRegression(eqx.Module):
    """One step, learned from what many steps made: mean of distance(f(x_T, T, 0), x).

    x_T = alpha_T x + sigma_T noise. One pass of the student. Also the regression term of
    distribution matching distillation.

    **Fixed point**: of a squared distance E[x | x_T], which is the sample itself, since the ODE
    makes it of its start; the loss is then 0.

    Args:
        distance: of two examples; any function of two, such as one of features.
        start: T, where the pairs' solver started; None for the process's t_max.

    Raises:
        TypeError: when called, for a student that is no `FlowMap`.
        ValueError: when called, for a batch without noise.

    Reference: Liu, Gong, Liu, arXiv 2209.03003, section 2.2; Yin, Gharbi, Zhang, Shechtman,
    Durand, Freeman, Park, "One-step Diffusion with Distribution Matching Distillation", 2023,
    arXiv 2311.18828, section 3.3.
    """

    distance: Distance | Any = Squared()
    start: Number | None = number(None)

    def __check_init__(self):
        check_callable("distance", self.distance, "distillation.Squared()")
        check_number("start", self.start, above=0.0)

    def __call__(
        self, model: FlowMap, key: PRNGKeyArray, batch: dict[str, Any], frozen: Any
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch; arguments as of `ReflowLoss`, with a map for the student.

        Returns:
            The scalar loss, and no metrics.
        """
        check_flow_map(model)
        check_pairs(batch)
        process = model.process

        def one(key, u, pair, cond):
            x0, noise = pair
            t = jnp.asarray(process.t_max if self.start is None else self.start, u.dtype)
            x = process.marginal(x0, noise, t).astype(x0.dtype)
            return self.distance(model(x, t, jnp.zeros_like(t), cond, key=key), x0)

        return _each_pair(one, key, batch).mean(), {}


def check_pairs(batch: Any) -> None:
    """Reject what is no batch of examples and noise.

    Raises:
        TypeError: for what is no batch at all.
        ValueError: for one without noise, or noise of another shape.
    """
    check_batch(batch)
    noise = jnp.shape(batch["noise"]) if "noise" in batch else "none"
    if noise != jnp.shape(batch["x"]):
        raise ValueError(
            "`batch` must have the noise of every example, of its shape "
            f"{jnp.shape(batch['x'])}, got {noise}. Make one with "
            "distillation.reflow_pairs(key, teacher, shape, count)."
        )


def _each_pair(loss, key: PRNGKeyArray, batch: dict[str, Any]) -> PyTree:
    """`loss(key, u, (x, noise), cond)` of every example, as `each_example`."""
    cond = {"noise": batch["noise"], "cond": batch.get("cond")}

    def one(key, u, x0, given):
        return loss(key, u, (x0, given["noise"]), given["cond"])

    return each_example(one, key, {"x": batch["x"], "cond": cond})

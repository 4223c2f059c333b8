"""Where a model is asked for what it is to forget: noised examples, or states of sampling."""

from abc import abstractmethod
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from jaxdiff._checks import check_count, check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.denoiser import Denoiser
from jaxdiff.guidance import ClassifierFree
from jaxdiff.losses import TimeLaw, UniformTime, each_example
from jaxdiff.losses._batch import time_dtype
from jaxdiff.sampling import denoise
from jaxdiff.solvers import DDIM
from jaxdiff.unlearning._shared import Seen


class States(eqx.Module):
    """Base of where noisy states are from.

    What a loss of a target teaches depends on them in one way only: a network of finite capacity
    learns it where it was asked.
    """

    @abstractmethod
    def __call__(self, key: PRNGKeyArray, rows: dict[str, Any], model: Denoiser) -> Seen:
        """States of a batch, and their times; no gradient passes them.

        Args:
            key: typed key; example i draws from its fold_in with i.
            rows: `{"x": (B, *event), "cond": leading axis B}`.
            model: whose process it is, and by which states are sampled; constant.
        """


def check_states(states: States | None) -> None:
    """Reject what are neither states nor None, which stands for those of sampling."""
    if states is not None:
        check_kind("states", states, States, "unlearning.NoisedExamples()")


class NoisedExamples(States):
    """The batch's own examples, noised: data are needed, and no pass of a network.

    Args:
        time_law: law of the time.
    """

    time_law: TimeLaw = UniformTime()

    def __check_init__(self):
        check_kind("time_law", self.time_law, TimeLaw, "losses.UniformTime()")

    def __call__(self, key: PRNGKeyArray, rows: dict[str, Any], model: Denoiser) -> Seen:
        """See `States`."""

        def one(key, u, x0, cond):
            del cond
            t = self.time_law.quantile(model.process, u).astype(time_dtype(x0))
            x = model.process.noise(key, x0, t).astype(x0.dtype)
            return Seen(x, t, self.time_law.density(model.process, t))

        return jax.lax.stop_gradient(each_example(one, key, rows))


class OnTrajectory(States):
    """What sampling passes: a guided sampler starts in noise and stops after a number of steps.

    The number is uniform in 0..most steps - 1, an example its own. As many steps are made as the
    last of a batch needs, two passes each with guidance. Of the batch only the shape of x is looked
    at: no data are needed.

    Args:
        null_cond: the condition that means "none".
        scale: of classifier-free guidance.
        steps: of the whole grid.
        most: share of them that is made at most, in (0, 1]; below 1 states are early ones.
        grid: how its times lie.
        solver: of a step; any without a memory.

    Reference: Gandikota, Materzynska, Fiotto-Kaufman, Bau, "Erasing Concepts from Diffusion
    Models", 2023, arXiv 2303.07345, section 4.1.
    """

    null_cond: PyTree
    scale: Number = number(3.0)
    steps: int = eqx.field(static=True, default=50)
    most: Number = number(1.0)
    grid: TimeLaw = UniformTime()
    solver: diffrax.AbstractSolver = DDIM()

    def __check_init__(self):
        check_count("steps", self.steps)
        check_number("scale", self.scale)
        check_number("most", self.most, above=0.0, most=1.0)
        check_kind("grid", self.grid, TimeLaw, "losses.UniformTime()")

    def __call__(self, key: PRNGKeyArray, rows: dict[str, Any], model: Denoiser) -> Seen:
        """See `States`."""
        x, cond, process = rows["x"], rows.get("cond"), model.process
        guided = ClassifierFree(model, self.null_cond, self.scale)
        levels = jnp.arange(self.steps, -1, -1) / self.steps
        times = self.grid.quantile(process, levels).astype(time_dtype(x))
        count = jnp.maximum(jnp.ceil(self.most * self.steps), 1).astype(jnp.int32)
        start_key, stop_key, step_key = jax.random.split(key, 3)

        def begin(i):
            prior = process.prior(jax.random.fold_in(start_key, i), x.shape[1:], times[0], x.dtype)
            stop = jax.random.randint(jax.random.fold_in(stop_key, i), (), 0, count)
            return prior, stop

        z, stop = jax.vmap(begin)(jnp.arange(len(x)))

        def step(n, z):
            own = jax.random.fold_in(step_key, n)
            pair = jnp.stack([times[n], times[n + 1]])
            moved = denoise(own, guided, z, cond=cond, solver=self.solver, times=pair).x
            going = (n < stop).reshape(-1, *[1] * (z.ndim - 1))
            return jnp.where(going, moved.astype(z.dtype), z)

        z = jax.lax.stop_gradient(jax.lax.fori_loop(0, stop.max(), step, z))
        t = times[stop]
        return Seen(z, t, jnp.ones_like(t))

"""Easy consistency tuning: from a diffusion model to a consistency model, without a break."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jaxdiff._checks import check_callable, check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.distillation._shared import (
    Distance,
    PseudoHuber,
    check_flow_map,
    noised,
)
from jaxdiff.flow_map import FlowMap
from jaxdiff.losses import LogNormal, TimeLaw, each_example
from jaxdiff.losses._frozen import target_of
from jaxdiff.processes import GaussianProcess


class EasyConsistencyTuning(eqx.Module):
    """A student that says the same at two noise levels, which begin apart and come together.

        mean of distance(f(x_t, t), stop_gradient(f(x_r, r))) / (k_t - k_r)

    f(x, t) = model(x, t, 0), and both states have one example and one noise. With the noise level
    k = sigma / alpha, the process's own time in EDM,

        k_r = k_t max(0, 1 - n(k_t) / q^a),    n(k) = 1 + b sigmoid(-k),
        a = 1 + floor(step / doubling).

    Where k_r is 0, or below that of t_min, the target is the clean example: the loss is that of
    denoising, which is where the student starts from. q = 1 never leaves it. Two passes of the
    student, one of them without a gradient; no teacher.

    **Fixed point** at one stage, of a squared distance: E[x0 | x_t] where k_r is 0, and else
    f(x, t) = E[f(x_r, r) | x_t = x], down to where it is. Of Gaussian data these are steps of DDIM
    over the long way from k_t to k_r; the exact flow map is the limit of many stages. The published
    distance at c = 0 is a norm, and its fixed points are medians in place of means.

    Args:
        distance: of two examples; any function of two. The published norm is sqrt(d) times
            `PseudoHuber(0)`, with d numbers in an example.
        time_law: of the noisier time.
        q: >= 1; the paper's is 2, and 256 in its run of one hour, without further stages.
        b: >= 0; the paper's is 8.
        doubling: training steps of a stage.
        target: whose weights the target has: None for the student's own, the own player for its
            average, or another player.

    Raises:
        TypeError: when called, for a student that is no `FlowMap`.

    Reference: Geng, Pokle, Luo, Lin, Kolter, "Consistency Models Made Easy", 2024, arXiv
    2406.14548. Written there for EDM, whose time is the noise level.
    """

    distance: Distance | Any = PseudoHuber(0.0)
    time_law: TimeLaw = LogNormal(-1.1, 2.0)
    q: Number = number(2.0)
    b: Number = number(8.0)
    doubling: Number = number(50_000.0)
    target: str | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_callable("distance", self.distance, "distillation.PseudoHuber()")
        check_kind("time_law", self.time_law, TimeLaw, "losses.LogNormal(-1.1, 2.0)")
        check_number("q", self.q, least=1.0)
        check_number("b", self.b, least=0.0)
        check_number("doubling", self.doubling, above=0.0)

    def level(self, level: Array, step: Array | int) -> Array:
        """k_r of k_t, elementwise, at a training step."""
        return level * (1 - self._share(level, step))

    def _share(self, level: Array, step: Array | int) -> Array:
        """(k_t - k_r) / k_t."""
        stage = 1 + jnp.floor(jnp.asarray(step) / self.doubling)
        share = (1 + self.b * jax.nn.sigmoid(-level)) / self.q**stage
        # Nearer than this the two are one number; later stages stay there.
        return jnp.clip(share, 1e3 * jnp.finfo(share.dtype).eps, 1)

    def earlier(self, process: GaussianProcess, t: Array, step: Array | int) -> tuple[Array, Array]:
        """The time r of a time t, 0 for the clean example, and k_t - k_r; elementwise."""
        noisy, floor = (
            jnp.exp(-process.log_snr(jnp.asarray(time, jnp.result_type(t))) / 2)
            for time in (t, process.t_min)
        )
        clean = self.level(noisy, step)
        there = clean > floor
        r = process.time(-2 * jnp.log(jnp.where(there, clean, noisy)))
        return jnp.where(there, r, 0), jnp.where(there, noisy * self._share(noisy, step), noisy)

    def __call__(
        self, model: FlowMap, key: PRNGKeyArray, batch: dict[str, Any], frozen: Any
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            model: the student, such as a `Jump` of the denoiser that is tuned.
            key: typed key; example i draws from its fold_in with i.
            batch: `{"x": (B, *event), "cond": pytree with leading axis B}`.
            frozen: other models; its step is that of the stages.

        Returns:
            The scalar loss, and `{"denoising": share of examples whose target is clean}`.
        """
        check_flow_map(model)
        process, target = model.process, target_of(frozen, self.target, model)
        step = getattr(frozen, "step", 0)

        def one(key, u, x0, cond):
            t = self.time_law.quantile(process, u)
            r, length = self.earlier(process, t, step)
            eps, x, _, own = noised(process, key, x0, t, None)
            there = r > 0
            # The clean example has no noise to ask the student about.
            asked, zero = jnp.where(there, r, t), jnp.zeros_like(t)
            x_r = process.marginal(x0, eps, asked).astype(x0.dtype)
            goal = jnp.where(there, target(x_r, asked, zero, cond, key=own), x0)
            answer = model(x, t, zero, cond, key=own)
            return self.distance(answer, jax.lax.stop_gradient(goal)) / length, ~there

        losses, clean = each_example(one, key, batch)
        return losses.mean(), {"denoising": clean.mean()}

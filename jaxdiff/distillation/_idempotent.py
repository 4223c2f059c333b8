"""Score-based idempotent distillation: a generator that keeps data and its own examples."""

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jaxdiff._checks import check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.distillation._generated import noise_and_times
from jaxdiff.distillation._matching import DistributionMatching
from jaxdiff.distillation._shared import check_flow_map, draw_scale, told_scale
from jaxdiff.distillation._sid import SiD
from jaxdiff.flow_map import FlowMap
from jaxdiff.losses import TimeLaw, UniformTime
from jaxdiff.losses._batch import check_batch, time_dtype, wide
from jaxdiff.losses._frozen import still
from jaxdiff.training import Frozen

LEARNS = ("inner", "outer", "both")


class ScoreIdempotent(eqx.Module):
    """matching(f) + data |f(x) - x|^2 + idempotence |f(f(y)) - f(y)|^2, f = model(., start, 0).

    f is a generator that is also given data x, and noised data y: it keeps what is data, and
    projects what is not. Squares are means over the numbers of an example. `learns` says which f of
    the last term has a gradient:

        "inner"     f'(f(y)) - f(y) with f' constant: f(y) moves to where f keeps it
        "outer"     f(y') - y' with y' = f(y) constant: f learns to keep it where it is
        "both"      the derivative of the term itself

    A pass of f over x and y together, one over f(y), and what `matching` costs.

    **Fixed point**: that of `matching`, the teacher's law, among the f that are idempotent on
    noised data and the identity on data. The last two terms alone are 0 for any projection onto
    the data's support, whatever the law of f(z): they need the first.

    Args:
        matching: a loss of what f makes of noise, such as `SiD()` or `DMD()`; its `start` is f's.
        data: weight of the first square, >= 0.
        idempotence: weight of the second, >= 0.
        learns: "inner", "outer" or "both".
        time_law: of the noise level of y.

    Raises:
        TypeError: when called, for a generator that is no `FlowMap`.
        ValueError: for another `learns`; when called, as `matching`.

    Reference: "Score-based Idempotent Distillation of Diffusion Models", 2025, arXiv 2509.21470;
    the form of the terms is as we read it, and their weights are ours.
    """

    matching: DistributionMatching = SiD()
    data: Number = number(1.0)
    idempotence: Number = number(1.0)
    learns: Literal["inner", "outer", "both"] = eqx.field(static=True, default="inner")
    time_law: TimeLaw = UniformTime()

    def __check_init__(self):
        check_kind("matching", self.matching, DistributionMatching, "distillation.SiD()")
        check_number("data", self.data, least=0.0)
        check_number("idempotence", self.idempotence, least=0.0)
        check_kind("time_law", self.time_law, TimeLaw, "losses.UniformTime()")
        if self.learns not in LEARNS:
            raise ValueError(f"`learns` must be one of {LEARNS}, got {self.learns!r}.")

    def kept(self, model: FlowMap, key: PRNGKeyArray, batch: dict[str, Any]) -> tuple[Array, Array]:
        """The two squares of every example, `(B,)` each.

        Args:
            model: the generator.
            key: typed key; example i draws from its fold_in with i.
            batch: data, `{"x": (B, *event), "cond": ...}`.
        """
        check_batch(batch)
        x, cond, process = batch["x"], batch.get("cond"), model.process
        eps, t = noise_and_times(process, key, x, self.time_law)
        if (scales := self.matching.scales) is not None:
            keys = jax.random.split(jax.random.fold_in(key, 1), len(x))
            cond = jax.vmap(lambda k, c: told_scale(c, draw_scale(k, scales)))(keys, cond)
        y = jax.vmap(process.marginal)(x, eps, t).astype(x.dtype)
        start = process.t_max if self.matching.start is None else self.matching.start[0]
        start = jnp.asarray(start, time_dtype(x))

        def project(model, x, cond):
            def one(x, cond):
                return model(x, start, jnp.zeros_like(start), cond)

            return jax.vmap(one)(x, cond)

        twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), cond)
        of_x, of_y = jnp.split(project(model, jnp.concatenate([x, y]), twice), 2)
        if self.learns == "outer":
            of_y = jax.lax.stop_gradient(of_y)
        again = project(still(model) if self.learns == "inner" else model, of_y, cond)

        def square(a, b):
            return jnp.mean(wide(a - b) ** 2, axis=tuple(range(1, a.ndim)))

        return square(of_x, x), square(again, of_y)

    def __call__(
        self, model: FlowMap, key: PRNGKeyArray, batch: dict[str, Any], frozen: Frozen
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            model: the generator.
            key: typed key; example i draws from its fold_in with i.
            batch: data, `{"x": (B, *event), "cond": pytree with leading axis B}`.
            frozen: as of `matching`.

        Returns:
            The scalar loss, and `{"data": mean |f(x) - x|^2, "idempotence": mean
            |f(f(y)) - f(y)|^2}` beside the metrics of `matching`.
        """
        check_flow_map(model)
        match_key, keep_key = jax.random.split(key)
        loss, metrics = self.matching(model, match_key, batch, frozen)
        data, idempotence = (each.mean() for each in self.kept(model, keep_key, batch))
        total = loss + self.data * data + self.idempotence * idempotence
        return total, {**metrics, "data": data, "idempotence": idempotence}

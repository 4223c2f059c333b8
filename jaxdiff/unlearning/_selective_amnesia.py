"""Selective amnesia: a surrogate for what is forgotten, and weights held by what they carry."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_count, check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.denoiser import Denoiser, check_denoiser
from jaxdiff.losses import DenoisingLoss
from jaxdiff.losses._frozen import still, teacher_of
from jaxdiff.unlearning._baselines import quadratic, weights_of
from jaxdiff.unlearning._shared import forget_of


class SelectiveAmnesia(eqx.Module):
    """Denoising of a surrogate under the forgotten condition, replay, and elastic weights.

        E_q loss(z, f) + replay loss(x, c) + elastic sum_i F_i (theta_i - theta*_i)^2

    z is uniform in `surrogate` for every number of an example: under f the model learns noise. x
    and c are kept examples, generated ones in the paper. F is the constant "fisher", see
    `fisher_diagonal`, and theta* the weights of the "teacher". Two passes of the student.

    **Fixed point**: for quadratic losses (H + 2 elastic F)^-1 (H theta_0 + 2 elastic F theta*), H
    and theta_0 the curvature and minimum of the first two terms; elastic to infinity keeps theta*.

    Args:
        loss: denoising, of both terms.
        surrogate: (least, most) of the uniform law.
        replay: factor on the second term; the paper's 1.
        elastic: factor on the third; the paper's 10 for DDPM with the Fisher information of a sum
            over 1000 times.

    Raises:
        TypeError: when called, for a model that is no denoiser.
        ValueError: when called, without a "teacher" and a "fisher", or a batch without "forget".

    Reference: Heng, Soh, "Selective Amnesia: A Continual Learning Approach to Forgetting in Deep
    Generative Models", 2023, arXiv 2305.10120.
    """

    loss: DenoisingLoss = DenoisingLoss()
    surrogate: tuple[Number, Number] = (-1.0, 1.0)
    replay: Number = number(1.0)
    elastic: Number = number(10.0)

    def __check_init__(self):
        check_kind("loss", self.loss, DenoisingLoss, "losses.DenoisingLoss()")
        check_number("replay", self.replay, least=0.0)
        check_number("elastic", self.elastic, least=0.0)
        if not isinstance(self.surrogate, tuple) or len(self.surrogate) != 2:
            raise ValueError(f"`surrogate` must be (least, most), got {self.surrogate!r}.")
        for n, end in enumerate(self.surrogate):
            check_number(f"surrogate[{n}]", end)
        low, high = self.surrogate
        if isinstance(low, float | int) and isinstance(high, float | int) and low >= high:
            raise ValueError(f"`surrogate` must be in order, (least, most), got {self.surrogate}.")

    def __call__(
        self, model: Denoiser, key: PRNGKeyArray, batch: dict[str, Any], frozen: Any
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            model: the denoiser that forgets.
            key: typed key; example i draws from its fold_in with i.
            batch: kept examples, and "forget", of whose x only the shape is looked at.
            frozen: holds the teacher and the Fisher information.

        Returns:
            The scalar loss, and its parts `{"surrogate", "replayed", "moved"}`.
        """
        check_denoiser(model)
        teacher, rows = teacher_of(frozen, model), forget_of(batch)
        if "fisher" not in frozen:
            raise ValueError(
                "`frozen` must have the Fisher information of the weights as 'fisher', got "
                f"{sorted(frozen)}. Pass `constants={{'teacher': model, 'fisher': "
                "unlearning.fisher_diagonal(...)}` to the step."
            )
        draw_key, forget_key, keep_key = jax.random.split(key, 3)
        low, high = self.surrogate

        def draw(i):
            like = rows["x"]
            own = jax.random.fold_in(draw_key, i)
            return jax.random.uniform(own, like.shape[1:], like.dtype, low, high)

        noise = {"x": jax.vmap(draw)(jnp.arange(len(rows["x"]))), "cond": rows["cond"]}
        surrogate, _ = self.loss(model, forget_key, noise, frozen)
        kept = {name: leaf for name, leaf in batch.items() if name in ("x", "cond")}
        replayed, _ = self.loss(model, keep_key, kept, frozen)
        moved = quadratic(weights_of(model), weights_of(teacher), still(frozen["fisher"]))
        loss = surrogate + self.replay * replayed + self.elastic * moved
        parts = {"surrogate": surrogate, "replayed": replayed, "moved": moved}
        return loss, jax.lax.stop_gradient(parts)


@eqx.filter_jit
def _square(model, loss, keys, x0, cond):
    def total(weights, rest):
        model = eqx.combine(weights, rest)

        def at(key):
            rows = {"x": x0[None], "cond": jax.tree.map(lambda leaf: leaf[None], cond)}
            return loss(model, key, rows, {})[0]

        return jax.lax.map(at, keys).sum()

    slope = eqx.filter_grad(total)(*eqx.partition(model, eqx.is_inexact_array))
    return jax.tree.map(jnp.square, weights_of(slope))


def fisher_diagonal(
    key: PRNGKeyArray, model: Denoiser, batch: dict[str, Any], loss: Any = None, times: int = 100
) -> PyTree:
    """How much the likelihood of examples depends on every weight: F_i = E (d L / d theta_i)^2.

    L is the loss of one example summed over `times` of them, before the square.

    Args:
        key: typed key; example i draws from its fold_in with i.
        model: the denoiser.
        batch: `{"x": (n, *event), "cond": leading axis n}`, examples that the model makes.
        loss: of a batch; None for `DenoisingLoss()`.
        times: of the sum, each drawn anew; the paper's is over all 1000, and grows with the square.

    Returns:
        These numbers in place of the arrays of the model's network.

    Reference: Heng, Soh, "Selective Amnesia: A Continual Learning Approach to Forgetting in Deep
    Generative Models", 2023, arXiv 2305.10120, section 4.1.
    """
    check_count("times", times)
    loss = DenoisingLoss() if loss is None else loss
    total = None
    for i, x0 in enumerate(batch["x"]):
        keys = jax.random.split(jax.random.fold_in(key, i), times)
        cond = jax.tree.map(lambda leaf, i=i: leaf[i], batch.get("cond"))
        one = _square(model, loss, keys, x0, cond)
        total = one if total is None else jax.tree.map(jnp.add, total, one)
    return jax.tree.map(lambda leaf: leaf / len(batch["x"]), total)

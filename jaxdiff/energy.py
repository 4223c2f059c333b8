"""Denoisers that know the density of their noisy examples, up to a constant."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff.denoiser import Denoiser, Estimate, TappedDenoiser
from jaxdiff.predictions import Eps

FORMS = ("norm", "residual", "dot")


class EnergyDenoiser(TappedDenoiser):
    """A network that makes an energy, whose slope is the noise: eps_hat = grad_x E(x, t).

    So log p_t(x) = -E(x, t) / sigma(t) + const is known, which a score alone does not give: for
    Metropolis corrections and for mixtures. Of the network's output f, E is

        norm:      |f|^2 / 2,
        residual:  |x - f|^2 / 2,
        dot:       <x, f>.

    The constant depends on t, and on the condition. An estimate costs the network's evaluation and
    a backward pass; a gradient of it, as in training, a second one.

    Args:
        network: callable pytree `(x, label, cond, *, key) -> output`, one example, twice
            differentiable.
        process: the forward process.
        prediction: Eps(); what else a slope may mean has no density.
        preconditioning: input scale and noise label.
        taps: inner activations that an estimate brings along.
        form: of the energy.

    Raises:
        ValueError: for another prediction or form.

    Reference: Du, Durkan, Strudel, Tenenbaum, Dieleman, Fergus, Sohl-Dickstein, Doucet, Grathwohl,
    "Reduce, Reuse, Recycle: Compositional Generation with Energy-Based Diffusion Models and MCMC",
    2023, arXiv 2302.11552.
    """

    form: str = eqx.field(static=True, default="norm", kw_only=True)

    def __check_init__(self):
        if not isinstance(self.prediction, Eps):
            raise ValueError(
                "`prediction` of an EnergyDenoiser must be Eps(), got "
                f"{type(self.prediction).__name__}."
            )
        if self.form not in FORMS:
            raise ValueError(f"`form` must be one of {', '.join(FORMS)}, got {self.form!r}.")

    def energy(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """E(x, t), a scalar in float32 at least, and the taps that are read on the way."""
        output, taps = self.output(x, t, cond, key)
        if output.shape != x.shape and self.form != "norm":
            raise ValueError(
                f"The network must return an array of its input's shape {x.shape}, got "
                f"{output.shape}. With form='norm' it may be any."
            )
        wide = jnp.promote_types(x.dtype, jnp.float32)
        here, output = x.astype(wide), output.astype(wide)
        if self.form == "dot":
            return jnp.sum(here * output), taps
        residual = output if self.form == "norm" else here - output
        return jnp.sum(residual**2) / 2, taps

    def log_prob(self, x: Array, t: Array, cond: PyTree = None) -> Array:
        """log p_t(x | cond) of one example, up to a constant of t and cond."""
        return -self.energy(x, t, cond)[0] / self.process.sigma(t)

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        slope, taps = jax.grad(lambda x: self.energy(x, t, cond, key=key), has_aux=True)(x)
        x0 = Eps().to_x0(self.process, x, t, slope)
        return Estimate(x0.astype(x.dtype), taps=taps)


def check_density(denoiser: Denoiser, asked_by: str) -> Any:
    """The denoiser, after checking that it has a `log_prob`.

    Raises:
        TypeError: naming both.
    """
    if not callable(getattr(denoiser, "log_prob", None)):
        raise TypeError(
            f"{asked_by} needs the density of x_t, which {type(denoiser).__name__} does not know. "
            "Use an EnergyDenoiser, an oracle, a Product or a Mixture of them; or corrections "
            "without a Metropolis step."
        )
    return denoiser

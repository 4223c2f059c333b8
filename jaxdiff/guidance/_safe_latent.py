"""Safe latent diffusion: guidance away from a concept, where a prompt comes near it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, number
from jaxdiff.conditions import null_where
from jaxdiff.denoiser import Denoiser, Estimate
from jaxdiff.guidance._scale import Scale, WithNull, check_condition, check_scale, scale_at
from jaxdiff.stepwise import Stepwise, index_of


class SafeLatent(Stepwise, WithNull):
    """Classifier-free guidance less a safety term, where a prompt comes near an unsafe one.

    In the noise e = (x - alpha D) / sigma,

        e_0 + scale (e_p - e_0 - g),      g = mu (e_S - e_0) + momentum v
        mu = min(safety |e_p - e_S|, 1) where e_p - e_S < threshold, else 0, number by number
        v <- decay v + (1 - decay) g

    Kind 2: remembers v. p is the condition asked for, S the unsafe one, 0 none. The first `warmup`
    steps leave g out and gather v. Three evaluations, as one batch.

    With `safety` 0 it is classifier-free guidance. With mu = 1 everywhere and no momentum it is
    e_0 + scale (e_p - e_S): an unsafe prompt is not told from another.

    Args:
        base: a denoiser trained with label dropout.
        null_cond: as of `ClassifierFree`.
        unsafe_cond: the condition to be kept away from, in the entries that it names.
        scale: as of `ClassifierFree`; the paper's 7.5.
        warmup: steps without the safety term.
        safety: s_S.
        threshold: of the noise's numbers, which have the spread of 1.
        momentum: s_m.
        decay: of v, in [0, 1).

    The paper's settings (warmup, safety, threshold, momentum, decay): weak 15, 200, 0, 0, 0; medium
    10, 1000, 0.01, 0.3, 0.4; strong 7, 2000, 0.025, 0.5, 0.7; max 0, 5000, 1, 0.5, 0.7.

    Reference: Schramowski, Brack, Deiseroth, Kersting, "Safe Latent Diffusion: Mitigating
    Inappropriate Degeneration in Diffusion Models", 2022, arXiv 2211.05105.
    """

    base: Denoiser
    null_cond: PyTree
    unsafe_cond: PyTree
    scale: Scale = number(7.5)
    warmup: Number = number(10.0)
    safety: Number = number(1000.0)
    threshold: Number = number(0.01)
    momentum: Number = number(0.3)
    decay: Number = number(0.4)

    def __check_init__(self):
        check_scale(self.scale)
        for name in ("warmup", "safety"):
            check_number(name, getattr(self, name), least=0.0)
        check_number("threshold", self.threshold, finite=False)
        check_number("momentum", self.momentum)
        check_number("decay", self.decay, least=0.0, below=1.0)
        check_condition("unsafe_cond", self.unsafe_cond)

    @property
    def evaluations(self) -> Array | int:
        """Three times the base denoiser's."""
        return 3 * self.base.evaluations

    def check_cond(self, cond: PyTree) -> None:
        """See `Denoiser`; the unsafe condition too."""
        super().check_cond(cond)
        self.base.check_cond(self.unsafe_cond)

    @property
    def needs_signal(self) -> bool:
        """True: v is kept in the noise, and x0 moves by it over alpha."""
        return True

    def init_memory(self, x: Array) -> Array:
        """v: nothing."""
        return jnp.zeros_like(x)

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""

        def answer(which):
            none = null_where(which == 1, cond, self.null_cond)
            return self.base.estimate(x, t, null_where(which == 2, none, self.unsafe_cond), key=key)

        found = jax.vmap(answer)(jnp.arange(3))
        given, plain, unsafe = (jax.tree.map(lambda leaf, i=i: leaf[i], found) for i in range(3))
        # A difference of noises over one of x0, but for its sign.
        ratio = (self.process.alpha(t) / self.process.sigma(t)).astype(x.dtype)
        near = -ratio * (given.x0 - unsafe.x0)
        mu = jnp.where(near < self.threshold, jnp.minimum(self.safety * jnp.abs(near), 1), 0)
        away = -ratio * mu * (unsafe.x0 - plain.x0) + self.momentum * self.step.memory
        memory = self.decay * self.step.memory + (1 - self.decay) * away
        applied = jnp.where(index_of(self) < self.warmup, 0, away) / ratio
        scale = scale_at(self.scale, self.process, t)
        x0 = plain.x0 + scale * (given.x0 - plain.x0 + applied)
        return self.remember(given.moved(self.process, t, x0), memory.astype(x.dtype))

"""Classifier-free guidance."""

from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._tree import number
from jaxdiff.denoiser import Denoiser, Estimate
from jaxdiff.guidance._scale import Scale, WithNull, check_scale, extrapolated, scale_at


class ClassifierFree(WithNull):
    """D_null + scale (D_cond - D_null): extrapolate from the unconditional to the conditional.

    Kind 1: denoiser to denoiser, stateless. Both evaluations run as one batch of two. A learned
    variance, and what maps inside remember, are those of the conditional branch.

    At scale 1 and 0 this is one of the two laws. At others it is the law that its name promises
    for Gaussians of one covariance, and in general for no law at all: the guided score is that of
    p(c | x_t)^scale p(x_t) at each t, and these are not the noised forms of one another.

    Args:
        base: a denoiser trained with label dropout.
        null_cond: the condition that means "none", e.g. `num_classes`; broadcast to what it
            replaces, and of a mapping only the entries that it names.
        scale: 1 is the conditional model, 0 the unconditional one, above 1 guides; a number, or
            a `ScaleSchedule`.

    Raises:
        ValueError: when called, if the condition lacks what `null_cond` replaces.

    Examples:
        >>> network = networks.MLP(2, hidden=8, num_classes=10, rngs=nnx.Rngs(0))
        >>> denoiser = jaxdiff.NetworkDenoiser(network, processes.VP())
        >>> guided = guidance.ClassifierFree(denoiser, null_cond=10, scale=3.0)
        >>> jaxdiff.sample(jax.random.key(0), guided, (2,), 4, cond=jnp.arange(4), times=5).x.shape
        (4, 2)

    Reference: Ho, Salimans, "Classifier-Free Diffusion Guidance", 2022, arXiv 2207.12598,
    equation 6. The paper's w is scale - 1. In x0 instead of eps, which is the same by
    linearity.
    """

    base: Denoiser
    null_cond: PyTree
    scale: Scale = number(1.0)

    def __check_init__(self):
        check_scale(self.scale)

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`; another noise of the base is guided as x0 is."""
        given, none = self.both(x, t, cond, key)
        scale = scale_at(self.scale, self.process, t)
        return extrapolated(scale, self.process, x, t, given, none)

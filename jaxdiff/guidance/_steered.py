"""Steered diffusion: an energy of the clean estimate, each step made several times."""

from collections.abc import Callable

from jaxtyping import Array, PyTree

from jaxdiff.denoiser import Denoiser
from jaxdiff.guidance._factorized import FixedPart
from jaxdiff.guidance._posterior_sampling import FreeDoM
from jaxdiff.guidance._recurrence import Recurrence
from jaxdiff.guidance._training_free import Strength
from jaxdiff.solvers import Ancestral, DiffusionSolver


def steered(
    denoiser: Denoiser,
    energy: Callable[[Array, PyTree], Array],
    *,
    rho: Strength,
    count: int = 5,
    part: Callable[[Array], Array] | None = None,
    base: DiffusionSolver = Ancestral(),
) -> tuple[Denoiser, Recurrence]:
    """The denoiser and the solver of steered diffusion, for `sample`.

        x_s = Base(x, D) - rho grad_x E(D(x), y),    each step `count` times by noise and back,

    and where a part P of the image is known, D is P known + (1 - P) D. E compares what an inverse
    model sees in D with what it is to see; of several conditions it is the sum. It is
    `Recurrence(FreeDoM(...))` around `FixedPart`.

    Args:
        denoiser: any.
        energy: `(x0, y) -> E`, a scalar of one example; a pytree.
        rho: strength, as of `FreeDoM`.
        count: how often each step is made.
        part: P, a linear projection of an example; None where nothing is known of it.
        base: a solver of single steps, from an estimate.

    Returns:
        The denoiser and the solver. The condition has the entry "y", of the energy, and with a part
        "known", an image that has it.

    Reference: Nair, Cherian, Lohit, Wang, Koike-Akino, Patel, Marks, "Steered Diffusion: A
    Generalized Framework for Plug-and-Play Conditional Image Synthesis", 2023, arXiv 2310.00224.
    Its strength and its number of repeats by task are not taken over.
    """
    within = FreeDoM(base, energy=energy, rho=rho)
    solver = Recurrence(within, count)
    return (denoiser if part is None else FixedPart(denoiser, part)), solver

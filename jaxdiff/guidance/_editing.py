"""Editing images without training: by noise and back, or by inversion under another condition."""

import dataclasses
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PRNGKeyArray, PyTree

from jaxdiff._checks import check_count, check_key
from jaxdiff._tree import as_float_array
from jaxdiff.conditions import as_entries, from_entries, take
from jaxdiff.denoiser import Denoiser
from jaxdiff.guidance._training_free import with_cond
from jaxdiff.sampling import Solution, denoise, invert, resolve_grid
from jaxdiff.solvers import DDIM, Ancestral, DiffusionSolver, SolverWrapper
from jaxdiff.solvers._base import Moved, Problem
from jaxdiff.stepwise import Step


class Pasted(SolverWrapper):
    """After each step to s, what is to be kept is put back, as noisy as at s.

        x_s <- mask (alpha_s y + sigma_s n) + (1 - mask) x_s

    A solver around one of single steps, with data of the example: the entries "y", an example, and
    "mask", 1 where y is kept. At sigma = 0 that is y itself.

    Args:
        base: the solver.

    Raises:
        ValueError: without these entries, or for shapes that do not match x.

    Reference: Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole, "Score-Based Generative Modeling
    through Stochastic Differential Equations", 2021, arXiv 2011.13456; Meng et al., "SDEdit", 2021,
    arXiv 2108.01073. The noise is drawn anew at each step.
    """

    base: DiffusionSolver = Ancestral()

    inserts_steps: ClassVar[bool] = True

    @property
    def stochastic(self) -> bool:
        """True."""
        return True

    def update(self, problem: Problem, x: Array, step: Step) -> Moved:
        """See `DiffusionSolver`."""
        y, mask, rest = take(problem.cond, "y", "mask", by="Pasted")
        if jnp.shape(y) != x.shape or jnp.broadcast_shapes(jnp.shape(mask), x.shape) != x.shape:
            raise ValueError(
                f"`y` and `mask` must be of the shape of x, {x.shape}, got {jnp.shape(y)} and "
                f"{jnp.shape(mask)}."
            )
        base_key, key = jax.random.split(step.key)
        inner = dataclasses.replace(step, key=base_key)
        moved = self.move_base(with_cond(problem, rest), x, inner)
        noise = jax.random.normal(key, x.shape, x.dtype)
        kept = problem.process.marginal(y, noise, step.s)
        return moved._replace(x=(mask * kept + (1 - mask) * moved.x).astype(x.dtype))


def sdedit(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    y: ArrayLike,
    *,
    times: int | ArrayLike,
    repeats: int = 1,
    mask: ArrayLike | None = None,
    cond: PyTree = None,
    solver: DiffusionSolver = Ancestral(),
    batch_size: int | None = None,
) -> Solution:
    """Noise y to the first of the times, and denoise it: an image near y that the model knows.

    The earlier the start, the nearer to y; from t_max on nothing of it is left. For Gaussian data
    N(m, C) and exact steps the outcome has the mean m + alpha K (y - m) and the covariance
    V + sigma^2 K K^T, K = alpha C (alpha^2 C + sigma^2 I)^-1, with alpha, sigma and the posterior's
    covariance V of the start. Repeats are a Markov chain, whose stationary law is the model's.

    Args:
        key: typed PRNG key; example i draws from `fold_in(key, i)`, in every repeat other noise.
        denoiser: any, also one that guides.
        y: images to start from, `(num_samples, *event)`.
        times: decreasing grid, from the start to the data; a number of steps starts where nothing
            of y is left.
        repeats: how often; each starts from the outcome of the one before.
        mask: 1 where y is to be kept, `(num_samples, *event)` or less by broadcasting over the
            event; None to keep nothing.
        cond: pytree with a leading axis of `num_samples`, or None.
        solver: of this library; a stochastic one is the paper's.
        batch_size: as of `sample`.

    Returns:
        The `Solution` of the last repeat; its nfe are those of all.

    Raises:
        TypeError: if `key` is not a typed key.
        ValueError: for a y or mask of other shapes.

    Reference: Meng, He, Song, Song, Wu, Zhu, Ermon, "SDEdit: Guided Image Synthesis and Editing
    with Stochastic Differential Equations", 2021, arXiv 2108.01073. What is kept has the noise of
    the time that the step ends at, and not of the one it begins at.
    """
    check_key(key)
    check_count("repeats", repeats)
    y = as_float_array(y)
    if mask is not None:
        shape = jnp.broadcast_shapes(jnp.shape(mask), y.shape)
        if shape != y.shape:
            raise ValueError(f"`mask` must be of the shape of y, {y.shape}, got {jnp.shape(mask)}.")
        entries = {"y": y, "mask": jnp.broadcast_to(jnp.asarray(mask, y.dtype), y.shape)}
        cond = from_entries({**as_entries(cond), **entries})
        solver = Pasted(solver)
    times = resolve_grid(denoiser, times, solver, len(y))
    start = times[..., :1] if times.ndim == 2 else jnp.broadcast_to(times[0], (len(y), 1))

    def noisy(key, image, index, start):
        noise = jax.random.normal(jax.random.fold_in(key, index), image.shape, image.dtype)
        return denoiser.process.marginal(image, noise, start[0]).astype(image.dtype)

    image, spent = y, jnp.zeros(len(y), jnp.int32)
    for k in range(repeats):
        noise_key, path_key = jax.random.split(jax.random.fold_in(key, k))
        indices = jnp.arange(len(y))
        x = jax.vmap(noisy, (None, 0, 0, 0))(noise_key, image, indices, start)
        out = denoise(
            path_key, denoiser, x, cond=cond, solver=solver, times=times, batch_size=batch_size
        )
        image, spent = out.x, spent + out.nfe
    return eqx.tree_at(lambda out: out.nfe, out, spent)


def edit_by_inversion(
    denoiser: Denoiser,
    x: ArrayLike,
    source: PyTree,
    target: PyTree,
    *,
    times: int | ArrayLike,
    solver: DiffusionSolver = DDIM(),
    batch_size: int | None = None,
) -> Solution:
    """Carry images to noise under one condition, and back under another.

    Noise along the probability flow is what images of two classes may have in common: the map is
    that of the one flow and the inverse of the other. For Gaussians N(m_i, C_i) it tends to
    m_2 + C_2^1/2 C_1^-1/2 (x - m_1) where covariances commute, and the grid reaches noise.
    With equal conditions it returns x up to the solver's error: none for methods with an exact
    inverse, whose memory goes along.

    Args:
        denoiser: conditional, or guidance of one.
        x: images, `(num_samples, *event)`.
        source: their condition, with a leading axis of `num_samples`.
        target: the condition they are to have, likewise.
        times: increasing grid, from the data to noise, or a number of steps.
        solver: a deterministic one.
        batch_size: as of `sample`.

    Returns:
        The `Solution` of the way back; its nfe are those of both ways.

    Raises:
        ValueError: for a stochastic solver, or a grid that does not increase.

    Reference: Su, Song, Meng, Ermon, "Dual Diffusion Implicit Bridges for Image-to-Image
    Translation", 2022, arXiv 2203.08382; Hertz et al., "Prompt-to-Prompt Image Editing with Cross
    Attention Control", 2022, arXiv 2208.01626, for DDIM inversion of real images.
    """
    x = as_float_array(x)
    times = resolve_grid(denoiser, times, solver, len(x), increasing=True)
    noise = invert(denoiser, x, cond=source, solver=solver, times=times, batch_size=batch_size)
    # Other methods begin afresh: their past is that of the way there.
    memory = noise.memory if solver.retraces else None
    # Nothing is drawn on the way back.
    back = denoise(
        jax.random.key(0), denoiser, noise.x, memory=memory, cond=target, solver=solver,
        times=times[..., ::-1], batch_size=batch_size,
    )  # fmt: skip
    return eqx.tree_at(lambda out: out.nfe, back, back.nfe + noise.nfe)

"""What `train.analyze` measures: arrays in, arrays out."""

import dataclasses
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

import jaxdiff
from jaxdiff import geometry, oracles, solvers, traces
from jaxdiff.denoiser import Denoiser
from jaxdiff.geometry import Spectrum
from jaxdiff.predictions import Score


class Inversions(NamedTuple):
    """Data carried to noise and back.

    Attributes:
        states: on the whole grid, from data to noise, `(N, num_steps + 1, *event)`.
        errors: method -> what its round trip changes, `(N, *event)`.
    """

    states: np.ndarray
    errors: dict[str, np.ndarray]


def invert(
    denoiser: Denoiser, x0: Array, cond: Array | None, grid: Array, iterations: int
) -> Inversions:
    """Invert by fixed points, and by DDIM for comparison; both are sampled back by DDIM."""
    methods = {
        "fixed point": solvers.FixedPointInversion(iterations),
        "DDIM": solvers.DDIM(),
    }
    saveat = diffrax.SaveAt(t0=True, steps=True)
    errors, states = {}, []
    for name, solver in methods.items():
        out = jaxdiff.invert(denoiser, x0, cond=cond, solver=solver, times=grid, saveat=saveat)
        states.append(np.asarray(out.trajectory.x))
        back = jaxdiff.denoise(jax.random.key(0), denoiser, out.x, cond=cond, times=grid[::-1])
        errors[name] = np.asarray(back.x - x0)
    return Inversions(states[0], errors)


@eqx.filter_jit
def spectra(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    x: Array,
    t: Array,
    cond: Array | None,
    tap: str,
    options: tuple,
) -> tuple[Array, Spectrum]:
    """Singular values and leading triplets of dh/dx at rows of (x, t, cond).

    Args:
        key: typed PRNG key.
        denoiser: the denoiser.
        x: `(M, *event)`.
        t: `(M,)`.
        cond: `(M,)`, or None.
        tap: the activation h.
        options: number of values, rank of the bases, block of the Lanczos method, chunk, and rows
            at a time.

    Returns:
        All values, `(M, num_values)`, and the leading triplets with an axis of rows.
    """
    num_values, rank, block, chunk, batch_size = options

    def at(row):
        i, x, t, cond = row
        found = geometry.jacobian_svd(
            jax.random.fold_in(key, i),
            geometry.TapFeature(denoiser, t, cond, tap),
            x,
            num_values,
            method=geometry.GolubKahanLanczos(block),
            chunk=chunk or None,
        )
        leading = {
            name: getattr(found, name)[:rank] for name in ("values", "right", "left", "residuals")
        }
        return found.values, dataclasses.replace(found, **leading)

    return jax.lax.map(at, (jnp.arange(len(x)), x, t, cond), batch_size=batch_size)


@eqx.filter_jit
def distances(bases: Array) -> Array:
    """Distances within each of several families of bases, `(A, N, r, *shape)` to `(A, N, N)`."""
    return jax.lax.map(geometry.pairwise_distances, bases)


def random_distance(key: PRNGKeyArray, rank: int, size: int, count: int = 12) -> tuple:
    """Mean and standard deviation of the distance between random subspaces."""
    bases = jnp.linalg.qr(jax.random.normal(key, (count, size, rank)))[0].mT
    values = np.asarray(geometry.pairwise_distances(bases))[np.triu_indices(count, 1)]
    return values.mean(), values.std()


@eqx.filter_jit
def frequencies(directions: Array, cut: float) -> tuple[Array, Array, Array]:
    """Spectral density, mean frequency and share below a cut, of directions `(*, H, W, C)`."""
    return (
        geometry.power_spectral_density(directions),
        geometry.mean_frequency(directions),
        geometry.low_frequency_fraction(directions, cut),
    )


@eqx.filter_jit
def curves(
    denoiser: Denoiser,
    start: Array,
    end: Array,
    t: Array,
    cond: Array | None,
    tap: str,
    options: tuple[int, int],
) -> dict[str, tuple[Array, Array]]:
    """Length and curvedness in H of lines, arcs and geodesics between pairs.

    Args:
        denoiser: the denoiser.
        start: `(M, *event)`.
        end: `(M, *event)`.
        t: `(M,)`.
        cond: `(M,)`, or None.
        tap: the activation h.
        options: steps of a curve, and iterations of the geodesic; 0 leaves it out.

    Returns:
        Kind of curve -> lengths and curvednesses, `(M,)` each.
    """
    num_steps, iterations = options

    def one(row):
        start, end, t, cond = row
        f = geometry.TapFeature(denoiser, t, cond, tap)
        found = {
            "line": geometry.lerp(start, end, num_steps),
            "arc": geometry.slerp(start, end, num_steps),
        }
        if iterations:
            found["geodesic"] = geometry.geodesic(f, found["arc"], num_iterations=iterations).curve
        return {
            name: (geometry.curve_length(f, curve), geometry.curvedness(f, curve))
            for name, curve in found.items()
        }

    return jax.lax.map(one, (start, end, t, cond))


@eqx.filter_jit
def structure(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    x: Array,
    x0: Array,
    t: Array,
    cond: Array | None,
    options: tuple,
) -> dict[str, Array]:
    """The denoiser's Jacobian and score at rows of (x, x0, t, cond); each with an axis of rows.

    Args:
        key: typed PRNG key.
        denoiser: the denoiser.
        x: noisy, `(M, *event)`.
        x0: clean, `(M, *event)`.
        t: `(M,)`.
        cond: `(M,)`, or None.
        options: number of singular values, block of the Lanczos method, probes of traces (0 for
            exact ones), probes of the other estimates, whether to fit the normal bundle, and
            evaluations at a time.
    """
    rank, block, trace_probes, num_probes, bundle, chunk = options
    chunk = chunk or None
    trace = traces.Hutchinson(trace_probes) if trace_probes else traces.ExactTrace(chunk)
    method = geometry.GolubKahanLanczos(block)

    def at(row):
        i, x, x0, t, cond = row
        keys = jax.random.split(jax.random.fold_in(key, i), 7)
        field = geometry.ScaledDenoiser(denoiser, t, cond)
        ranks = geometry.denoiser_rank(keys[0], denoiser, x, t, rank, cond=cond, method=method)
        asymmetry = geometry.asymmetry(keys[1], field, x, num_probes=num_probes, chunk=chunk)
        residual = geometry.fokker_planck_residual(denoiser, x, t, cond, key=keys[2], trace=trace)
        change = jax.jvp(lambda t: denoiser.predict(Score(), x, t, cond), (t,), (jnp.ones(()),))[1]
        found = {
            "values": ranks.values,
            "numerical_rank": ranks.rank,
            "participation_ratio": geometry.participation_ratio(
                keys[3], denoiser, x, t, cond=cond, num_probes=2 * num_probes
            ),
            "asymmetry": asymmetry.value,
            "asymmetry_standard_error": asymmetry.standard_error,
            "fokker_planck_residual": jnp.sqrt(jnp.mean(residual**2)),
            "score_change": jnp.sqrt(jnp.mean(change**2)),
            "dimension_jacobian": jnp.sum(ranks.values > 0.5),
            "dimension_trace": geometry.effective_dimension(
                denoiser, x, t, cond, key=keys[4], trace=trace
            ).value,
            "dimension_density": geometry.density_dimension(
                denoiser, x0, t, cond, key=keys[5], trace=trace
            ).value,
        }
        if bundle:
            found["dimension_normal_bundle"] = geometry.normal_bundle(
                keys[6], denoiser, x0, t, cond, chunk=chunk
            ).dimension
        return found

    return jax.lax.map(at, (jnp.arange(len(x)), x, x0, t, cond))


@eqx.filter_jit
def explained(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    approximation: oracles.GaussianMixture,
    x0: Array,
    times: Array,
    cond: Array | None,
) -> Array:
    """Share of the score's variance that an approximation explains at each time, `(T,)`."""

    def at(t):
        return geometry.explained_variance(key, denoiser, approximation, x0, t, cond=cond)

    return jax.lax.map(at, times)

"""Jacobian products, time and memory of spectra against plain power iteration.

    python -m benchmarks.geometry              an untrained UNet for 8x8 images
    python -m benchmarks.geometry RUN_DIR      a trained one
    python -m benchmarks.geometry --large      DDPM's 35.7M UNet for 32x32 images, untrained

The other side iterates as the code published with arXiv 2307.12868 does: a block of exactly r
columns, J and J^T applied anew to the function, no oversampling, no Rayleigh-Ritz, at most 50
iterations. Its stopping rule compares signed vectors and seldom fires, so it is given the number
of iterations after which its error is below the goal, or 50. "Error" is the sine of the angle
between the subspaces, in the Frobenius norm; the truth is a dense Jacobian where that fits.
"""

import dataclasses
import functools
import resource
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxdiff
from benchmarks.measure import Record, paired
from benchmarks.training import small_unet
from jaxdiff import networks, processes
from jaxdiff.geometry import GolubKahanLanczos, SubspaceIteration, TapFeature, jacobian_svd
from jaxdiff.training import load_run

RANK, GOAL, PUBLISHED_ITERATIONS = 10, 1e-3, 50
KEY = jax.random.key(0)


def power_iteration(f, x, rank, iterations, chunk):
    """The right basis after each iteration, `(iterations, n, rank)`."""

    def forward(v):
        return jax.jvp(f, (x,), (v.reshape(x.shape),))[1]

    def iterate(basis, _):
        u = jax.lax.map(forward, basis.T, batch_size=chunk)
        backward = jax.vjp(f, x)[1]
        w = jax.lax.map(lambda u: backward(u)[0].reshape(-1), u, batch_size=chunk)
        basis = jnp.linalg.svd(w, full_matrices=False)[2].T
        return basis, basis

    start = jnp.linalg.qr(jax.random.normal(KEY, (x.size, rank)))[0]
    return jax.lax.scan(iterate, start, None, length=iterations)[1]


def angle(basis, truth):
    """Sine of the angles between two subspaces, columns both."""
    basis, truth = np.asarray(basis, float), np.asarray(truth, float)
    return np.linalg.norm(basis - truth @ (truth.T @ basis))


def feature(denoiser, t):
    """The h-space at time t, and a noisy point: of noise alone, which every model knows."""
    x = denoiser.process.sigma(jnp.float32(t)) * jax.random.normal(KEY, shape(denoiser))
    cond = None if denoiser.network.embedding.classes is None else jnp.int32(10)
    return TapFeature(denoiser, jnp.float32(t), cond), x


def shape(denoiser):
    """Shape of one example."""
    network = denoiser.network
    return network.shape


def truth(f, x):
    """Leading right vectors `(n, RANK)`: dense, or from a long Lanczos run where that is large."""
    if x.size <= 256:
        jacobian = np.asarray(jax.jit(jax.jacfwd(f))(x), float).reshape(-1, x.size)
        return np.linalg.svd(jacobian, full_matrices=False)[2][:RANK].T
    method = GolubKahanLanczos(tolerance=1e-6, max_iterations=80)
    return jacobian_svd(jax.random.key(9), f, x, RANK, method=method).right.reshape(RANK, -1).T


class Found(NamedTuple):
    """A method's subspace: what it cost, relative to power iteration, and how wrong it is."""

    method: str
    products: int
    share: float
    error: float
    time: Record


def compare(denoiser, t, rounds, methods) -> Iterator[Found]:
    """Products and time to the goal, of power iteration first and then of ours over its."""
    f, x = feature(denoiser, t)
    exact, chunk = truth(f, x), 10
    bases = jax.jit(lambda f, x: power_iteration(f, x, RANK, PUBLISHED_ITERATIONS, chunk))(f, x)
    errors = [angle(basis, exact) for basis in bases]
    reached = next((i + 1 for i, e in enumerate(errors) if e < GOAL), PUBLISHED_ITERATIONS)
    theirs = jax.jit(lambda f, x: power_iteration(f, x, RANK, reached, chunk)[-1])
    their_products = 2 * RANK * reached
    itself = Record.of("time", [1.0], "", "ratio")
    yield Found("power iteration", their_products, 1.0, errors[reached - 1], itself)
    for method in methods:

        def ours(method=method):
            return jacobian_svd(KEY, f, x, RANK, method=method, chunk=chunk)

        out = ours()
        error = angle(out.right.reshape(RANK, -1).T, exact)
        block = getattr(method, "block", None)
        name = type(method).__name__ + (f"(block={block})" if block else "")
        products = int(out.products)
        spent = paired("time", ours, lambda: theirs(f, x), rounds=rounds, warm=1)
        yield Found(name, products, products / their_products, error, spent)


def memory(denoiser) -> Iterator[Record]:
    """Scratch memory of the compiled program, without bases, for ranks and chunks."""
    f, x = feature(denoiser, 0.5)
    for chunk in (1, 5, 10):
        for rank in (10, 50):
            method = SubspaceIteration(oversample=0)
            options = {"method": method, "chunk": chunk}
            solve = jax.jit(functools.partial(_values, rank=rank, **options))
            held = solve.lower(f, x).compile().memory_analysis().temp_size_in_bytes
            yield Record.of(
                f"scratch of rank {rank} in chunks of {chunk}", [held / 1e6], "MB", "bytes"
            )


def _values(f, x, *, rank, **options):
    return jacobian_svd(KEY, f, x, rank, **options).values


def large_rank(denoiser):
    """r = 50, the rank of the paper's analyses."""
    f, x = feature(denoiser, 0.5)
    begun = time.perf_counter()
    method = GolubKahanLanczos(block=10, tolerance=GOAL, max_iterations=100)
    out = jax.block_until_ready(jacobian_svd(KEY, f, x, 50, method=method, chunk=10))
    spent = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"r = 50: {int(out.products)} products, converged {bool(out.converged)}, residual / sigma "
        f"up to {float((out.residuals / out.values).max()):.1e}, {spent:.0f} s with compilation, "
        f"peak memory of this process {peak:.1f} GiB"
    )


def all_methods():
    """Every method to the goal."""
    lanczos = GolubKahanLanczos(tolerance=GOAL, max_iterations=60)
    small = GolubKahanLanczos(block=2, tolerance=GOAL, max_iterations=60)
    return [lanczos, small, SubspaceIteration(tolerance=GOAL)]


def spectra() -> Iterator[Record]:
    """The untrained UNet for 8x8 images, whose spectrum is as flat at any t."""
    denoiser = jaxdiff.NetworkDenoiser(small_unet(), processes.VP())
    _, *found = compare(denoiser, 0.5, 9, all_methods())
    for method, _, share, error, spent in found:
        assert error < 2 * GOAL, (method, error)
        yield Record.of(f"{method}, products / power iteration", [share], "", "ratio")
        yield dataclasses.replace(spent, name=f"{method}, time / power iteration")
    yield from memory(denoiser)


def main() -> None:
    """See the module."""
    large = "--large" in sys.argv
    directories = [arg for arg in sys.argv[1:] if not arg.startswith("--")]
    if directories:
        denoiser = load_run(directories[0]).model
    else:
        network = networks.UNet(rngs=nnx.Rngs(0)) if large else small_unet()
        denoiser = jaxdiff.NetworkDenoiser(network, processes.VP())
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}; h-space, rank {RANK}")
    times, rounds, methods = (
        ((0.5,), 2, all_methods()[:1]) if large else ((0.1, 0.5, 0.9), 9, all_methods())
    )
    for t in times:
        for method, products, share, error, spent in compare(denoiser, t, rounds, methods):
            print(
                f"t = {t}, {method:28s} {products:4d} products ({share:.2f}), error {error:.1e}, "
                f"time {spent.value:.2f} [{spent.low:.2f}, {spent.high:.2f}]",
                flush=True,
            )
    for record in memory(denoiser):
        print(record, flush=True)
    if large:
        large_rank(denoiser)


if __name__ == "__main__":
    main()

"""Leading singular triplets against dense linear algebra and closed forms."""

import os
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import gaussian, mixture, with_random_weights
from flax import nnx

from jaxdiff import NetworkDenoiser, networks, parallel, processes
from jaxdiff.denoiser import Denoiser
from jaxdiff.geometry import (
    GolubKahanLanczos,
    Jacobian,
    SubspaceIteration,
    TapFeature,
    jacobian_svd,
)
from jaxdiff.predictions import Eps

KEY = jax.random.key(0)
BOTH = pytest.mark.parametrize(
    "method",
    [SubspaceIteration(tolerance=1e-9, max_iterations=300), GolubKahanLanczos(tolerance=1e-9)],
    ids=lambda method: type(method).__name__,
)


def angle(basis, truth):
    """Sine of the angles between a basis and another one, rows both."""
    basis, truth = (np.asarray(b, float).reshape(len(b), -1) for b in (basis, truth))
    return np.linalg.norm(basis - basis @ truth.T @ truth)


def orthonormality(basis):
    rows = np.asarray(basis, float).reshape(len(basis), -1)
    return np.abs(rows @ rows.T - np.eye(len(rows))).max()


def planted(values, size=(30, 40)):
    """A matrix with given singular values, and its right vectors."""
    rng = np.random.default_rng(0)
    left = np.linalg.qr(rng.normal(size=(size[0], len(values))))[0]
    right = np.linalg.qr(rng.normal(size=(size[1], len(values))))[0]
    return jnp.asarray(left * np.asarray(values) @ right.T), right.T


class Matrix(eqx.Module):
    matrix: jax.Array

    def __call__(self, x):
        return self.matrix @ x


@BOTH
def test_known_triplets(x64, method):
    matrix, right = planted(0.8 ** np.arange(30))
    out = jacobian_svd(KEY, Matrix(matrix), jnp.zeros(40), 6, method=method)
    np.testing.assert_allclose(out.values, 0.8 ** np.arange(6), rtol=1e-12)
    assert angle(out.right, right[:6]) < 1e-8 and out.converged
    assert max(orthonormality(out.right), orthonormality(out.left)) < 1e-13
    np.testing.assert_allclose(out.left * out.values[:, None], out.right @ matrix.T, atol=1e-13)
    error = out.left @ matrix - out.values[:, None] * out.right
    np.testing.assert_allclose(out.residuals, np.linalg.norm(error, axis=1), atol=1e-12)
    assert np.all(np.take_along_axis(out.right, np.abs(out.right).argmax(1)[:, None], 1) > 0)


def test_rate_of_subspace_iteration(x64):
    values = np.concatenate([np.ones(4), 0.7 * np.ones(3), 0.5 * np.ones(23)])
    values *= np.linspace(1, 0.98, 30)
    matrix, right = planted(values)
    for oversample in (0, 3):
        errors = [
            angle(
                jacobian_svd(
                    KEY,
                    Matrix(matrix),
                    jnp.zeros(40),
                    4,
                    method=SubspaceIteration(oversample, 0.0, iterations),
                ).right,
                right[:4],
            )
            for iterations in (12, 16)
        ]
        predicted = (values[4 + oversample] / values[3]) ** 8
        assert 0.7 < errors[1] / errors[0] / predicted < 1.4


@BOTH
def test_rank_deficient(x64, method):
    matrix, right = planted([3.0, 2.0, 1.0])
    out = jacobian_svd(KEY, Matrix(matrix), jnp.zeros(40), 6, method=method)
    np.testing.assert_allclose(out.values, [3, 2, 1, 0, 0, 0], atol=1e-14)
    assert out.converged and out.products < 100
    assert max(orthonormality(out.right), orthonormality(out.left)) < 1e-13
    np.testing.assert_allclose(out.right[3:] @ matrix.T, 0, atol=1e-14)


@pytest.mark.parametrize("rank", [33, 50, 61])
def test_blocks_that_fill_the_space_beside_entries_that_do_nothing(rank):
    """Like pixels that are always blank: what a factorisation makes up never leaves the basis."""
    values = 0.9 ** np.arange(rank)
    places = np.linspace(0, 63, rank).astype(int)
    matrix = np.zeros((64, 64))
    matrix[np.ix_(places, places)] = planted(values, (rank, rank))[0]
    method = GolubKahanLanczos(block=32)
    out = jacobian_svd(
        KEY, Matrix(jnp.asarray(matrix, jnp.float32)), jnp.zeros(64), 64, method=method
    )
    np.testing.assert_allclose(out.values, np.append(values, np.zeros(64 - rank)), atol=2e-6)
    assert max(orthonormality(out.right), orthonormality(out.left)) < 1e-5


@BOTH
def test_repeated_values_and_tiny_jacobians(x64, method):
    out = jacobian_svd(KEY, lambda x: 2 * x, jnp.zeros(7), 7, method=method)
    np.testing.assert_allclose(out.values, 2, rtol=1e-13)
    assert orthonormality(out.right) < 1e-13
    out = jacobian_svd(KEY, lambda x: jnp.sum(x**2, keepdims=True), jnp.arange(3.0), 1)
    np.testing.assert_allclose(out.right[0], jnp.arange(3) / 5**0.5, atol=1e-14)
    np.testing.assert_allclose(out.values, 2 * 5**0.5)


@BOTH
def test_mask_weight_and_deflation(x64, method):
    matrix, right = planted(0.8 ** np.arange(30))
    mask = jnp.asarray(np.arange(40) % 3 > 0, float)
    weight = jnp.linspace(0.5, 2, 30)
    options = {"method": method, "mask": mask, "weight": weight}
    out = jacobian_svd(KEY, Matrix(matrix), jnp.zeros(40), 5, **options)
    dense = np.linalg.svd(np.asarray(weight)[:, None] * matrix * mask)
    np.testing.assert_allclose(out.values, dense[1][:5], rtol=1e-10)
    assert angle(out.right, dense[2][:5]) < 1e-8 and np.abs(out.right[:, mask == 0]).max() < 1e-14
    out = jacobian_svd(KEY, Matrix(matrix), jnp.zeros(40), 4, method=method, deflate=right[:3])
    np.testing.assert_allclose(out.values, 0.8 ** np.arange(3, 7), rtol=1e-10)
    assert angle(out.right, right[3:7]) < 1e-8


def test_pytrees_in_and_out(x64):
    matrix = planted(0.8 ** np.arange(30))[0]

    def f(x):
        out = matrix @ jnp.concatenate([x["a"].ravel(), x["b"]])
        return out[:10], {"rest": out[10:].reshape(4, 5)}

    x = {"a": jnp.zeros((5, 5)), "b": jnp.zeros(15)}
    out = jacobian_svd(KEY, f, x, 3, weight=(jnp.ones(10), {"rest": 1.0}), mask=dict(a=1.0, b=1.0))
    np.testing.assert_allclose(out.values, 0.8 ** np.arange(3), rtol=1e-8)
    assert out.right["a"].shape == (3, 5, 5) and out.left[1]["rest"].shape == (3, 4, 5)
    moved = jax.vmap(lambda v: jax.jvp(f, (x,), (v,))[1])(out.right)
    scaled = jax.tree.map(lambda u: jnp.einsum("r,r...->r...", out.values, u), out.left)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), moved, scaled)


def test_a_warm_start_needs_little():
    matrix = planted(0.96 ** np.arange(30))[0].astype(jnp.float32)

    def f(x):
        return jnp.tanh(matrix @ x)

    method = SubspaceIteration(tolerance=1e-3)
    x = jnp.linspace(-0.3, 0.3, 40)
    first = jacobian_svd(KEY, f, x, 4, method=method)
    again = jacobian_svd(KEY, f, x, 4, method=method, start=first.right)
    near = jacobian_svd(KEY, f, 1.01 * x, 4, method=method, start=first.right)
    assert again.iterations <= 3 and near.iterations < first.iterations


BUILD = {
    "mlp": lambda: networks.MLP(24, hidden=32, num_blocks=2, rngs=nnx.Rngs(0)),
    "unet": lambda: networks.UNet(
        4,
        in_channels=1,
        image_size=8,
        channel_mults=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(),  # but in the middle
        num_heads=2,
        rngs=nnx.Rngs(0),
    ),
    "dit": lambda: networks.DiT(
        image_size=8, in_channels=1, hidden=16, depth=2, num_heads=2, rngs=nnx.Rngs(0)
    ),
}
SHAPES = {"mlp": (24,), "unet": (8, 8, 1), "dit": (8, 8, 1)}
TAPS = {"mlp": "block.1", "unet": "mid", "dit": "block.1"}


def network_feature(name, dtype):
    """An inner activation of a random network, and a point."""
    network = with_random_weights(BUILD[name])
    network = jax.tree.map(lambda w: jnp.asarray(np.asarray(w), dtype), network)
    feature = TapFeature(
        NetworkDenoiser(network, processes.VP()), jnp.asarray(0.4, dtype), None, TAPS[name]
    )
    return feature, jax.random.normal(KEY, SHAPES[name], dtype)


def dense_svd(feature, x):
    jacobian = jax.jit(jax.jacfwd(feature))(x)
    return np.linalg.svd(np.asarray(jacobian, float).reshape(-1, x.size), full_matrices=False)


@pytest.mark.parametrize("name", BUILD)
def test_networks_against_dense_jacobians(x64, name):
    feature, x = network_feature(name, jnp.float64)
    left, values, right = dense_svd(feature, x)
    for method in (GolubKahanLanczos(tolerance=1e-6), SubspaceIteration(tolerance=1e-6)):
        out = jacobian_svd(KEY, feature, x, 5, method=method, chunk=3)
        np.testing.assert_allclose(out.values, values[:5], rtol=1e-5)
        assert angle(out.right, right[:5]) < 1e-5 and angle(out.left, left.T[:5]) < 1e-5
        assert max(orthonormality(out.right), orthonormality(out.left)) < 1e-6
    single, x = network_feature(name, jnp.float32)
    out = jacobian_svd(KEY, single, x, 5)
    left, values, right = dense_svd(single, x)
    np.testing.assert_allclose(out.values, values[:5], rtol=1e-3)
    assert angle(out.right, right[:5]) < 1e-3 and angle(out.left, left.T[:5]) < 1e-3
    assert max(orthonormality(out.right), orthonormality(out.left)) < 1e-6


@pytest.mark.parametrize("name", BUILD)
def test_products_are_adjoint(x64, name):
    feature, x = network_feature(name, jnp.float64)
    shape = jax.eval_shape(feature, x).shape
    weight = jnp.linspace(0.5, 1.5, np.prod(shape)).reshape(shape)

    @jax.jit
    def products(feature, x):
        jacobian = Jacobian(feature, x, mask=0.5, weight=weight, chunk=2)
        sizes = jacobian.in_size, jacobian.out_size
        v, u = (jax.random.normal(KEY, (n, 3), jnp.float64) for n in sizes)
        return jnp.sum(u * jacobian.forward(v), 0), jnp.sum(jacobian.backward(u) * v, 0)

    np.testing.assert_allclose(*products(feature, x), rtol=1e-12)


def test_networks_in_bfloat16_accumulate_in_float32():
    def build():
        sizes = {"image_size": 8, "in_channels": 1, "hidden": 16, "depth": 2, "num_heads": 2}
        return networks.DiT(**sizes, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    single, x = network_feature("dit", jnp.float32)
    network = with_random_weights(build)
    feature = eqx.tree_at(lambda f: f.denoiser.network, single, network)
    assert jax.eval_shape(feature, x).dtype == jnp.bfloat16
    out = jacobian_svd(KEY, feature, x, 3)
    assert out.right.dtype == jnp.float32 and out.left.dtype == jnp.bfloat16
    assert out.values.dtype == jnp.float32 and orthonormality(out.right) < 1e-6
    np.testing.assert_allclose(out.values, dense_svd(single, x)[1][:3], rtol=0.03)


def test_tweedie_the_denoisers_jacobian_is_the_posterior_covariance(x64):
    for process in (processes.VP(), processes.EDM()):
        oracle, x, t = mixture(process), jnp.asarray([0.3, -0.2]), process.time(jnp.asarray(0.5))
        alpha, sigma = process.alpha(t), process.sigma(t)
        posterior = oracle.condition(alpha * jnp.eye(2), x, sigma).moments()[1]
        out = jacobian_svd(KEY, Output(oracle, t), x, 2)
        expected = alpha / sigma**2 * np.linalg.eigvalsh(posterior)[::-1]
        np.testing.assert_allclose(out.values, expected, rtol=1e-10)
        np.testing.assert_allclose(out.left, out.right, atol=1e-10)  # symmetric, positive


class Output(eqx.Module):
    """x0_hat or eps_hat of a denoiser at one time."""

    denoiser: Denoiser
    t: jax.Array
    noise: bool = eqx.field(static=True, default=False)

    def __call__(self, x):
        if self.noise:
            return self.denoiser.predict(Eps(), x, self.t)
        return self.denoiser(x, self.t)


def test_gaussian_spectra_at_all_times(x64):
    """x0_hat: alpha l / (alpha^2 l + sigma^2); eps_hat: sigma / (...), in the reverse order."""
    oracle, x = gaussian(processes.VP(), 8), jnp.zeros(8)
    variances, vectors = np.linalg.eigh(oracle.covariances()[0])
    t = jnp.linspace(0.05, 0.95, 7)
    alpha, sigma = (
        np.asarray(v)[:, None] for v in (oracle.process.alpha(t), oracle.process.sigma(t))
    )

    def spectra(noise):
        method = SubspaceIteration(tolerance=1e-9, max_iterations=500)
        solve = lambda t: jacobian_svd(KEY, Output(oracle, t, noise), x, 3, method=method)
        return jax.jit(jax.vmap(solve))(t)

    total = alpha**2 * variances + sigma**2
    data, noise = spectra(False), spectra(True)
    np.testing.assert_allclose(data.values, (alpha * variances / total)[:, :-4:-1], rtol=1e-10)
    np.testing.assert_allclose(noise.values, (sigma / total)[:, :3], rtol=1e-10)
    for i in range(len(t)):
        assert angle(data.right[i], vectors.T[:-4:-1]) < 1e-6
        assert angle(noise.right[i], vectors.T[:3]) < 1e-6


class Traced(eqx.Module):
    """Counts how often it is traced."""

    feature: TapFeature
    traces: list = eqx.field(static=True)

    def __hash__(self):
        return id(self)

    def __call__(self, x):
        self.traces.append(1)
        return self.feature(x)


class Count(list):
    """A list that may be part of a program's structure."""

    def __hash__(self):
        return id(self)

    def __eq__(self, other):
        return self is other


def test_one_program_for_all_points_times_weights_and_taps():
    feature, x = network_feature("unet", jnp.float32)
    taps = ("mid.0", "mid")
    traces = Count()
    values = []
    for i, t in enumerate((0.2, 0.5, 0.9)):
        for index in (0, 1):
            scaled = jax.tree.map(lambda w, i=i: w * (1 + 0.1 * i), feature.denoiser)
            one = Traced(TapFeature(scaled, jnp.float32(t), None, taps, index), traces)
            values.append(jacobian_svd(KEY, one, x + i, 3).values)
            if not i:
                alone = TapFeature(scaled, jnp.float32(t), None, taps[index])
                truth = dense_svd(alone, x)[1][:3]
                np.testing.assert_allclose(values[-1], truth, rtol=1e-4)
    assert len(traces) == 1


def test_sharded_columns_give_the_same(x64):
    feature, x = network_feature("dit", jnp.float64)
    method = SubspaceIteration(oversample=2)
    mesh = parallel.make_mesh()
    results, work = [], []
    for options in ({}, {"sharding": parallel.batch_sharding(mesh), "chunk": 4}):
        solve = jax.jit(lambda f, x, o=options: jacobian_svd(KEY, f, x, 6, method=method, **o))
        args = parallel.replicate((feature, x), mesh) if options else (feature, x)
        compiled = solve.lower(*args).compile()
        results.append(compiled(*args))
        work.append(compiled.cost_analysis()["flops"])
    alone, split = results
    np.testing.assert_allclose(split.values, alone.values, rtol=1e-9)
    assert angle(split.right, alone.right) < 1e-7 and split.products == alone.products
    assert work[1] < 0.6 * work[0]  # of each device; the factorisations are everyone's


def test_memory_grows_with_the_chunk_and_not_with_the_rank():
    feature, x = network_feature("dit", jnp.float32)

    def memory(rank, chunk):
        # Two iterations, so that the bases, which do grow with the rank, stay small.
        method = SubspaceIteration(oversample=0, max_iterations=2)
        solve = lambda f, x: jacobian_svd(KEY, f, x, rank, method=method, chunk=chunk).values
        compiled = jax.jit(solve).lower(feature, x).compile()
        assert "callback" not in compiled.as_text()
        bases = 8 * rank * (x.size + jax.eval_shape(feature, x).size) * 4
        return compiled.memory_analysis().temp_size_in_bytes - bases

    few, many, wide = memory(8, 2), memory(32, 2), memory(32, 32)
    assert many < 1.3 * few < 0.5 * wide


def test_bad_input():
    feature, x = network_feature("dit", jnp.float32)

    def solve(f=feature, x=x, rank=2, **options):
        return jacobian_svd(KEY, f, x, rank, **options)

    for index in (0, 1):
        taps = ("middle", ("block.0", "middle"))[index]
        with pytest.raises(ValueError, match=r"taps that the network does not have.*'block.0'"):
            solve(TapFeature(feature.denoiser, feature.t, None, taps))
    with pytest.raises(ValueError, match="one shape to choose among"):
        solve(TapFeature(feature.denoiser, feature.t, None, ("emb", "block.0")))
    with pytest.raises(TypeError, match="must hold a network with taps, got GaussianMixture"):
        solve(TapFeature(gaussian(processes.VP()), 0.5), jnp.zeros(3))
    for rank in (0, 65):
        with pytest.raises(ValueError, match=f"largest rank of the Jacobian, 64 .* got {rank}"):
            solve(rank=rank)
    with pytest.raises(ValueError, match=r"largest rank of the Jacobian, 1 .*2 of them deflated"):
        solve(lambda x: x, jnp.zeros(3), deflate=jnp.eye(3)[:2])

    @jax.custom_vjp
    def kernel(x):
        return x**2

    kernel.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))
    with pytest.raises(TypeError, match="must have forward derivatives .* fused attention kernel"):
        solve(kernel)
    with pytest.raises(TypeError, match="`x` must hold floats.*int32"):
        solve(x={"image": x, "label": jnp.int32(3)})
    with pytest.raises(TypeError, match=r"`f\(x\)` must hold floats.*int32"):
        solve(lambda x: x.astype(int))
    with pytest.raises(ValueError, match="`mask` must be a pytree like what it scales"):
        solve(mask={"image": x})
    with pytest.raises(ValueError, match="`weight` must be a pytree like what it scales"):
        solve(weight=jnp.ones(3))
    for wrong in (x, {"image": x[None]}, jnp.ones((2, 3))):
        with pytest.raises(ValueError, match="`start` must be a pytree like `x`"):
            solve(start=wrong)
    with pytest.raises(ValueError, match="`chunk` must be at least 1"):
        solve(chunk=0)
    with pytest.raises(ValueError, match="`max_iterations` must be at least 1"):
        SubspaceIteration(max_iterations=0)
    with pytest.raises(ValueError, match="`oversample` must be at least 0"):
        SubspaceIteration(oversample=-1)
    with pytest.raises(ValueError, match="`block` must be at least 1"):
        GolubKahanLanczos(block=0)
    with pytest.raises(TypeError, match="typed PRNG key"):
        jacobian_svd(jnp.zeros(2, jnp.uint32), feature, x, 2)


def test_many_points_at_once_do_not_wait_for_each_other():
    """Batched decompositions that may run at once have stopped jaxlib 0.10.2 for ever, on as many
    threads as there are cores: hence another process, without virtual devices, and a limit."""
    program = """
import jax
from jaxdiff import geometry

def spectrum(matrix):
    f, method = lambda x: matrix @ x, geometry.GolubKahanLanczos(32)
    return geometry.jacobian_svd(key, f, matrix[0], 64, method=method)

key = jax.random.key(0)
matrices = jax.random.normal(key, (8, 1024, 64))
jax.block_until_ready(jax.jit(jax.vmap(spectrum))(matrices))

bases = jax.numpy.linalg.qr(jax.random.normal(key, (6, 8, 3072, 20)))[0].mT
distances = jax.jit(lambda bases: jax.lax.map(geometry.pairwise_distances, bases))
for _ in range(5):
    distances(bases).block_until_ready()
"""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    subprocess.run([sys.executable, "-c", program], env=environment, timeout=300, check=True)

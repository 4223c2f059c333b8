"""Denoisers known in closed form: Gaussians and mixtures of Gaussians.

Every method of the library can be proven right on these before it meets a network. One
class, `GaussianMixture`, covers them all, because every covariance is stored as

    C = U diag(lambda) U^T + tau^2 (I - U U^T),    U (d, r) with orthonormal columns:

r = d is a full covariance, r < d with tau = 0 a low-rank one, r = 0 isotropic, and r = 0 with
tau = 0 a point mass, so that a data set is a mixture with one component per example. In this
form everything at time t, such as (alpha^2 C + sigma^2 I)^{-1}, is a rescaling of eigenvalues
and stays accurate for every process at every noise level, singular covariances included.

Oracles are exact for any `GaussianProcess`, accept events of any shape, and compute in the dtype of
their parameters: build them under `jax.enable_x64` for proofs in double precision.

Reference: closed forms from Bishop, "Pattern Recognition and Machine Learning", 2006,
sections 2.3.3 and 2.3.9.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, PRNGKeyArray, PyTree

from jaxdiff._checks import check_number
from jaxdiff._tree import as_float_array, is_known, jit
from jaxdiff.conditions import LABEL, as_entries, check_labels, check_taken
from jaxdiff.denoiser import Denoiser
from jaxdiff.flow_map import FlowMap
from jaxdiff.processes import GaussianProcess


def _gain(variance: Array, alpha: Array, sigma: Array) -> Array:
    """alpha v / (alpha^2 v + sigma^2), and 0 for v = 0 even where sigma = 0."""
    total = alpha**2 * variance + sigma**2
    return jnp.where(variance > 0, alpha * variance / jnp.where(total > 0, total, 1.0), 0.0)


class GaussianMixture(Denoiser):
    """The exact denoiser of p(x0) = sum_k w_k N(m_k, C_k), conditional on a label or not.

    E[x0 | x_t] = sum_k p(k | x_t) [m_k + G_k (x_t - alpha m_k)] with
    G_k = alpha C_k (alpha^2 C_k + sigma^2 I)^{-1}.

    Build one with `gaussian`, `gaussian_mixture`, `low_rank_mixture` or `empirical`.

    With labels, `cond` is a class in [0, num_classes), and `cond = num_classes` (the null
    label) or None is the unconditional law. Other labels are refused where they are known, and
    count as the null label where they are traced.

    Attributes:
        log_weights: `(K,)`, log w_k.
        means: `(K, *event)`.
        basis: U of each component, `(K, d, r)`, d the size of the event.
        spectrum: lambda of each component, `(K, r)`, >= 0.
        isotropic: tau^2 of each component, `(K,)`, >= 0.
        labels: class of each component, `(K,)` int32.
        num_classes: number of classes.
    """

    process: GaussianProcess
    log_weights: Array
    means: Array
    basis: Array
    spectrum: Array
    isotropic: Array
    labels: Array
    num_classes: int = eqx.field(static=True)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return self.means.shape[1:]

    @jax.default_matmul_precision("highest")
    def _components(self, x: Array, t: Array) -> tuple[Array, Array]:
        """log N(x; alpha m_k, alpha^2 C_k + sigma^2 I), `(K,)`, and E[x0 | x, k], `(K, d)`."""
        if x.shape != self.event_shape:
            raise ValueError(
                f"`x` must be one example of shape {self.event_shape}, got {x.shape}. "
                "Use jax.vmap for a batch."
            )
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        means = self.means.reshape(self.means.shape[0], -1)
        size, rank = self.basis.shape[1:]

        offset = x.reshape(-1) - alpha * means
        inside = jnp.einsum("kdr,kd->kr", self.basis, offset)
        outside = offset - jnp.einsum("kdr,kr->kd", self.basis, inside)
        posterior_means = (
            means
            + jnp.einsum("kdr,kr->kd", self.basis, _gain(self.spectrum, alpha, sigma) * inside)
            + _gain(self.isotropic, alpha, sigma)[:, None] * outside
        )

        variance = alpha**2 * self.spectrum + sigma**2
        distance = jnp.sum(inside**2 / variance, axis=1)
        log_det = jnp.sum(jnp.log(variance), axis=1)
        if rank < size:
            rest = alpha**2 * self.isotropic + sigma**2
            distance += jnp.sum(outside**2, axis=1) / rest
            log_det += (size - rank) * jnp.log(rest)
        return -0.5 * (distance + log_det + size * jnp.log(2 * jnp.pi)), posterior_means

    def check_cond(self, cond: PyTree) -> None:
        """See `Denoiser`."""
        label = as_entries(cond).get(LABEL)
        check_labels(label, self.num_classes)
        integer = label is not None and jnp.issubdtype(jnp.result_type(label), jnp.integer)
        if integer and is_known(label) and is_known(self.labels):
            there = np.unique(np.asarray(self.labels)).tolist()
            asked = np.unique(np.asarray(label)).tolist()
            if missing := sorted(set(asked) - {*there, self.num_classes}):
                raise ValueError(
                    f"The mixture has no component of class {missing[0]}. Pass one of {there}."
                )

    def _log_prior(self, cond: PyTree) -> Array:
        """log p(k | cond), `(K,)`."""
        label = check_taken(cond, (LABEL,), "a closed-form denoiser").get(LABEL)
        if label is None:
            return self.log_weights
        if jnp.ndim(label) or not jnp.issubdtype(jnp.result_type(label), jnp.integer):
            raise ValueError(
                "A closed-form denoiser takes an integer class for each example, got "
                f"{jnp.result_type(label)} of shape {jnp.shape(label)}. Pass its number."
            )
        check_labels(label, self.num_classes)
        member = (self.labels == label) | (label < 0) | (label >= self.num_classes)
        masked = jnp.where(member, self.log_weights, -jnp.inf)
        return masked - jax.nn.logsumexp(masked)

    def __call__(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Array:
        """E[x0 | x_t = x, cond]; see `Denoiser`."""
        del key
        return _posterior_mean(self, x, t, cond)

    def log_prob(self, x: Array, t: Array, cond: PyTree = None) -> Array:
        """log p_t(x | cond) of one example, in nats."""
        return _log_prob(self, x, t, cond)

    def class_log_posterior(self, x: Array, t: Array) -> Array:
        """log p(c | x_t = x) of every class, `(num_classes,)`."""
        joint = self.log_weights + self._components(x, t)[0]
        classes = jnp.arange(self.num_classes)
        by_class = jnp.where(self.labels == classes[:, None], joint, -jnp.inf)
        return jax.nn.logsumexp(by_class, axis=1) - jax.nn.logsumexp(joint)

    def sample_data(self, key: PRNGKeyArray, cond: PyTree = None) -> Array:
        """One example of p(x0 | cond), `(*event)`."""
        return _sample_data(self, key, cond)

    def covariances(self) -> Array:
        """The dense C_k, `(K, d, d)`."""
        scaled = self.basis * (self.spectrum - self.isotropic[:, None])[:, None, :]
        dense = jnp.einsum("kdr,ker->kde", scaled, self.basis)
        return dense + self.isotropic[:, None, None] * jnp.eye(self.basis.shape[1])

    def moments(self, cond: PyTree = None) -> tuple[Array, Array]:
        """Mean `(*event)` and covariance `(d, d)` of p(x0 | cond)."""
        weights = jnp.exp(self._log_prior(cond))
        means = self.means.reshape(self.means.shape[0], -1)
        mean = weights @ means
        centred = means - mean
        between = jnp.einsum("k,kd,ke->de", weights, centred, centred)
        within = jnp.einsum("k,kde->de", weights, self.covariances())
        return mean.reshape(self.event_shape), within + between

    def condition(self, operator: Array, y: Array, noise_std: Array) -> "GaussianMixture":
        """The oracle of p(x0 | y) for a measurement y = A x0 + noise_std * n, n ~ N(0, I).

        A mixture's posterior is a mixture: its denoiser is the exact E[x0 | x_t, y].

        Args:
            operator: A, `(m, d)`, acting on the flattened example.
            y: `(m,)`.
            noise_std: scalar > 0.
        """
        means, covariances = self.means.reshape(self.means.shape[0], -1), self.covariances()

        def update(mean, covariance):
            evidence = operator @ covariance @ operator.T + noise_std**2 * jnp.eye(y.shape[0])
            factor = jnp.linalg.cholesky(evidence)
            residual = y - operator @ mean
            right = jnp.column_stack([operator @ covariance, residual])
            solved = jax.scipy.linalg.cho_solve((factor, True), right)
            gain, weighted = solved[:, :-1].T, solved[:, -1]
            log_det = 2 * jnp.sum(jnp.log(jnp.diagonal(factor)))
            square = residual @ weighted + log_det + y.shape[0] * jnp.log(2 * jnp.pi)
            posterior = covariance - gain @ operator @ covariance
            return mean + gain @ residual, (posterior + posterior.T) / 2, -square / 2

        means, covariances, log_evidence = jax.vmap(update)(means, covariances)
        log_weights = self.log_weights + log_evidence
        return _full(
            self.process,
            log_weights - jax.nn.logsumexp(log_weights),
            means.reshape(self.means.shape),
            covariances,
            self.labels,
            self.num_classes,
        )


# One program each, also where a caller does not compile: dispatched operation by operation, an
# evaluation is forty of them.
@jit
def _posterior_mean(oracle: GaussianMixture, x: Array, t: Array, cond: PyTree) -> Array:
    log_likelihood, posterior_means = oracle._components(x, t)
    responsibility = jax.nn.softmax(oracle._log_prior(cond) + log_likelihood)
    return (responsibility @ posterior_means).reshape(x.shape).astype(x.dtype)


@jit
def _log_prob(oracle: GaussianMixture, x: Array, t: Array, cond: PyTree) -> Array:
    return jax.nn.logsumexp(oracle._log_prior(cond) + oracle._components(x, t)[0])


@jit
def _sample_data(oracle: GaussianMixture, key: PRNGKeyArray, cond: PyTree) -> Array:
    component_key, noise_key = jax.random.split(key)
    k = jax.random.categorical(component_key, oracle._log_prior(cond))
    noise = jax.random.normal(noise_key, oracle.basis.shape[1:2], oracle.means.dtype)
    inside = oracle.basis[k].T @ noise
    deviation = oracle.basis[k] @ (jnp.sqrt(oracle.spectrum[k]) * inside)
    deviation += jnp.sqrt(oracle.isotropic[k]) * (noise - oracle.basis[k] @ inside)
    return oracle.means[k] + deviation.reshape(oracle.event_shape)


def _full(process, log_weights, means, covariances, labels, num_classes) -> GaussianMixture:
    spectrum, basis = jnp.linalg.eigh(covariances)
    # eigh of a singular covariance returns eigenvalues of order -roundoff.
    spectrum = jnp.maximum(spectrum, 0.0)
    isotropic = jnp.zeros(means.shape[0], means.dtype)
    return GaussianMixture(
        process, log_weights, means, basis, spectrum, isotropic, labels, num_classes
    )


def _check_mixture(means: Array, weights: ArrayLike | None, labels: ArrayLike | None):
    count = means.shape[0]
    weights = jnp.ones(count, means.dtype) if weights is None else as_float_array(weights)
    # In NumPy, because JAX would trace even a constant inside jit.
    labels = np.zeros(count, np.int32) if labels is None else np.asarray(labels)
    for name, value in (("weights", weights), ("labels", labels)):
        if value.shape != (count,):
            raise ValueError(
                f"`{name}` must have one entry per component, shape ({count},), got {value.shape}."
            )
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"`labels` must be integers, got dtype {labels.dtype}.")
    if is_known(weights) and not np.all(np.asarray(weights) > 0):
        raise ValueError(f"`weights` must be positive, got {np.asarray(weights)}.")
    if labels.min() < 0:
        raise ValueError(f"`labels` must not be negative, got {labels.min()}. Number them from 0.")
    num_classes = int(labels.max()) + 1
    log_weights = jnp.log(weights / weights.sum()).astype(means.dtype)
    return log_weights, jnp.asarray(labels, jnp.int32), num_classes


def _check_covariances(covariances: Array) -> None:
    """Reject what is surely no covariance, where its numbers are known.

    Raises:
        ValueError: for a matrix that is not symmetric, or has a negative eigenvalue.
    """
    if not is_known(covariances):
        return
    matrices = np.asarray(covariances, np.float64)
    size = np.abs(matrices).max(initial=0.0)
    # Rounding of whoever made them is allowed for.
    if np.abs(matrices - matrices.mT).max(initial=0.0) > 1e-4 * size:
        raise ValueError("`covariances` must be symmetric. Pass (C + C.T) / 2.")
    least = np.linalg.eigvalsh(matrices).min(initial=0.0)
    if not least >= -1e-4 * size:
        raise ValueError(
            f"`covariances` must be positive semi-definite, got an eigenvalue of {least:g}."
        )


def gaussian(process: GaussianProcess, mean: ArrayLike, covariance: ArrayLike) -> GaussianMixture:
    """The oracle of N(mean, covariance).

    Args:
        process: the forward process.
        mean: `(*event)`.
        covariance: `(d, d)`, symmetric positive semi-definite, d the size of the event.

    Raises:
        ValueError: if the shapes do not match, or the covariance is none.
    """
    return gaussian_mixture(process, jnp.asarray(mean)[None], jnp.asarray(covariance)[None])


def gaussian_mixture(
    process: GaussianProcess,
    means: ArrayLike,
    covariances: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    labels: ArrayLike | None = None,
) -> GaussianMixture:
    """The oracle of a mixture of K Gaussians with full covariances.

    Args:
        process: the forward process.
        means: `(K, *event)`.
        covariances: `(K, d, d)`, symmetric positive semi-definite.
        weights: `(K,)`, positive, normalised here; None for equal ones.
        labels: class of each component, `(K,)` in [0, num_classes); None for a single class.

    Raises:
        ValueError: if the shapes do not match, or a covariance is none.
    """
    means, covariances = as_float_array(means), as_float_array(covariances)
    size = means[0].size
    if covariances.shape != (means.shape[0], size, size):
        raise ValueError(
            f"`covariances` must have shape {(means.shape[0], size, size)} to match `means` of "
            f"shape {means.shape}, got {covariances.shape}."
        )
    _check_covariances(covariances)
    log_weights, labels, num_classes = _check_mixture(means, weights, labels)
    return _full(process, log_weights, means, covariances, labels, num_classes)


def low_rank_mixture(
    process: GaussianProcess,
    means: ArrayLike,
    factors: ArrayLike,
    *,
    noise_std: float = 0.0,
    weights: ArrayLike | None = None,
    labels: ArrayLike | None = None,
) -> GaussianMixture:
    """The oracle of a mixture of K Gaussians with covariances F_k F_k^T + noise_std^2 I.

    Costs O(K d r) per call, so d may be the size of an image.

    Args:
        process: the forward process.
        means: `(K, *event)`.
        factors: F_k, `(K, d, r)` with r <= d.
        noise_std: >= 0; 0 puts the data on K affine subspaces of dimension r.
        weights: as in `gaussian_mixture`.
        labels: as in `gaussian_mixture`.

    Raises:
        ValueError: if the shapes do not match.
    """
    means, factors = as_float_array(means), as_float_array(factors)
    check_number("noise_std", noise_std, least=0.0)
    size = means[0].size
    if factors.ndim != 3 or factors.shape[:2] != (means.shape[0], size) or factors.shape[2] > size:
        raise ValueError(
            f"`factors` must have shape ({means.shape[0]}, {size}, r) with r <= {size} to match "
            f"`means` of shape {means.shape}, got {factors.shape}."
        )
    basis, singular, _ = jnp.linalg.svd(factors, full_matrices=False)
    isotropic = jnp.full(means.shape[0], noise_std**2, means.dtype)
    log_weights, classes, num_classes = _check_mixture(means, weights, labels)
    spectrum = singular**2 + noise_std**2
    return GaussianMixture(
        process, log_weights, means, basis, spectrum, isotropic, classes, num_classes
    )


def empirical(
    process: GaussianProcess, data: ArrayLike, *, labels: ArrayLike | None = None
) -> GaussianMixture:
    """The oracle of a data set: the denoiser that a network of unlimited capacity would learn.

    A mixture of N point masses. Its samples are the training examples themselves.

    Args:
        process: the forward process.
        data: `(N, *event)`.
        labels: class of each example, `(N,)`; None for a single class.
    """
    data = as_float_array(data)
    count, size = len(data), data[0].size
    log_weights, classes, num_classes = _check_mixture(data, None, labels)
    basis, spectrum = jnp.zeros((count, size, 0), data.dtype), jnp.zeros((count, 0), data.dtype)
    isotropic = jnp.zeros(count, data.dtype)
    return GaussianMixture(
        process, log_weights, data, basis, spectrum, isotropic, classes, num_classes
    )


def gaussian_flow_map(oracle: GaussianMixture, x: Array, t: Array, s: Array) -> Array:
    """Where the probability-flow ODE carries x from time t to time s, for a single Gaussian.

    x_s = alpha_s m + (alpha_s^2 C + sigma_s^2 I)^{1/2} (alpha_t^2 C + sigma_t^2 I)^{-1/2}
    (x_t - alpha_t m).

    Args:
        oracle: one made by `gaussian`.
        x: the state at time t, `(*event)`.
        t: scalar time with sigma(t) > 0.
        s: scalar target time, on either side of t.

    Raises:
        ValueError: if the oracle has more than one component.
    """
    if oracle.means.shape[0] != 1:
        raise ValueError(
            "`oracle` must be a single Gaussian, got a mixture of "
            f"{oracle.means.shape[0]} components: their flow map has no closed form."
        )
    return _flow_map(oracle, x, t, s)


@jit
def _flow_map(oracle: GaussianMixture, x: Array, t: Array, s: Array) -> Array:
    process, mean, basis = oracle.process, oracle.means[0].reshape(-1), oracle.basis[0]

    def deviation(variance, time):
        return jnp.sqrt(process.alpha(time) ** 2 * variance + process.sigma(time) ** 2)

    def ratio(variance):
        return deviation(variance, s) / deviation(variance, t)

    offset = x.reshape(-1) - process.alpha(t) * mean
    inside = basis.T @ offset
    moved = basis @ (ratio(oracle.spectrum[0]) * inside)
    moved += ratio(oracle.isotropic[0]) * (offset - basis @ inside)
    return (process.alpha(s) * mean + moved).reshape(x.shape)


class GaussianFlowMap(FlowMap):
    """The exact flow map of a single Gaussian: `gaussian_flow_map` as a `FlowMap`.

    Args:
        oracle: one made by `gaussian`.

    Raises:
        ValueError: when called, if the oracle has more than one component.
    """

    oracle: GaussianMixture

    @property
    def process(self) -> GaussianProcess:
        """The oracle's."""
        return self.oracle.process

    def __call__(
        self,
        x: Array,
        t: Array,
        s: Array,
        cond: PyTree = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Array:
        """See `FlowMap`."""
        del cond, key
        return gaussian_flow_map(self.oracle, x, t, s)

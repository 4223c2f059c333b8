"""The denoiser: (x_t, t, cond) -> E[x0 | x_t, cond], for one example."""

from abc import abstractmethod
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._tree import number
from jaxdiff.networks import EditedNetwork
from jaxdiff.predictions import Eps, Prediction
from jaxdiff.processes import Process


class Denoiser(eqx.Module):
    """A pure function of one noisy example that returns E[x0 | x_t, cond].

    The one noun of the library: networks become denoisers, guidance maps denoisers to
    denoisers, solvers integrate them, losses train them. Batches are `jax.vmap` outside.
    """

    process: eqx.AbstractVar[Process]

    @property
    def evaluations(self) -> int:
        """Network evaluations that one call costs."""
        return 1

    @abstractmethod
    def __call__(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Array:
        """E[x0 | x_t = x, cond].

        Args:
            x: the noisy example, `(*event)`.
            t: scalar time of the process.
            cond: what the example is conditioned on; None for an unconditional denoiser.
            key: randomness of the denoiser itself (dropout, probes); None turns it off.

        Returns:
            x0_hat, `(*event)`.
        """

    def predict(
        self,
        prediction: Prediction,
        x: Array,
        t: Array,
        cond: PyTree = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Array:
        """The denoiser's answer in another parameterisation, e.g. `predict(Score(), x, t)`."""
        return prediction.from_x0(self.process, x, t, self(x, t, cond, key=key))


class Preconditioning(eqx.Module):
    """How a network sees its inputs: x scaled by `scale(t)`, and the noise level as `label(t)`."""

    @abstractmethod
    def scale(self, process: Process, t: Array) -> Array:
        """Scalar factor on the network's input."""

    @abstractmethod
    def label(self, process: Process, t: Array) -> Array:
        """Scalar noise label the network is conditioned on."""


class TimeLabel(Preconditioning):
    """The plain choice: x as it is, and the label `factor * t + shift`.

    Args:
        factor: 1000 puts t in [0, 1] on the scale of DDPM's sinusoidal embedding.
        shift: -1 together with `factor=T` gives the discrete timestep of a `Tabulated` process.
    """

    factor: float = number(1000.0)
    shift: float = number(0.0)

    def scale(self, process: Process, t: Array) -> Array:
        """1."""
        return jnp.ones_like(process.alpha(t))

    def label(self, process: Process, t: Array) -> Array:
        """factor * t + shift."""
        return self.factor * t + self.shift


class LogNoiseLabel(Preconditioning):
    """EDM's choice: unit-variance input and the label `factor * log(sigma / alpha)`.

    scale = 1 / sqrt(alpha^2 sigma_data^2 + sigma^2). With the prediction `F` this is EDM's
    preconditioning.

    Args:
        sigma_data: standard deviation of the data.
        factor: EDM's is 1/4, for embeddings made for labels of order one.

    Reference: Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based
    Generative Models", 2022, arXiv 2206.00364, table 1.
    """

    sigma_data: float = number(0.5)
    factor: float = number(0.25)

    def scale(self, process: Process, t: Array) -> Array:
        """1 / sqrt(alpha^2 sigma_data^2 + sigma^2)."""
        return 1 / jnp.hypot(process.alpha(t) * self.sigma_data, process.sigma(t))

    def label(self, process: Process, t: Array) -> Array:
        """factor * log(sigma / alpha)."""
        return self.factor * -0.5 * process.log_snr(t)


class TappedDenoiser(Denoiser):
    """Base of the denoisers that are one network: what it is given, and what its output means.

    Attributes:
        network: callable pytree `(x, label, cond, *, key) -> output`, one example.
        process: the forward process.
        prediction: what the output means.
        preconditioning: input scale and noise label.
    """

    network: Callable[..., Array]
    process: Process
    prediction: Prediction = Eps()
    preconditioning: Preconditioning = TimeLabel()

    def inputs(self, x: Array, t: Array) -> tuple[Array, Array]:
        """What the network sees of x at time t: the scaled example `(*event)` and its label."""
        scale = self.preconditioning.scale(self.process, t)
        return (scale * x).astype(x.dtype), self.preconditioning.label(self.process, t)


class NetworkDenoiser(TappedDenoiser):
    """A network, the process it was trained for, and what its output means.

    x0_hat = prediction.to_x0(x, network(scale(t) x, label(t), cond)).

    Args:
        network: any callable pytree `(x, label, cond, *, key) -> output`, one example.
        process: the forward process.
        prediction: what the output means; `Eps()` as in DDPM.
        preconditioning: input scale and noise label; `TimeLabel()` gives `1000 t`.
    """

    def __call__(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Array:
        """See `Denoiser`."""
        output = self.network(*self.inputs(x, t), cond, key=key)
        if output.shape != x.shape:
            raise ValueError(
                f"The network must return an array of its input's shape {x.shape}, "
                f"got {output.shape}. A network with twice the channels (learned variance) "
                "belongs in `LearnedVarianceDenoiser`."
            )
        return self.prediction.to_x0(self.process, x, t, output).astype(x.dtype)


class LearnedVarianceDenoiser(TappedDenoiser):
    """A network with twice the channels: what it predicts, and the variance of a reverse step.

    The second half of the last axis, mapped from [-1, 1] to v in [0, 1], interpolates the
    logarithm of a step's variance between DDPM's beta-tilde (0) and beta (1). As a denoiser it
    is like `NetworkDenoiser`; train it with `HybridLoss`, sample it with `LearnedAncestral` or
    any other solver.

    Args:
        network: callable pytree whose output has twice the last axis of x.
        process: the forward process.
        prediction: what the first half means.
        preconditioning: input scale and noise label.

    Reference: Nichol, Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021,
    arXiv 2102.09672, section 3.1.
    """

    def with_variance(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> tuple[Array, Array]:
        """x0_hat and v in [0, 1] (not clipped), both `(*event)`."""
        output = self.network(*self.inputs(x, t), cond, key=key)
        if output.shape != (*x.shape[:-1], 2 * x.shape[-1]):
            raise ValueError(
                f"The network must return twice the channels of its input {x.shape}, got "
                f"{output.shape}. Build it with out_channels twice in_channels."
            )
        output, variance = jnp.split(output, 2, axis=-1)
        x0 = self.prediction.to_x0(self.process, x, t, output)
        return x0.astype(x.dtype), ((variance + 1) / 2).astype(x.dtype)

    def __call__(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Array:
        """See `Denoiser`."""
        return self.with_variance(x, t, cond, key=key)[0]


class DenoiserMap(Denoiser):
    """A denoiser made from another, `base`, whose process and cost it has by default."""

    base: eqx.AbstractVar[Denoiser]

    @property
    def process(self) -> Process:
        """The base denoiser's process."""
        return self.base.process

    @property
    def evaluations(self) -> int:
        """The base denoiser's cost."""
        return self.base.evaluations


class Clipped(DenoiserMap):
    """Clip x0_hat to the range of the data, as DDPM's sampler does.

    Args:
        base: the denoiser to clip.
        low: smallest value of the data.
        high: largest value of the data.
    """

    base: Denoiser
    low: float = number(-1.0)
    high: float = number(1.0)

    def __call__(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Array:
        """See `Denoiser`."""
        return jnp.clip(self.base(x, t, cond, key=key), self.low, self.high)


class DynamicThresholding(DenoiserMap):
    """Clip x0_hat to a quantile of its own absolute values, and rescale to [-1, 1].

    c = max(1, quantile of |x0_hat|); x0_hat -> clip(x0_hat, -c, c) / c. Keeps large guidance
    scales from saturating images.

    Args:
        base: the denoiser to threshold.
        quantile: in [0, 1].

    Reference: Saharia et al., "Photorealistic Text-to-Image Diffusion Models with Deep
    Language Understanding", 2022, arXiv 2205.11487, section 2.3.
    """

    base: Denoiser
    quantile: float = number(0.995)

    def __call__(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Array:
        """See `Denoiser`."""
        x0_hat = self.base(x, t, cond, key=key)
        limit = jnp.maximum(jnp.quantile(jnp.abs(x0_hat), self.quantile), 1.0)
        limit = limit.astype(x0_hat.dtype)
        return jnp.clip(x0_hat, -limit, limit) / limit


def find_network(denoiser: Denoiser) -> TappedDenoiser:
    """The network's own denoiser inside guidance and other maps of it.

    Raises:
        TypeError: if there is no network inside.
    """
    inner = denoiser
    while isinstance(inner, DenoiserMap):
        inner = inner.base
    if not isinstance(inner, TappedDenoiser):
        raise TypeError(
            f"`denoiser` must hold a network with taps, got {type(inner).__name__}. Its output, or "
            "any other function of x, can be analysed as it is."
        )
    return inner


def edit_taps(denoiser: Denoiser, edits: dict[str, Callable[[Array], Array]]) -> Denoiser:
    """The same denoiser with its network's inner activations edited or replaced.

    Args:
        denoiser: a network's denoiser, or guidance and other maps of one.
        edits: as in `networks.EditedNetwork`.

    Raises:
        TypeError: if there is no network inside.
        ValueError: when called, for taps that the network does not have.
    """
    find_network(denoiser)

    def edit(node):
        if not isinstance(node, TappedDenoiser):
            return node
        return eqx.tree_at(lambda d: d.network, node, EditedNetwork(node.network, edits))

    return jax.tree.map(edit, denoiser, is_leaf=lambda node: isinstance(node, TappedDenoiser))

"""The denoiser: (x_t, t, cond) -> E[x0 | x_t, cond], for one example; and maps of denoisers."""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import (
    check_callable,
    check_kind,
    check_network_cond,
    check_number,
    check_same_process,
    check_takes_key,
)
from jaxdiff._tree import Number, number, straight_through_clip
from jaxdiff.conditions import as_entries, from_entries
from jaxdiff.flow_map import FlowMap
from jaxdiff.predictions import Eps, Prediction
from jaxdiff.processes import GaussianProcess
from jaxdiff.taps import EditedNetwork, read_taps


class Estimate(eqx.Module):
    """What a denoiser knows of one noisy example, by one evaluation.

    Attributes:
        x0: E[x0 | x_t], `(*event)`.
        eps: the noise a solver is to go on with, where it is another than the one x0 implies,
            (x - alpha x0) / sigma; None for that one.
        variance: of the learned reverse step, v in [0, 1] as in `LearnedVarianceDenoiser`; None
            where none is learned.
        notes: what `Stepwise` maps inside remember for the next step, by slot.
        taps: inner activations that were asked for by `reading`, by name.
    """

    x0: Array
    # None for the implied one; solvers see it settled.
    eps: Array = None  # type: ignore[assignment]
    variance: Array | None = None
    notes: dict[int, PyTree] = eqx.field(default_factory=dict)
    taps: dict[str, Array] = eqx.field(default_factory=dict)

    def replace(self, **changes: PyTree) -> "Estimate":
        """The estimate with other values, and the rest as it is, a stated noise too."""
        return dataclasses.replace(self, **changes)

    def moved(self, process: GaussianProcess, t: Array, x0: Array) -> "Estimate":
        """The estimate with another x0; a stated noise moves along, as the implied one does.

        eps' = eps - alpha / sigma (x0' - x0): what states the noise that its x0 implies does so
        still.
        """
        x0 = x0.astype(self.x0.dtype)
        if self.eps is None:
            return self.replace(x0=x0)
        shift = process.alpha(t) / process.sigma(t) * (x0 - self.x0)
        return self.replace(x0=x0, eps=(self.eps - shift).astype(self.eps.dtype))

    def noise(self, process: GaussianProcess, x: Array, t: Array) -> Array:
        """The stated noise, or the one that x0 implies."""
        return Eps().from_x0(process, x, t, self.x0) if self.eps is None else self.eps


def combined(
    rule: Callable[..., Array], process: GaussianProcess, x: Array, t: Array, *found: Estimate
) -> Estimate:
    """Estimates by a linear rule, in x0, and in the noise where one of them states it.

    Args:
        rule: `(*arrays) -> array`, of as many arrays `(*event)` as there are estimates.
        process: the forward process.
        x: the noisy example, `(*event)`.
        t: scalar time.
        found: estimates; all but x0 and noise is that of the first.
    """
    x0 = rule(*[one.x0 for one in found]).astype(x.dtype)
    if all(one.eps is None for one in found):
        return found[0].replace(x0=x0)
    eps = rule(*[one.noise(process, x, t) for one in found])
    return found[0].replace(x0=x0, eps=eps.astype(x.dtype))


class Denoiser(eqx.Module):
    """A pure function of one noisy example that returns E[x0 | x_t, cond].

    The one noun of the library: networks become denoisers, guidance maps denoisers to
    denoisers, solvers integrate them, losses train them. Batches are `jax.vmap` outside.

    A denoiser of one's own defines `__call__`; one that knows more than x0 also `estimate`.
    """

    if TYPE_CHECKING:  # a field or a property

        @property
        def process(self) -> GaussianProcess:
            """The forward process."""
            ...

    else:
        process: eqx.AbstractVar[GaussianProcess]

    @property
    def evaluations(self) -> Array | int:
        """Network evaluations that one call costs."""
        return 1

    @property
    def bounded_start(self) -> bool:
        """Whether the customary grid of a process whose alpha vanishes starts later.

        For what changes the noise of an estimate, and x0 with it by 1 / alpha, as a solver's
        `bounded_start`.
        """
        return False

    @property
    def needs_signal(self) -> bool:
        """Whether a grid of one's own must start where alpha > 0, by which something is divided."""
        return self.bounded_start

    @abstractmethod
    def __call__(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Array:
        """E[x0 | x_t = x, cond].

        Args:
            x: the noisy example, `(*event)`.
            t: scalar time of the process.
            cond: what the example is conditioned on, see `jaxdiff.conditions`; None for an
                unconditional denoiser.
            key: randomness of the network itself (dropout); None turns it off.

        Returns:
            x0_hat, `(*event)`.
        """

    def check_cond(self, cond: PyTree) -> None:
        """Reject conditions, of a batch or one example, whose values are known to be wrong.

        Raises:
            ValueError: for labels outside the classes.
        """
        del cond

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """All that is known of the example, by the same evaluation; arguments as of a call."""
        return Estimate(self(x, t, cond, key=key))

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


def check_estimate(denoiser: Any, found: Any, x: Array) -> None:
    """Reject estimates that are not of the form of x, and would be broadcast.

    Raises:
        TypeError: for anything but an `Estimate`.
        ValueError: for an x0 or eps of another shape, or not of floats.
    """
    name = type(denoiser).__name__
    if not isinstance(found, Estimate):
        raise TypeError(
            f"`estimate` of {name} must return an Estimate, got {type(found).__name__}. Return "
            "found.replace(x0=...) of what the map calls, or Estimate(x0)."
        )
    for part in ("x0", "eps"):
        value = getattr(found, part)
        if value is None and part == "eps":
            continue
        shape, dtype = jnp.shape(value), jnp.result_type(value)
        if shape != x.shape or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"`{part}` of {name} must be floats of the shape of x, {x.shape}, got {dtype} of "
                f"shape {shape}."
            )


def check_denoiser(denoiser: object, argument: str = "denoiser") -> None:
    """Reject what is no denoiser.

    Raises:
        TypeError: for a network, a map between two times, or anything else.
    """
    if isinstance(denoiser, Denoiser):
        return
    remedy = "Wrap a network: NetworkDenoiser(network, process, prediction)."
    if isinstance(denoiser, FlowMap):
        remedy = "A map from one time to another has solvers of its own, e.g. FlowMapSteps()."
    raise TypeError(
        f"`{argument}` must be a denoiser, (x, t, cond) -> E[x0 | x_t], got "
        f"{type(denoiser).__name__}. {remedy}"
    )


class Preconditioning(eqx.Module):
    """How a network sees its inputs: x scaled by `scale(t)`, and the noise level as `label(t)`."""

    @abstractmethod
    def scale(self, process: GaussianProcess, t: Array) -> Array:
        """Scalar factor on the network's input."""

    @abstractmethod
    def label(self, process: GaussianProcess, t: Array) -> Array:
        """Scalar noise label the network is conditioned on."""


class TimeLabel(Preconditioning):
    """The plain choice: x as it is, and the label `factor * t + shift`.

    Args:
        factor: 1000 puts t in [0, 1] on the scale of DDPM's sinusoidal embedding.
        shift: -1 together with `factor=T` gives the discrete timestep of a `Tabulated` process.
    """

    factor: Number = number(1000.0)
    shift: Number = number(0.0)

    def __check_init__(self):
        check_number("factor", self.factor)
        check_number("shift", self.shift)

    def scale(self, process: GaussianProcess, t: Array) -> Array:
        """1."""
        return jnp.ones_like(process.alpha(t))

    def label(self, process: GaussianProcess, t: Array) -> Array:
        """factor * t + shift."""
        return self.factor * t + self.shift


class LogNoiseLabel(Preconditioning):
    """EDM's choice: unit-variance input and the label `factor * log(sigma / alpha)`.

    scale = 1 / sqrt(alpha^2 sigma_data^2 + sigma^2). With the prediction `F` this is EDM's
    preconditioning.

    Args:
        sigma_data: standard deviation of the data, > 0.
        factor: EDM's is 1/4, for embeddings made for labels of order one.

    Reference: Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based
    Generative Models", 2022, arXiv 2206.00364, table 1.
    """

    sigma_data: Number = number(0.5)
    factor: Number = number(0.25)

    def __check_init__(self):
        check_number("sigma_data", self.sigma_data, above=0.0)
        check_number("factor", self.factor)

    def scale(self, process: GaussianProcess, t: Array) -> Array:
        """1 / sqrt(alpha^2 sigma_data^2 + sigma^2)."""
        return 1 / jnp.hypot(process.alpha(t) * self.sigma_data, process.sigma(t))

    def label(self, process: GaussianProcess, t: Array) -> Array:
        """factor * log(sigma / alpha)."""
        return self.factor * -0.5 * process.log_snr(t)


class TappedDenoiser(Denoiser):
    """Base of the denoisers that are one network: what it is given, and what its output means.

    Attributes:
        network: callable pytree `(x, label, cond, *, key) -> output`, one example.
        process: the forward process.
        prediction: what the output means.
        preconditioning: input scale and noise label.
        taps: inner activations that an estimate brings along; see `reading`.
    """

    network: Callable[..., Array]
    process: GaussianProcess
    prediction: Prediction = Eps()
    preconditioning: Preconditioning = TimeLabel()
    taps: tuple[str, ...] = eqx.field(static=True, default=(), kw_only=True)

    def __check_init__(self):
        check_callable("network", self.network, "a network")
        check_takes_key("network", self.network)
        check_kind("process", self.process, GaussianProcess, "processes.VP()")
        check_kind("prediction", self.prediction, Prediction, "predictions.Eps()")
        check_kind("preconditioning", self.preconditioning, Preconditioning, "TimeLabel()")

    def check_cond(self, cond: PyTree) -> None:
        """See `Denoiser`: what the network itself checks, if it has a `check_cond`."""
        check_network_cond(self.network, cond)

    def inputs(self, x: Array, t: Array) -> tuple[Array, Array]:
        """What the network sees of x at time t: the scaled example `(*event)` and its label."""
        scale = self.preconditioning.scale(self.process, t)
        return (scale * x).astype(x.dtype), self.preconditioning.label(self.process, t)

    def output(
        self, x: Array, t: Array, cond: PyTree, key: PRNGKeyArray | None
    ) -> tuple[Array, dict[str, Array]]:
        """The network's output, and the taps that are read on the way."""
        cond = from_entries(as_entries(cond))
        if self.taps:
            return read_taps(self.network, self.taps, *self.inputs(x, t), cond, key=key)
        return self.network(*self.inputs(x, t), cond, key=key), {}

    def __call__(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Array:
        """See `Denoiser`."""
        return self.estimate(x, t, cond, key=key).x0

    @abstractmethod
    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""


class NetworkDenoiser(TappedDenoiser):
    """A network, the process it was trained for, and what its output means.

    x0_hat = prediction.to_x0(x, network(scale(t) x, label(t), cond)).

    Args:
        network: any callable pytree `(x, label, cond, *, key) -> output`, one example.
        process: the forward process.
        prediction: what the output means; `Eps()` as in DDPM.
        preconditioning: input scale and noise label; `TimeLabel()` gives `1000 t`.
        taps: inner activations that an estimate brings along.
    """

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        output, taps = self.output(x, t, cond, key)
        if output.shape != x.shape:
            raise ValueError(
                f"The network must return an array of its input's shape {x.shape}, "
                f"got {output.shape}. A network with twice the channels (learned variance) "
                "belongs in `LearnedVarianceDenoiser`."
            )
        x0 = self.prediction.to_x0(self.process, x, t, output).astype(x.dtype)
        return Estimate(x0, taps=taps)


class LearnedVarianceDenoiser(TappedDenoiser):
    """A network with twice the channels: what it predicts, and the variance of a reverse step.

    The second half of the last axis, mapped from [-1, 1] to v in [0, 1], interpolates the
    logarithm of a step's variance between DDPM's beta-tilde (0) and beta (1); it is the
    `variance` of an estimate, not clipped. As a denoiser it is like `NetworkDenoiser`; train it
    with `HybridLoss`, sample it with `LearnedAncestral` or any other solver.

    Args:
        network: callable pytree whose output has twice the last axis of x.
        process: the forward process.
        prediction: what the first half means.
        preconditioning: input scale and noise label.
        taps: inner activations that an estimate brings along.

    Reference: Nichol, Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021,
    arXiv 2102.09672, section 3.1.
    """

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`; with a variance."""
        output, taps = self.output(x, t, cond, key)
        if output.shape != (*x.shape[:-1], 2 * x.shape[-1]):
            raise ValueError(
                f"The network must return twice the channels of its input {x.shape}, got "
                f"{output.shape}. Build it with out_channels twice in_channels."
            )
        output, variance = jnp.split(output, 2, axis=-1)
        x0 = self.prediction.to_x0(self.process, x, t, output)
        return Estimate(
            x0.astype(x.dtype), variance=((variance + 1) / 2).astype(x.dtype), taps=taps
        )


class DenoiserMap(Denoiser):
    """Base of the denoisers made from others: `base`, and any further fields that are denoisers.

    A map defines `estimate`, and in it changes what its bases estimate, usually x0 alone:

        found = self.base.estimate(x, t, cond, key=key)
        return found.moved(self.process, t, jnp.clip(found.x0, -1, 1))

    so that a learned variance and the notes of other maps pass through, and another noise moves
    along; `found.replace(x0=...)` leaves that as it is. A map that speaks of nothing but x0 may
    define `__call__` instead. The process is that of `base`, which denoisers beside it must
    share, and the cost that of all denoisers inside, unless the map says otherwise.
    """

    if TYPE_CHECKING:  # a field or a property

        @property
        def base(self) -> Denoiser:
            """The first of the denoisers inside."""
            ...

    else:
        base: eqx.AbstractVar[Denoiser]

    # Entries of the condition that the map takes for itself, which the denoisers inside do not see.
    takes: ClassVar[tuple[str, ...]] = ()
    # Fields that hold the network which edits of taps are meant for.
    same_network: ClassVar[tuple[str, ...]] = ("base",)

    def __check_init__(self):
        check_denoiser(self.base, "base")
        for path, child in self._children():
            check_same_process(jax.tree_util.keystr(path)[1:], child.process, self.base.process)
        kind = type(self)
        if kind.__call__ is DenoiserMap.__call__ and kind.estimate is DenoiserMap.estimate:
            raise TypeError(
                f"`{kind.__name__}` must define `estimate`, or `__call__` for x0 alone."
            )

    def check_cond(self, cond: PyTree) -> None:
        """See `Denoiser`: what the denoisers inside check."""
        if self.takes:
            entries = as_entries(cond)
            cond = from_entries({k: v for k, v in entries.items() if k not in self.takes})
        for child in self.children:
            child.check_cond(cond)

    @property
    def children(self) -> list[Denoiser]:
        """The denoisers that the map calls."""
        return [child for _, child in self._children()]

    def _children(self) -> list[tuple[Any, Denoiser]]:
        leaves = jax.tree_util.tree_leaves_with_path(
            self, is_leaf=lambda n: isinstance(n, Denoiser) and n is not self
        )
        return [(path, leaf) for path, leaf in leaves if isinstance(leaf, Denoiser)]

    @property
    def process(self) -> GaussianProcess:
        """The base denoiser's process."""
        return self.base.process

    @property
    def bounded_start(self) -> bool:
        """Where any denoiser inside asks for it."""
        return any(child.bounded_start for child in self.children)

    @property
    def needs_signal(self) -> bool:
        """Where it or any denoiser inside does."""
        return self.bounded_start or any(child.needs_signal for child in self.children)

    @property
    def evaluations(self) -> Array | int:
        """One call of every denoiser inside."""
        return sum(child.evaluations for child in self.children)

    def __call__(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Array:
        """See `Denoiser`."""
        return self.estimate(x, t, cond, key=key).x0

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`. Of a map that defines `__call__` alone, this is x0 and nothing else.

        Raises:
            ValueError: if a base has more to say than x0, which would be lost.
        """

        def guarded(node):
            speaks = isinstance(node, DenoiserMap) or (
                isinstance(node, TappedDenoiser) and node.taps
            )
            return _X0Alone(node, type(self).__name__) if speaks else node

        inside = jax.tree.map(
            guarded, self, is_leaf=lambda n: isinstance(n, Denoiser) and n is not self
        )
        return Estimate(type(self).__call__(inside, x, t, cond, key=key))


class _X0Alone(DenoiserMap):
    """A denoiser inside a map that asks for x0 alone: an error if it has more to say."""

    base: Denoiser
    asked_by: str = eqx.field(static=True)

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        found = self.base.estimate(x, t, cond, key=key)
        said = {
            "the noise to go on with": found.eps is not None,
            "what to remember": bool(found.notes),
            "the taps to read": bool(found.taps),
        }
        if any(said.values()):
            lost = " and ".join(what for what, there in said.items() if there)
            raise ValueError(
                f"`{self.asked_by}` defines `__call__` alone, and would lose {lost} of "
                f"{type(self.base).__name__} inside. Define `estimate`, and return "
                "`found.replace(x0=...)` of the base's."
            )
        return found


class Clipped(DenoiserMap):
    """Clip x0_hat to the range of the data, as DDPM's sampler does.

    Args:
        base: the denoiser to clip.
        low: smallest value of the data.
        high: largest value of the data, > low.
        straight_through: whether the derivative is that of the base itself, outside the range too:
            to differentiate through a sampler that clips.
    """

    base: Denoiser
    low: Number = number(-1.0)
    high: Number = number(1.0)
    straight_through: bool = eqx.field(static=True, default=False, kw_only=True)

    def __check_init__(self):
        check_number("low", self.low)
        if isinstance(self.low, float):
            check_number("high", self.high, above=self.low)

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        found = self.base.estimate(x, t, cond, key=key)
        clip = straight_through_clip if self.straight_through else jnp.clip
        return found.moved(self.process, t, clip(found.x0, self.low, self.high))


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
    quantile: Number = number(0.995)

    def __check_init__(self):
        check_number("quantile", self.quantile, least=0.0, most=1.0)

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        found = self.base.estimate(x, t, cond, key=key)
        limit = jnp.maximum(jnp.quantile(jnp.abs(found.x0), self.quantile), 1.0)
        limit = limit.astype(found.x0.dtype)
        return found.moved(self.process, t, jnp.clip(found.x0, -limit, limit) / limit)


Where = Callable[[Denoiser], Denoiser | tuple[Denoiser, ...]]


def find_network(denoiser: Denoiser, where: Where | None = None) -> TappedDenoiser:
    """The network's own denoiser inside guidance and other maps of it.

    Args:
        denoiser: a network's denoiser, or maps of one or several.
        where: which of the denoisers inside to look into, e.g. `lambda d: d.weak`; None follows
            the `base` of every map.

    Raises:
        TypeError: if there is no network inside.
    """
    inner = denoiser if where is None else where(denoiser)
    while isinstance(inner, DenoiserMap):
        inner = inner.base
    if not isinstance(inner, TappedDenoiser):
        raise TypeError(
            f"`denoiser` must hold a network with taps, got {type(inner).__name__}. Its output, or "
            "any other function of x, can be analysed as it is."
        )
    return inner


def edit_taps(
    denoiser: Denoiser,
    edits: Mapping[str, Callable[[Array], Array]],
    where: Where | None = None,
) -> Denoiser:
    """The same denoiser with its network's inner activations edited or replaced.

    Of a map of several networks, the one that `find_network` finds is edited, and its other
    versions where a map holds several of the same network, such as `EditedBetween`.

    Args:
        denoiser: a network's denoiser, or guidance and other maps of one or several.
        edits: tap -> function of its activation, `(*activation)` to the same shape, as in
            `taps.EditedNetwork`.
        where: which denoisers inside to edit, one or a tuple, e.g. `lambda d: d.weak`.

    Raises:
        TypeError: if there is no network inside.
        ValueError: when called, for taps that the network does not have.
    """

    def edit(node: TappedDenoiser) -> TappedDenoiser:
        return eqx.tree_at(lambda d: d.network, node, EditedNetwork(node.network, dict(edits)))

    return at_network(denoiser, edit, where)


def reading(denoiser: Denoiser, names: tuple[str, ...], where: Where | None = None) -> Denoiser:
    """The same denoiser, whose estimates bring inner activations along, through any maps.

    `reading(denoiser, ("mid",)).estimate(x, t, cond).taps["mid"]` is what the network computed on
    the way to that estimate, with the input that maps gave it; under guidance, that of the
    conditional branch.

    Args:
        denoiser: a network's denoiser, or guidance and other maps of one or several.
        names: taps to read.
        where: which denoiser inside to read; see `find_network`.

    Raises:
        TypeError: if there is no network inside.
        ValueError: when called, for taps that the network does not have.
    """

    def read(node: TappedDenoiser) -> TappedDenoiser:
        return dataclasses.replace(node, taps=(*node.taps, *names))

    return at_network(denoiser, read, where)


def at_network(denoiser: Denoiser, change: Callable, where: Where | None = None) -> Denoiser:
    """The denoiser with its network's own denoiser, and other versions of it, changed."""
    if where is not None:
        return eqx.tree_at(where, denoiser, replace_fn=lambda d: at_network(d, change, None))
    find_network(denoiser)
    if not isinstance(denoiser, DenoiserMap):
        return change(denoiser)
    names = denoiser.same_network
    children = [at_network(getattr(denoiser, name), change, None) for name in names]
    return eqx.tree_at(lambda d: [getattr(d, name) for name in names], denoiser, children)

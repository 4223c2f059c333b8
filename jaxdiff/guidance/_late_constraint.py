"""LaCon: guidance by an image that is read out of the network's own activations."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_callable, check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.conditions import take
from jaxdiff.denoiser import Denoiser, DenoiserMap, Estimate, find_network, reading
from jaxdiff.guidance._scale import Scale, check_scale, norm, scale_at
from jaxdiff.losses import TimeLaw, UniformTime, each_example
from jaxdiff.losses._batch import wide

# Activations by the names of their taps, and the network's noise label -> an image.
Aligner = Callable[[dict[str, Array], Array], Array]


class LateConstraint(DenoiserMap):
    """Towards an image y that an aligner reads out of activations: by steps of a fixed length.

        L = mean (y - g(activations at x, t))^2,    G = grad_x L,
        eps' = eps + scale |eps - x| G / |G| for u > t_low, and the base for u <= t_low,

    u the `unit_time` of the process, eps the noise that D implies, and x that of a process that
    preserves variance: of another one x / sqrt(alpha^2 + sigma^2) stands for it. In x0 this is
    D' = D - scale |D - alpha x / (r (r + sigma))| G / |G|, r = sqrt(alpha^2 + sigma^2), which is
    what is computed. `ClassifierGuidance` by -L, with a scale that depends on G, is the same.

    Kind 2, with data of the example: the entry "y" of its condition, in the size of what the
    aligner answers. Reads taps. One evaluation of the base, and for u > t_low a backward pass of
    the network from the taps; where examples share the time, it is skipped below.

    Args:
        base: a network's denoiser, or guidance and other maps of one; of classifier-free guidance
            the conditional branch is read.
        aligner: g, `(activations by tap, noise label) -> image`, a pytree, such as
            `networks.TapAligner`; learned by `LateConstraintLoss`. The label is the network's.
        taps: names of the activations.
        scale: 0 is the base.
        t_low: u from which on there is no guidance.

    Raises:
        TypeError: if there is no network inside.
        ValueError: when called, without "y", for one of another shape than the aligner's answer,
            or taps that the network does not have.

    Reference: Liu, Li, Zhang, Luo, Liu, "LaCon: Late-Constraint Diffusion for Steerable Guided
    Image Synthesis", 2023, arXiv 2305.11520. Norms are of one example here, over the whole batch
    in its code; eps is the base's own there under guidance, too, and here the guided one.
    """

    base: Denoiser
    aligner: Aligner
    taps: tuple[str, ...] = eqx.field(static=True)
    scale: Scale = number(2.0)
    t_low: Number = number(0.5)

    takes: ClassVar[tuple[str, ...]] = ("y",)

    def __check_init__(self):
        find_network(self.base)
        check_callable("aligner", self.aligner, "networks.TapAligner(...)")
        _check_taps(self.taps)
        check_scale(self.scale)
        check_number("t_low", self.t_low)

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        y, rest = take(cond, "y", by="LateConstraint")
        process = self.process

        def loss(x):
            answer, found = _read(self.base, self.aligner, self.taps, x, t, rest, key)
            return _distance(answer, y), found

        def guided():
            slope, found = jax.grad(loss, has_aux=True)(x)
            alpha, sigma = process.alpha(t), process.sigma(t)
            spread = jnp.hypot(alpha, sigma)
            # (sigma / alpha) (eps - x / spread), whose parts are large where alpha is small.
            apart = found.x0 - alpha / (spread * (spread + sigma)) * x
            size = norm(slope)
            length = scale_at(self.scale, process, t) * norm(apart) / jnp.where(size > 0, size, 1)
            moved = found.x0 - length * slope
            # Those that others asked for, and not the map's own.
            asked = find_network(self.base).taps
            taps = {name: found.taps[name] for name in asked}
            return found.moved(process, t, moved).replace(taps=taps)

        def plain():
            return self.base.estimate(x, t, rest, key=key)

        return jax.lax.cond(process.unit_time(t) > self.t_low, guided, plain)


class LateConstraintLoss(eqx.Module):
    """mean (y - g(activations at x_t, t))^2: an aligner learns to read y, of a frozen network.

    Times and noises are fresh for every example. The best answer is E[y | activations], and what
    is left of the loss the mean variance of y given those. For a `Player` whose model is the
    aligner, with `trainable=lambda aligner: aligner`. The frozen denoiser is the constant "base".

    Args:
        taps: as of `LateConstraint`.
        time_law: law of the training time.

    Reference: as of `LateConstraint`. Its code draws the same noise at every step.
    """

    taps: tuple[str, ...] = eqx.field(static=True)
    time_law: TimeLaw = UniformTime()

    def __check_init__(self):
        _check_taps(self.taps)
        check_kind("time_law", self.time_law, TimeLaw, "losses.UniformTime()")

    def __call__(
        self, aligner: Aligner, key: PRNGKeyArray, batch: dict, frozen: Any
    ) -> tuple[Array, dict[str, Array]]:
        """The loss of a batch.

        Args:
            aligner: the model that learns.
            key: typed key.
            batch: `{"x": (B, *event), "cond": {"y": (B, *answer), ...}}`; the other entries of the
                condition are the base's.
            frozen: has the "base".

        Returns:
            The scalar loss, and no metrics.

        Raises:
            ValueError: without "base" or "y".
        """
        if "base" not in frozen:
            raise ValueError(
                "`frozen` must have the model whose activations are read as the constant 'base', "
                f"got {sorted(frozen)}. Pass `constants={{'base': denoiser}}` to the step."
            )
        base = frozen["base"]
        find_network(base)

        def one(key, u, x0, cond):
            y, rest = take(cond, "y", by="LateConstraintLoss")
            t = self.time_law.quantile(base.process, u)
            x = base.process.noise(key, x0, t)
            answer, _ = _read(base, aligner, self.taps, x, t, rest, None)
            return _distance(answer, y)

        return each_example(one, key, batch).mean(), {}


def _read(
    base: Denoiser,
    aligner: Aligner,
    taps: tuple[str, ...],
    x: Array,
    t: Array,
    cond: PyTree,
    key: PRNGKeyArray | None,
) -> tuple[Array, Estimate]:
    """What the aligner answers, and the base's estimate by the same evaluation."""
    found = reading(base, taps).estimate(x, t, cond, key=key)
    _, label = find_network(base).inputs(x, t)
    return aligner({name: found.taps[name] for name in taps}, label), found


def _distance(answer: Array, y: Array) -> Array:
    if jnp.shape(answer) != jnp.shape(y):
        raise ValueError(
            f"`y` must have the shape of what `aligner` answers, {jnp.shape(answer)}, got "
            f"{jnp.shape(y)}. Resize it by jax.image.resize."
        )
    return jnp.mean(wide(y - answer) ** 2)


def _check_taps(taps: Any) -> None:
    if not isinstance(taps, tuple) or not taps:
        raise ValueError(
            f"`taps` must be a tuple of the network's taps, such as ('mid',), got {taps!r}."
        )

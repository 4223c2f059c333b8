"""What guidance by attention shares: away from the network whose attention is made worse."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import equinox as eqx
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff.denoiser import Denoiser, DenoiserMap, Estimate, combined, edit_taps, find_network
from jaxdiff.guidance._scale import Scale, check_scale, scale_at
from jaxdiff.taps import tap_names


def check_layers(layers: Sequence[str]) -> None:
    """Reject a string in place of a tuple of them, and none."""
    if isinstance(layers, str) or not layers:
        raise ValueError(
            f"`layers` must be a tuple of attention taps, such as ('mid.attn',), got {layers!r}."
        )


def check_attention(
    base: Denoiser, layers: Sequence[str], part: str, x: Array, t: Array, cond: PyTree
) -> None:
    """Reject layers that the network does not have.

    Raises:
        ValueError: naming the first, and those there are.
    """
    node = find_network(base)
    names = tap_names(node.network, *node.inputs(x, t), cond)
    there = [name.removesuffix(f".{part}") for name in names if name.endswith(f".{part}")]
    for layer in layers:
        if layer not in there:
            raise ValueError(
                f"`layers` must be self-attentions of the network, which has {there or 'none'}, "
                f"got {layer!r}. Build the network with attention there."
            )


def grid_of(tokens: int, shape: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of a grid of so many tokens, of the proportions of an image.

    Raises:
        ValueError: if there is no such grid.
    """
    height, width = shape[:2]
    rows = round((tokens * height / width) ** 0.5)
    if rows * rows * width != tokens * height or tokens % rows:
        raise ValueError(
            f"`layers` must attend over a grid of the image's proportions, {height} to {width}, "
            f"got {tokens} tokens."
        )
    return rows, tokens // rows


class AgainstEdited(DenoiserMap):
    """Base: D + scale (D - D'), with D' of the network whose chosen attentions are edited.

    A guidance defines `part`, which of the attention's taps is edited, and `edit`, how.
    """

    base: eqx.AbstractVar[Denoiser]
    scale: eqx.AbstractVar[Scale]
    layers: eqx.AbstractVar[tuple[str, ...]]

    part: ClassVar[str]

    def __check_init__(self):
        find_network(self.base)
        check_scale(self.scale)
        check_layers(self.layers)

    @abstractmethod
    def edit(self, x: Array) -> Callable[[Array], Array]:
        """What is done to the tap, for an example like x."""

    @property
    def evaluations(self) -> Array | int:
        """Twice the base denoiser's."""
        return 2 * self.base.evaluations

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        check_attention(self.base, self.layers, self.part, x, t, cond)
        found = self.base.estimate(x, t, cond, key=key)
        edits = {f"{layer}.{self.part}": self.edit(x) for layer in self.layers}
        other = edit_taps(self.base, edits).estimate(x, t, cond, key=key)
        scale = scale_at(self.scale, self.process, t)

        def rule(one, edited):
            return one + scale * (one - edited)

        return combined(rule, self.process, x, t, found, other)

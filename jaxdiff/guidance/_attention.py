"""What guidance by attention shares: which layers, and their grids of tokens."""

from collections.abc import Sequence

from jaxtyping import Array, PyTree

from jaxdiff.denoiser import Denoiser, find_network
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

"""InceptionV3 as the Frechet inception distance uses it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, PRNGKeyArray

from jaxdiff.networks._conv import Conv
from jaxdiff.taps import Tap

SIZE = 299
_EPSILON = 1e-3  # of batch norm

# Layers by name: input and output channels, filter, stride, padding.
_Spec = tuple[int, int, tuple[int, int], int, tuple[int, int]]


class ConvNorm(nnx.Module):
    """Convolution, the affine map that batch norm is in evaluation, and ReLU."""

    def __init__(self, spec: _Spec, rngs: nnx.Rngs):
        inputs, outputs, kernel, stride, (vertical, horizontal) = spec
        padding = ((vertical, vertical), (horizontal, horizontal))
        self.conv = Conv(
            inputs, outputs, kernel, strides=stride, padding=padding, use_bias=False, rngs=rngs
        )
        self.scale = nnx.Param(jnp.ones(outputs))
        self.shift = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: Array) -> Array:
        """`(H, W, inputs)` to `(H', W', outputs)`."""
        return jax.nn.relu(self.conv(x) * self.scale[...] + self.shift[...])


def _max(x: Array, stride: int = 2, pad: int = 0) -> Array:
    padding = ((pad, pad), (pad, pad), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (3, 3, 1), (stride, stride, 1), padding)


def _mean(x: Array) -> Array:
    """The mean over what is inside of 3 x 3 neighbours."""

    def total(x):
        padding = ((1, 1), (1, 1), (0, 0))
        return lax.reduce_window(x, 0.0, lax.add, (3, 3, 1), (1, 1, 1), padding)

    return total(x) / total(jnp.ones_like(x[..., :1]))


def _square(inputs: int, outputs: int, size: int = 1, stride: int = 1, pad: int = 0) -> _Spec:
    return inputs, outputs, (size, size), stride, (pad, pad)


def _row(inputs: int, outputs: int, size: int) -> _Spec:
    return inputs, outputs, (1, size), 1, (0, size // 2)


def _column(inputs: int, outputs: int, size: int) -> _Spec:
    return inputs, outputs, (size, 1), 1, (size // 2, 0)


# A block is its branches, which are concatenated: chains of layers, a pooling before or alone,
# and pairs of layers side by side at the end of a chain.
_Branch = tuple[Any, ...]
_Block = tuple[_Branch, ...]
AVERAGE, MAXIMUM, SHRINK = "average", "maximum", "shrink"


def _a(inputs: int, pool: int) -> _Block:
    return (
        (("branch1x1", _square(inputs, 64)),),
        (("branch5x5_1", _square(inputs, 48)), ("branch5x5_2", _square(48, 64, 5, pad=2))),
        (
            ("branch3x3dbl_1", _square(inputs, 64)),
            ("branch3x3dbl_2", _square(64, 96, 3, pad=1)),
            ("branch3x3dbl_3", _square(96, 96, 3, pad=1)),
        ),
        (AVERAGE, ("branch_pool", _square(inputs, pool))),
    )


def _b(inputs: int) -> _Block:
    return (
        (("branch3x3", _square(inputs, 384, 3, 2)),),
        (
            ("branch3x3dbl_1", _square(inputs, 64)),
            ("branch3x3dbl_2", _square(64, 96, 3, pad=1)),
            ("branch3x3dbl_3", _square(96, 96, 3, 2)),
        ),
        (SHRINK,),
    )


def _c(inner: int) -> _Block:
    return (
        (("branch1x1", _square(768, 192)),),
        (
            ("branch7x7_1", _square(768, inner)),
            ("branch7x7_2", _row(inner, inner, 7)),
            ("branch7x7_3", _column(inner, 192, 7)),
        ),
        (
            ("branch7x7dbl_1", _square(768, inner)),
            ("branch7x7dbl_2", _column(inner, inner, 7)),
            ("branch7x7dbl_3", _row(inner, inner, 7)),
            ("branch7x7dbl_4", _column(inner, inner, 7)),
            ("branch7x7dbl_5", _row(inner, 192, 7)),
        ),
        (AVERAGE, ("branch_pool", _square(768, 192))),
    )


def _d() -> _Block:
    return (
        (("branch3x3_1", _square(768, 192)), ("branch3x3_2", _square(192, 320, 3, 2))),
        (
            ("branch7x7x3_1", _square(768, 192)),
            ("branch7x7x3_2", _row(192, 192, 7)),
            ("branch7x7x3_3", _column(192, 192, 7)),
            ("branch7x7x3_4", _square(192, 192, 3, 2)),
        ),
        (SHRINK,),
    )


def _e(inputs: int, pool: str) -> _Block:
    return (
        (("branch1x1", _square(inputs, 320)),),
        (
            ("branch3x3_1", _square(inputs, 384)),
            [("branch3x3_2a", _row(384, 384, 3)), ("branch3x3_2b", _column(384, 384, 3))],
        ),
        (
            ("branch3x3dbl_1", _square(inputs, 448)),
            ("branch3x3dbl_2", _square(448, 384, 3, pad=1)),
            [("branch3x3dbl_3a", _row(384, 384, 3)), ("branch3x3dbl_3b", _column(384, 384, 3))],
        ),
        (pool, ("branch_pool", _square(inputs, 192))),
    )


_STEM: tuple[Any, ...] = (
    ("Conv2d_1a_3x3", _square(3, 32, 3, 2)),
    ("Conv2d_2a_3x3", _square(32, 32, 3)),
    ("Conv2d_2b_3x3", _square(32, 64, 3, pad=1)),
    SHRINK,
    ("Conv2d_3b_1x1", _square(64, 80)),
    ("Conv2d_4a_3x3", _square(80, 192, 3)),
    SHRINK,
)
_BLOCKS: dict[str, _Block] = {
    "Mixed_5b": _a(192, 32),
    "Mixed_5c": _a(256, 64),
    "Mixed_5d": _a(288, 64),
    "Mixed_6a": _b(288),
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": _d(),
    "Mixed_7b": _e(1280, AVERAGE),
    # As TensorFlow's model of 2015 has it, whose weights the distance is defined by.
    "Mixed_7c": _e(2048, MAXIMUM),
}
_POOLS: dict[str, Callable[[Array], Array]] = {
    AVERAGE: _mean,
    MAXIMUM: lambda x: _max(x, stride=1, pad=1),
    SHRINK: _max,
}


class InceptionV3(nnx.Module):
    """InceptionV3 of 2015 with 1008 outputs, whose pooled features define the FID.

    Images of any size are resized bilinearly to 299 x 299, as the usual one of PyTorch does.
    Other ways of resizing, TensorFlow's and antialiased ones, give other distances: compare figures
    of one way alone.

    Taps: the blocks, "Mixed_5b" to "Mixed_7c", and "pool". Spatial features, as of sFID, are the
    first 7 channels of "Mixed_6e".

    Args:
        rngs: initialisation keys. Weights that mean something come from `load_inception`.

    Reference: Szegedy, Vanhoucke, Ioffe, Shlens, Wojna, "Rethinking the Inception Architecture for
    Computer Vision", 2015, arXiv 1512.00567; its use: Heusel et al., arXiv 1706.08500; sFID: Nash,
    Menick, Dieleman, Battaglia, "Generating Images with Sparse Representations", 2021, arXiv
    2103.03841.
    """

    def __init__(self, *, rngs: nnx.Rngs):
        stem = [layer for layer in _STEM if layer not in _POOLS]
        self.stem = nnx.Dict({name: ConvNorm(spec, rngs) for name, spec in stem})
        self.blocks = nnx.Dict(
            {
                name: nnx.Dict({n: ConvNorm(spec, rngs) for n, spec in _layers(block)})
                for name, block in _BLOCKS.items()
            }
        )
        self.last = nnx.Linear(2048, 1008, rngs=rngs)

    def __call__(
        self, x: Array, *, key: PRNGKeyArray | None = None, tap: Tap | None = None
    ) -> Array:
        """Logits `(1008,)` of one image `(H, W, 3)` in [-1, 1].

        Raises:
            ValueError: for another number of channels.
        """
        if x.ndim != 3 or x.shape[-1] != 3:
            raise ValueError(
                f"`x` must be one image of shape (H, W, 3), got {x.shape}. Repeat grey ones with "
                "jnp.repeat(x, 3, -1), and use jax.vmap for a batch."
            )
        tap = Tap() if tap is None else tap
        h = jax.image.resize(x, (SIZE, SIZE, 3), "linear", antialias=False)
        for layer in _STEM:
            h = _POOLS[layer](h) if layer in _POOLS else self.stem[layer[0]](h)
        for name, block in _BLOCKS.items():
            h = tap(name, _run(self.blocks[name], block, h))
        return self.last(tap("pool", jnp.mean(h, (0, 1))))

    def features(self, x: Array) -> Array:
        """The pooled features `(2048,)` of one image `(H, W, 3)` in [-1, 1]."""
        tap = Tap(wanted=["pool"])
        self(x, tap=tap)
        return tap.values["pool"]


def _layers(block: _Block) -> list[tuple[str, _Spec]]:
    found = []
    for branch in block:
        for part in branch:
            if isinstance(part, list):
                found += part
            elif part not in _POOLS:
                found.append(part)
    return found


def _run(layers: Mapping[str, ConvNorm], block: _Block, x: Array) -> Array:
    def along(branch: _Branch) -> Array:
        h = x
        for part in branch:
            if isinstance(part, list):
                h = jnp.concatenate([layers[name](h) for name, _ in part], -1)
            else:
                h = _POOLS[part](h) if part in _POOLS else layers[part[0]](h)
        return h

    return jnp.concatenate([along(branch) for branch in block], -1)


def load_inception(path: str | Path) -> InceptionV3:
    """The network with published weights, from PyTorch's file or an npz file of the same arrays.

    The file that FIDs are taken with is `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid, a
    conversion of TensorFlow's. PyTorch must be there to read it; to be without it, save its arrays
    once as npz: `np.savez("inception.npz", **{k: v.numpy() for k, v in torch.load(path).items()})`.

    Args:
        path: of the file.

    Returns:
        The network.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: for PyTorch's file without PyTorch.
        ValueError: for a file of another network.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"`path` must be a file of weights, got {str(path)!r}.")
    try:
        state = _read(path)
    except ImportError:
        raise ImportError(
            f"PyTorch is needed to read {str(path)!r}. Install it, or save the arrays as npz once, "
            "where it is: see `load_inception`."
        ) from None
    except Exception as error:  # whatever PyTorch and NumPy make of a file
        raise ValueError(
            f"`path` must be a file of PyTorch's or of NumPy's, got {str(path)!r}, which cannot be "
            f"read: {error}."
        ) from None
    network = nnx.eval_shape(lambda: InceptionV3(rngs=nnx.Rngs(0)))
    graph, blank = nnx.split(network)
    used: set[str] = set()

    def get(name: str, shape: Sequence[int]) -> np.ndarray:
        found = state.get(name)
        if found is None or found.shape != tuple(shape):
            got = "no such array" if found is None else f"shape {found.shape}"
            raise ValueError(
                f"`path` must hold the weights of FID's InceptionV3, with {name!r} of shape "
                f"{tuple(shape)}, got {got} in {str(path)!r}."
            )
        used.add(name)
        return np.asarray(found, np.float32)

    def layer(name: str, module: ConvNorm) -> dict[str, Any]:
        height, width, inputs, outputs = module.conv.kernel.shape
        kernel = get(f"{name}.conv.weight", (outputs, inputs, height, width))
        kinds = ("weight", "bias", "running_mean", "running_var")
        gain, bias, mean, variance = (get(f"{name}.bn.{kind}", (outputs,)) for kind in kinds)
        scale = gain / np.sqrt(variance + _EPSILON)
        return {
            "conv": {"kernel": kernel.transpose(2, 3, 1, 0)},
            "scale": scale,
            "shift": bias - mean * scale,
        }

    arrays = {
        "stem": {name: layer(name, module) for name, module in network.stem.items()},
        "blocks": {
            name: {n: layer(f"{name}.{n}", module) for n, module in block.items()}
            for name, block in network.blocks.items()
        },
        "last": {
            "kernel": get("fc.weight", (1008, 2048)).T,
            "bias": get("fc.bias", (1008,)),
        },
    }
    nnx.replace_by_pure_dict(blank, jax.tree.map(jnp.asarray, arrays))
    return nnx.merge(graph, blank)


def _read(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)
    return {name: value.numpy() for name, value in state.items()}

"""FID's InceptionV3 against PyTorch's with the same weights, and files of weights."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from jaxdiff import networks

GOLDEN = Path(__file__).parent.parent / "golden"
sys.path.insert(0, str(GOLDEN))
from inception_weights import image, weight  # noqa: E402


def state_dict(network):
    """Arrays of PyTorch's names and shapes, made of their names."""
    found = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    groups = [("", network.stem), *((f"{name}.", block) for name, block in network.blocks.items())]
    for prefix, layers in groups:
        for name, layer in layers.items():
            height, width, inputs, outputs = layer.conv.kernel.shape
            found[f"{prefix}{name}.conv.weight"] = (outputs, inputs, height, width)
            for kind in ("weight", "bias", "running_mean", "running_var"):
                found[f"{prefix}{name}.bn.{kind}"] = (outputs,)
    return {name: weight(name, shape) for name, shape in found.items()}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    network = nnx.eval_shape(lambda: networks.InceptionV3(rngs=nnx.Rngs(0)))
    path = tmp_path_factory.mktemp("inception") / "weights.npz"
    np.savez(path, **state_dict(network))
    return path


def test_pooled_features_are_those_of_pytorch(file):
    network = networks.load_inception(file)
    x = jnp.stack([image(0), image(1)])
    found = jax.jit(lambda n, x: jax.lax.map(n.features, x))(network, x)
    expected = np.load(GOLDEN / "inception.npz")["pooled"]
    assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    scale = np.abs(expected).mean()
    assert np.abs(found - expected).mean() < 1e-5 * scale
    names = networks.tap_names(lambda x, t, c, tap: network(x, tap=tap), x[0], 0.0, None)
    assert names == (*networks._inception._BLOCKS, "pool")


def test_other_files_are_named(file, tmp_path):
    with pytest.raises(FileNotFoundError, match="`path` must be a file of weights"):
        networks.load_inception(tmp_path / "no.npz")
    (tmp_path / "text.npz").write_text("nothing")
    with pytest.raises(ValueError, match="a file of PyTorch's or of NumPy's"):
        networks.load_inception(tmp_path / "text.npz")
    with np.load(file) as whole:
        arrays = dict(whole)
    arrays["fc.weight"] = arrays["fc.weight"][:1000]
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(ValueError, match=r"'fc.weight' of shape \(1008, 2048\), got shape \(1000"):
        networks.load_inception(tmp_path / "other.npz")
    np.savez(tmp_path / "none.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match="got no such array"):
        networks.load_inception(tmp_path / "none.npz")
    network = networks.load_inception(file)
    with pytest.raises(ValueError, match=r"one image of shape \(H, W, 3\)"):
        network(jnp.zeros((32, 32, 1)))

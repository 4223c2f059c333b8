import numpy as np
import pytest

from jaxdiff.data import array_source, reduced


def test_blocks_and_channels_are_averaged():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5000, 8, 8, 3), np.uint8)
    source = array_source(images, np.arange(5000) % 7)
    small = reduced(source, size=2)
    expected = np.rint(images[4321, 4:, :4].astype(float).mean((0, 1)))
    np.testing.assert_allclose(small.x[4321, 1, 0], expected, atol=1)
    assert small.event_shape == (2, 2, 3) and small.x.dtype == np.uint8
    np.testing.assert_array_equal(small.cond, source.cond)
    gray = reduced(source, gray=True)
    luma = images[7, 3, 4] @ [0.299, 0.587, 0.114]
    assert abs(float(gray.x[7, 3, 4, 0]) - luma) <= 0.5001 and gray.event_shape == (8, 8, 1)
    floats = array_source(images.astype(np.float32) / 255)
    mean = np.float32(floats.x[9].mean((0, 1)))
    np.testing.assert_allclose(reduced(floats, size=1).x[9, 0, 0], mean, rtol=1e-5)


def test_bad_input():
    images = array_source(np.zeros((2, 8, 8, 1), np.uint8))
    with pytest.raises(ValueError, match=r"`size` must divide the height 8 .* got 3.*1, 2, 4, 8"):
        reduced(images, size=3)
    with pytest.raises(ValueError, match="`gray` needs images of three channels, got 1"):
        reduced(images, gray=True)
    with pytest.raises(ValueError, match="must hold square images"):
        reduced(array_source(np.zeros((2, 5))), size=1)

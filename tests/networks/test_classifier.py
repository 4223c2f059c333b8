import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

from jaxdiff.networks import ConvClassifier, Tap


@pytest.fixture(scope="module")
def classifier():
    make = lambda key: ConvClassifier(
        image_size=8, in_channels=1, num_classes=10, channels=16, rngs=nnx.Rngs(key)
    )
    return jax.jit(make)(jax.random.key(0, impl="rbg"))


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images = (images[order].reshape(-1, 8, 8, 1) / 8 - 1).astype(np.float32)
    return images, labels[order].astype(np.int32)


def test_learns_digits(classifier, digits):
    images, labels = digits
    held_out = 360
    optimizer = optax.adam(2e-3)

    @jax.jit
    def step(network, state, key, x, y):
        def loss(network):
            keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(x)))
            logits = jax.vmap(lambda x, key: network(x, key=key))(x, keys)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, state = optimizer.update(jax.grad(loss)(network), state)
        return optax.apply_updates(network, updates), state

    network, state, rng = classifier, optimizer.init(classifier), np.random.default_rng(1)
    for i in range(250):
        rows = rng.integers(held_out, len(labels), 64)
        key = jax.random.fold_in(jax.random.key(1), i)
        network, state = step(network, state, key, images[rows], labels[rows])
    logits = jax.jit(lambda n, x: jax.vmap(n)(x))(network, images[:held_out])
    assert np.mean(np.argmax(logits, axis=-1) == labels[:held_out]) > 0.97


def test_features_are_what_the_last_layer_sees(classifier, digits):
    x = digits[0][0]
    logits, features = jax.jit(lambda n, x: (n(x), n.features(x)))(classifier, x)
    assert features.shape == (64,)
    expected = features @ classifier.last.kernel[...] + classifier.last.bias[...]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


def test_dropout_belongs_to_its_key(classifier, digits):
    call = jax.jit(lambda n, key: n(digits[0][0], key=key))
    a, b, c, d = (call(classifier, key) for key in (None, *map(jax.random.key, (1, 1, 2))))
    np.testing.assert_array_equal(b, c)
    assert len({float(out[0]) for out in (a, b, d)}) == 3


def test_the_noise_label_reaches_every_convolution(digits):
    """And a classifier without one has the weights that it would have had."""
    make = lambda noise_label: ConvClassifier(
        image_size=8, in_channels=1, num_classes=10, channels=8, noise_label=noise_label,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    told, plain = make(True), make(False)
    x = digits[0][0]
    call = jax.jit(lambda n, t: read_taps_of(n, x, t))
    a, b = (call(told, jnp.asarray(t)) for t in (0.0, 500.0))
    assert all(np.abs(a[name] - b[name]).max() > 1e-3 for name in a)
    for kept, other in zip(told.convs, plain.convs, strict=True):
        np.testing.assert_array_equal(kept.kernel[...], other.kernel[...])
    with pytest.raises(ValueError, match="`t` must be the noise label of the example"):
        told(x)
    with pytest.raises(ValueError, match="`t` must be left out for a classifier made with"):
        plain(x, jnp.asarray(0.0))


def read_taps_of(network, x, t):
    tap = Tap(wanted=[f"conv{i}" for i in range(4)])
    network(x, t, tap=tap)
    return tap.values


def test_bad_input_is_named(classifier, digits):
    with pytest.raises(ValueError, match=r"`x` must be .* \(8, 8, 1\), got \(2, 8, 8, 1\)"):
        classifier(digits[0][:2])
    with pytest.raises(ValueError, match="`image_size` must be divisible by 2, got 7"):
        ConvClassifier(image_size=7, in_channels=1, num_classes=10, rngs=nnx.Rngs(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(classifier)} == {jnp.dtype(jnp.float32)}

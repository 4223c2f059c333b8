"""The world of captions: its attributes are what the captions say, and pixels tell them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import with_random_weights
from flax import nnx

from jaxdiff import networks
from jaxdiff.data import PROMPT_WORDS, array_source, digits, prompt_attributes, prompts


def test_pixels_show_what_captions_say():
    for part in ("train", "test"):
        source = prompts(part, copies=2, unsaid=0.0)
        assert len(source) == 2 * len(digits(part)) and source.event_shape == (32, 32, 3)
        said, shown = source.cond["tokens"], prompt_attributes(source[np.arange(len(source))]["x"])
        for column, found in ((0, shown.size), (1, shown.colour), (3, shown.place)):
            np.testing.assert_array_equal(found, said[:, column])
        words = [PROMPT_WORDS[token] for token in said[0]]
        assert words[0] in ("small", "large") and words[3] in ("left", "right")
        # The digits themselves are found again, where they are whole pixels.
        again = 2 * shown.digit_pixels - 1
        error = np.abs(again - np.repeat(digits(part).x[..., 0], 2, axis=0)).mean((1, 2))
        assert np.median(error) < 0.25


def test_every_choice_is_made_equally_often_and_words_are_left_out():
    tokens = prompts(unsaid=0.2).cond["tokens"]
    count, none = len(tokens), len(PROMPT_WORDS)
    unsaid = (tokens == none).mean(0)
    np.testing.assert_allclose(unsaid, 0.2, atol=4 * np.sqrt(0.16 / count))
    for column, options in ((0, 2), (1, 4), (3, 2)):
        said = tokens[:, column][tokens[:, column] < none]
        shares = np.unique(said, return_counts=True)[1] / len(said)
        assert len(shares) == options
        np.testing.assert_allclose(shares, 1 / options, atol=4 * np.sqrt(0.25 / len(said)))
    np.testing.assert_array_equal(prompts(unsaid=0.2).cond["tokens"], tokens)
    for wrong in ({"copies": 0}, {"unsaid": 1.0}):
        with pytest.raises(ValueError, match="`copies` must be at least 1 and `unsaid`"):
            prompts(**wrong)


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_words_are_tokens_that_are_learned(kind):
    sizes = {"image_size": 4, "in_channels": 1, "num_heads": 2, "token_size": 6, "num_words": 5}

    def build():
        if kind == "dit":
            return networks.DiT(**sizes, hidden=8, depth=1, rngs=nnx.Rngs(0))
        options = {"channel_mults": (1,), "num_res_blocks": 1, "attention_resolutions": (4,)}
        return networks.UNet(4, **sizes, **options, rngs=nnx.Rngs(0))

    network = with_random_weights(build)
    x, t = jnp.sin(jnp.arange(16.0)).reshape(4, 4, 1), jnp.float32(3.0)
    call = jax.jit(lambda network, tokens: network(x, t, {"tokens": tokens}))
    words = jnp.asarray([0, 3, 5])
    found = call(network, words)
    # The rows of the table, which integers name; what is no word is the last.
    rows = network.embedding.words.embedding[...][words]
    np.testing.assert_allclose(call(network, rows), found, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(call(network, jnp.asarray([0, 3, 77])), found)
    assert not np.allclose(call(network, jnp.asarray([1, 3, 5])), found)
    slope = jax.jit(jax.grad(lambda n: call(n, words).sum()))(network)
    moved = np.any(slope.embedding.words.embedding[...] != 0, axis=1)
    assert moved.tolist() == [True, False, False, True, False, True]
    for wrong in (6, -1):
        with pytest.raises(ValueError, match=rf"Words must lie in \[0, 4\], .* got {wrong}"):
            network.check_cond({"tokens": np.asarray([[0, wrong]])})
    with pytest.raises(ValueError, match=r"integers \(n,\) in \[0, 5\], or \(n, 6\)"):
        network(x, t, {"tokens": jnp.zeros(3)})
    with pytest.raises(ValueError, match="`num_words` needs the size"):
        networks.DiT(
            image_size=4,
            in_channels=1,
            hidden=8,
            depth=1,
            num_heads=2,
            num_words=3,
            rngs=nnx.Rngs(0),
        )


def test_captions_that_are_no_words_are_refused():
    x = np.zeros((2, 4, 4, 3), np.uint8)
    for tokens in ([[0, 3]] * 2, [[0.0]] * 2, [0, 1], None):
        with pytest.raises(ValueError, match=r"integers 'tokens', \(2, length\), in \[0, 2\]"):
            array_source(x, None if tokens is None else {"tokens": tokens}, words=["a", "b"])

"""Sources as long as the customary ones."""

import jax
import numpy as np

import jaxdiff
from jaxdiff import oracles, processes, solvers
from jaxdiff.data import ArraySource, make_loader


def test_three_epochs_of_fifty_thousand_images_in_pieces_lose_none(measured):
    """Stopped twenty times and gone on with other batch sizes: each example once an epoch."""
    count, rng = 50_000, np.random.default_rng(0)
    x = np.zeros((count, 32, 32, 3), np.uint8)
    x[:, 0, 0, :] = (np.arange(count)[:, None] // np.array([1, 256, 65536])) % 256
    source, state, seen = ArraySource(x), None, []
    sizes = (40, 125, 200, 250)
    while len(seen) < 3 * count:
        batches = iter(make_loader(source, int(rng.choice(sizes)), seed=1))
        if state is not None:
            batches.set_state(state)
        for _ in range(rng.integers(10, 80)):
            images = next(batches)["x"]
            pixels = np.rint((np.asarray(images)[:, 0, 0, :] + 1) * 127.5).astype(int)
            seen.extend(pixels @ np.array([1, 256, 65536]))
        state = batches.get_state()
    epochs = np.array(seen[: 3 * count]).reshape(3, count)
    assert np.array_equal(np.sort(epochs, 1), np.broadcast_to(np.arange(count), (3, count)))
    assert not np.array_equal(epochs[0], epochs[1])
    measured(f"{len(seen)} images of 32 x 32 x 3, every one once an epoch")


def test_a_million_samples_in_chunks_have_the_law(measured):
    """Weights, means and variances of a mixture to four standard errors."""
    means = np.array([[-1.0, 0.0], [1.0, 0.5]], np.float32)
    oracle = oracles.gaussian_mixture(
        processes.VP(), means, 0.1 * np.stack([np.eye(2)] * 2), weights=[0.3, 0.7]
    )
    count = 1_000_000
    x = jaxdiff.sample(
        jax.random.key(0),
        oracle,
        (2,),
        count,
        solver=solvers.DPMSolverMultistep(3),
        times=60,
        batch_size=50_000,
    ).x
    mean, covariance = (np.asarray(m) for m in oracle.moments())
    found = np.asarray(x, np.float64)
    errors = np.abs(found.mean(0) - mean) / np.sqrt(np.diag(covariance) / count)
    measured(f"a million samples: means {np.array2string(errors, precision=2)} errors away")
    # Runs start without the mean that alpha(1) = 0.0066 leaves of the data's, three errors here.
    assert errors.max() < 5
    np.testing.assert_allclose(np.cov(found.T), covariance, atol=5e-3)

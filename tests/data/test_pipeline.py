import json
import sys

import numpy as np
import pytest

from jaxdiff.data import array_source, make_loader


def numbered(count, *, shape=(1, 2, 1)):
    """Example i holds i in its first pixel and -i - 1 in its last, and has label i."""
    x = np.zeros((count, *shape), np.float32)
    x[:, 0, 0, 0] = np.arange(count)
    x[:, 0, -1, 0] = -np.arange(count) - 1
    return array_source(x, np.arange(count))


def labels(loader, batches):
    iterator = iter(loader)
    return np.concatenate([next(iterator)["cond"] for _ in range(batches)])


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("num_threads", [0, 3])
def test_every_epoch_is_another_permutation_also_across_batches(num_threads):
    # 10 does not divide 24: batches span epochs.
    loader = make_loader(numbered(24), 10, seed=3, num_threads=num_threads)
    order = labels(loader, 12)
    epochs = order.reshape(5, 24)
    assert (np.sort(epochs, 1) == np.arange(24)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert not np.array_equal(epochs[0], np.arange(24))
    assert not np.array_equal(order, labels(make_loader(numbered(24), 10, seed=4), 12))


def test_epochs_are_uniform_permutations():
    # Where example 0 lands: chi-square over 8 places, 7 degrees of freedom, in 4,000 epochs.
    order = labels(make_loader(numbered(8), 8, seed=0), 4000).reshape(-1, 8)
    counts = np.bincount(np.argmin(order, 1), minlength=8)
    assert ((counts - 500) ** 2 / 500).sum() < 24.3  # the 99.9 % quantile
    # The places of 0 in successive epochs are uncorrelated.
    place = np.argmin(order, 1) - 3.5
    assert abs(np.mean(place[1:] * place[:-1])) < 4 * 5.25 / 4000**0.5


def test_a_counted_stream_ends_and_keeps_the_order_without_shuffle():
    loader = make_loader(numbered(7), 3, seed=0, shuffle=False, num_epochs=2)
    order = [batch["cond"].tolist() for batch in loader]
    assert order == [[0, 1, 2], [3, 4, 5], [6, 0, 1], [2, 3, 4]]


@pytest.mark.parametrize("count", [2, 4])
def test_processes_together_yield_the_batches_of_one(count):
    source = numbered(24)
    options = {"seed": 1, "flip": True}
    whole = make_loader(source, 8, **options)
    parts = [
        make_loader(source, 8, process_index=p, process_count=count, **options)
        for p in range(count)
    ]
    seen = []
    for batch, *shares in zip(whole, *parts, range(6), strict=False):
        shares = shares[:-1]
        joined = {k: np.concatenate([share[k] for share in shares]) for k in batch}
        assert same(batch, joined)
        seen.append(joined["cond"])
    epochs = np.concatenate(seen).reshape(2, 24)
    assert (np.sort(epochs, 1) == np.arange(24)).all()


@pytest.mark.parametrize("restored_threads", [0, 2])
def test_restored_state_continues_bit_for_bit(restored_threads):
    source = numbered(23)
    iterator = iter(make_loader(source, 5, seed=7, flip=True))
    for _ in range(11):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator) for _ in range(9)]

    fresh = iter(make_loader(source, 5, seed=7, flip=True, num_threads=restored_threads))
    next(fresh)
    fresh.set_state(state)
    assert all(same(batch, next(fresh)) for batch in expected)
    # Going back on the used iterator works as well.
    iterator.set_state(state)
    assert same(expected[0], next(iterator))


def test_flips_are_exact_mirrors_with_probability_one_half():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 4, 6, 3), dtype=np.uint8)
    loader = make_loader(array_source(images, np.arange(40)), 40, seed=2, flip=True, num_epochs=100)
    flipped = np.zeros((100, 40), bool)
    for epoch, batch in enumerate(loader):
        plain = images[batch["cond"]].astype(np.float64) / 127.5 - 1
        is_plain = np.abs(batch["x"] - plain).max((1, 2, 3)) < 1e-6
        is_mirror = np.abs(batch["x"] - plain[:, :, ::-1]).max((1, 2, 3)) < 1e-6
        assert (is_plain ^ is_mirror).all()
        flipped[epoch, batch["cond"]] = is_mirror
    # 4,000 fair coins: 4 standard errors overall; no example always or never.
    assert abs(flipped.mean() - 0.5) < 4 * 0.5 / 4000**0.5
    assert flipped.mean(0).min() > 0.25 and flipped.mean(0).max() < 0.75
    # Whether an example is flipped does not follow from its place in the shuffled batch: 40 coins
    # an epoch, within 4.5 standard errors.
    assert np.abs(flipped.mean(1) - 0.5).max() < 4.5 * 0.5 / 40**0.5
    assert np.array_equal(images, np.random.default_rng(0).integers(0, 256, images.shape, "u1"))


def test_another_batch_size_goes_on_with_the_next_example():
    """None is lost and none comes twice, and flips stay with their places."""
    source = array_source(
        np.random.default_rng(1).integers(0, 256, (30, 4, 4, 1), dtype=np.uint8), np.arange(30)
    )
    whole = iter(make_loader(source, 1, seed=4, flip=True))
    expected = [next(whole) for _ in range(90)]
    stream = {name: np.concatenate([b[name] for b in expected]) for name in ("x", "cond")}
    position, state = 0, None
    for size, count in ((7, 3), (4, 5), (10, 2), (1, 3)):
        iterator = iter(make_loader(source, size, seed=4, flip=True, num_threads=count % 2))
        if state is not None:
            iterator.set_state(json.loads(json.dumps(state)))
        for _ in range(count):
            batch = next(iterator)
            for name in stream:
                np.testing.assert_array_equal(batch[name], stream[name][position : position + size])
            position += size
        state = iterator.get_state()
        assert state["examples"] == position


def test_a_position_belongs_to_its_source_seed_and_order():
    images = np.random.default_rng(1).integers(0, 256, (30, 4, 4, 1), dtype=np.uint8)
    iterator = iter(make_loader(array_source(images), 5, seed=4))
    next(iterator)
    state = iterator.get_state()
    other = images.copy()
    other[0] += 1
    for loader, what in (
        (make_loader(array_source(other), 5, seed=4), "source"),
        (make_loader(array_source(images[:29]), 5, seed=4), "source"),
        (make_loader(array_source(images, np.arange(30) % 3), 5, seed=4), "source"),
        (make_loader(array_source(images), 5, seed=5), "seed"),
        (make_loader(array_source(images), 5, seed=4, shuffle=False), "shuffle"),
    ):
        with pytest.raises(ValueError, match=f"The state is of another {what}"):
            iter(loader).set_state(state)
    with pytest.raises(ValueError, match="an older version"):
        iter(make_loader(array_source(images), 5, seed=4)).set_state({"next_index": 3})


def test_conditions_may_be_pytrees():
    class Source:
        event_shape, num_classes = (2,), None

        def __len__(self):
            return 64

        def __getitem__(self, i):
            cond = {"text": np.full(4, i, np.float32), "age": np.float32(i)}
            return {"x": np.full(2, i, np.float32), "cond": cond}

    batch = next(iter(make_loader(Source(), 8, seed=0)))
    np.testing.assert_array_equal(batch["cond"]["text"], np.tile(batch["x"][:, :1], 4))
    np.testing.assert_array_equal(batch["cond"]["age"], batch["x"][:, 0])


def test_the_order_is_pinned():
    # Checkpoints resume in this order: a change here breaks every stored data position.
    first = labels(make_loader(numbered(12), 12, seed=0), 2).reshape(2, 12)
    assert first.tolist() == [
        [1, 10, 4, 5, 11, 6, 8, 2, 0, 3, 9, 7],
        [10, 7, 8, 6, 2, 9, 3, 1, 11, 0, 4, 5],
    ]


def test_any_random_access_source_serves():
    class Squares:
        event_shape, num_classes = (1,), None

        def __len__(self):
            return 6

        def __getitem__(self, index):
            return {"x": np.float32([index**2])}

    batch = next(iter(make_loader(Squares(), 6, seed=0)))
    assert batch.keys() == {"x"}
    assert sorted(batch["x"].ravel()) == [0, 1, 4, 9, 16, 25]


def test_an_error_of_the_source_reaches_the_caller():
    class Broken:
        event_shape, num_classes = (1,), None

        def __len__(self):
            return 2

        def __getitem__(self, index):
            raise ValueError("image 1 is broken")

    with pytest.raises(ValueError, match="image 1 is broken"):
        next(iter(make_loader(Broken(), 2, seed=0)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 11}, r"`batch_size`.*number of examples, 10, got 11"),
        ({"batch_size": 0}, r"`batch_size` must be at least 1"),
        (
            {"batch_size": 9, "process_count": 2, "process_index": 0},
            r"processes, 2, got 9",
        ),
        ({"process_count": 2, "process_index": 2}, r"`process_index`.*got 2"),
        ({"seed": -1}, r"`seed` must be at least 0"),
        ({"num_epochs": 0}, r"`num_epochs` must be at least 1, got 0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        make_loader(numbered(10), **{"batch_size": 4, "seed": 0, **options})


def test_only_images_can_be_flipped():
    with pytest.raises(ValueError, match=r"`flip` needs images \(H, W, C\), got .*\(2,\)"):
        make_loader(array_source(np.zeros((4, 2))), 2, seed=0, flip=True)


def test_importing_the_package_imports_no_reader():
    import subprocess

    code = (
        "import sys, jaxdiff.data\n"
        "readers = 'grain', 'array_record', 'sklearn', 'pyarrow', 'PIL'\n"
        "print([m for m in readers if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_belongs_to_an_image_is_mirrored_with_it():
    """Noise that it was made of, and another image beside it; a label or a vector never."""

    class Beside:
        event_shape, num_classes = (2, 3, 1), 20

        def __len__(self):
            return 20

        def __getitem__(self, index):
            x = np.arange(6, dtype=np.float32).reshape(2, 3, 1) + 10 * index
            return {"x": x, "noise": -x, "cond": np.int32(index), "forget": {"x": x + 1}}

    batch = next(iter(make_loader(Beside(), 20, seed=0, flip=True)))
    np.testing.assert_array_equal(batch["noise"], -batch["x"])
    np.testing.assert_array_equal(batch["forget"]["x"], batch["x"] + 1)
    turned = batch["x"][:, 0, 0, 0] != 10 * batch["cond"]
    assert 0 < turned.sum() < 20

"""Records on disk are the examples that were written, or are refused."""

import itertools
import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from PIL import Image

from jaxdiff import data
from jaxdiff.data import make_loader, records, to_records, write_records
from jaxdiff.data._sources import from_bytes, to_bytes

RNG = np.random.default_rng(0)
COUNT = 70


def images(count=COUNT, shape=(8, 8, 3), classes=5):
    x = RNG.integers(0, 256, (count, *shape), dtype=np.uint8)
    return data.array_source(x, np.arange(count) % classes, num_classes=classes)


def several_conditions():
    cond = {
        "text": RNG.normal(size=(COUNT, 3, 4)),
        "label": np.arange(COUNT) % 3,
        "age": RNG.normal(size=COUNT),
        "token_mask": RNG.random((COUNT, 3)) > 0.5,
        "tokens": RNG.integers(0, 3, (COUNT, 2)),
    }
    return data.array_source(
        RNG.normal(size=(COUNT, 4, 5)),
        cond,
        class_names=["a", "b", "c"],
        words=["red", "blue"],
        pixels=True,
    )


SOURCES = {
    "colour": images,
    "grey": lambda: images(shape=(6, 7, 1)),
    "two channels": lambda: images(shape=(6, 7, 2)),
    "vectors": lambda: data.array_source(RNG.normal(size=(COUNT, 3))),
    "floats with vectors": lambda: data.array_source(
        RNG.normal(size=(COUNT, 2, 2, 9)), RNG.normal(size=(COUNT, 5))
    ),
    "several conditions": several_conditions,
    "one condition by name": lambda: data.array_source(
        np.zeros((COUNT, 2)), {"label": np.arange(COUNT) % 2}
    ),
}


def same(a, b):
    """Bit for bit, dtypes and structure included."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(left).dtype == np.asarray(right).dtype
        np.testing.assert_array_equal(left, right)


def alike(a, b):
    """Two sources, whole."""
    for name in ("event_shape", "num_classes", "class_names", "words", "pixels", "dtype"):
        assert getattr(a, name) == getattr(b, name), name
    assert len(a) == len(b)
    same(a.labels, b.labels)
    same(a[np.arange(len(a))], b[np.arange(len(b))])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A source, and the directory of its records, in files of 16 examples."""
    source, path = images(), tmp_path_factory.mktemp("records") / "set"
    to_records(source, path, shard_bytes=16 * (8 * 8 * 3 + 4))
    return source, path


@pytest.fixture
def copied(written, tmp_path):
    """A copy that may be damaged."""
    for file in written[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("name", SOURCES)
def test_every_example_is_bit_for_bit_the_sources(tmp_path, name):
    source = SOURCES[name]()
    encodings = ("raw", "png") if name in ("colour", "grey") else ("raw",)
    for encoding in encodings:
        to_records(source, tmp_path / encoding, encoding=encoding, shard_bytes=5000)
        stored = records(tmp_path / encoding)
        alike(stored, source)
        for i in (0, 17, -1):
            same(stored[i], source[i])
        rows = RNG.integers(0, COUNT, 50)  # in no order, some of them twice
        same(stored[rows], source[rows])
        same(stored[rows[:0]], source[rows[:0]])
        again = tmp_path / f"{encoding} again"
        to_records(stored, again)
        alike(records(again), source)


def test_bytes_survive_their_scaling():
    x = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_bytes(from_bytes(x)), x)


def test_a_stream_is_what_its_arrays_are(tmp_path):
    for name, source in ((name, make()) for name, make in SOURCES.items()):
        stream = ({**source[i], "x": source.x[i]} for i in range(COUNT))
        options = {n: getattr(source, n) for n in ("num_classes", "class_names", "words", "pixels")}
        write_records(tmp_path / name, stream, shard_bytes=3000, **options)
        alike(records(tmp_path / name), source)


def test_any_source_is_converted(tmp_path):
    """A folder that is decoded as it is read, and one of somebody's own."""

    class Squares:
        event_shape, num_classes = (1,), 2

        def __len__(self):
            return 40

        def __getitem__(self, i):
            return {"x": np.float32([i**2]), "cond": {"label": np.int32(i % 2)}}

    to_records(Squares(), tmp_path / "squares")
    stored = records(tmp_path / "squares")
    assert not stored.pixels and stored.labels.tolist() == [0, 1] * 20
    same(stored[7], Squares()[7])
    for i in range(12):
        (tmp_path / "images" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(
            tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        )
    folder = data.image_folder(tmp_path / "images", resize=(6, 5), lazy=True)
    seen = []
    to_records(folder, tmp_path / "folder", progress=seen.append)
    alike(records(tmp_path / "folder"), folder)
    assert seen == [0, 12]


def test_subsets_are_those_of_arrays(written):
    source, path = written
    stored = records(path)
    for a, b in zip(data.split(stored, 0.2), data.split(source, 0.2), strict=True):
        alike(a, b)
    alike(data.without_classes(stored, [1, 3]), data.without_classes(source, [1, 3]))
    for options in ({"size": 4}, {"gray": True}, {"size": 2, "gray": True}):
        alike(data.reduced(stored, **options), data.reduced(source, **options))
    twice = [data.reduced(data.reduced(s, size=4), size=2, gray=True) for s in (stored, source)]
    alike(*twice)
    alike(data.split(twice[0])[1], data.split(twice[1])[1])


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_batches_and_resuming_are_those_of_arrays(written, threads):
    """A position in one is a position in the other, as they are the same set."""
    source, path = written
    options = {"seed": 3, "flip": True, "num_threads": threads}
    whole = iter(make_loader(source, 8, seed=3, flip=True))
    mine = iter(make_loader(records(path), 8, **options))
    for _ in range(11):
        same(next(mine), next(whole))
    state = json.loads(json.dumps(mine.get_state()))
    assert state == whole.get_state()
    expected = [next(whole) for _ in range(12)]
    again = iter(make_loader(records(path), 8, **options))
    again.set_state(state)
    for batch in expected:
        same(next(again), batch)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_together_yield_the_batches_of_one(written, count):
    stored = records(written[1])
    whole = make_loader(stored, 8, seed=1)
    parts = [
        make_loader(records(written[1]), 8, seed=1, process_index=p, process_count=count)
        for p in range(count)
    ]
    seen = []
    for batch, *shares in itertools.islice(zip(whole, *parts, strict=False), 2 * COUNT // 8):
        same(jax.tree.map(lambda *leaves: np.concatenate(leaves), *shares), batch)
        seen.extend(map(bytes, batch["x"]))
    assert len(set(seen[:COUNT])) == COUNT  # each example once an epoch


def test_threads_and_processes_share_a_source(written):
    source, path = written
    stored = records(path)
    rows = [RNG.permutation(COUNT)[:20] for _ in range(40)]
    with ThreadPoolExecutor(8) as pool:
        for chosen, batch in zip(rows, pool.map(stored.__getitem__, rows), strict=True):
            same(batch, source[chosen])
    alike(pickle.loads(pickle.dumps(stored)), source)
    alike(pickle.loads(pickle.dumps(data.reduced(stored, size=4))), data.reduced(source, size=4))
    program = "import pickle, sys; print(pickle.load(sys.stdin.buffer)[5]['x'].tobytes().hex())"
    done = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps(stored), capture_output=True, check=True
    )
    assert done.stdout.decode().strip() == source[5]["x"].tobytes().hex()


# Damage.


def test_a_damaged_file_is_named(copied):
    file = copied / "00002.array_record"
    whole = file.read_bytes()
    for damaged, found in (
        (whole[:-100], f"{len(whole) - 100} bytes"),
        (b"", "0 bytes"),
        (None, "no such file"),
    ):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        message = f"00002.array_record' must have the {len(whole)} bytes .* got {found}.*again"
        with pytest.raises(ValueError, match=message):
            records(copied)
    # What has the right size is found out as it is read.
    middle = 1000  # of the records; the end is padding
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for damaged in (b"x" * len(whole), flipped):
        file.write_bytes(damaged)
        stored = records(copied)
        same(stored[np.arange(32)]["cond"], np.arange(32, dtype=np.int32) % 5)
        message = r"00002.array_record' must hold whole records, got one, number \d+, .*again"
        with pytest.raises(ValueError, match=message) as caught:
            stored[np.arange(COUNT)]
        assert caught.value.__suppress_context__
        with pytest.raises(ValueError, match=r"00002.array_record'"):
            list(make_loader(stored, 8, seed=0, num_epochs=1, num_threads=2))


def test_damaged_labels_and_descriptions_are_named(copied):
    labels = copied / "00001.npy"
    for damaged in (labels.read_bytes()[:-8], b"", b"text", (copied / "00004.npy").read_bytes()):
        labels.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"00001.npy' must hold the labels of 16 .*again"):
            records(copied)
    labels.unlink()
    with pytest.raises(ValueError, match="00001.npy' must hold the labels .*No such file"):
        records(copied)
    file = copied / "info.json"
    whole = json.loads(file.read_text())
    without = {name: value for name, value in whole.items() if name != "layout"}
    for text in ("{", "[3]", json.dumps(without), json.dumps(whole | {"more": 1})):
        file.write_text(text)
        with pytest.raises(ValueError, match="info.json' must describe records"):
            records(copied)
    file.write_text(json.dumps(whole | {"version": 99}))
    with pytest.raises(ValueError, match="version 99, newer than this library"):
        records(copied)
    file.unlink()
    with pytest.raises(ValueError, match="got no `info.json` in .*Point it at the folder"):
        records(copied)
    with pytest.raises(FileNotFoundError, match="`path` must exist"):
        records(copied / "nowhere")


# Interruption.


class Stop(Exception):
    pass


@pytest.mark.parametrize("moment", [0, 30, 64, COUNT])
def test_what_was_interrupted_goes_on_and_never_looks_complete(written, tmp_path, moment):
    source, whole = written
    options = {"shard_bytes": 16 * (8 * 8 * 3 + 4)}

    def interrupt(count):
        if count >= moment:
            raise Stop

    path = tmp_path / "set"
    with pytest.raises(Stop):
        to_records(source, path, progress=interrupt, **options)
    if moment == COUNT:  # in the very last moment: all is there
        alike(records(path), source)
    else:
        with pytest.raises(ValueError, match="got what an interrupted writing left .*go on where"):
            records(path)
    with pytest.raises(ValueError, match="where other records are, or the same written otherwise"):
        to_records(images(), path, **options)
    with pytest.raises(ValueError, match="where other records are, or the same written otherwise"):
        to_records(source, path, encoding="png", **options)
    with pytest.raises(ValueError, match="where other records are"):
        write_records(path, ({"x": x} for x in source.x))
    before = {file.name: file.stat().st_mtime_ns for file in path.glob("*.array_record")}
    seen = []
    to_records(source, path, progress=seen.append, **options)
    assert seen[0] == min(16 * len(before), COUNT) and seen[-1] == COUNT
    for name, at in before.items():
        assert (path / name).stat().st_mtime_ns == at
    assert sorted(f.name for f in path.iterdir()) == sorted(f.name for f in whole.iterdir())
    alike(records(path), source)
    to_records(source, path, progress=seen.append, **options)  # nothing to do
    assert seen[-1] == COUNT


def test_what_was_stopped_before_its_last_word_gets_it(written, copied):
    info = json.loads((copied / "info.json").read_text())
    (copied / "info.json").unlink()
    unfinished = info | {"count": 0, "file_bytes": []}
    (copied / "unfinished.json").write_text(json.dumps(unfinished))
    to_records(written[0], copied, shard_bytes=16 * (8 * 8 * 3 + 4))
    assert json.loads((copied / "info.json").read_text()) == info
    alike(records(copied), written[0])


def test_a_stream_that_breaks_off_leaves_no_set(tmp_path):
    def stream():
        yield from ({"x": np.zeros(3)} for _ in range(40))
        raise Stop

    with pytest.raises(Stop):
        write_records(tmp_path / "set", stream(), shard_bytes=200)
    with pytest.raises(ValueError, match="interrupted"):
        records(tmp_path / "set")
    with pytest.raises(ValueError, match="must be a new or empty directory"):
        write_records(tmp_path / "set", iter([{"x": np.zeros(3)}]))


@pytest.mark.parametrize(
    ("examples", "options", "message"),
    [
        ([], {}, "`examples` must hold one at least"),
        ([{"x": np.zeros(3)}, {"x": np.zeros(4)}], {}, r"of the first, .*got .*\[4\].* at index 1"),
        ([{"x": np.zeros(3)}, {"x": np.zeros(3), "cond": 1}], {}, "got .* at index 1"),
        ([{"x": np.zeros(3), "y": 1}], {}, "must be {'x': ..., 'cond': ...}"),
        ([{"image": np.zeros(3)}], {}, "must be {'x': ..., 'cond': ...}"),
        ([{"x": np.zeros(3), "cond": 1}], {}, "`num_classes` must say how many"),
        ([{"x": np.zeros(3), "cond": 2}], {"num_classes": 2}, r"\[0, 2\), got 2"),
        ([{"x": np.zeros(3)}], {"num_classes": 2}, "`num_classes` must be None without labels"),
        ([{"x": np.full(3, np.nan)}], {}, "must be finite"),
        ([{"x": np.zeros(3, np.uint8)}], {}, r"images \(n, H, W, C\)"),
        ([{"x": np.zeros((2, 2, 3))}], {"encoding": "png"}, "'png' needs uint8 images .*float32"),
        ([{"x": np.zeros((2, 2, 2), "u1")}], {"encoding": "png"}, "one or three channels"),
        ([{"x": np.zeros(3)}], {"encoding": "jpeg"}, "`encoding` must be 'raw' or 'png'"),
        ([{"x": np.zeros(3)}], {"shard_bytes": 0}, "`shard_bytes` must be at least 1"),
    ],
)
def test_writing_rejects(tmp_path, examples, options, message):
    with pytest.raises(ValueError, match=message):
        write_records(tmp_path / "set", examples, **options)


def test_a_directory_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    for path in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(ValueError, match="`path` must be a new or empty directory"):
            to_records(images(), path)
    assert (tmp_path / "thesis.txt").read_text() == "all of it"

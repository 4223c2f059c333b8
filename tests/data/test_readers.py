import gzip
import io
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jaxdiff.data import (
    array_source,
    cifar10,
    digits,
    idx,
    image_folder,
    make_loader,
    npz,
    split,
    without_classes,
)

RNG = np.random.default_rng(0)


def pixels(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def scaled(images):
    """[0, 255] -> [-1, 1], in double precision."""
    return np.asarray(images, np.float64) * (2 / 255) - 1


def encode(image, kind="PNG", mode=None):
    image = Image.fromarray(image.squeeze())
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, kind)
    return buffer.getvalue()


def write_cifar(path, images, labels, *, image_column="img", label_type=None):
    rows = [{"bytes": image, "path": None} for image in images]
    table = pa.table(
        {
            image_column: pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()})),
            "label": pa.array(labels, label_type or pa.int64()),
        }
    )
    pq.write_table(table, path)


def write_idx(path, array, *, code=8):
    data = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(data + array.tobytes())


# Digits.


def test_digits_are_all_there_once_and_scaled():
    from sklearn.datasets import load_digits

    train, test = digits(), digits("test")
    raw = load_digits()
    assert (len(train), len(test)) == (1438, 359)
    assert train.event_shape == (8, 8, 1) and train.num_classes == 10
    joined = np.concatenate([train.x, test.x]).reshape(-1, 64)
    labels = np.concatenate([train.cond, test.cond])
    # The same multiset of (image, label) as the original's, so that no image is in both parts.
    ours = np.column_stack([(joined + 1) * 8, labels])
    theirs = np.column_stack([raw.data, raw.target])
    assert np.array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])
    assert train.x.min() == -1 and train.x.max() == 1


def test_digits_are_split_by_class_and_the_split_is_pinned():
    test, all_counts = digits("test"), np.bincount(np.r_[digits().cond, digits("test").cond])
    np.testing.assert_allclose(np.bincount(test.cond) / all_counts, 0.2, atol=0.5 / 170)
    # Published figures refer to this split.
    assert test.cond[:12].tolist() == [0, 3, 8, 9, 4, 5, 8, 9, 1, 6, 9, 9]
    with pytest.raises(ValueError, match="`split` must be 'train' or 'test', got 'val'"):
        digits("val")


# CIFAR-10.


def test_cifar10_reads_all_files_of_a_split_in_order(tmp_path):
    images = pixels(5, 32, 32, 3)
    encoded = [encode(image) for image in images]
    write_cifar(tmp_path / "train-00001-of-00002.parquet", encoded[3:], [9, 1])
    write_cifar(tmp_path / "train-00000-of-00002.parquet", encoded[:3], [0, 4, 2])
    write_cifar(tmp_path / "test-00000-of-00001.parquet", encoded[:1], [7])
    source = cifar10(tmp_path)
    assert len(source) == 5 and source.event_shape == (32, 32, 3) and source.num_classes == 10
    batch = source[np.arange(5)]
    assert batch["x"].dtype == np.float32 and batch["cond"].dtype == np.int32
    np.testing.assert_allclose(batch["x"], scaled(images), atol=1e-6)
    assert batch["cond"].tolist() == [0, 4, 2, 9, 1]
    one = source[3]
    assert one["x"].shape == (32, 32, 3) and one["cond"] == 9
    assert cifar10(tmp_path, "test").cond.tolist() == [7]


def test_cifar10_decodes_jpeg(tmp_path):
    smooth = np.broadcast_to(np.arange(32, dtype=np.uint8)[:, None, None] * 8, (32, 32, 3))
    write_cifar(tmp_path / "train-0.parquet", [encode(smooth, "JPEG")], [0])
    np.testing.assert_allclose(cifar10(tmp_path)[0]["x"], scaled(smooth), atol=0.05)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ([b"not an image"], [0], r"image 0 of .*train-0.parquet.*cannot be decoded"),
        ([encode(pixels(32, 32, 3))[:-900]], [0], r"image 0 of .*cannot be decoded"),
        ([encode(pixels(32, 32, 3), "JPEG")[:400]], [0], r"image 0 of .*cannot be decoded"),
        ([None], [0], r"image 0 of .*got null"),
        ([encode(pixels(32, 31, 3))], [0], r"image 0 of .*32x32.*\(32, 31, 3\)"),
        ([encode(pixels(32, 32))], [0], r"image 0 of .*RGB.*\(32, 32, 1\)"),
        ([encode(pixels(32, 32, 3), mode="CMYK", kind="TIFF")], [0], r"got mode 'CMYK'"),
        ([encode(pixels(32, 32, 3))] * 2, [3, 10], r"\[0, 10\), got 10 in row 1"),
        ([encode(pixels(32, 32, 3))], [-1], r"\[0, 10\), got -1 in row 0"),
        ([encode(pixels(32, 32, 3))], [None], r"`label` .*got null"),
        ([], [], r"train-0.parquet' must hold images, got no rows"),
    ],
)
def test_cifar10_rejects_bad_rows(tmp_path, images, labels, message):
    write_cifar(tmp_path / "train-0.parquet", images, labels)
    with pytest.raises(ValueError, match=message) as caught:
        cifar10(tmp_path)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_cifar10_rejects_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="`path` must exist, got .*nowhere"):
        cifar10(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"`train-\*.parquet`, found none in"):
        cifar10(tmp_path)
    with pytest.raises(ValueError, match="`split`.*got 'valid'"):
        cifar10(tmp_path, "valid")
    file = tmp_path / "train-0.parquet"
    write_cifar(file, [encode(pixels(32, 32, 3))], [0])
    whole = file.read_bytes()
    for damaged in (
        b"",
        whole[: len(whole) // 2],
        b"x" * 100,
        whole[:4] + b"\0" * 500 + whole[504:],
    ):
        file.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"must be a Parquet file, but cannot be read"
        ) as caught:
            cifar10(tmp_path)
        assert caught.value.__suppress_context__
    write_cifar(file, [encode(pixels(32, 32, 3))], [0], image_column="image")
    with pytest.raises(ValueError, match="must have the columns `img`.*got image: struct"):
        cifar10(tmp_path)
    write_cifar(file, [encode(pixels(32, 32, 3))], ["cat"], label_type=pa.string())
    with pytest.raises(ValueError, match="`label` .*integer.*label: string"):
        cifar10(tmp_path)
    pq.write_table(pa.table({"img": [encode(pixels(32, 32, 3))], "label": [0]}), file)
    with pytest.raises(ValueError, match="struct with `bytes`.*img: binary"):
        cifar10(tmp_path)


# idx.


@pytest.mark.parametrize("compressed", [False, True])
def test_idx(tmp_path, compressed):
    images, labels = pixels(6, 4, 5), np.array([0, 3, 1, 1, 2, 0], np.uint8)
    paths = tmp_path / "images", tmp_path / "labels"
    for path, array in zip(paths, (images, labels), strict=True):
        write_idx(path, array)
        if compressed:
            path.write_bytes(gzip.compress(path.read_bytes()))
    source = idx(*paths)
    assert source.event_shape == (4, 5, 1) and source.num_classes == 4
    np.testing.assert_allclose(source[np.arange(6)]["x"][..., 0], scaled(images), atol=1e-6)
    assert source.cond.tolist() == labels.tolist()
    assert "cond" not in idx(paths[0])[0] and idx(paths[0]).num_classes is None
    with pytest.raises(ValueError, match=r"`cond` must be in \[0, 3\), got 3 at index 1"):
        idx(*paths, num_classes=3)


def test_idx_rejects_bad_files(tmp_path):
    images, labels = tmp_path / "images", tmp_path / "labels"
    write_idx(images, pixels(6, 4, 5))
    write_idx(labels, np.zeros(5, np.uint8))
    with pytest.raises(FileNotFoundError, match="`labels_path` must exist"):
        idx(images, tmp_path / "none")
    with pytest.raises(ValueError, match="5 labels for 6 images"):
        idx(images, labels)
    with pytest.raises(ValueError, match="`images_path`.*0x00000803.*got 0x00000801"):
        idx(labels, images)
    whole = images.read_bytes()
    for damaged in (whole[:-1], whole[:9], whole + b"0"):
        images.write_bytes(damaged)
        with pytest.raises(ValueError, match="as many bytes as its header says"):
            idx(images)
    for damaged in (b"", b"\x89PNG...."):
        images.write_bytes(damaged)
        with pytest.raises(ValueError, match="magic number"):
            idx(images)
    packed = gzip.compress(whole)
    for damaged in (packed[:-10], packed[:20] + b"\xff" * 30 + packed[50:]):
        images.write_bytes(damaged)
        with pytest.raises(ValueError, match="readable idx file"):
            idx(images)
    write_idx(images, np.zeros((0, 4, 5), np.uint8))
    with pytest.raises(ValueError, match="n > 0"):
        idx(images)


# Folders.


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(image, **options))


def test_image_folder_labels_by_sorted_name(tmp_path):
    images = pixels(4, 6, 5, 3)
    for name, image in zip(["b/2.png", "b/1.PNG", "a/x/y.png", "c/0.png"], images, strict=True):
        save(tmp_path / name, image)
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "b" / ".hidden.png").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    source = image_folder(tmp_path)
    assert source.num_classes == 3 and source.cond.tolist() == [0, 1, 1, 2]
    expected = scaled(images[[2, 1, 0, 3]])
    np.testing.assert_allclose(source[np.arange(4)]["x"], expected, atol=1e-6)


def test_image_folder_without_classes(tmp_path):
    images = pixels(3, 4, 4)
    for i, image in enumerate(images):
        save(tmp_path / f"{i}.png", image)
    source = image_folder(tmp_path)
    assert source.cond is None and source.num_classes is None and source.event_shape == (4, 4, 1)
    np.testing.assert_allclose(source[np.arange(3)]["x"][..., 0], scaled(images), atol=1e-6)


def test_image_folder_resizes_and_converts(tmp_path):
    save(tmp_path / "a/0.png", np.full((10, 20, 3), 200, np.uint8))
    save(tmp_path / "a/1.png", np.full((9, 5), 100, np.uint8))
    source = image_folder(tmp_path, resize=np.int64(4), mode="L")
    assert source.event_shape == (4, 4, 1)
    np.testing.assert_allclose(source.x[:, 0, 0, 0], [200, 100], atol=1)
    # The centre is kept: black margins of a wide image disappear.
    wide = np.zeros((8, 24), np.uint8)
    wide[:, 8:16] = 255
    save(tmp_path / "a/0.png", wide)
    assert (image_folder(tmp_path, resize=8, mode="L").x[0] == 255).all()
    squeezed = image_folder(tmp_path, resize=(8, 24), crop="none", mode="L")
    assert squeezed.event_shape == (8, 24, 1) and (squeezed.x[0, :, :8] == 0).all()


def test_image_folder_rejects(tmp_path):
    with pytest.raises(FileNotFoundError, match="`path` must exist"):
        image_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="folder of images .* found none"):
        image_folder(tmp_path)
    save(tmp_path / "a/0.png", pixels(4, 4, 3))
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match="b' must be a folder of images"):
        image_folder(tmp_path)
    for bad in (pixels(4, 5, 3), pixels(4, 4)):
        save(tmp_path / "b/1.png", bad)
        message = r"b/1.png' must have .*\(4, 4, 3\), got \(4,.*`resize`"
        with pytest.raises(ValueError, match=message):
            image_folder(tmp_path)
    (tmp_path / "b/1.png").write_bytes(encode(pixels(32, 32, 3))[:500])
    with pytest.raises(ValueError, match=r"b/1.png' .*cannot be decoded") as caught:
        image_folder(tmp_path)
    assert caught.value.__suppress_context__
    with pytest.raises(ValueError, match="`mode` must be"):
        image_folder(tmp_path, mode="rgb")
    with pytest.raises(ValueError, match="`resize` must be"):
        image_folder(tmp_path, resize=0)
    with pytest.raises(ValueError, match="`crop` must be"):
        image_folder(tmp_path, crop="random")
    with pytest.raises(ValueError, match="colour"):
        image_folder(tmp_path, background="nonsense")
    save(tmp_path / "b/1.png", pixels(4, 4, 3))
    save(tmp_path / "loose.png", pixels(4, 4, 3))
    with pytest.raises(ValueError, match=r"2 folders and 1 images beside them, .*'loose.png'"):
        image_folder(tmp_path)


def test_image_folder_shows_what_a_viewer_shows(tmp_path):
    """Turned by EXIF; sixteen bits and floats by their range; nothing hidden under alpha = 0."""

    def read(name, **options):
        source = image_folder(tmp_path / name, **options)
        return source.x[..., 0] if source.event_shape[2] == 1 else source.x

    def write(name, image, **options):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image.save(tmp_path / name, **options)

    upright = np.zeros((16, 8, 3), np.uint8)
    upright[:, 4:] = 255  # right half white
    for tag, stored in {1: upright, 3: np.rot90(upright, 2), 6: np.rot90(upright),
                        8: np.rot90(upright, -1), 2: upright[:, ::-1]}.items():  # fmt: skip
        exif = Image.Exif()
        exif[274] = tag
        write(f"exif{tag}/P.JPG", Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
        np.testing.assert_allclose(read(f"exif{tag}")[0], upright, atol=3)
    ramp = np.linspace(0, 65535, 256).reshape(16, 16)
    for name in ("deep/scan.png", "deep2/scan.tiff"):
        write(name, Image.fromarray(ramp.astype(np.uint16)))
        np.testing.assert_allclose(read(name.split("/")[0])[0], ramp / 257, atol=0.51)
    write("float/1.tif", Image.fromarray((ramp / 65535).astype(np.float32)))
    np.testing.assert_allclose(read("float")[0], ramp / 257, atol=0.51)
    write("bad/1.tif", Image.fromarray((ramp / 255).astype(np.float32)))
    with pytest.raises(ValueError, match=r"1.tif' must hold floats in \[0, 1\], .* 0 to 257"):
        read("bad")
    logo = np.zeros((16, 16, 4), np.uint8)
    logo[..., 1] = 255  # green that nobody sees
    logo[4:12, 4:12] = (255, 0, 0, 255)
    logo[0, 0] = (0, 0, 0, 128)
    expected = np.full((16, 16, 3), 255)
    expected[4:12, 4:12] = (255, 0, 0)
    expected[0, 0] = 127
    write("rgba/1.png", Image.fromarray(logo))
    np.testing.assert_allclose(read("rgba")[0], expected, atol=1)
    assert read("rgba", background="#00f")[0, 2, 2].tolist() == [0, 0, 255]
    write("palette/1.png", Image.fromarray(logo).quantize(4))
    np.testing.assert_allclose(read("palette", mode="RGB")[0, 1:], expected[1:], atol=1)
    write("la/1.png", Image.fromarray(logo[..., :2][..., ::-1].copy(), "LA"))
    assert read("la")[0, 2, 2] == 255 and read("la", mode="RGB")[0, 2, 2].tolist() == [255] * 3
    opaque = Image.fromarray(pixels(8, 8, 3)).quantize(8)
    write("p/1.png", opaque)
    np.testing.assert_array_equal(read("p")[0], np.asarray(opaque.convert("RGB")))
    write("bits/1.png", Image.fromarray(np.eye(8, dtype=bool)))
    np.testing.assert_array_equal(read("bits")[0], 255 * np.eye(8))
    write("cmyk/1.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=95)
    np.testing.assert_allclose(read("cmyk")[0], np.tile([255, 0, 0], (8, 8, 1)), atol=4)


def test_image_folder_passes_over_what_is_hidden_and_reads_every_suffix(tmp_path):
    names = ("a/1.png", "a/.ipynb_checkpoints/1.png", "a/deep/__MACOSX/1.png", "b/1.tif",
             "b/2.TIFF", "__MACOSX/a/1.png", "a/._1.png", ".trash/1.png")  # fmt: skip
    for name in names:
        save(tmp_path / name, pixels(4, 4), kind="TIFF" if "tif" in name.lower() else "PNG")
    source = image_folder(tmp_path)
    assert np.bincount(source.cond).tolist() == [1, 2] and source.class_names == ("a", "b")
    (tmp_path / "b/3.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"b/3.png' must be an encoded image, got 0 bytes"):
        image_folder(tmp_path)


def test_a_lazy_folder_is_the_same_source(tmp_path):
    for i in range(10):
        save(tmp_path / f"{'ab'[i % 2]}/{i}.png", pixels(6, 5, 3))
    now, lazy = (image_folder(tmp_path, resize=4, lazy=lazy) for lazy in (False, True))
    for name in ("event_shape", "num_classes", "class_names", "pixels"):
        assert getattr(now, name) == getattr(lazy, name), name
    np.testing.assert_array_equal(now.labels, lazy.labels)
    np.testing.assert_array_equal(now[np.arange(10)]["x"], lazy[np.arange(10)]["x"])
    np.testing.assert_array_equal(now[3]["x"], lazy[3]["x"])
    batches = [next(iter(make_loader(source, 4, seed=0))) for source in (now, lazy)]
    for name in ("x", "cond"):
        np.testing.assert_array_equal(batches[0][name], batches[1][name])
    (tmp_path / "b/1.png").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"b/1.png' must be an encoded image"):
        lazy[np.arange(10)]
    save(tmp_path / "b/1.png", pixels(6, 5))
    with pytest.raises(ValueError, match=r"b/1.png' must have the .* first image, \(4, 4, 3\)"):
        lazy[5]


# Splits.


def test_a_split_holds_out_a_part_of_every_class_at_random():
    labels = np.repeat([0, 1, 2], [100, 40, 7])
    source = array_source(np.arange(147.0)[:, None], labels, class_names=["x", "y", "z"])
    train, test = split(source, 0.2)
    assert np.bincount(test.cond).tolist() == [20, 8, 1]
    both = np.concatenate([train.x, test.x]).ravel()
    assert sorted(both) == list(range(147))
    assert np.all(np.diff(test.x.ravel()) > 0)
    # Of every class from all over it, whose files may be in an order.
    first = test.x.ravel()[:20]
    assert 25 < first.mean() < 75 and np.ptp(first) > 50
    # Pinned: the split of a run is the same wherever it goes on.
    assert test.x.ravel()[-9:].tolist() == [106, 109, 112, 124, 126, 131, 134, 136, 140]
    again, other = split(source, 0.2)[1], split(source, 0.2, seed=1)[1]
    np.testing.assert_array_equal(again.x, test.x)
    assert not np.array_equal(other.x, test.x)
    train, test = split(array_source(np.arange(9.0)[:, None]), 0.1)
    assert (len(train), len(test)) == (8, 1)
    few = array_source(np.zeros((3, 1)), [0, 0, 1], class_names=["x", "y"])
    with pytest.raises(ValueError, match=r"two examples of each .* got 1 of class 1 \(y\)"):
        split(few, 0.5)
    with pytest.raises(ValueError, match=r"in \(0, 1\), got 0"):
        split(source, 0)


def test_classes_are_left_out_and_labels_stay():
    source = array_source(np.arange(6.0)[:, None], [0, 1, 2, 0, 1, 2])
    left = without_classes(source, [1])
    assert left.cond.tolist() == [0, 2, 0, 2] and left.num_classes == 3
    for wrong in ([3], [-1], [0, 1, 2]):
        with pytest.raises(ValueError, match="Classes to leave out"):
            without_classes(source, wrong)
    with pytest.raises(ValueError, match=r"must lie in \[0, 0\)"):
        without_classes(array_source(np.zeros((3, 2))), [0])


# npz and arrays.


def test_npz(tmp_path):
    images, latents = pixels(3, 2, 2, 1), RNG.normal(size=(3, 5))
    for name in ("cond", "label"):
        np.savez(tmp_path / "d.npz", x=images, **{name: np.array([0, 2, 1])})
        source = npz(tmp_path / "d.npz")
        np.testing.assert_allclose(source[np.arange(3)]["x"], scaled(images), atol=1e-6)
        assert source.cond.tolist() == [0, 2, 1] and source.num_classes == 3
    np.savez_compressed(tmp_path / "d.npz", x=latents)
    source = npz(tmp_path / "d.npz")
    assert source.cond is None
    np.testing.assert_array_equal(source[np.arange(3)]["x"], latents.astype(np.float32))


def test_npz_of_several_conditions_and_a_test_set(tmp_path):
    text, age = RNG.normal(size=(4, 3)), np.array([0.1, 0.2, 0.3, 0.4])
    arrays = {"x": np.zeros((4, 2)), "cond/text": text, "cond/age": age, "cond/label": [0, 1, 1, 0]}
    test = {"x_test": np.ones((2, 2)), "cond_test/text": text[:2], "cond_test/age": age[:2],
            "cond_test/label": [2, 0]}  # fmt: skip
    np.savez(tmp_path / "d.npz", **arrays, **test, class_names=["p", "q", "r"])
    train, held_out = (npz(tmp_path / "d.npz", part) for part in ("train", "test"))
    assert train.num_classes == held_out.num_classes == 3 and train.class_names == ("p", "q", "r")
    assert (len(train), len(held_out)) == (4, 2) and held_out.labels.tolist() == [2, 0]
    batch = next(iter(make_loader(train, 2, seed=0, shuffle=False)))["cond"]
    np.testing.assert_allclose(batch["text"], text[:2], rtol=1e-6)
    np.testing.assert_allclose(batch["age"], age[:2], rtol=1e-6)
    assert batch["label"].dtype == np.int32 and batch["age"].dtype == np.float32
    with pytest.raises(ValueError, match="has a test set, `x_test`, got None"):
        npz(tmp_path / "d.npz")
    np.savez(tmp_path / "v.npz", x=np.zeros((4, 2)), cond=text)
    assert npz(tmp_path / "v.npz").num_classes is None


def test_npz_rejects(tmp_path):
    file = tmp_path / "d.npz"
    with pytest.raises(FileNotFoundError, match="`path` must exist"):
        npz(file)
    np.savez(file, images=pixels(3, 2, 2, 1))
    with pytest.raises(ValueError, match=r"must hold the array `x`, got \['images'\]"):
        npz(file)
    np.savez(file, x=pixels(3, 2, 2, 1), y=np.arange(3))
    with pytest.raises(ValueError, match=r"got also \['y'\]"):
        npz(file)
    for options, message in ({"split": "test"}, "no `x_test`"), ({"split": "val"}, "'train', 't"):
        np.savez(file, x=pixels(3, 2, 2, 1))
        with pytest.raises(ValueError, match=message):
            npz(file, **options)
    np.savez(file, x=pixels(3, 2, 2, 1), cond=np.arange(3), label=np.arange(3))
    with pytest.raises(ValueError, match="at most one of `cond` and `label`"):
        npz(file)
    np.savez_compressed(file, x=pixels(30, 8, 8, 1))
    whole = file.read_bytes()
    objects, plain = io.BytesIO(), io.BytesIO()
    np.savez(objects, x=np.array([{}, None], object))
    np.save(plain, np.zeros((3, 2)))
    broken = whole[:400] + b"\0" * 200 + whole[600:]
    damaged = (b"", b"text", whole[:-50], broken, objects.getvalue(), plain.getvalue())
    for data in damaged:
        file.write_bytes(data)
        with pytest.raises(
            ValueError, match="`path` must be an .npz file of plain arrays"
        ) as caught:
            npz(file)
        assert caught.value.__suppress_context__


def test_eight_bit_images_reach_both_ends_exactly():
    x = array_source(np.array([0, 255], np.uint8).reshape(2, 1, 1, 1))[np.arange(2)]["x"]
    assert x.ravel().tolist() == [-1.0, 1.0]


@pytest.mark.parametrize(
    ("x", "cond", "message"),
    [
        (np.zeros((0, 2)), None, r"`x` must be an array \(n, \*event\) with n > 0.*\(0, 2\)"),
        (np.zeros(3), None, r"`x` must be an array \(n, \*event\)"),
        (np.zeros((3, 2, 2), np.uint8), None, r"images \(n, H, W, C\).*x\[..., None\]"),
        (np.zeros((3, 2), int), None, r"uint8 images or floats, got dtype int64"),
        (np.array([[0.0], [np.nan], [np.inf]]), None, r"2 of 3 examples, the first at index 1"),
        (np.zeros((3, 2)), np.zeros(2, int), r"shape \(3, ...\), got shape \(2,\)"),
        (np.zeros((3, 2)), np.zeros((3, 1), int), r"got dtype int64 of shape \(3, 1\)"),
        (np.zeros((3, 2)), {"age": np.arange(3)}, r"`cond\['age'\]` must hold integer labels"),
        (np.zeros((3, 2)), np.zeros(3), r"integer labels, got dtype float64"),
        (np.zeros((3, 2)), np.zeros(3, bool), r"integer labels, got dtype bool"),
        (np.zeros((3, 2)), np.array([0, -1, 2]), r"\[0, 3\), got -1 at index 1"),
    ],
)
def test_array_source_rejects(x, cond, message):
    with pytest.raises(ValueError, match=message):
        array_source(x, cond)


def test_num_classes_needs_labels():
    with pytest.raises(ValueError, match="`num_classes` must be None without labels, got 4"):
        array_source(np.zeros((3, 2)), num_classes=4)

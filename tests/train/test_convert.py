"""Records of a data set are trained on as the set itself is."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from jaxdiff.data import make_loader, reduced
from train import convert
from train.core.data import DataConfig, DataInfo, build_sources

RNG = np.random.default_rng(0)


@pytest.fixture
def folder(tmp_path):
    """Of two classes, 30 and 20 images."""
    for i in range(50):
        file = tmp_path / "images" / f"class{int(i >= 30)}" / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
    return DataConfig("folder", str(tmp_path / "images"))


def command(config, out, *more):
    return [str(out), "--data.name", config.name, "--data.path", config.path, *more]


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_a_folder_and_its_records_are_one_set(tmp_path, folder, encoding, capsys):
    out = tmp_path / "records"
    arguments = command(folder, out, "--encoding", encoding)
    for _ in range(2):  # where all is there, nothing is to do
        assert convert.cli(arguments) == 0
    printed = capsys.readouterr()
    assert "45 examples to train on and 5 to hold out" in printed.out and "45/45" in printed.err
    stored = DataConfig("records", str(out))
    for changes in ({}, {"exclude_class": (0,)}):
        sides = (build_sources(dataclasses.replace(c, **changes)) for c in (stored, folder))
        for a, b in zip(*sides, strict=True):
            assert DataInfo.of(a) == DataInfo.of(b)
            batches = [iter(make_loader(side, 2, seed=1)) for side in (a, b)]
            assert batches[0].get_state() == batches[1].get_state()
            for _ in range(4):
                x, y = map(next, batches)
                np.testing.assert_array_equal(x["x"], y["x"])
                np.testing.assert_array_equal(x["cond"], y["cond"])
    gray = build_sources(dataclasses.replace(stored, resize=4, mode="gray"))
    for a, b in zip(gray, build_sources(folder), strict=True):
        np.testing.assert_array_equal(a[0]["x"], reduced(b, size=4, gray=True)[0]["x"])


def test_one_side_alone_is_split(tmp_path, folder):
    out = tmp_path / "records"
    assert convert.cli(command(folder, out)) == 0
    train, held_out = build_sources(DataConfig("records", str(out / "train"), test_fraction=0.2))
    assert np.bincount(train.labels).tolist() == [22, 14]  # of 27 and 18
    assert np.bincount(held_out.labels).tolist() == [5, 4]


def test_what_cannot_be_converted_is_one_line(tmp_path, folder, capsys):
    out = tmp_path / "records"
    (out / "train").mkdir(parents=True)
    (out / "train" / "notes.txt").write_text("mine")
    for arguments, expected in (
        (command(folder, out), "must be a new or empty directory"),
        ([str(out), "--data.name", "folder"], "`data.path` must say"),
        ([str(out), "--data.name", "rings", "--encoding", "png"], "'png' needs uint8 images"),
    ):
        assert convert.cli(arguments) == 1
        error = capsys.readouterr().err
        assert expected in error and "Traceback" not in error
    with pytest.raises(ValueError, match="got no `info.json`"):
        build_sources(DataConfig("records", str(out / "train")))

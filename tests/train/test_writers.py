"""What a run logs, in each of the places it can go to."""

import json

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from train.core import writers
from train.core.runner import Log


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "p.png"
    Image.new("RGB", (6, 5), (255, 0, 0)).save(path)
    return path


def events_of(path):
    """Records of a TensorBoard file: length, its checksum, the event, its checksum."""
    raw, at = path.read_bytes(), 0
    while at < len(raw):
        length = int.from_bytes(raw[at : at + 8], "little")
        yield Event.FromString(raw[at + 12 : at + 12 + length])
        at += 16 + length


def logged(run_dir, names, picture, first, steps):
    """One session of a run that logs a number, a vector, nothing, and a picture."""
    run_dir.mkdir(exist_ok=True)
    log = Log(writers.build_writers(names, run_dir, first, {"seed": 3}), first, 4, 8)
    for step in range(first + 1, first + 1 + steps):
        log.scalars(step, {"loss": np.float32(step + 0.5), "each": [1, 2], "rate": None})
        log.picture(step, "samples", picture)
    log.close()


def test_lines_after_the_checkpoint_are_forgotten(tmp_path, picture):
    logged(tmp_path / "run", (), picture, 0, 3)
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "lo')  # cut short by a kill
    logged(tmp_path / "run", (), picture, 2, 1)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": i, "loss": i + 0.5, "each": [1, 2]} for i in (1, 2, 3)]


def test_tensorboard_holds_numbers_and_pictures(tmp_path, picture):
    logged(tmp_path / "run", ("tensorboard",), picture, 0, 2)
    (path,) = (tmp_path / "run" / "tensorboard").iterdir()
    values = [(e.step, v) for e in events_of(path) for v in e.summary.value]
    assert [(s, v.tag, v.simple_value) for s, v in values if v.tag == "loss"] == [
        (1, "loss", 1.5),
        (2, "loss", 2.5),
    ]
    images = [v.image for _, v in values if v.tag == "samples"]
    assert [(i.width, i.height) for i in images] == [(6, 5)] * 2
    assert {v.tag for _, v in values} == {"loss", "samples"}


def test_weights_and_biases_goes_on_offline(tmp_path, picture, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for first in (0, 2):
        logged(tmp_path / "run", ("wandb",), picture, first, 2)
    capfd.readouterr()
    name = (tmp_path / "run" / "wandb_id").read_text()
    stored = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{name}.wandb"))
    assert len(stored) == 2  # sessions of the same run
    for path, steps in zip(stored, ((1, 2), (3, 4)), strict=True):
        raw = path.read_bytes()
        for step in steps:
            assert b"train_step" in raw and f"{step + 0.5}".encode() in raw
        assert len(list(path.parent.glob("files/media/images/samples*.png"))) == 2


def test_a_missing_package_is_named_before_any_work(monkeypatch):
    writers.check_writers(("tensorboard", "wandb"))
    monkeypatch.setattr(writers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"wandb is missing. .*'jaxdiff\[wandb\]'"):
        writers.check_writers(("wandb",))
    writers.check_writers(())

"""Programs for TPUs that are not there. Needs libtpu: pip install 'jaxdiff[tpu]'."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("libtpu")


def compiled(tmp_path, *options):
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "train.compile_aot", *options, "--out", str(out)]
    subprocess.run(command, check=True)
    return json.loads(out.read_text().splitlines()[-1])


def test_training_steps_gather_weights_and_nothing_else(tmp_path, measured):
    """Of every block twice, in half precision: forward, and where it is computed again."""
    found = compiled(tmp_path, "dit-s", "--fsdp", "16", "--per-chip", "32")
    sent = found["collectives"]
    hidden, depth = 384, 12
    # Queries, keys, values, output; the MLP; the modulation.
    matrices = (4 + 2 * 4 + 6) * hidden**2
    assert sent["all-gather in loop"]["bytes"] == 2 * 2 * depth * matrices
    assert "all-to-all in loop" not in sent
    assert found["peak"] < found["memory"]
    measured(f"DiT-S on 16 chips: {sent}")


def test_chips_do_the_same_however_many_there_are(tmp_path, measured):
    # With fsdp over all chips the compiler chooses another way to add gradients.
    options = ("dit-s", "--fsdp", "8", "--per-chip", "32", "--topology")
    few, many = compiled(tmp_path, *options, "v5e:4x4"), compiled(tmp_path, *options, "v5e:16x16")
    assert many["flops"] == pytest.approx(few["flops"], rel=1e-3)
    assert many["peak"] == pytest.approx(few["peak"], rel=0.05)
    # Traffic is the compiler's choice: it fuses what it sends otherwise, 8 % apart here.
    assert many["bytes"] < 1.05 * few["bytes"]
    seconds = many["seconds"]
    assert seconds["communication"] < max(seconds["compute"], seconds["memory"])
    measured(f"DiT-S, 16 and 256 chips: {few['seconds']} and {seconds}")


def test_samplers_send_nothing_in_their_loop(tmp_path, measured):
    found = compiled(tmp_path, "dit-s", "--fsdp", "16", "--per-chip", "32", "--sample")
    assert not any("in loop" in kind for kind in found["collectives"])
    measured(f"DiT-S, DDIM: {found['collectives']}")

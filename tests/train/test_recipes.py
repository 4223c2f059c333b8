"""The recipes as a user runs them: from the command line, killed, resumed, misused."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from train import config as cfg
from train import pretrain
from train.sample import Options, load_run
from train.sample import main as sample_main

ROOT = Path(__file__).parent.parent.parent
TOY = [
    *("toy2d", "--network.channels", "16", "--network.depth", "1", "--batch-size", "32"),
    *("--log-every", "20", "--checkpoint-every", "40", "--evaluation.num-samples", "64"),
    *("--evaluation.batch-size", "64", "--evaluation.sampling-steps", "4"),
]


def command(run_dir, *options, module="train.pretrain", preset=TOY):
    return [sys.executable, "-m", module, *preset, "--run-dir", str(run_dir), *options]


def environment():
    """One device, as on a newcomer's machine."""
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    return {**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}


def finish(args, **options):
    return subprocess.run(
        args, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, **options
    )


def wait_for_checkpoints(process, run_dir, count):
    deadline = time.monotonic() + 120
    while len(list(run_dir.glob("checkpoints/*/manifest.json"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def losses_of(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [(r["step"], r["loss"], r["grad_norm"]) for r in map(json.loads, lines)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    done = finish(command(run_dir, "--steps", "1200"))
    assert done.returncode == 0, done.stderr
    assert "sliced Wasserstein distance" in done.stdout
    return run_dir


def same_result(run_dir, whole, *, cut_at=0):
    """`cut_at`: a step inside a logging interval, whose mean a stop there has shortened."""
    _, _, mine = load_run(str(run_dir))
    _, _, hers = load_run(str(whole))
    for a, b in zip(mine.arrays, hers.arrays, strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(mine.step) == 1200
    logged = [
        [line for line in losses_of(run) if not cut_at <= line[0] < cut_at + 20]
        for run in (run_dir, whole)
    ]
    assert logged[0] == logged[1]


def interrupt(run_dir, count, signum, *options):
    """Start or go on; stop the process once there are so many checkpoints."""
    process = subprocess.Popen(
        command(run_dir, "--steps", "1200", *options),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_checkpoints(process, run_dir, count)
    process.send_signal(signum)
    return process.communicate(timeout=60)[1], process.returncode


def test_killed_and_terminated_then_resumed_ends_bit_for_bit_the_same(tmp_path, uninterrupted):
    run_dir = tmp_path / "run"
    keep = ("--keep-checkpoints", "50")
    stderr, status = interrupt(run_dir, 4, signal.SIGKILL, *keep)  # at a moment nobody chose
    assert status == -signal.SIGKILL, stderr
    stderr, status = interrupt(run_dir, 9, signal.SIGTERM, *keep)
    assert status == 128 + signal.SIGTERM
    # It wrote a checkpoint, and says so.
    assert "Interrupted by SIGTERM" in stderr and "Traceback" not in stderr
    last = max(int(p.name) for p in (run_dir / "checkpoints").iterdir())
    assert last >= 9 * 40
    done = finish(command(run_dir, "--steps", "1200"))
    assert done.returncode == 0, done.stderr
    assert f"Going on from step {last} of 1200" in done.stdout
    same_result(run_dir, uninterrupted, cut_at=last)


def test_the_run_directory_alone_is_enough_to_sample(tmp_path, uninterrupted, capsys):
    out = tmp_path / "mine"
    options = Options(str(uninterrupted), num_samples=32, sampling_steps=3, out=str(out))
    sample_main(options)
    assert "32 samples of step 1200, 3 evaluations each" in capsys.readouterr().out
    first = np.load(out.with_suffix(".npz"))["x"]
    assert first.shape == (32, 2) and out.with_suffix(".png").stat().st_size > 1000
    sample_main(dataclasses.replace(options, seed=1))
    assert not np.allclose(np.load(out.with_suffix(".npz"))["x"], first)


def test_another_configuration_is_refused_with_the_difference(uninterrupted):
    config = cfg.load_config(uninterrupted)
    other = dataclasses.replace(config, run_dir=str(uninterrupted), batch_size=64, log_every=7)
    with pytest.raises(ValueError, match=r"contradicts.*batch_size: 32 there, 64 here\. Use"):
        pretrain.main(other)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nonsense"], "nonsense"),
        (["toy2d", "--learning-rat", "3"], "learning-rat"),
        (["toy2d", "--process", "nonsense"], "nonsense"),
        (["cifar10"], "data.path"),
        (["cifar10", "--data.path", "/does/not/exist"], "/does/not/exist"),
        (["digits", "--network.kind", "mlp"], "network.kind"),
        (["toy2d", "--batch-size", "100000"], "batch_size"),
    ],
)
def test_bad_command_lines_get_one_clear_error(tmp_path, capsys, arguments, expected):
    extra = ["--run-dir", str(tmp_path / "run")] if arguments != ["nonsense"] else []
    try:
        status = pretrain.cli([*arguments, *extra])
    except SystemExit as stop:  # of the parser
        status = stop.code
    assert status in (1, 2)
    printed = capsys.readouterr()
    assert expected in printed.out + printed.err
    assert "Traceback" not in printed.err


def test_a_run_directory_without_a_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json"):
        load_run(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_run(str(tmp_path))


def test_configurations_survive_json():
    for _, config in cfg.PRESETS.values():
        assert cfg.from_json(json.loads(json.dumps(cfg.to_json(config)))) == config


def test_batches_must_divide_among_the_devices():
    config = dataclasses.replace(cfg.PRESETS["toy2d"][1], batch_size=60)
    with pytest.raises(ValueError, match="divisible by the 8 devices"):
        pretrain.check_batch(config, pretrain.parallel.make_mesh())

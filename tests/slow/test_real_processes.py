"""Runs of the recipes killed at many moments."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from runs import state_of

ROOT = Path(__file__).parent.parent.parent
TOY = [
    *("toy2d", "--network.channels", "16", "--network.depth", "1", "--batch-size", "32"),
    *("--log-every", "20", "--checkpoint-every", "25", "--evaluation.num-samples", "64"),
    *("--evaluation.batch-size", "64", "--evaluation.sampling-steps", "4", "--steps", "2000"),
]


def command(run_dir):
    return [sys.executable, "-m", "train.pretrain", *TOY, "--run-dir", str(run_dir)]


@pytest.mark.parametrize("seed", range(2))
def test_killed_a_dozen_times_at_random_moments(tmp_path, seed, measured):
    """By SIGKILL and SIGTERM, before the first checkpoint, within writes, between steps."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert subprocess.run(command(whole), **options).returncode == 0
    rng, killed = np.random.default_rng(seed), 0
    for _ in range(12):
        process = subprocess.Popen(command(pieces), cwd=ROOT, env=environment, stdout=-3, stderr=-3)
        time.sleep(rng.uniform(1.0, 20.0))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL if rng.random() < 0.7 else signal.SIGTERM)
        process.wait()
        killed += 1
    done = subprocess.run(command(pieces), **options)
    assert done.returncode == 0, done.stderr
    mine, hers = (state_of(run) for run in (pieces, whole))
    for a, b in zip(mine.arrays, hers.arrays, strict=True):
        np.testing.assert_array_equal(a, b)
    measured(f"stopped {killed} times, then bit for bit the same as a run in one piece")

"""Real processes on one machine, which train the digits together."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from runs import state_of

ROOT = Path(__file__).parent.parent.parent
DIGITS = [
    *("digits", "--network.kind", "dit", "--network.channels", "16", "--network.depth", "1"),
    *("--batch-size", "32", "--steps", "400", "--log-every", "20", "--checkpoint-every", "50"),
    *("--evaluation.num-samples", "40", "--evaluation.sampling-steps", "3"),
    *("--evaluation.classifier-steps", "40", "--warmup-steps", "20"),
]


def start(run_dir, count, devices, *options):
    """So many processes of so many devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    environment = {**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "train.pretrain", *DIGITS, "--run-dir", str(run_dir), *options]
    joined = ["--launch.coordinator", f"127.0.0.1:{port}", "--launch.num-processes", str(count)]
    return [
        subprocess.Popen(
            [*command, *(joined + ["--launch.process-id", str(i)] if count > 1 else [])],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def ended(processes, timeout=900):
    """Status and what each wrote to stderr."""
    errors = [process.communicate(timeout=timeout)[1] for process in processes]
    return [process.returncode for process in processes], errors


def wait_for_checkpoints(processes, run_dir, count):
    deadline = time.monotonic() + 600
    while len(list(run_dir.glob("checkpoints/*/manifest.json"))) < count:
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_stopped_either_way_end_where_one_process_ends(tmp_path, count, measured):
    whole, several = tmp_path / "whole", tmp_path / "several"
    assert ended(start(whole, 1, 4))[0] == [0]
    keep = ("--keep-checkpoints", "20")

    processes = start(several, count, 4 // count, *keep)
    wait_for_checkpoints(processes, several, 2)
    processes[-1].send_signal(signal.SIGTERM)  # to one, and all of them stop at the same step
    status, lines = ended(processes)
    assert status == [128 + signal.SIGTERM] * count, lines
    assert all("A checkpoint is written; the same command goes on." in line for line in lines)

    processes = start(several, count, 4 // count, *keep)
    wait_for_checkpoints(processes, several, 5)
    processes[-1].kill()
    begun = time.monotonic()
    status, lines = ended(processes)
    waited = time.monotonic() - begun
    assert all(code not in (0, None) for code in status)
    # JAX ends those that are left, from within, and says why.
    assert any("another" in text and "died" in text for text in lines[:-1]), lines

    # On another mesh, and half as many processes.
    left = count // 2
    processes = start(several, left, 4 // left, *keep, "--mesh.fsdp", "2")
    assert ended(processes)[0] == [0] * left
    mine, hers = state_of(several), state_of(whole)
    assert int(mine.step) == 400
    apart = max(
        np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max()
        for a, b in zip(mine.arrays, hers.arrays, strict=True)
    )
    measured(
        f"{count} processes, one told to stop, one killed (the others ended {waited:.0f} s later), "
        f"then on 2 x 2 devices: weights and averages within {apart:.1e} of one process's"
    )
    assert apart < 1e-3

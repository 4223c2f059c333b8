"""The recipes as a user runs them: from the command line, killed, resumed, misused."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from runs import state_of

from jaxdiff.training import load_run
from train import evaluate, pretrain, resume, sample
from train.core.config import RunConfig, from_json, load_config, save_config, to_json
from train.pretraining.recipe import PRESETS, Config

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
    mine, hers = state_of(run_dir), state_of(whole)
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
    done = finish([sys.executable, "-m", "train.resume", str(run_dir)])
    assert done.returncode == 0, done.stderr
    assert f"Going on from step {last} of 1200" in done.stdout
    same_result(run_dir, uninterrupted, cut_at=last)


def samples_in(folder):
    with np.load(folder / "samples.npz") as file:
        return file["x"]


def test_the_run_directory_alone_is_enough_to_sample(tmp_path, uninterrupted, capsys):
    out = tmp_path / "new" / "mine"
    options = sample.Options(str(uninterrupted), num_samples=32, sampling_steps=3, out=str(out))
    sample.main(options)
    assert "32 samples of step 1200, 3 evaluations each" in capsys.readouterr().out
    first = samples_in(out)
    assert first.shape == (32, 2) and (out / "samples.png").stat().st_size > 1000
    # Nothing is lost, and nothing mixed.
    with pytest.raises(ValueError, match="`out` must be a new or empty directory"):
        sample.main(dataclasses.replace(options, seed=1))
    other = dataclasses.replace(options, seed=1, out=None)
    for name in ("samples-1", "samples-1-2"):
        sample.main(other)
        assert not np.allclose(samples_in(uninterrupted / name), first)
        shutil.move(uninterrupted / name / "samples.png", tmp_path / f"{name}.png")


def test_a_run_is_measured_again_and_grows(tmp_path, uninterrupted, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    options = evaluate.Options(str(run_dir), solver="heun", sampling_steps=3, num_samples=64)
    figures = evaluate.main(options)
    assert figures["nfe"] == 5
    stored = json.loads((run_dir / "evaluation-heun-3.json").read_text())
    assert stored == figures and (run_dir / "samples-heun-3.png").exists()
    assert resume.cli([str(run_dir), "--steps", "1240"]) == 0
    assert "Going on from step 1200 of 1240" in capsys.readouterr().out
    assert load_run(run_dir).step == 1240 and load_config(run_dir, Config).steps == 1240
    assert resume.cli([str(run_dir), "--steps", "1000"]) == 1
    assert "steps: 1240 there, 1000 here" in capsys.readouterr().err
    # Another run begins with its weights, as far as they have a place there.
    config = dataclasses.replace(
        load_config(run_dir, Config),
        run_dir=str(tmp_path / "next"),
        init_from=str(run_dir),
        learning_rate=1e-12,
        steps=1,
        network=dataclasses.replace(load_config(run_dir, Config).network, depth=2),
    )
    pretrain.main(config)
    printed = capsys.readouterr().out
    assert "Beginning with the weights of step 1240" in printed
    assert "weights begin anew: .blocks[1]" in printed
    mine, hers = (load_run(tmp_path / name).model.network for name in ("next", "run"))
    np.testing.assert_allclose(mine.first.kernel[...], hers.first.kernel[...], rtol=1e-6)


def test_another_configuration_is_refused_with_the_difference(uninterrupted):
    config = load_config(uninterrupted, Config)
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
        (["toy2d", "--steps", "-5"], "`steps` must be at least 1, got -5"),
        (["toy2d", "--accumulate", "0"], "`accumulate`"),
        (["toy2d", "--log-every", "0"], "`log_every`"),
        (["toy2d", "--keep-checkpoints", "-1"], "`keep_checkpoints`"),
        (["toy2d", "--learning-rate", "nan"], "`learning_rate` must be positive and finite"),
        (["toy2d", "--evaluation.num-samples", "0"], "`evaluation.num_samples`"),
        (["toy2d", "--data.test-fraction", "1"], "must lie in (0, 1)"),
        (["toy2d", "--data.exclude-class", "3"], "Classes to leave out"),
        (["toy2d", "--init-from", "/does/not/exist"], "it has no model.json"),
        (["toy2d", "--evaluation.order", "3"], "`order` is no option of the solver 'ddim'"),
        (["digits", "--data.lazy"], "`data.lazy` is for folders"),
        (["digits", "--data.mode", "rgb"], "three channels"),
        (["toy2d", "--data.path", "/x"], "`data.path` must be left out for two_moons"),
        (["toy2d", "--evaluation.solver", "unipc", "--evaluation.sampling-steps", "1"], "order of"),
        (["digits", "--evaluation.guidance-scale", "inf"], "`evaluation.guidance_scale`"),
        (["toy2d", "--network.channel-mults"], "`network.channel_mults` must be positive"),
        (["toy2d", "--seed", "9" * 30], "`seed` must be in"),
        (["toy2d", "--accumulate", "9", "--steps", "4"], "no update would be made"),
        (["toy2d", "--ema", "power", "--ema-widths"], "`ema_widths` must have one"),
        (["toy2d", "--evaluation.metrics", "accuracy"], "`evaluation.metrics` must be among"),
        (["toy2d", "--mesh.data", "3"], "number of devices, 8"),
        (["toy2d", "--launch.num-processes", "2"], "must be given together"),
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
        load_config(tmp_path, Config)
    path = tmp_path / "config.json"
    good = to_json(PRESETS["toy2d"][1])
    for text in (b"{", b"\xff\xfe\x00", b"[3]", b"null"):
        path.write_bytes(text)
        with pytest.raises(ValueError, match="damaged"):
            load_config(tmp_path, Config)
    for changes, name in (
        ({"network": 3}, "network"),
        ({"steps": "abc"}, "steps"),
        ({"process": "foo"}, "process"),
        ({"evaluation": {**good["evaluation"], "solver": "foo"}}, "evaluation.solver"),
        ({"data": {**good["data"], "name": "foo"}}, "data.name"),
        ({"learning_rate": None}, "learning_rate"),
    ):
        path.write_text(json.dumps(good | changes))
        with pytest.raises(ValueError, match=f"damaged: `{name}` has a value"):
            load_config(tmp_path, Config)


def test_configurations_survive_json():
    for _, config in PRESETS.values():
        assert from_json(Config, json.loads(json.dumps(to_json(config)))) == config


def test_configurations_of_other_versions(tmp_path):
    """Older ones get defaults and new names; what is newer says who wrote it."""
    config = dataclasses.replace(PRESETS["digits"][1], run_dir=str(tmp_path))
    save_config(config)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert load_config(tmp_path, Config) == config and stored["version"]
    del (
        stored["version"],
        stored["ema"],
        stored["writers"],
        stored["evaluation"]["order"],
        stored["data"]["lazy"],
    )
    del stored["data"]["resize"], stored["data"]["mode"]
    stored["data"] |= {"size": 4, "gray": True}
    stored["tensorboard"] = True
    (tmp_path / "config.json").write_text(json.dumps(stored))
    data = dataclasses.replace(config.data, resize=4, mode="gray")
    config = dataclasses.replace(config, data=data, writers=("tensorboard",))
    assert load_config(tmp_path, Config) == config
    # What all recipes have is read of any of them.
    stored["what_another_recipe_has"] = 1
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert load_config(tmp_path, RunConfig).evaluation == config.evaluation
    del stored["what_another_recipe_has"]
    stored |= {"version": "9.9", "network": {**stored["network"], "experts": 8}}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"written by jaxdiff 9.9: .* not know: network.experts"):
        load_config(tmp_path, Config)


def test_batches_must_divide_among_the_devices(tmp_path):
    config = dataclasses.replace(PRESETS["toy2d"][1], run_dir=str(tmp_path), batch_size=60)
    with pytest.raises(ValueError, match="divisible by the 8 devices"):
        pretrain.main(config)
    assert not any(tmp_path.iterdir())

"""Knobs of memory and speed, and what the log says of them."""

import dataclasses
import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.costs import Chip
from train import resume
from train.core import evaluation, runner
from train.core.building import build_network
from train.core.config import (
    LaunchConfig,
    MeshConfig,
    NetworkConfig,
    from_json,
    load_config,
    save_config,
    to_json,
)
from train.core.data import DataInfo
from train.core.runner import keep_programs
from train.pretraining.recipe import Config

IMAGES = DataInfo((8, 8, 1), 10, classes=tuple(range(10)), pixels=True)


def test_knobs_reach_the_network():
    config = NetworkConfig(
        "dit", channels=16, depth=2, num_heads=2, stacked=True, remat="dots_saveable",
        attention="xla", bfloat16=True,
    )  # fmt: skip
    found = dict(build_network(config, IMAGES, 0).arguments)
    assert found["stacked"] and found["remat"] == "dots_saveable" and found["attention"] == "xla"
    for name, expected in (("none", False), ("blocks", True)):
        plain = NetworkConfig(channels=8, channel_mults=(1,), remat=name, attention_resolutions=())
        assert dict(build_network(plain, IMAGES, 0).arguments)["remat"] is expected
    for wrong, message in (
        ({"stacked": True}, "`network.stacked` is an option of a dit, got a unet"),
        ({"kind": "mlp", "attention": "xla"}, "`network.attention` must be left out for an mlp"),
    ):
        with pytest.raises(ValueError, match=message):
            Config(network=NetworkConfig(**wrong)).check()


def test_runs_of_before_keep_their_meaning():
    config = Config(network=NetworkConfig(remat="blocks"))
    stored = to_json(config)
    assert "launch" not in stored
    assert from_json(Config, stored) == config
    stored["network"]["remat"] = True
    assert from_json(Config, stored) == config


def test_a_mesh_makes_devices_of_a_cpu():
    code = """
import jax
from train.core.config import MeshConfig
from train.core.runner import build_mesh, launch
from train.pretraining.recipe import Config
config = Config(mesh=MeshConfig(data=2, fsdp=3))
launch(config)
print(list(build_mesh(config).shape.values()), jax.device_count())
launch(Config(mesh=MeshConfig(data=2)))  # too late, and no harm
print(jax.device_count())
"""
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.splitlines() == ["[2, 3, 1] 6", "6"]


def test_a_run_goes_on_with_other_devices(tmp_path):
    config = Config(run_dir=str(tmp_path), mesh=MeshConfig(data=4, fsdp=2))
    save_config(dataclasses.replace(config, launch=LaunchConfig("detect")))
    assert load_config(tmp_path, Config) == config
    launch = LaunchConfig(coordinator="a:1", num_processes=2, process_id=1)
    options = resume.Options(str(tmp_path), tensor=2, launch=launch)
    found = resume.resumed(options)
    assert found.mesh == MeshConfig(data=None, fsdp=2, tensor=2) and found.launch == launch
    assert resume.resumed(resume.Options(str(tmp_path))) == config


def test_the_log_says_how_fast_and_how_well(monkeypatch):
    times = iter([10.0, 12.0])
    monkeypatch.setattr(runner.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(runner, "chip_of", lambda device: Chip(1e12, 1.0, 1.0))
    lines = []

    class Writer:
        def scalars(self, step, values):
            lines.append(values)

        def close(self):
            pass

    log = runner.Log([Writer()], 0, 100, 32)
    log.flops = 8 * 10**10
    log(20, None, {"loss": 1.0})
    log(40, None, {"loss": 1.0})
    log.close()
    assert lines[0] == {"loss": 1.0}  # the first interval holds the compilation
    assert lines[1] == {
        "loss": 1.0,
        "steps_per_second": 10.0,
        "examples_per_second": 320.0,
        "tflops_per_second": 0.8,
        "utilisation": 0.8 / jax.device_count(),
    }


def test_some_steps_are_watched_by_the_profiler(tmp_path):
    step = jax.jit(lambda x: x + 1)
    profiled, x = runner.Profiled(step, 2, tmp_path / "profile"), jnp.zeros(())
    for _ in range(10):
        x = profiled(x)
    assert x == 10
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 0


def test_a_large_held_out_set_is_measured_by_a_part_that_never_changes():
    assert list(evaluation.references(5)) == [0, 1, 2, 3, 4]
    chosen = evaluation.references(200_000)
    assert len(chosen) == 50_000 == len(set(chosen.tolist()))
    assert (np.diff(chosen) > 0).all() and (chosen == evaluation.references(200_000)).all()


def test_programs_are_kept_where_one_says_or_for_this_processor(tmp_path, monkeypatch):
    found = {}
    monkeypatch.setattr(jax.config, "update", lambda name, value: found.update({name: value}))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    keep_programs()
    assert found["jax_compilation_cache_dir"] == str(tmp_path)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    keep_programs()
    folder = Path(found["jax_compilation_cache_dir"])
    assert folder.parent == Path.home() / ".cache" / "jaxdiff"
    assert folder.name.startswith(platform.machine())

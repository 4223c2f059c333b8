"""Eight virtual CPU devices, so that every test may shard; float32 unless a test asks for more."""

import gc
import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# Small factorisations are far slower on threads that compete with other workers.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest


@pytest.fixture
def x64():
    """Run one test in double precision, where it proves something."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Compiled programs hold memory maps, and a process may have only so many of them."""
    yield
    jax.clear_caches()
    gc.collect()

"""Eight virtual CPU devices, so that every test may shard; float32 unless a test asks for more."""

import atexit
import collections
import gc
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

flags = ["--xla_force_host_platform_device_count=8"]
# Compiling is most of the suite's time, running next to none of it: machine code stays as it comes.
# JAXDIFF_TEST_OPTIMISED=1 tests the programs that users get.
OPTIMISED = bool(os.environ.get("JAXDIFF_TEST_OPTIMISED"))
if not OPTIMISED:
    flags += ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
    # Loops without MLIR, half of what is left; newer versions know no such flag, and abort.
    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
        flags += ["--xla_cpu_use_fusion_emitters=false"]
os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")])
# Small factorisations are far slower on threads that compete with other workers.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Tracing makes millions of objects that live on; looking through them for cycles takes a tenth.
gc.set_threshold(100_000, 50, 50)

# Recipes keep programs there, and tests themselves none: JAX looks for it when it is imported.
programs = os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
if programs is None:
    programs = tempfile.mkdtemp(prefix="jaxdiff-programs-")
    atexit.register(shutil.rmtree, programs, ignore_errors=True)

import equinox.internal as eqxi  # noqa: E402
import jax  # noqa: E402

os.environ["JAX_COMPILATION_CACHE_DIR"] = programs

import jax.numpy as jnp  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
import shapes  # noqa: E402

shapes.install()

if not OPTIMISED:
    # Diffrax steps back from the end of time a hundred times, half the program of a small sampler;
    # the same floats by arithmetic.
    eqxi.prevbefore = lambda t: t - jnp.abs(t) * (0.5 * jnp.finfo(t.dtype).eps)

MAPS = Path("/proc/self/maps")
# A worker takes whole files: one of these at the end would keep the others waiting.
LONGEST = ("test_notebooks.py", "conformance/", "test_recipes.py", "test_family.py")


def pytest_collection_modifyitems(items):
    """The longest files first."""
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONGEST))


SPENT = collections.Counter()


def pytest_runtest_logreport(report):
    SPENT[report.nodeid.split("::")[0].rpartition("/")[0]] += report.duration


def pytest_terminal_summary(terminalreporter):
    """What every family took, all workers together."""
    spent = ", ".join(f"{family} {seconds:.0f} s" for family, seconds in SPENT.most_common())
    terminalreporter.write_line(spent)


@pytest.fixture
def x64():
    """Run one test in double precision, where it proves something."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def unchecked():
    """Wrong arguments, of which the library's own errors are tested."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def count_programs(caplog):
    """Counts what was compiled since the test began, by the function's name."""
    with jax.log_compiles(), caplog.at_level("WARNING"):
        yield lambda name: sum(
            f"Compiling jit({name})" in record.getMessage() for record in caplog.records
        )


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Compiled programs hold memory maps, of which Linux gives a process 65530 at most."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 45_000:
        jax.clear_caches()
        gc.collect()

"""`import jaxdiff` needs the base dependencies alone."""

import subprocess
import sys

EXTRAS = (
    "grain",
    "array_record",
    "sklearn",
    "pyarrow",
    "PIL",
    "matplotlib",
    "tyro",
    "tqdm",
    "tensorboardX",
    "wandb",
)


def test_import_loads_no_extras_and_runs_without_them():
    program = f"""
import sys
for name in {EXTRAS}:
    sys.modules[name] = None  # importing it now fails
import jax, jaxdiff
assert jaxdiff.data.split and jaxdiff.training.load_run
oracle = jaxdiff.oracles.gaussian(jaxdiff.processes.VP(), [0.0, 0.0], jax.numpy.eye(2))
source = jaxdiff.data.array_source(jax.numpy.zeros((4, 2)))
for name, call in (
    ("sklearn", jaxdiff.data.digits),
    ("PIL", lambda: jaxdiff.data.image_folder(".")),
    ("array_record", lambda: jaxdiff.data.to_records(source, "records")),
    ("grain", lambda: next(iter(jaxdiff.data.make_loader(source, 2, seed=0)))),
):
    try:
        call()
    except ModuleNotFoundError as error:
        assert f"{{name}} is missing" in str(error) and "jaxdiff[train]" in str(error)
    else:
        raise AssertionError(name)
print(jaxdiff.sample(jax.random.key(0), oracle, (2,), 3, times=2).x.shape)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "(3, 2)", done.stderr

"""The documentation's files on extending the library run, and so do the examples of docstrings."""

import doctest
import importlib
import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxdiff

FILES = sorted((Path(__file__).parent.parent / "docs" / "extending").glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_runs(path, capsys):
    runpy.run_path(str(path))
    assert capsys.readouterr().out
    assert len(path.read_text().splitlines()) < 85


@pytest.mark.parametrize("name", ["guidance", "finetuning", "distillation", "unlearning"])
def test_pages_run(name, capsys, tmp_path, monkeypatch):
    """Their Python, from top to bottom; other pages need a run or a data set."""
    monkeypatch.chdir(tmp_path)
    text = (FILES[0].parent.parent / f"{name}.md").read_text()
    names = {"__name__": "__main__"}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, f"{name}.md", "exec"), names)
    capsys.readouterr()


def test_documents_are_whole():
    """No marks of two versions that were joined by hand."""
    root = FILES[0].parent.parent.parent
    for path in [
        *root.glob("*.md"),
        *(root / "docs").rglob("*.md"),
        *(root / "train").rglob("*.md"),
    ]:
        assert not re.search(r"^(<{7}|={7}|>{7})", path.read_text(), re.MULTILINE), path.name


def test_there_is_one_for_each_kind_and_the_page_shows_them():
    assert {path.stem for path in FILES} == {"guidance", "loss", "metric", "solver", "source"}
    page = (FILES[0].parent.parent / "extending.md").read_text()
    for path in FILES:
        # A formatter of Markdown's Python takes the marker for an expression.
        assert f'--8<-- "docs/extending/{path.name}"' in page


MODULES = {
    name: importlib.import_module(f"jaxdiff.{name}")
    for name in (
        *(
            "data",
            "finetuning",
            "geometry",
            "guidance",
            "likelihood",
            "losses",
            "metrics",
            "networks",
        ),
        *("oracles", "parallel", "predictions", "processes", "solvers", "traces", "training"),
    )
}
EXAMPLES = {
    test.name: test
    for module in (jaxdiff, *MODULES.values())
    for name, public in vars(module).items()
    if not name.startswith("_") and getattr(public, "__module__", "").startswith("jaxdiff")
    for test in doctest.DocTestFinder(recurse=False).find(public, name)
    if test.examples
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_docstrings(name):
    """Each says what it prints; packages and modules are at hand."""
    test = EXAMPLES[name]
    test.globs = {"jax": jax, "jnp": jnp, "np": np, "nnx": nnx, "jaxdiff": jaxdiff, **MODULES}
    report = []
    result = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert result.failed == 0, "".join(report)
    assert result.attempted > 0


def test_the_main_functions_have_examples():
    assert {"sample", "denoise", "invert", "log_likelihood", "ClassifierFree"} <= set(EXAMPLES)

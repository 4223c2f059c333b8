"""The documentation's files on extending the library run, and prove what they say."""

import runpy
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parent.parent / "docs" / "extending").glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_runs(path, capsys):
    runpy.run_path(str(path))
    assert capsys.readouterr().out
    assert len(path.read_text().splitlines()) < 85


def test_there_is_one_for_each_kind_and_the_page_shows_them():
    assert {path.stem for path in FILES} == {"guidance", "loss", "metric", "solver", "source"}
    page = (FILES[0].parent.parent / "extending.md").read_text()
    for path in FILES:
        # A formatter of Markdown's Python takes the marker for an expression.
        assert f'--8<-- "docs/extending/{path.name}"' in page

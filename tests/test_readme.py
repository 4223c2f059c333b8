"""Every Python example of the README runs, and every file it links to exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_example_runs(index, capsys):
    exec(compile(EXAMPLES[index], f"README example {index}", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert printed and "nan" not in printed
    if "EDMHeun" in EXAMPLES[index]:
        assert "158" in printed
        errors = [float(value) for value in printed.splitlines()[-1].split()]
        assert max(errors) < 0.05


def test_links_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_examples_are_short():
    assert len(EXAMPLES) == 7 and all(len(e.splitlines()) <= 32 for e in EXAMPLES)

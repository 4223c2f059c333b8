"""Tests of minutes; `make test-slow` runs them, continuous integration does not."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
MEASURED = []


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def measured():
    """Keep a line for the summary."""
    return MEASURED.append


def pytest_terminal_summary(terminalreporter):
    for line in MEASURED:
        terminalreporter.write_line(line)

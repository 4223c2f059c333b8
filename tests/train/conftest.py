import pytest

from train.core import runner


@pytest.fixture(autouse=True)
def programs_of_this_process_are_not_kept(monkeypatch):
    """Only commands in processes of their own keep them: the setting holds for a whole process."""
    monkeypatch.setattr(runner, "keep_programs", lambda: None)

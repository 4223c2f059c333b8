"""What the benchmarks write is read again, and compared only where that makes sense."""

import dataclasses
import itertools
import json

import pytest

from benchmarks import measure
from benchmarks.measure import Record, alternate
from benchmarks.results import Results, compared, run, verdict

ABOUT = {"device": "cpu", "processor": "P", "cores": 2, "date": "2026-01-01"}
RATIO = Record("scan", 1.0, "", 0.98, 1.02, "ratio")
TIME = Record("call", 300.0, "us", 290.0, 310.0, "seconds")
RATE = Record("loader", 5e5, "images/s", 4.9e5, 5.1e5, "rate")


def moved(record, factor):
    return Record.of(record.name, [factor * record.value], record.unit, record.kind)


def test_results_are_read_as_they_were_written(tmp_path):
    results = Results(ABOUT, [RATIO, TIME, RATE])
    results.save(tmp_path / "out.json")
    assert Results.load(tmp_path / "out.json") == results
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.parametrize(
    ("record", "factor", "said"),
    [
        (RATIO, 1.2, "worse"),
        (RATIO, 0.8, "better"),
        (RATE, 1.2, "better"),
        (RATE, 0.8, "worse"),
        (TIME, 1.2, "worse"),
        (TIME, 1.04, ""),  # beyond the quartiles, but small
        (TIME, 1.02, ""),
    ],
)
def test_changes_beyond_noise_and_threshold_are_marked(record, factor, said):
    assert verdict(record, moved(record, factor), same_machine=True) == said


def test_a_change_within_the_quartiles_of_either_is_noise():
    wide = dataclasses.replace(RATIO, low=0.7, high=1.3)
    assert verdict(wide, moved(RATIO, 1.2), same_machine=True) == ""
    uncertain = Record("scan", 1.2, "", 0.9, 1.3, "ratio")
    assert verdict(RATIO, uncertain, same_machine=True) == ""


def test_ratios_alone_compare_on_another_machine():
    before = Results(ABOUT, [RATIO, TIME, RATE])
    after = [moved(RATIO, 2), moved(TIME, 2), moved(RATE, 2), Record.of("new", [1.0], "", "ratio")]
    for field in ("device", "processor", "cores"):
        head, *table = compared(before, Results(ABOUT | {field: "other"}, after)).splitlines()
        assert "ratios alone compare" in head
        assert table[0] == f"{field}: {ABOUT[field]} -> other"
        assert table[-4].endswith("+100.0% worse")
        assert all(line.endswith("another machine") and "%" not in line for line in table[-3:-1])
        assert table[-1].endswith("not in the baseline")
    same = compared(before, Results(ABOUT, after)).splitlines()
    assert [line.split()[-1] for line in same[1:4]] == ["worse", "worse", "better"]


ROW = dataclasses.asdict(RATIO)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        {"about": {}, "records": []},
        {"about": ABOUT, "records": None},
        {"about": ABOUT, "records": [{"name": "scan"}]},
        {"about": ABOUT, "records": [ROW | {"kind": "speed"}]},
        {"about": ABOUT, "records": [ROW | {"value": "1", "low": "1", "high": "1"}]},
        {"about": ABOUT, "records": [ROW | {"value": float("nan")}]},
    ],
)
def test_a_broken_baseline_is_refused_before_anything_is_measured(tmp_path, content):
    path = tmp_path / "baseline.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match="`baseline` must be a file that --out wrote, got .*json"):
        run(iter(lambda: pytest.fail("measured"), None), None, path)


def test_a_run_is_printed_saved_and_compared(tmp_path, capsys):
    with pytest.raises(ValueError, match="`out` must lie in a directory that exists"):
        run(iter(()), tmp_path / "none" / "out.json", None)
    first = run(iter([RATIO]), tmp_path / "first.json", None)
    assert first.about["jax"] and first.about["cores"] >= 1
    run(iter([moved(RATIO, 2)]), None, tmp_path / "first.json")
    assert capsys.readouterr().out.endswith("+100.0% worse\n")


def test_functions_take_turns_and_busy_rounds_are_taken_again(monkeypatch):
    calls = []
    clock = itertools.count(step=100.0)  # others are always busy
    monkeypatch.setattr(measure, "others", lambda: next(clock))
    spent = alternate(lambda: calls.append("a"), lambda: calls.append("b"), rounds=2, warm=0)
    assert "".join(calls) == "abbaabba"
    assert len(spent) == 2 and all(len(row) == 2 for row in spent)
    monkeypatch.setattr(measure, "others", lambda: 0.0)
    calls.clear()
    alternate(lambda: calls.append("a"), rounds=2, warm=1)
    assert "".join(calls) == "aaa"

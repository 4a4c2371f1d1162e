"""The command that measures: every case has its place, results are compared before they are timed, runs go on."""

import json

import pytest
import torch

from benchmarks import command
from benchmarks.cpu import tables
from benchmarks.shared import machine
from benchmarks.shared.case import OURS, Case, Skip
from benchmarks.shared.results import Results, newest


def test_every_case_has_a_name_of_its_own_in_a_group():
    keys = [case.key(mode) for case in tables.CASES for mode in case.modes]
    assert len(set(keys)) == len(keys)
    assert {group for group, _, _ in keys} == set(tables.GROUPS)


def of_results(group, name, *results, **options):
    """A case whose sides give these results; ours comes first."""
    runs = {each: (lambda a=a: torch.tensor(a)) for each, a in zip((OURS, "torch", "another"), results)}
    return Case(group, name, lambda mode: runs, ("inference",), **options)


def absent(mode):
    raise Skip("the machine has no such unit")


CASES = [
    of_results("layers", "first", 1.0, 1.0),
    of_results("layers", "wrong", 1.0, 1.1),
    of_results("layers", "without its package", 1.0, 1.0, needs=("no_such_package",)),
    Case("layers", "impossible", absent, ("inference",)),
    of_results("gru", "last", 1.0, 1.0, 1.0),
]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "CASES", CASES)
    monkeypatch.setattr(machine, "BUSY", 1e9)  # other tests run beside this one
    monkeypatch.setattr(machine, "commit", lambda: "abcd1234")

    def main(*arguments, fails=False):
        options = [*arguments, "--rounds", "2", "--threads", "1", "--out", str(tmp_path / "results")]
        if fails:
            with pytest.raises(SystemExit, match="1 rows failed"):
                command.main(options)
        else:
            command.main(options)
        return capsys.readouterr().out

    main.folder = tmp_path / "results"
    return main


def rows_of(folder):
    (path,) = folder.glob("*.json")
    return {row["name"]: row for row in json.loads(path.read_text())["rows"]}


def test_rows_are_written_and_what_is_left_out_has_its_reason(run):
    said = run(fails=True)
    rows = rows_of(run.folder)
    assert list(rows) == ["first", "last"]
    assert rows["last"]["ratios"].keys() == {"torch", "another"}
    assert rows["first"]["commit"] == "abcd1234"
    assert "left out: layers: no_such_package is not installed (1 rows)" in said
    assert "left out: layers: the machine has no such unit (1 rows)" in said


def test_what_differs_is_not_timed():
    with pytest.raises(AssertionError, match="layers, wrong, inference: fastlstm"):
        CASES[1].measure("inference", 2, 1.0)
    with pytest.raises(AssertionError, match="gru, third, inference: another"):
        of_results("gru", "third", 1.0, 1.0, 1.1).measure("inference", 2, 1.0)
    alike = of_results("gru", "third", 1.0, 1.0, 1.1, unlike=("another",))
    assert alike.measure("inference", 2, 1.0)["ratios"].keys() == {"torch", "another"}


def test_a_run_goes_on_where_the_last_one_stopped(run, monkeypatch):
    run("layers", "--only", "first")
    before = rows_of(run.folder)["first"]
    before |= {"is_noisy": False}
    (path,) = run.folder.glob("*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rows": [before]}))
    assert "layers: 1 rows, 0 to be measured" in run("layers", "--only", "first")
    assert "gru: 1 rows, 1 to be measured" in run("gru", "layers", "--only", "first", "last")
    assert rows_of(run.folder)["first"] == before
    assert "layers: 1 rows, 1 to be measured" in run("layers", "--only", "first", "--again", "--list")


def test_a_row_whose_rounds_scattered_is_measured_again(run):
    run("gru")
    (path,) = run.folder.glob("*.json")
    report = json.loads(path.read_text())
    report["rows"][0]["is_noisy"] = True
    path.write_text(json.dumps(report))
    assert "gru: 1 rows, 1 to be measured" in run("gru", "--list")


def test_no_row_begins_after_the_time_that_is_given(run):
    run("layers", "gru", "--only", "first", "last", "--stop-after", "0.1")
    assert not run.folder.exists()


def test_ctrl_c_keeps_the_rows_before_and_says_that_the_command_goes_on(run, monkeypatch, capsys):
    def interrupted(mode):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "CASES", [CASES[0], Case("gru", "interrupted", interrupted, ("inference",))])
    with pytest.raises(SystemExit, match="130"):
        run("layers", "gru")
    assert "stopped; the same command goes on where it stopped" in capsys.readouterr().out
    assert list(rows_of(run.folder)) == ["first"]


def test_a_quick_run_writes_no_file(run):
    assert "no file is written" in run("gru", "--quick")
    assert not run.folder.exists()


def test_another_commit_takes_the_rows_of_the_last_with_it(tmp_path, monkeypatch):
    keys = {("layers", name, "inference") for name in ("first", "second")}
    row = {"group": "layers", "mode": "inference", "is_noisy": False}
    monkeypatch.setattr(machine, "commit", lambda: "1111")
    for name in ("first", "second", "no longer a case"):
        Results(tmp_path, {*keys, ("layers", "no longer a case", "inference")}).add(row | {"name": name})
    monkeypatch.setattr(machine, "commit", lambda: "2222")
    results = Results(tmp_path, keys)
    assert not results.has(("layers", "first", "inference"))
    results.add(row | {"name": "first"})
    (report,) = newest(tmp_path)
    assert {row["name"]: row["commit"] for row in report["rows"]} == {"first": "2222", "second": "1111"}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_row_without_a_result_leaves_that_of_its_commit_and_no_earlier_one(tmp_path, monkeypatch):
    item, row = ("layers", "first", "inference"), {"group": "layers", "name": "first", "mode": "inference"}
    monkeypatch.setattr(machine, "commit", lambda: "1111")
    results = Results(tmp_path, {item})
    results.add(row | {"is_noisy": True, "round": 1})
    results.add(row | {"is_noisy": False, "round": 2})
    results.add(row | {"is_noisy": True, "round": 3})
    assert results.rows[item]["round"] == 2
    assert results.has(item)
    monkeypatch.setattr(machine, "commit", lambda: "2222")
    later = Results(tmp_path, {item})
    later.add(row | {"is_noisy": True, "round": 4})
    assert later.rows[item]["round"] == 4
    assert not later.has(item)


def test_a_group_that_does_not_exist_is_told(capsys):
    with pytest.raises(SystemExit):
        command.main(["layer"])
    assert "argument GROUP: must be of layers, gru" in capsys.readouterr().err

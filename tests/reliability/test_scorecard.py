"""The scorecard's table, exit code and files; and the frozen order and augmentation of its check 19.

The checks themselves take minutes: make scorecard.
"""

import json
import os
import signal
from pathlib import Path

import pytest
from helpers.images import write_image_folder
from helpers.pipeline import image_dataset, train_transform

from reliability import scorecard
from reliability.exact import RECORDED, hash_augmented, hash_order
from reliability.harness import NotRunError, Result, Sandbox, launch, run_in_fork
from reliability.process import keep_ledger, kept_and_lost, read_ledger
from reliability.scorecard import BEGIN, CHECKS, END, Check


def run(tmp_path: Path, *words: str) -> tuple[int, dict]:
    """The exit code and the written JSON of a scorecard."""
    out = tmp_path / "card" / "scorecard.json"
    code = scorecard.main(["--short", "--fault-seed", "7", "--out", str(out), *words])
    return code, json.loads(out.read_text())


def good(sandbox: Sandbox) -> Result:
    return Result("1/1 | all", True)


def bad(sandbox: Sandbox) -> Result:
    return Result("19/20", False)


def broken(sandbox: Sandbox) -> Result:
    raise AssertionError("it broke")


def without_device(sandbox: Sandbox) -> Result:
    raise NotRunError("no GPU here")


def interrupted(sandbox: Sandbox) -> Result:
    raise KeyboardInterrupt


def replace_checks(monkeypatch, *measures) -> None:
    checks = tuple(Check(n, f"name {n}", m, "target") for n, m in enumerate(measures, start=1))
    monkeypatch.setattr(scorecard, "CHECKS", checks)


def test_every_check_has_its_row():
    assert [check.number for check in CHECKS] == list(range(1, len(CHECKS) + 1))
    for check in CHECKS:
        assert check.measure.__doc__
        assert check.target(short=True)
        assert check.target(short=False)


@pytest.mark.slow
def test_a_cheap_check(tmp_path, capsys):
    code, card = run(tmp_path, "--only", "13")
    assert code == 0
    assert (card["form"], card["fault_seed"]) == ("short", 7)
    (record,) = card["checks"]
    assert (record["number"], record["result"]) == (13, "PASS")
    output = capsys.readouterr().out
    assert "1 pass, 0 fail, 0 not run" in output
    assert "--fault-seed 7" in output


@pytest.mark.parametrize(
    ("measure", "result", "code"),
    [(bad, "FAIL", 1), (broken, "FAIL", 1), (without_device, "NOT RUN", 0)],
)
def test_a_check_that_did_not_pass_is_reported(
    measure, result, code, tmp_path, monkeypatch, capsys
):
    replace_checks(monkeypatch, good, measure)
    exit_code, card = run(tmp_path)
    assert exit_code == code
    assert [record["result"] for record in card["checks"]] == ["PASS", result]
    assert result in capsys.readouterr().out.splitlines()[3]


def test_an_interrupted_scorecard_keeps_what_it_measured(tmp_path, monkeypatch):
    def leave(code: int) -> None:
        raise SystemExit(code)

    replace_checks(monkeypatch, good, interrupted)
    monkeypatch.setattr(scorecard.os, "_exit", leave)
    with pytest.raises(SystemExit, match="130"):
        run(tmp_path)
    card = json.loads((tmp_path / "card" / "scorecard.json").read_text())
    assert [record["number"] for record in card["checks"]] == [1]


def test_a_resumed_scorecard_runs_what_is_missing(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}{END}")
    replace_checks(monkeypatch, bad, good)
    run(tmp_path, "--only", "2")
    replace_checks(monkeypatch, bad, broken)
    code, card = run(tmp_path, "--resume", "--write", str(page))
    assert code == 1
    assert [(record["number"], record["result"]) for record in card["checks"]] == [
        (1, "FAIL"),
        (2, "PASS"),
    ]
    assert "1 pass, 1 fail" in page.read_text()
    replace_checks(monkeypatch, good, broken)
    code, card = run(tmp_path, "--resume", "--only", "1")
    assert code == 0
    assert [record["result"] for record in card["checks"]] == ["PASS", "PASS"]


def test_a_scorecard_of_other_code_or_faults_is_not_resumed(tmp_path, monkeypatch, capsys):
    replace_checks(monkeypatch, good, good)
    _, card = run(tmp_path, "--only", "2")
    out = tmp_path / "card" / "scorecard.json"
    for words, message in {
        ("--short", "--fault-seed", "8"): "has fault seed 7; remove --fault-seed",
        (): "has form short, now it is full",
    }.items():
        with pytest.raises(SystemExit):
            scorecard.main([*words, "--resume", "--out", str(out)])
        assert message in capsys.readouterr().err
    monkeypatch.setattr(scorecard.compat, "revision", lambda: "0123")
    with pytest.raises(SystemExit):
        scorecard.main(["--short", "--resume", "--out", str(out)])
    assert f"has commit {card['commit']}, now it is 0123" in capsys.readouterr().err


def test_the_table_of_a_page_is_replaced(tmp_path, monkeypatch):
    replace_checks(monkeypatch, good, bad)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        _, card = run(tmp_path, "--write", str(page))
    lines = page.read_text().splitlines()
    assert lines[:2] == ["before", BEGIN]
    assert lines[-2:] == [END, "after"]
    for value in (card["commit"], card["machine"], card["date"].split()[0], "fault seed 7"):
        assert value in lines[2]
    assert "1 pass, 1 fail, 0 not run" in lines[2]
    assert lines[-4:-2] == [
        "| 1 | name 1 | target | 1/1 \\| all | PASS | 0 s |",
        "| 2 | name 2 | target | 19/20 | FAIL | 0 s |",
    ]


def test_what_would_fail_at_the_end_is_refused_at_the_start(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"{END}{BEGIN}")
    refused = {
        ("--only", "13,99"): f"--only 99: expected numbers from 1 to {len(CHECKS)}",
        ("--out", str(tmp_path)): "a folder, expected a file to write",
        ("--write", str(page)): "expected a page with",
        ("--write", str(tmp_path / "none.md")): "expected a page with",
        ("--write", str(page), "--only", "13"): "remove --only",
        ("--resume", "--out", str(tmp_path / "none.json")): "does not exist",
    }
    for words, message in refused.items():
        with pytest.raises(SystemExit):
            scorecard.main(list(words))
        assert message in capsys.readouterr().err


def test_the_ledger_counts_what_was_kept_and_what_was_lost(tmp_path):
    attempts = [
        "0 1\n0 2\n0 3\n0 4\n0 5\n",  # two steps of two images, and half of one
        "",  # killed before it read anything
        "at 1\n0 3\n0 4\n",  # one step was saved
        "at 2\n0 5\n0 6\n",
    ]
    paths = [tmp_path / str(number) for number in range(len(attempts))]
    for path, text in zip(paths, attempts, strict=True):
        path.with_name(f"{path.name}-0").write_text(text)
    kept, lost = kept_and_lost(paths, rank=0, share=2)
    assert kept == [f"0 {number}" for number in range(1, 7)]
    assert lost == 1


def test_the_ledger_has_what_a_process_reads(tmp_path):
    write_image_folder(tmp_path / "images", train=2, val=1)

    def read_three() -> None:
        keep_ledger(tmp_path / "ledger", rank=1)
        dataset = image_dataset(tmp_path / "images", train=True, transform=train_transform(32))
        for index in (3, 0, 5):
            dataset[2, index, 0]

    run_in_fork(read_three)
    assert read_ledger(tmp_path / "ledger", rank=1) == (0, ["2 3", "2 0", "2 5"])


def test_victims_hear_signals_that_the_scorecard_ignores(tmp_path):
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        victim = launch(
            log=tmp_path / "log", hooks=[lambda rank: os.kill(os.getpid(), signal.SIGHUP)]
        )
        assert victim.wait() == [-signal.SIGHUP]
    finally:
        signal.signal(signal.SIGHUP, former)


def test_order_and_augmentation_are_frozen():
    """Other values would change every run that resumes under a new version."""
    recorded = json.loads(RECORDED.read_text())
    assert hash_order() == recorded["order"]
    assert hash_augmented() == recorded["augmented"]

"""tests/reliability/scorecard.py: its table, its exit code, and what it writes; the figures themselves take minutes.

pytest tests/test_scorecard.py
"""

import json
from pathlib import Path

import pytest

from reliability import scorecard
from reliability.exact import GOLDEN, batch_hash, order_hash
from reliability.harness import Lab, NotRunError, Outcome
from reliability.process import committed
from reliability.scorecard import FIGURES, Figure


def run(tmp_path: Path, *words: str) -> tuple[int, dict]:
    """The exit code and the written JSON of a scorecard."""
    out = tmp_path / "card" / "scorecard.json"
    code = scorecard.main(["--short", "--fault-seed", "7", "--out", str(out), *words])
    return code, json.loads(out.read_text())


def test_every_figure_has_its_line():
    assert [figure.number for figure in FIGURES] == list(range(1, 25))
    for figure in FIGURES:
        assert figure.measure.__doc__
        assert figure.target(short=True)
        assert figure.target(short=False)


def test_a_cheap_figure(tmp_path, capsys):
    code, card = run(tmp_path, "--only", "13")
    assert code == 0
    assert (card["form"], card["fault_seed"]) == ("short", 7)
    (record,) = card["figures"]
    assert (record["number"], record["result"]) == (13, "PASS")
    output = capsys.readouterr().out
    assert "1 pass, 0 fail, 0 not run" in output
    assert "again: --fault-seed 7" in output


def broken(lab: Lab) -> Outcome:
    raise AssertionError("it broke")


def without_device(lab: Lab) -> Outcome:
    raise NotRunError("no GPU here")


@pytest.mark.parametrize(
    ("measure", "result", "code"),
    [
        (lambda lab: Outcome("19/20", False), "FAIL", 1),
        (broken, "FAIL", 1),
        (without_device, "NOT RUN", 0),
    ],
)
def test_what_did_not_pass_is_said(measure, result, code, tmp_path, monkeypatch, capsys):
    figures = (
        Figure(1, "good", lambda lab: Outcome("1/1", True), "1/1"),
        Figure(2, "x", measure, "y"),
    )
    monkeypatch.setattr(scorecard, "FIGURES", figures)
    exit_code, card = run(tmp_path)
    assert exit_code == code
    assert [record["result"] for record in card["figures"]] == ["PASS", result]
    assert result in capsys.readouterr().out.splitlines()[3]


def test_what_was_measured_before_an_interruption_is_kept(tmp_path, monkeypatch):
    def interrupted(lab: Lab) -> Outcome:
        raise KeyboardInterrupt

    def leave(code: int) -> None:
        raise SystemExit(code)

    figures = (
        Figure(1, "good", lambda lab: Outcome("1/1", True), "1/1"),
        Figure(2, "x", interrupted, "y"),
    )
    monkeypatch.setattr(scorecard, "FIGURES", figures)
    monkeypatch.setattr(scorecard.os, "_exit", leave)
    with pytest.raises(SystemExit, match="130"):
        run(tmp_path)
    card = json.loads((tmp_path / "card" / "scorecard.json").read_text())
    assert [record["number"] for record in card["figures"]] == [1]


def test_what_would_fail_at_the_end_is_refused_at_the_start(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "--only", "13,25")
    assert "--only 25: expected numbers from 1 to 24" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        scorecard.main(["--only", "13", "--out", str(tmp_path)])
    assert "a folder, expected a file to write" in capsys.readouterr().err


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
    kept, lost = committed(paths, rank=0, share=2)
    assert kept == [f"0 {number}" for number in range(1, 7)]
    assert lost == 1


def test_order_and_augmentation_are_frozen():
    """Other values would change every run that goes on under a new version."""
    golden = json.loads(GOLDEN.read_text())
    assert order_hash() == golden["order"]
    assert batch_hash() == golden["augmented"]

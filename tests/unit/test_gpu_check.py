"""tools/gpu_check.py: every group's code on the CPU, and what becomes of groups that hang, die, or were done before.

pytest tests/unit/test_gpu_check.py
"""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tools import gpu_check
from tools.gpu_checks.common import Setting
from tools.gpu_checks.groups import ALL, ORDER, Group, run_group
from tools.gpu_checks.report import Report, ResultFile, read_records, table

ROOT = Path(__file__).resolve().parents[2]
TINY = Setting(torch.device("cpu"), tiny=True)
SLOW = {7, 8, 10}


@pytest.fixture(autouse=True)
def unchanged_torch():
    """Restore what groups change for their own process."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


# --- The groups -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in sorted(ORDER)]
)
def test_a_group_runs_on_the_cpu_and_meets_its_bars(number):
    output = io.StringIO()
    run_group(ALL[number], Report(number, output), TINY)
    records = [json.loads(line) for line in output.getvalue().splitlines()]
    assert any("what" in record for record in records)
    assert [record for record in records if record.get("ok") is False] == []
    assert all(record["group"] == number for record in records)


def test_what_a_group_needs_and_is_not_installed(monkeypatch):
    output = io.StringIO()
    group = Group(8, "main.py", 70, "program.check_program", needs=("yacs", "no_such_package"))
    run_group(group, Report(8, output), TINY)
    assert json.loads(output.getvalue())["skipped"] == "needs no_such_package"


@pytest.mark.slow
def test_missing_packages_stop_no_other_group():
    """Nothing that they import needs yacs or simplejpeg."""
    modules = {ALL[n].function.split(".")[0] for n in ORDER if not ALL[n].needs}
    names = ", ".join(f"tools.gpu_checks.{name}" for name in sorted(modules))
    code = "import sys; sys.modules['yacs'] = sys.modules['simplejpeg'] = None; "
    code += f"import {names}, engine.loop, tools.gpu_check"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# --- The program ----------------------------------------------------------------------------------

RESULT = "import json; print(json.dumps({'group': %d, 'what': 'speed', 'value': 1.5, 'unit': 'images/s'}))"


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """A function that runs the program with groups of one line of Python each; exit code, output and records."""
    monkeypatch.setattr(
        gpu_check, "describe_subject", lambda args: {"commit": "abc", "device": "card"}
    )
    path = tmp_path / "check.jsonl"

    def run(programs: dict[int, str], *more: str):
        monkeypatch.setattr(
            gpu_check,
            "command_of",
            lambda group, args: [sys.executable, "-c", programs[group.number]],
        )
        only = ",".join(map(str, programs))
        code = gpu_check.main(["--json", str(path), "--only", only, "--device", "cpu", *more])
        return code, capsys.readouterr(), read_records(path)

    return run


def test_results_and_a_table(check):
    code, printed, records = check({0: RESULT % 0, 5: RESULT % 5})
    assert code == 0
    assert [r["end"] for r in records if "end" in r] == ["done", "done"]
    assert "| 5 speed, eager | speed | 1.5 images/s | |" in printed.out
    assert "All bars are met." in printed.out


def test_a_missed_bar_is_exit_code_1_and_a_speed_never(check):
    bar = 'print(\'{"group": 1, "bar": "error: at most 1e-4", "ok": false}\')'
    code, printed, _ = check({0: RESULT % 0, 1: bar})
    assert code == 1
    assert "MISSED error: at most 1e-4" in printed.out


def test_a_group_that_hangs_or_dies_costs_no_other(check, monkeypatch):
    monkeypatch.setattr(gpu_check, "PATIENCE", 0.02)
    hang = f"{RESULT % 1}; import time; time.sleep(600)".replace(
        "print(", "print(flush=True, *("
    ).replace("}))", "}),))")
    die = "import os; os.kill(os.getpid(), 9)"
    fail = "raise ValueError('no such kernel')"
    code, printed, records = check({1: hang, 2: die, 3: fail, 4: RESULT % 4})
    assert code == 1
    assert "1 paths against float64 | speed | 1.5" in printed.out  # what it had found
    ends = {r["group"]: r["end"] for r in records if "end" in r}
    assert ends[1].startswith("made no end in")
    assert ends[2].startswith("was ended by signal 9")
    assert ends[3].endswith("failed with exit code 1: ValueError: no such kernel")
    assert ends[4] == "done"


def test_the_same_file_continues_with_what_is_missing(check):
    once = RESULT % 0
    check({0: once, 3: "raise SystemExit(3)"})
    code, _, records = check({0: "raise SystemExit('it was done')", 3: RESULT % 3})
    assert code == 0
    assert [r["group"] for r in records if "end" in r] == [0, 3]


def test_a_file_of_another_commit_is_refused(check, monkeypatch, tmp_path):
    check({0: RESULT % 0})
    monkeypatch.setattr(
        gpu_check, "describe_subject", lambda args: {"commit": "def", "device": "card"}
    )
    code, printed, records = check({1: RESULT % 1})
    assert code == 2
    assert "'commit': 'abc'" in printed.err
    assert len(records) == 3
    notes = tmp_path / "notes.txt"
    notes.write_text("my notes\n")
    assert gpu_check.main(["--json", str(notes), "--device", "cpu"]) == 2
    assert notes.read_text() == "my notes\n"


def test_a_group_starts_only_if_the_budget_lasts(check):
    code, printed, records = check({0: RESULT % 0, 5: RESULT % 5}, "--budget", "20")
    assert code == 1
    assert "group 5, speed, eager: 20 s are left, it takes 50" in printed.out
    assert "NOT RUN group 5, speed, eager" in printed.out
    assert [r["group"] for r in records if "end" in r] == [0]


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    path = tmp_path / "check.jsonl"
    ResultFile(path, {"commit": "abc"}).add({"group": 0, "what": "a", "value": 1, "unit": ""})
    with path.open("a") as file:
        file.write('{"group": 0, "wh')
    assert len(read_records(path)) == 2
    assert "| 0 title | a | 1  | |" in table(read_records(path), lambda number: "title")


@pytest.mark.slow
def test_the_table_comes_after_sigterm(tmp_path):
    path = tmp_path / "check.jsonl"
    command = [
        sys.executable,
        "tools/gpu_check.py",
        "--json",
        str(path),
        "--device",
        "cpu",
        "--tiny",
    ]
    process = subprocess.Popen(
        [*command, "--only", "0,5"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    while not path.exists() or '"end"' not in path.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGTERM
    assert "| 0 machine | product" in printed
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if _is_ours(p, str(path))]


def _is_ours(cmdline: Path, path: str) -> bool:
    try:
        return path.encode() in cmdline.read_bytes()
    except OSError:
        return False


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_card(tmp_path, capsys):
    assert gpu_check.main(["--json", str(tmp_path / "check.jsonl")]) == 2
    error = capsys.readouterr().err
    assert "no CUDA device can be used" in error
    assert "--device cpu --tiny" in error
    assert os.listdir(tmp_path) == []
    assert gpu_check.main(["--json", str(tmp_path / "check.jsonl"), "--only", "0,99"]) == 2

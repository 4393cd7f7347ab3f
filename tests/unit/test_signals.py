"""Stop requests: which signals are handled, what they raise, and the time limit."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import main
from engine import evaluate
from utils import signals
from utils.errors import StopRequested
from utils.signals import SIGNALS, StopRequest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("restore_signals")
ARGUMENTS = ["--cfg", "configs/cifar10.yaml"]


@pytest.fixture
def ended(monkeypatch) -> list[int]:
    """The exit codes with which the process would have ended at once."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


@contextlib.contextmanager
def ignored(*numbers: int):
    former = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_an_evaluation_with_128_and_its_number(number, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate", lambda *args: os.kill(os.getpid(), number))
    assert main.main(["--eval", *ARGUMENTS]) == 128 + number


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_was_ignored_stays_ignored(number):
    with ignored(number), StopRequest().handle_signals() as stop:
        stop.start_evaluation()
        os.kill(os.getpid(), number)
        assert not stop.requested


def test_a_background_job_of_a_script_hears_the_interrupt_that_is_sent_to_it():
    """Its shell has it ignore SIGINT and SIGQUIT."""
    with ignored(signal.SIGINT, signal.SIGQUIT), StopRequest().handle_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested


def test_the_first_signal_counts_and_only_a_later_interrupt_ends_at_once(ended, monkeypatch):
    monkeypatch.setattr(signals, "SAME_INTERRUPT", 0.2)
    with StopRequest().handle_signals() as stop:
        stop.start_training(0)
        stop.defer_to_steps()
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.agree() == "SIGHUP was received"
        time.sleep(0.1)
        assert ended == []
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: ended)
    assert ended[0] == 130


def test_a_process_that_waits_for_others_at_the_start_ends_after_a_grace(ended, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(signals, "GROUP_GRACE", 0.2)
    reports = []
    with StopRequest().handle_signals() as stop:
        stop.start_training(0)
        stop.raise_if_requested(lambda *report: reports.append(report))
        os.kill(os.getpid(), signal.SIGTERM)  # noted, as the others have to agree
        wait_until(lambda: ended)
    assert ended == [75]
    ((state, code, message),) = reports
    assert (state, code) == ("stopped", 75)
    assert "SIGTERM was received before the first step" in message


def test_processes_agree_before_the_first_step(monkeypatch):
    monkeypatch.setattr("utils.distributed.all_reduce_max", lambda value: signal.SIGUSR2)
    with StopRequest().handle_signals() as stop:
        stop.start_training(0)
        with pytest.raises(StopRequested, match="SIGUSR2 was received before the first step"):
            stop.defer_to_steps()


def test_a_forked_process_does_not_stop_the_run():
    with StopRequest().handle_signals() as stop:
        stop.start_training(0)
        if not (pid := os.fork()):
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(stop.requested)
        assert os.waitpid(pid, 0)[1] == 0
        assert not stop.requested


def test_handlers_and_threads_are_gone_afterwards():
    former, threads = signal.getsignal(signal.SIGTERM), threading.active_count()
    with StopRequest().handle_signals():
        assert signal.getsignal(signal.SIGTERM) != former
    assert signal.getsignal(signal.SIGTERM) == former
    assert threading.active_count() == threads


# --- The time limit -------------------------------------------------------------------------------


@pytest.mark.parametrize("restarts", ["0", "1"])
def test_the_time_limit_counts_over_restarts_of_torchrun(restarts, monkeypatch):
    monkeypatch.setattr(signals, "_seconds_since_torchrun", lambda: 100.0)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    StopRequest().start_training(200)
    stop = StopRequest()
    if restarts == "0":
        stop.start_training(50)  # at least one step is trained
        assert "MAX_SECONDS" in stop.agree()
    else:
        with pytest.raises(StopRequested, match="MAX_SECONDS is up, counted from torchrun's start"):
            stop.start_training(50)


def test_the_start_of_torchrun_is_that_of_the_session_leaders_parent():
    code = "from utils import signals; print(signals._seconds_since_torchrun())"
    wrapped = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    started = int(signals._read_stat(os.getpid())[19]) / os.sysconf("SC_CLK_TCK")
    for program in (code, wrapped):
        found = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, "TORCHELASTIC_RUN_ID": "none"},
            start_new_session=True,
            capture_output=True,
            text=True,
            check=True,
        )
        passed = time.clock_gettime(time.CLOCK_BOOTTIME) - started
        assert boot - started - 0.1 <= float(found.stdout) <= passed
    assert signals._seconds_since_torchrun() == 0

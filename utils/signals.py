"""Stop requests: by a signal or a time limit, at a step on which all processes agree.

Imports no torch: main.py handles signals before that import, which takes seconds.
"""

import contextlib
import enum
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from utils.errors import StopRequested

# SIGUSR1 is what schedulers send before a job's time limit, SIGXCPU at the limit of CPU time, SIGHUP a lost terminal.
SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
TIME_IS_UP = 1_000  # larger than the number of any signal
TIME_IS_UP_TEXT = "the time of TRAIN.MAX_SECONDS is up"

# Seconds for what has nothing to save to end by itself, and for several processes to agree on it. The main thread may
# wait inside of torch, and Python drops an exception that a signal raises in a destructor.
GRACE, GROUP_GRACE = 2.0, 10.0
# A launcher passes Ctrl-C on to processes that the terminal has already sent it to: seconds until a second SIGINT is a
# person's.
SAME_INTERRUPT = 0.5
END = b"\0"  # no signal's number


class Interrupted(KeyboardInterrupt):
    """A signal ends a command that has nothing to save."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Phase(enum.Enum):
    """What a signal means for the command that runs."""

    PARSING = enum.auto()  # it is not yet known what runs
    EVALUATION = enum.auto()  # nothing is to be saved: Interrupted
    START = (
        enum.auto()
    )  # before the first step of a training: StopRequested, nothing is to be saved
    STEPS = enum.auto()  # it is noted, for `agree` to report after the step


class StopRequest:
    """Whether this run was asked to stop, by a signal or because its time is up."""

    def __init__(self) -> None:
        self._on_exit: Callable[[str, int, str], None] = lambda state, code, message: None
        self._deadline = float("inf")
        self._received = 0
        self._phase = Phase.PARSING
        self._pid = os.getpid()
        self._alone = True

    @contextmanager
    def handle_signals(self) -> Iterator["StopRequest"]:
        """Handle SIGNALS instead of dying of them; the former handlers are restored at the end.

        A signal that was ignored before, as SIGHUP is under nohup, stays ignored.
        """
        global _current
        former = {number: signal.getsignal(number) for number in SIGNALS if not _is_ignored(number)}
        for number in former:
            signal.signal(number, self._note)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        former_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        listener = threading.Thread(target=self._listen, args=(reader, former), daemon=True)
        listener.start()
        _current, former_request = self, _current
        try:
            yield self
        finally:
            _current = former_request
            for number, handler in former.items():
                # After a request the process is about to exit: another signal must not change its exit code.
                signal.signal(number, signal.SIG_IGN if self._received else handler)
            signal.set_wakeup_fd(former_writer)
            os.write(writer, END)
            listener.join()
            os.close(writer)
            os.close(reader)

    def start_evaluation(self) -> None:
        """From now on a signal raises Interrupted at once."""
        self._enter(Phase.EVALUATION)

    def start_training(self, max_seconds: float) -> None:
        """From now on a signal raises StopRequested at once or, of several processes, at the next `raise_if_requested`.

        max_seconds: time since the launch after which the run stops; 0: no limit. Raises StopRequested where torchrun
        has started the processes again after that time.
        """
        if max_seconds:
            left = max_seconds - _seconds_since_torchrun()
            self._deadline = time.monotonic() + left
            if left < 0 and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
                raise StopRequested(
                    f"{TIME_IS_UP_TEXT}, counted from torchrun's start. Start the same command again to resume."
                )
        self._alone = os.environ.get("WORLD_SIZE", "1") == "1"
        self._enter(Phase.START)

    def raise_if_requested(self, on_exit: Callable[[str, int, str], None]) -> None:
        """Raise StopRequested on all processes if one got a signal before the first step. A collective.

        on_exit: from now on called with (state, exit code, message) before the process ends without its main thread.
        """
        self._on_exit = on_exit
        self._raise_if_received()

    def defer_to_steps(self) -> None:
        """From now on a signal is only noted, for `agree` to report. A collective."""
        self._raise_if_received()
        self._phase = Phase.STEPS

    @property
    def requested(self) -> bool:
        """Whether this process, perhaps alone, was asked to stop."""
        return bool(self._own())

    def agree(self) -> str | None:
        """The reason for all processes to stop now, or None. A collective: every process calls it at the same step."""
        from utils.distributed import all_reduce_max

        agreed = all_reduce_max(self._own())
        if not agreed:
            return None
        self._received = agreed
        return TIME_IS_UP_TEXT if agreed == TIME_IS_UP else _was_received(agreed)

    def _raise_if_received(self) -> None:
        from utils.distributed import all_reduce_max

        if received := all_reduce_max(self._received):
            self._received = received
            raise StopRequested(_before_first_step(received))

    def _own(self) -> int:
        return self._received or (TIME_IS_UP if time.monotonic() > self._deadline else 0)

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        if self._received:
            self._raise()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if (
            os.getpid() != self._pid or self._received
        ):  # in a loader worker that has just begun; or a further signal
            return
        self._received = number
        self._raise()

    def _raise(self) -> None:
        if self._phase is Phase.EVALUATION:
            raise Interrupted(self._received)
        if self._phase is Phase.START and self._alone:
            raise StopRequested(_before_first_step(self._received))

    # A second thread, as Python handles signals in the main one, which may wait for other processes inside of torch.

    def _listen(self, reader: int, handled: dict) -> None:
        """End the process on a second SIGINT, or where it has nothing to save and does not end by itself in time."""
        interrupted, first, deadline = 0.0, 0, float("inf")
        while True:
            wait = max(0.0, deadline - time.monotonic()) if first else None
            if not select.select([reader], [], [], wait)[0]:
                deadline = float("inf")
                if self._phase in (Phase.PARSING, Phase.START):
                    message = _before_first_step(first)
                    self._exit("stopped", StopRequested.exit_code, f"StopRequested: {message}")
                if self._phase is Phase.EVALUATION:
                    self._exit("interrupted", 128 + first, _was_received(first))
                first = 0
                continue
            received = os.read(reader, 512)
            if END in received:
                return
            now = time.monotonic()
            for number in filter(handled.__contains__, received):
                if not first:
                    in_group = self._phase is not Phase.EVALUATION and not self._alone
                    first, deadline = number, now + (GROUP_GRACE if in_group else GRACE)
                if number == signal.SIGINT:
                    if interrupted and now - interrupted > SAME_INTERRUPT:
                        self._exit("interrupted", 128 + signal.SIGINT, "SIGINT was received again")
                    interrupted = interrupted or now

    def _exit(self, state: str, code: int, message: str) -> None:
        self._on_exit(state, code, message)
        with contextlib.suppress(OSError):
            sys.stderr.write(f"{message}\n")
        os._exit(code)


_current: StopRequest | None = None


def is_stopping() -> bool:
    """Whether the command that runs in this process was asked to stop."""
    return _current is not None and _current.requested


def _was_received(number: int) -> str:
    return f"{signal.Signals(number).name} was received"


def _before_first_step(number: int) -> str:
    return f"{_was_received(number)} before the first step. Start the same command again."


def _is_ignored(number: int) -> bool:
    if signal.getsignal(number) != signal.SIG_IGN:
        return False
    # A shell's script has its background jobs ignore SIGINT and SIGQUIT: a SIGINT that is sent to one is meant.
    in_background = signal.getsignal(signal.SIGQUIT) == signal.SIG_IGN
    return not (number == signal.SIGINT and in_background)


def _seconds_since_torchrun() -> float:
    """Seconds since the start of the torchrun that started this process; 0 without one.

    It puts each process into a session of its own, perhaps with a wrapper between: the session leader's parent is
    torchrun, which stays the same over its restarts.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0.0
    with contextlib.suppress(OSError, ValueError, IndexError):
        agent = int(_read_stat(os.getsid(0))[1])
        started = int(_read_stat(agent)[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    return 0.0


def _read_stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the third on: state, parent …; the 20th is the start, in ticks since boot."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()

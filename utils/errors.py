"""The errors a user can cause, each with its exit code; anything else that escapes is a bug (exit 1).

A message names the file or key, says what was expected and what to do. torchrun hides a worker's exit code behind
its own 1, so the code is written to the run's `status.json` too.
"""

import functools
import os
import sys
from collections.abc import Callable

from utils.streams import protect_streams


class UserError(Exception):
    """Base of every error that a user can fix; never raised itself."""

    exit_code = 1
    on_all = False  # whether every process of the run raises it: one on each machine prints it


class ConfigError(UserError):
    """A command line or configuration that cannot be run."""

    exit_code = 2


class DataError(UserError):
    """A dataset that is missing, malformed or holds files that cannot be read."""

    exit_code = 3


class CheckpointError(UserError):
    """Weights or a checkpoint that are missing, damaged or for another model."""

    exit_code = 4


class DivergedError(UserError):
    """The loss or the gradient is no longer a finite number."""

    exit_code = 5
    on_all = True


class StorageError(UserError):
    """The output folder is read-only, full or another run's, a path is forbidden, or a limit of the machine is met."""

    exit_code = 6


class ProcessLost(UserError):
    """Another process of the run has ended or hangs, so that this one cannot continue."""


class StopRequested(UserError):
    """The run was asked to stop; it is saved and resumes when it is started again."""

    exit_code = 75
    on_all = True


def explain_denied(error: PermissionError) -> StorageError:
    """The error of a path that this user may not open, wherever it was met: Python's names neither user nor remedy."""
    user = f"user {os.geteuid()}"
    return StorageError(
        f"{error.filename}: {error.strerror}. Allow {user} to open it and the folders above it, or name another path."
    )


def as_exit_code(main: Callable[[list[str]], None]) -> Callable[[list[str]], int]:
    """A decorator for a tool's `main`: return 0, or print a UserError in one line and return its exit code.

    Ctrl-C gives 130, without a traceback.
    """

    @functools.wraps(main)
    def wrapped(arguments: list[str]) -> int:
        protect_streams()
        try:
            main(arguments)
        except (UserError, PermissionError) as caught:
            error = explain_denied(caught) if isinstance(caught, PermissionError) else caught
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            print("Interrupted.", file=sys.stderr)
            return 130
        return 0

    return wrapped

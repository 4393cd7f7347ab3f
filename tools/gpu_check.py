#!/usr/bin/env python
"""Check of a GPU: everything that the project computes there, correctness first, then speed, in at most eight minutes.

Every group of checks runs in a process of its own with a time limit, and every result is written to the file of --json
at once. The same command with the same file continues with the groups that are missing. The table is printed from the
file at the end, and after SIGTERM or Ctrl-C. Exit code: 0 all bars are met, 1 some are not; speeds have no bars.

It runs under torch 2.11 and later; yacs and simplejpeg are needed by the groups that run main.py and loaders alone.

examples:
  python tools/gpu_check.py --json check.jsonl
  python tools/gpu_check.py --json check.jsonl --only 0,1,2,3
  python tools/gpu_check.py --json /tmp/tiny.jsonl --device cpu --tiny --only 0,9
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.gpu_checks.groups import ALL, ORDER, WARM_UP, Group
from tools.gpu_checks.processes import end, start
from tools.gpu_checks.report import ResultFile, read_records, table
from utils.errors import ConfigError, UserError

PATIENCE = 2.5  # a group may take so many times what it takes on an H100
UNTIMED = (1, 2, 3, 4)  # groups that the warm-up beside them does not disturb


def parse(arguments: list[str]) -> argparse.Namespace:
    """The flags. Raises ConfigError."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", type=Path, required=True, metavar="FILE", help="results, a line each"
    )
    parser.add_argument(
        "--budget", type=float, default=480, metavar="SECONDS", help="for all groups"
    )
    parser.add_argument("--only", default="", metavar="N,N,…", help="groups: " + ", ".join(
        f"{number} {ALL[number].title}" for number in sorted(ORDER)))  # fmt: skip
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="small models: only to see that it runs"
    )
    args = parser.parse_args(arguments)
    words = [word for word in args.only.split(",") if word]
    if unknown := [word for word in words if not word.isdigit() or int(word) not in ORDER]:
        raise ConfigError(
            f"--only {', '.join(unknown)}: groups are {', '.join(map(str, sorted(ORDER)))}"
        )
    args.groups = [ALL[n] for n in ORDER if not words or str(n) in words]
    return args


def describe_subject(args: argparse.Namespace) -> dict[str, object]:
    """What is checked: this code on this device. Raises ConfigError where there is no such device."""
    import torch  # takes seconds, which --help need not wait for

    from engine.compat import device_name, revision

    if args.device == "cuda":
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"no CUDA device can be used: {reason}. Install or renew NVIDIA's driver, or try the program with "
                "--device cpu --tiny."
            ) from error
    return {
        "commit": revision(),
        "device": device_name(torch.device(args.device)),
        "torch": torch.__version__,
        "tiny": args.tiny,
    }


# --- One group ------------------------------------------------------------------------------------


def command_of(group: Group, args: argparse.Namespace) -> list[str]:
    """The command line of a group's process."""
    command = [sys.executable, "-m", "tools.gpu_checks", str(group.number), "--device", args.device]
    return [*command, "--tiny"] if args.tiny else command


def run(group: Group, args: argparse.Namespace, file: ResultFile, limit: float) -> None:
    """Run a group and write its results, and how it ended."""
    file.drop(group.number)
    began, timed_out = time.monotonic(), threading.Event()
    with tempfile.TemporaryFile("w+") as errors:
        process = start(command_of(group, args), subprocess.PIPE, errors)
        timer = threading.Timer(limit, lambda: (timed_out.set(), end(process)))
        timer.start()
        try:
            for line in process.stdout:
                if (record := read_line(line)) is not None:
                    file.add(record)
            code = process.wait()
        finally:
            timer.cancel()
            end(process)
        how = describe_end(code, timed_out.is_set(), limit, errors)
    file.add({"group": group.number, "end": how, "seconds": time.monotonic() - began})
    print(
        f"group {group.number}, {group.title}: {how} in {time.monotonic() - began:.0f} s",
        flush=True,
    )


def read_line(line: str) -> dict | None:
    """A result; None for a line that a killed process left unfinished."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def describe_end(code: int, timed_out: bool, limit: float, errors: TextIO) -> str:
    """ "done", or what went wrong."""
    if timed_out:
        return f"made no end in {limit:.0f} s and was killed"
    if code == 0:
        return "done"
    errors.seek(0)
    lines = errors.read().strip().splitlines()
    reason = lines[-1][:300] if lines else "no message"
    what = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
    return f"{what}: {reason}"


# --- All groups -----------------------------------------------------------------------------------


def run_all(args: argparse.Namespace, file: ResultFile) -> None:
    """Run the groups that are missing, as far as the budget lasts."""
    began, done = time.monotonic(), file.done()
    groups = [group for group in args.groups if group.number not in done]
    warm_up = None
    compiled = any(group.number == 7 for group in groups) and args.device == "cuda"
    try:
        for group in groups:
            left = args.budget - (time.monotonic() - began)
            if group.seconds > left:
                print(
                    f"group {group.number}, {group.title}: {left:.0f} s are left, it takes {group.seconds}"
                )
                continue
            if compiled and group.number in UNTIMED and warm_up is None:
                warm_up = start(
                    command_of(ALL[WARM_UP], args), subprocess.DEVNULL, subprocess.DEVNULL
                )
            if warm_up is not None and group.number not in UNTIMED:
                end(warm_up)
            run(group, args, file, min(PATIENCE * group.seconds, max(left, group.seconds)))
    finally:
        if warm_up is not None:
            end(warm_up)


def stop(number: int, frame: object) -> None:
    """End after a signal, with the table."""
    raise SystemExit(128 + number)


def main(arguments: list[str]) -> int:
    """Run the command line; return the exit code."""
    try:
        args = parse(arguments)
        file = ResultFile(args.json, describe_subject(args))
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    former = signal.signal(signal.SIGTERM, stop)
    code = 0
    try:
        run_all(args, file)
    except (SystemExit, KeyboardInterrupt) as ended:
        code = getattr(ended, "code", 130)
    signal.signal(signal.SIGTERM, former)
    print("\n" + table(read_records(args.json), lambda number: ALL[number].title))
    missed = [f"MISSED {line}" for line in file.failures()]
    ended = {record["group"] for record in read_records(args.json) if "end" in record}
    missed += [
        f"NOT RUN group {group.number}, {group.title}"
        for group in args.groups
        if group.number not in ended
    ]
    print("\n" + ("\n".join(missed) or "All bars are met."), flush=True)
    return code or int(bool(missed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

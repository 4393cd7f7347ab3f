#!/usr/bin/env python
"""Train, evaluate or time a model on ImageNet: `torchrun main.py --cfg configs/dat_tiny.yaml --data-path /imagenet`."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from yacs.config import CfgNode

import config
from utils.errors import StorageError, UserError
from utils.launcher import set_ranks
from utils.machine import raise_open_files
from utils.memory import use_large_pages
from utils.signals import StopRequest
from utils.streams import protect_streams

REPORT_SECONDS = 120  # then it is given up: a launcher may be waiting for the run to end


def main(arguments: list[str]) -> int:
    """Run one command; returns the process's exit code (see utils/errors.py)."""
    try:
        with StopRequest().handle_signals() as stop:
            return _run(arguments, stop)
    except KeyboardInterrupt as interrupt:
        return getattr(interrupt, "exit_code", 130)


def _run(arguments: list[str], stop: StopRequest) -> int:
    """Parse the command line and execute it; report a UserError and return its exit code."""
    try:
        set_ranks()
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    rank = int(os.environ.get("RANK", 0))
    try:
        command = config.parse(arguments)
        if command.mode == "train":
            config.check_world_size(command.cfg, int(os.environ.get("WORLD_SIZE", 1)))
    except UserError as error:
        return _refuse(error, rank)
    try:
        _execute(command, stop)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0" or not error.on_all:
            # In one write: torchrun's processes share the pipe, unbuffered, and print would write the newline apart.
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return error.exit_code
    return 0


def _refuse(error: UserError, rank: int) -> int:
    """Print why a command cannot run, and end the other processes of the run, whose command may be another one."""
    if rank == 0:
        print(error, file=sys.stderr, flush=True)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "MASTER_ADDR" in os.environ:
        from utils.distributed import share_refusal

        shared = share_refusal(error)
        if rank > 0 and (os.environ.get("LOCAL_RANK", "0") == "0" or not shared.on_all):
            print(shared, file=sys.stderr)
        return shared.exit_code
    return error.exit_code


def _execute(command: config.Command, stop: StopRequest) -> None:
    """Import torch, which --help and a refused command need not wait for, and do what is asked."""
    use_large_pages()
    raise_open_files()
    if command.mode == "train":
        stop.start_training(command.cfg.TRAIN.MAX_SECONDS)
        try:
            from engine.train import train

            train(command.cfg, command.sources, stop)
        except StorageError:
            raise  # the run's directory is full, read-only or another run's
        except UserError:
            _write_report(command.cfg)
            raise
        _write_report(command.cfg)
        return
    stop.start_evaluation()
    from engine.evaluate import evaluate, throughput

    if command.mode == "eval":
        evaluate(command.cfg, command.sources, command.given)
    else:
        throughput(command.cfg, command.sources)


def _write_report(cfg: CfgNode) -> None:
    """With TRAIN.REPORT, write report.html in a process of its own: whatever fails there, the run has ended."""
    run = Path(cfg.OUTPUT) / cfg.MODEL.NAME / cfg.TAG
    is_main = int(os.environ.get("RANK", 0)) == 0
    if not (cfg.TRAIN.REPORT and is_main and (run / "metrics.jsonl").exists()):
        return
    program = Path(__file__).parent / "tools" / "report.py"
    try:
        subprocess.run([sys.executable, program, run], timeout=REPORT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError, KeyboardInterrupt) as error:
        message = f"No report ({error!r}); write it with python tools/report.py {run}"
        print(message, file=sys.stderr)


def leave(code: int) -> NoReturn:
    """End the process at once: torch's teardown takes seconds on a busy machine, for which others may be waiting."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    protect_streams()
    leave(main(sys.argv[1:]))

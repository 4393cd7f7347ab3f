"""Command lines in texts: found in Markdown, and parsed by the program that they start, which then does not run."""

import argparse
import glob
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import config
from tools import doctor

ROOT = Path(__file__).resolve().parents[2]
LOOP_VARIABLES = {"$name": "dat", "$seed": "0"}  # of the shell loops in the documentation
FENCE = re.compile(r"^(```+|~~~+)(\w*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
STARTS = ("python ", "torchrun ", "make ", "sbatch ", "pip install ")


class Parsed(Exception):
    """The program has parsed its arguments."""


def in_markdown(text: str) -> Iterator[str]:
    """The commands in fenced blocks, continued lines joined, and in inline code of `text`."""
    for _, language, block in FENCE.findall(text):
        if language != "console":  # shows commands that are refused
            yield from in_lines(block)
    for code in re.findall(r"`([^`\n]+)`", FENCE.sub("", text)):
        yield from in_lines(code)


def in_lines(text: str) -> Iterator[str]:
    """The commands among the lines of `text`."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip().startswith(STARTS):
            yield " ".join(line.partition(" #")[0].split())


def check(command: str) -> None:
    """Fail unless the program that `command` starts exists and accepts its arguments."""
    for variable, value in LOOP_VARIABLES.items():
        command = command.replace(variable, value)
    program, *words = shlex.split(command, comments=True)
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[0] in targets, f"{command}: no such target"
    elif program == "pip":
        if "-r" in words:
            assert (ROOT / words[words.index("-r") + 1]).is_file(), command
    elif program == "sbatch":
        script = words.index("tools/slurm.sh")
        check_main(words[script + 1 :], None)
    elif program == "torchrun":
        launched = get_args_parser().parse_args(words)
        assert launched.training_script == "main.py", command
        nodes = int(launched.nnodes.split(":")[0])
        check_main(launched.training_script_args, nodes * int(launched.nproc_per_node))
    elif words[0] == "main.py":
        check_main(words[1:], 1)
    elif words[0] == "-m":
        assert words[1] == "pytest", command
        for path in words[2:]:
            assert path.startswith("-") or (ROOT / path).exists(), command
    else:
        check_tool(ROOT / words[0], words[1:])


def check_main(arguments: list[str], processes: int | None) -> None:
    """Fail unless main.py accepts `arguments` and can train on that many processes."""
    if "--help" in arguments:
        return
    command = config.parse(arguments)
    if command.mode == "train" and processes:
        config.check_world_size(command.cfg, processes)


def check_tool(script: Path, arguments: list[str]) -> None:
    """Fail unless the program `script` accepts `arguments`."""
    assert script.is_file(), f"{script}: no such program"
    if script == ROOT / "tools" / "doctor.py":  # hands most of its arguments to main.py's parser
        doctor.parse(arguments)
        return
    if not arguments:  # a program without a command line would run
        return
    parsed = vars(parse_only(script, arguments))
    patterns = parsed.get("cfg") or []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        files = glob.glob(pattern)
        assert files, f"{pattern}: no such configuration"
        for file in files:
            config.parse(["--throughput", "--cfg", file, "--opts", *parsed.get("opts", [])])


def parse_only(script: Path, arguments: list[str]) -> argparse.Namespace:
    """What `script` makes of `arguments`; it ends there."""
    original = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser, words=None, namespace=None):
        raise Parsed(original(parser, words, namespace))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", [str(script), *arguments])
        patch.setattr(sys, "path", list(sys.path))
        try:
            runpy.run_path(str(script), run_name="__main__")
        except Parsed as stop:
            return stop.args[0]
        except SystemExit as end:
            pytest.fail(f"{script.name} {shlex.join(arguments)}: refused, exit code {end.code}")
    pytest.fail(f"{script.name} parses no command line")

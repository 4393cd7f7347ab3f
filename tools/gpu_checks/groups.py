"""Groups of checks: what each does, how long it takes, and what it needs. A group is `python -m tools.gpu_checks N`."""

import importlib
import importlib.util
from dataclasses import dataclass

from tools.gpu_checks.report import Report

WARM_UP = 100  # compiles in the background what group 7 races


@dataclass(frozen=True)
class Group:
    """One group of checks."""

    number: int
    title: str
    seconds: int  # on an H100, cold
    function: str  # "module.function" of this package
    needs: tuple[str, ...] = ()  # packages beside torch, timm and Pillow


GROUPS = (
    Group(0, "machine", 10, "machine.check"),
    Group(1, "paths against float64", 40, "correct.check_paths"),
    Group(2, "released numbers", 25, "correct.check_golden"),
    Group(3, "the same bits", 20, "correct.check_bits"),
    Group(4, "memory", 15, "memory.check"),
    Group(5, "speed, eager", 50, "speed.check_eager"),
    Group(6, "layers", 30, "layers.check"),
    Group(7, "speed, compiled", 90, "speed.check_compiled"),
    Group(8, "main.py", 70, "program.check_program", needs=("yacs", "simplejpeg")),
    Group(9, "waits", 20, "program.check_waits"),
    Group(10, "images", 40, "images.check", needs=("yacs", "simplejpeg")),
    Group(11, "batch sizes", 20, "speed.check_batches"),
    Group(12, "sanitizer, large models", 30, "extra.check"),
)
# With little time: what is computed first, then speed, then the program.
ORDER = (0, 1, 2, 3, 4, 5, 8, 9, 7, 6, 10, 11, 12)
ALL = {group.number: group for group in (*GROUPS, Group(WARM_UP, "warm-up", 90, "speed.warm_up"))}


def missing_packages(group: Group) -> list[str]:
    """What the group needs and this machine lacks."""
    return [name for name in group.needs if importlib.util.find_spec(name) is None]


def run_group(group: Group, report: Report, setting: object) -> None:
    """Run the group in this process, or report why it cannot."""
    if missing := missing_packages(group):
        report.skip(f"needs {' and '.join(missing)}")
        return
    module, function = group.function.split(".")
    getattr(importlib.import_module(f"tools.gpu_checks.{module}"), function)(report, setting)

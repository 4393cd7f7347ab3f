"""tools/*.py: each command starts from any folder and shows its help.

pytest tests/runs/test_tool_commands.py
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = sorted(
    path.stem for path in (ROOT / "tools").glob("*.py") if "__main__" in path.read_text()
)
PROJECT_IMPORT = r"^(import|from) (analysis|config|data|engine|main|models|tools|utils)\b"

# All in one process, because importing PyTorch takes longest; the last one as a module too.
START_ALL = """
import runpy, sys

def show_help(start, name):
    sys.argv[:] = [name, "--help"]
    try:
        start(name, run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, name

root, *commands = sys.argv[1:]
for command in commands:
    show_help(runpy.run_path, f"{root}/tools/{command}.py")
show_help(runpy.run_module, f"tools.{command}")
"""


@pytest.mark.slow
def test_every_command_shows_its_help_from_any_folder(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", START_ALL, str(ROOT), *COMMANDS]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name in COMMANDS:
        assert f"python tools/{name}.py" in result.stdout, name


def test_all_commands_find_the_project_by_the_same_line():
    for name in COMMANDS:
        text = (ROOT / "tools" / f"{name}.py").read_text()
        lines = [line for line in text.splitlines() if "sys.path" in line]
        expected = ["sys.path.insert(0, str(Path(__file__).resolve().parents[1]))"]
        assert lines == (expected if re.search(PROJECT_IMPORT, text, re.MULTILINE) else []), name

"""tools/*.py: each one starts from any folder.

pytest tests/runs/test_tools.py
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py") if path.stem != "__init__")

# Forks of one process, which has imported what takes long; the last tool runs as a module too.
START_ALL = """
import os, runpy, sys
import matplotlib.pyplot, sklearn.datasets, timm, torch.distributed, torchvision
root, *tools = sys.argv[1:]
for tool in tools:
    sys.argv[:] = [f"{tool}.py", "--help"]
    if os.fork() == 0:
        runpy.run_path(f"{root}/tools/{tool}.py", run_name="__main__")
    assert os.wait()[1] == 0, tool
if os.fork() == 0:
    sys.path.insert(0, root)
    runpy.run_module(f"tools.{tool}", run_name="__main__")
assert os.wait()[1] == 0, tool
"""


def test_every_tool_shows_its_help_from_any_folder(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", START_ALL, str(ROOT), *TOOLS]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for tool in TOOLS:
        assert f"python tools/{tool}.py " in result.stdout, tool
    assert result.stdout.count(f"python tools/{TOOLS[-1]}.py ") >= 2, "as a script and as a module"

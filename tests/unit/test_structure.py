"""The direction of imports, and who may read the configuration: decisions that a reader relies on."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAY_IMPORT = {
    "utils": set(),
    "models": {"utils"},
    "data": {"utils"},
    "analysis": {"utils", "models", "data"},
    "engine": {"utils", "models", "data", "analysis"},
    "config": {"utils"},
    "main": {"config", "engine", "utils"},
}
LAYERS = {*MAY_IMPORT, "tools"}
FILES = [path for layer in MAY_IMPORT for path in sorted(ROOT.glob(f"{layer}*/**/*.py"))]
FILES += [ROOT / "main.py", ROOT / "config.py"]


def imported(tree: ast.AST) -> set[str]:
    """The top-level names of everything imported, at any depth."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_layers(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    found = imported(ast.parse(path.read_text())) & LAYERS - {own}
    assert found <= MAY_IMPORT[own]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_these_files_read_the_configuration(path):
    if path.name in ("main.py", "config.py", "train.py", "evaluate.py", "build.py"):
        pytest.skip("it reads the configuration")
    names = {
        node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)
    }
    assert "cfg" not in names

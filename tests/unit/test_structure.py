"""Structure: the direction of imports, who reads the configuration, and how long modules and `train` may be."""

import ast
from functools import cache
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
    "tools": {"utils", "models", "data", "analysis", "engine", "config", "main"},
    "hubconf": {"utils", "models", "engine"},
}
TESTS = {"tests", "helpers", "reliability", "golden"}  # imported by nobody but themselves
OURS = MAY_IMPORT.keys() | TESTS
READ_CFG = {"main.py", "config.py", "engine/train.py", "engine/evaluate.py", "engine/build.py"}
MAX_LINES = 500  # of a module whose first docstring line gives no reason for more
MAX_LINES_OF_TRAIN = 80


def source_files(*layers: str) -> list[str]:
    """The Python files of these layers, as paths below the root."""
    paths = [path for layer in layers for path in ROOT.glob(f"{layer}/**/*.py")]
    paths += [ROOT / f"{layer}.py" for layer in layers if (ROOT / f"{layer}.py").is_file()]
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


@cache
def parse(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text())


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


@pytest.mark.parametrize("file", source_files(*MAY_IMPORT))
def test_imports_follow_the_layers(file):
    own = Path(file).parts[0].removesuffix(".py")
    assert imported(parse(file)) & OURS - {own} <= MAY_IMPORT[own]


TEXT_METHODS = {"read_text", "write_text"}


@pytest.mark.parametrize("file", source_files(*MAY_IMPORT))
def test_text_files_are_utf8_in_every_locale(file):
    for node in ast.walk(parse(file)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name | ast.Attribute):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        modes = [
            a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)
        ]
        text = name == "open" and any(
            mode in ("r", "w", "a", "x", "r+", "w+", "a+") for mode in modes
        )
        if name in TEXT_METHODS or text:
            given = {keyword.arg for keyword in node.keywords}
            assert "encoding" in given, f"{file}:{node.lineno}: without encoding"


def test_every_python_file_belongs_to_a_layer():
    files = {path.name.removesuffix(".py") for path in ROOT.glob("*.py")}
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert files | folders <= OURS


@pytest.mark.parametrize("file", source_files("utils", "models", "data", "analysis", "engine"))
def test_few_modules_read_the_configuration(file):
    if file in READ_CFG:
        return
    for node in ast.walk(parse(file)):
        name = (
            getattr(node, "id", None) or getattr(node, "arg", None) or getattr(node, "attr", None)
        )
        assert name != "cfg", f"{file}:{node.lineno} reads the configuration"


@pytest.mark.parametrize("file", source_files(*MAY_IMPORT))
def test_a_long_module_gives_its_reason(file):
    lines = len((ROOT / file).read_text().splitlines())
    docstring = ast.get_docstring(parse(file)) or ""
    reason = "in one file" in docstring.partition("\n")[0]
    assert lines <= MAX_LINES or reason, (
        f"{lines} lines: split it, or say on line 1 why 'in one file'"
    )


def test_train_is_short():
    (train,) = (
        node
        for node in parse("engine/train.py").body
        if isinstance(node, ast.FunctionDef) and node.name == "train"
    )
    assert train.end_lineno - train.lineno + 1 <= MAX_LINES_OF_TRAIN

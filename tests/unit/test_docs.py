"""Documentation: links resolve, commands parse, keys exist, generated parts are current, tables have true numbers."""

import re
from pathlib import Path

import pytest
import yaml
from helpers import commands

import config
from tools import write_docs
from utils.version import __version__

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {path: path.read_text() for path in PAGES}
COMMANDS = sorted({command for text in TEXT.values() for command in commands.in_markdown(text)})
NAMES_OLD_KEYS = {"migrating.md", "CHANGELOG.md"}


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(text: str) -> str:
    """`text` without fenced blocks."""
    return commands.FENCE.sub("", text)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=label)
def test_links_resolve(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(TEXT[path])):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        assert page.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in anchors(page.read_text()), f"{target}: no such heading"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    commands.check(command)


def test_the_pages_show_the_main_commands():
    """A change of the Markdown must not hide all commands from the test above."""
    for start in ("python main.py", "torchrun", "python tools/", "make ", "sbatch ", "pip "):
        assert any(command.startswith(start) for command in COMMANDS), start


@pytest.mark.parametrize("path", PAGES, ids=label)
def test_python_examples_run(path):
    for _, language, block in commands.FENCE.findall(TEXT[path]):
        if language == "python" and ".pth" not in block:
            exec(compile(block, str(path), "exec"), {})


@pytest.mark.parametrize("path", PAGES, ids=label)
def test_keys_exist(path):
    if path.name in NAMES_OLD_KEYS:
        pytest.skip("it names the keys of other programs and of the first edition")
    known = {*config.KEYS, *write_docs.GROUP_TITLES}
    for code in re.findall(r"`([^`\n]+)`", prose(TEXT[path])):
        for name in re.findall(
            r"\b(?:DATA|MODEL|AUG|TRAIN|DISTILL|CHECKPOINT|TEST)\.[A-Z_.]*[A-Z_]", code
        ):
            assert name in known, f"`{code}`"


@pytest.mark.parametrize("path", PAGES, ids=label)
def test_generated_parts_are_current(path):
    assert write_docs.rewrite(TEXT[path]) == TEXT[path], "run python tools/write_docs.py"


def test_every_part_is_generated_somewhere():
    for name in write_docs.PARTS:
        assert any(f"<!-- {name}:begin -->" in text for text in TEXT.values()), name


def test_every_key_is_in_the_table():
    for name in config.KEYS:
        assert f"| `{name}`" in TEXT[ROOT / "docs" / "configuration.md"]


def test_readme_is_short():
    assert len(TEXT[ROOT / "README.md"].split()) <= 1000


def test_readme_links_every_page():
    for path in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{path.name}" in TEXT[ROOT / "README.md"], path.name


def test_model_table_has_the_numbers_of_the_configurations():
    """Those are compared with the models in test_configs.py."""
    rows = re.findall(
        r"^\| \[(\w+)\]\((configs/\w+\.yaml)\) \| ([\d.]+) M \| ([\d.]+) \| ([\d.]+) / ([\d.]+|–) \|",
        TEXT[ROOT / "README.md"],
        re.MULTILINE,
    )
    assert len(rows) == 8
    for name, file, parameters, macs, top1, top5 in rows:
        text = " ".join((ROOT / file).read_text().replace("#", "").split())
        assert f"NAME: {name} " in text
        assert f"{parameters} M parameters, {macs} GMACs" in text
        assert f"top-1 {top1}{'' if top5 == '–' else f', top-5 {top5}'} with TEST.CROP_MODE" in text


def test_the_version_is_the_same_everywhere():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    changes = re.findall(r"^## (\S+)", TEXT[ROOT / "CHANGELOG.md"], re.MULTILINE)
    assert next(title for title in changes if title != "Unreleased") == __version__

#!/usr/bin/env python
"""Parts of the documentation that come from the code: keys and flags, refused settings, names in other programs.

python tools/write_docs.py

rewrites what is between `<!-- NAME:begin -->` and `<!-- NAME:end -->` in docs/*.md, for the names in `PARTS`.
"""

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import config
from utils.errors import ConfigError

DOCS = Path(__file__).resolve().parents[1] / "docs"
GROUP_TITLES = {
    "": "The run",
    "DATA": "Data",
    "MODEL": "Model",
    "AUG": "Augmentation",
    "TRAIN": "Training",
    "DISTILL": "Distillation",
    "CHECKPOINT": "Checkpoints",
    "TEST": "Evaluation",
}
MISTAKES = """# my.yaml
MODEL:
  NAME: dat_tiny
  DROP_PATH_RATE: 20
TRAIN:
  BASE_LRR: 1e-3
  EPOCHS: 10
DATA:
  BATCH_SIZE: 100
"""


def keys() -> str:
    """A table of the keys of each group: name, default, what is accepted, meaning."""
    flags = {name: flag for flag, name in config.FLAGS.items()}
    parts = []
    for group, title in GROUP_TITLES.items():
        members = [
            key
            for key in config.SCHEMA
            if (key.name.partition(".")[0] if "." in key.name else "") == group
        ]
        rows = [
            (
                f"`{key.name}`" + (f"<br>`{flags[key.name]}`" if key.name in flags else ""),
                f"`{default_of(key)}`",
                accepted(key),
                key.text,
            )
            for key in members
        ]
        columns = ("Key, flag", "Default", "Accepted", "Meaning")
        parts.append(f"### {title}\n\n{table(columns, rows)}")
    return "\n\n".join(parts)


def default_of(key: config.Key) -> str:
    """The default as it is written in a configuration file."""
    if isinstance(key.default, list):
        return f"[{', '.join(map(str, key.default))}]"
    return f"{key.default:g}" if isinstance(key.default, float) else str(key.default) or "''"


def accepted(key: config.Key) -> str:
    """What a value must be, in words."""
    if isinstance(key.default, dict):
        return "arguments by name"
    if isinstance(key.default, list) and key.default:
        return f"{len(key.default)} numbers, {key.check.expected}"
    return key.expected


def mistakes() -> str:
    """A wrong configuration file, and what main.py prints about it."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "my.yaml")
        Path(path).write_text(MISTAKES, encoding="utf-8")
        try:
            config.parse(["--cfg", path, "--data-path", "/imagenet"])
        except ConfigError as error:
            message = str(error).replace(path, "my.yaml")
    command = "$ python main.py --cfg my.yaml --data-path /imagenet"
    return f"```yaml\n{MISTAKES}```\n\n```console\n{command}\n{message}\n```"


def foreign() -> str:
    """A table of the keys and flags of other programs, each with what to use here."""
    rows = [(f"`{name}`", use) for name, use in config.FOREIGN.items()]
    return table(("Elsewhere", "Here"), rows)


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(tuple(columns)), *rows]
    return "\n".join(f"| {' | '.join(map(_escape, line))} |" for line in lines)


def _escape(cell: str) -> str:
    """`cell` on one line, with what a table or HTML would take for its own; code stays as it is."""
    words = " ".join(cell.split()).replace("|", "\\|")
    return re.sub("(`[^`]*`|<br>)|<", lambda match: match[1] or "&lt;", words)


PARTS = {"keys": keys, "mistakes": mistakes, "foreign": foreign}


def rewrite(text: str) -> str:
    """`text` with every part between its markers as the code has it now."""
    for name, make in PARTS.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        block = f"{begin}\n\n{make()}\n\n{end}"
        text = re.sub(f"{begin}.*{end}", lambda match, block=block: block, text, flags=re.DOTALL)
    return text


def main(arguments: list[str]) -> None:
    """Rewrite the parts of every page, and print the pages that changed."""
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=formatter).parse_args(arguments)
    for page in sorted(DOCS.glob("*.md")):
        before = page.read_text(encoding="utf-8")
        after = rewrite(before)
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(f"{page.relative_to(DOCS.parent)}: rewritten")


if __name__ == "__main__":
    main(sys.argv[1:])

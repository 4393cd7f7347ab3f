"""Schema reader: keys with default, check and meaning; YAML files and command-line words read into them.

Knows nothing of this project's keys: config.py lists those. Everything wrong is collected in a `Draft`, with the file
and line or the flag it comes from, and raised as one ConfigError.
"""

import difflib
import os
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from yacs.config import CfgNode

from utils.checks import Check
from utils.errors import ConfigError
from utils.yaml_nodes import Loader, convert_node, format_node, locate_node, read_name, to_python

# --- Keys -----------------------------------------------------------------------------------------

# A space that YAML takes for a letter: before a line's first word, or after the mark that ends a key or an entry.
ODD_SPACE = re.compile(
    r"(^[ \t]*|^[^#\n'\"]*?[:,\[{-] *)[\u00a0\u1680\u2000-\u200b\u202f\u205f\u3000]", re.MULTILINE
)
KINDS = {bool: "True or False", int: "an integer", float: "a number", str: ""}


@dataclass(frozen=True)
class Key:
    """One thing that can be set; the type of `default` is the type of the value, or of both of a `pair`.

    pair: a list of two values is allowed too; two equal ones are read as one.
    """

    name: str
    default: bool | int | float | str | list | dict
    check: Check
    text: str
    pair: bool = False

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        if self.default == []:
            return self.check.expected
        if isinstance(self.default, list):
            return f"a list of numbers such as {self.default}, {self.check.expected}"
        return f"{KINDS[type(self.default)]} {self.check.expected}".strip()


@dataclass(frozen=True)
class Schema:
    """Everything that can be set.

    keys: by name, `GROUP.NAME` or `NAME`.
    free_group: a group whose entries only its reader knows, such as a model's arguments.
    owned: entries of the free group that have a key of their own, with that key.
    foreign: what other programs, and earlier editions, call a key or flag, with what to use.
    """

    keys: dict[str, Key]
    free_group: str
    owned: dict[str, str]
    foreign: dict[str, str]

    @property
    def groups(self) -> set[str]:
        """Every group of keys."""
        return {name.rpartition(".")[0] for name in self.keys if "." in name} | {self.free_group}

    def advise(self, name: str) -> tuple[str, list[str]]:
        """What to do about an unknown key, and the keys that were probably meant."""
        for foreign in (name, name.rpartition(".")[0]):
            if foreign in self.foreign:
                advice = self.foreign[foreign]
                return f"use {advice}", [key for key in self.keys if key in advice]
        name = name.upper()
        meant = (
            difflib.get_close_matches(name, self.keys, n=1, cutoff=0.99)  # in small letters
            or [key for key in self.keys if last_part(key) == last_part(name)]
            or difflib.get_close_matches(name, self.keys, n=1, cutoff=0.8)
        )
        groups = difflib.get_close_matches(name, self.groups, n=1, cutoff=0.75)
        if groups and not meant:
            return f"did you mean {groups[0]}?", [k for k in self.keys if k.startswith(groups[0])]
        if not meant:
            lasts = map(last_part, self.keys)
            close = difflib.get_close_matches(last_part(name), lasts, n=1, cutoff=0.75)
            meant = [key for key in self.keys if last_part(key) in close]
        return (
            f"did you mean {' or '.join(meant)}?" if meant else "config.py lists every key",
            meant,
        )


def last_part(name: str) -> str:
    """`NAME` of `GROUP.NAME`."""
    return name.rpartition(".")[2]


# --- A configuration in the making ----------------------------------------------------------------


@dataclass
class Draft:
    """A configuration being put together: values, where each comes from, and everything wrong so far."""

    schema: Schema
    values: dict = field(init=False)
    sources: dict[str, str] = field(default_factory=dict)  # key -> "file:line" or flag, no defaults
    given: set[str] = field(default_factory=set)  # keys set on the command line, not in a file
    problems: list[str] = field(default_factory=list)
    unsettled: set[str] = field(default_factory=set)  # keys that could not be set as asked
    complete: bool = True  # every file could be read

    def __post_init__(self):
        self.values = {name: key.default for name, key in self.schema.keys.items()}

    def refuse(self, where: str, message: str, *names: str) -> None:
        """Note a problem; `names` keep their former values and are left out of the checks of combinations."""
        self.problems.append(f"{where}: {message}")
        self.unsettled.update(names)

    def refuse_together(self, names: str, message: str) -> None:
        """Note that the values of several keys, "KEY KEY …", do not fit one another."""
        if self.unsettled.intersection(names.split()):
            return
        sources = {name: self.sources.get(name, "defaults") for name in names.split()}
        where = next((source for source in sources.values() if source != "defaults"), "defaults")
        parts = []
        for name, source in sources.items():
            elsewhere = f" ({source})" if source != where else ""
            parts.append(f"{name} {self.values[name]!r}{elsewhere}")
        self.refuse(where, f"{', '.join(parts)}: {message}")

    def set_value(self, name: str, value: object, where: str) -> None:
        """Give key `name`, or an entry of the free group, a value that is no YAML, such as a checkpoint's."""
        key = self.schema.keys.get(name)
        if key is None and not name.startswith(f"{self.schema.free_group}."):
            return self.refuse(where, f"{name}: unknown key; {self.schema.advise(name)[0]}")
        if key is not None and not (_has_type(key, value) and key.check.holds(value)):
            return self.refuse(where, f"{name}: got {value!r}, expected {key.expected}", name)
        self.values[name], self.sources[name] = value, where

    def set(self, name: str, node: yaml.Node, label: str, where: str) -> None:
        """Give key `name`, or each key below the group `name`, the value of a YAML node.

        `label` is the file or flag that holds it, `where` the same with the line.
        """
        if name in self.schema.groups:
            if isinstance(node, yaml.MappingNode):
                self.set_all(node, label, f"{name}.")
            else:
                got = f"got {format_node(node)}, expected keys below it"
                self.refuse(where, f"{name}: {got}; set {name}.<key> or remove it")
        elif name.startswith(f"{self.schema.free_group}."):
            self.set_argument(name, node, where)
        elif name in self.schema.keys:
            try:
                self.values[name] = read_value(self.schema.keys[name], node)
                self.sources[name] = where
            except ValueError as error:
                self.refuse(where, f"{name}: {error} ({self.schema.keys[name].text})", name)
        else:
            advice, meant = self.schema.advise(name)
            self.refuse(where, f"{name}: unknown key; {advice}", *meant)

    def set_all(self, node: yaml.MappingNode, label: str, prefix: str = "") -> None:
        """Set every key of a mapping."""
        lines = {}
        for key, value in node.value:
            name = f"{prefix}{read_name(key)}"
            where = locate_node(label, key)
            if name in lines:
                message = f"is given twice, first in line {lines[name]}; remove one"
                self.refuse(where, f"{name}: {message}", name)
            elif "." in name.removeprefix(prefix):
                self.refuse(where, f"{name}: dots are for --opts; write keys below their group")
            elif name != "BASE":
                self.set(name, value, label, where)
            lines[name] = key.start_mark.line + 1

    def set_argument(self, name: str, node: yaml.Node, where: str) -> None:
        """Set one entry of the free group, whose type only its reader knows."""
        argument = name.removeprefix(f"{self.schema.free_group}.")
        if argument in self.schema.owned:
            key = self.schema.owned[argument]
            self.refuse(where, f"{name}: has a key of its own; use {key}", key)
        elif not argument.isidentifier():
            self.refuse(
                where, f"{name}: not an argument's name; write {self.schema.free_group}.name"
            )
        else:
            try:
                self.values[name] = to_python(node)
                self.sources[name] = where
            except ValueError as error:
                self.refuse(where, f"{name}: {error}")

    def build(self) -> CfgNode:
        """The values as a tree, in the order of the schema."""
        tree: dict = {}
        for name, value in self.values.items():
            *groups, last = name.split(".")
            branch = tree
            for group in groups:
                branch = branch.setdefault(group, {})
            branch[last] = dict(value) if name == self.schema.free_group else value
        return CfgNode(tree)

    def raise_problems(self) -> None:
        """Raise the one ConfigError of all problems, if there are any."""
        if len(self.problems) == 1:
            raise ConfigError(self.problems[0])
        if self.problems:
            raise ConfigError("\n  ".join([f"{len(self.problems)} problems:", *self.problems]))


def read_value(key: Key, node: yaml.Node) -> bool | int | float | str | list:
    """The value of a node for a key; ValueError says what was got and expected."""
    paired = key.pair and isinstance(node, yaml.SequenceNode)
    try:
        value = convert_node(node, [key.default] * 2 if paired else key.default)
    except (ValueError, yaml.YAMLError):
        raise ValueError(f"got {format_node(node)}, expected {key.expected}") from None
    if not key.check.holds(value):
        raise ValueError(
            f"got {format_node(node)}, expected {key.expected}{key.check.remedy(value)}"
        )
    return value[0] if paired and value[0] == value[1] else value


def _has_type(key: Key, value: object) -> bool:
    if key.pair and isinstance(value, list):
        return len(value) == 2 and all(type(one) is type(key.default) for one in value)
    return type(value) is type(key.default)


# --- Files ----------------------------------------------------------------------------------------


def read_file(path: str, where: str, draft: Draft, above: tuple[str, ...] = ()) -> None:
    """Set what a YAML file holds, after the files that it names as BASE.

    `where` is the flag or line that asks for the file, `above` the files that led to it.
    """
    node = _compose_file(path, where, draft)
    if node is None:
        draft.complete = False
        return
    above = (*above, path)
    for value in (value for key, value in node.value if key.value == "BASE"):
        asked = f"{locate_node(path, value)}: BASE"
        for base in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            if not isinstance(base, yaml.ScalarNode) or not base.value:
                draft.refuse(
                    asked, f"got {format_node(base)}, expected a path from this file, or a list"
                )
                continue
            target = os.path.normpath(os.path.join(os.path.dirname(path), base.value))
            if os.path.realpath(target) in map(os.path.realpath, above):
                circle = " → ".join([*above, target])
                draft.refuse(asked, f"the files form a circle, {circle}; remove one BASE")
            else:
                read_file(target, asked, draft, above)
    draft.set_all(node, path)


def _compose_file(path: str, where: str, draft: Draft) -> yaml.MappingNode | None:
    """The file's top mapping; None, after noting why, where there is none."""
    if not path.endswith((".yaml", ".yml")):
        draft.refuse(where, f"{path}: expected a .yaml file; configurations are never run as code")
        return None
    try:
        if Path(path).is_char_device() or Path(path).is_fifo():
            draft.refuse(where, f"{path}: is a device, whose text may never end; expected a file")
            return None
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        draft.refuse(where, f"{path}: no such file{_nearest_file(path)}")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        draft.refuse(where, f"{path}: {reason}; expected a readable file of UTF-8 text")
    else:
        return _compose_text(text, path, draft)
    return None


def _compose_text(text: str, path: str, draft: Draft) -> yaml.MappingNode | None:
    if match := ODD_SPACE.search(text):
        line = text.count("\n", 0, match.end()) + 1
        space = match[0][-1]
        message = f"holds {unicodedata.name(space).lower()} (U+{ord(space):04X}) where YAML needs a plain space"
        draft.refuse(f"{path}:{line}", f"{message}, as in text copied from a web page; replace it")
        return None
    try:
        node = yaml.compose(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        tab = "\\t" in error.problem
        advice = "indent with spaces, not tabs" if tab else "look at the lines up to it"
        draft.refuse(f"{path}:{mark.line + 1}", f"not valid YAML: {error.problem}; {advice}")
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = f"holds a character that is not text, {error.character:#x}; remove it"
        draft.refuse(f"{path}:{line}", message)
    except RecursionError:
        draft.refuse(path, "is nested too deeply for a configuration; expected groups of keys")
    else:
        if isinstance(node, yaml.MappingNode):
            return node
        example = "expected keys such as MODEL: {NAME: dat_tiny}"
        got = "is empty" if node is None else f"got {format_node(node)}"
        draft.refuse(path, f"{got}, {example}")
    return None


def _nearest_file(path: str) -> str:
    folder = Path(path).parent
    names = [file.name for file in folder.glob("*.yaml")] if folder.is_dir() else []
    close = difflib.get_close_matches(Path(path).name, names, n=1, cutoff=0.75)
    if close:
        return f"; did you mean {folder / close[0]}?"
    return "; its folder holds " + (", ".join(sorted(names)) or "no .yaml file, or does not exist")

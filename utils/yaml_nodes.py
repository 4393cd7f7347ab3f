"""YAML nodes and plain values: reading with file and line, writing what reads back equal."""

import math
import re

import yaml
from yacs.config import CfgNode

from utils.addresses import hide_secrets


class Loader(yaml.SafeLoader):
    """Plain YAML: 1e-3 is a number and dates are text; tags could build objects, aliases endless structures."""

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        """The next node; MarkedYAMLError for a tag or an alias."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.tag:
            problem = "a tag (!…) or an alias (*…), which are refused; write the plain value"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


class Dumper(yaml.SafeDumper):
    """YAML that `Loader` reads back as it was, with lists on one line."""

    def ignore_aliases(self, data: object) -> bool:
        """Repeated values are written out each time."""
        return True

    def represent_list(self, data: list) -> yaml.Node:
        """A list on one line."""
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


_READ_TYPES = (":bool", ":int", ":float", ":null")
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag.endswith(_READ_TYPES)]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _class in (Loader, Dumper):  # YAML 1.1 takes 1e-3 for text
    pattern = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
    _class.add_implicit_resolver("tag:yaml.org,2002:float", pattern, list("-+0123456789"))
Dumper.add_representer(CfgNode, yaml.SafeDumper.represent_dict)
Dumper.add_representer(list, Dumper.represent_list)


def locate_node(label: str, node: yaml.Node) -> str:
    """Where a node comes from: the flag, or the file with its line."""
    return label if label.startswith("--") else f"{label}:{node.start_mark.line + 1}"


def format_node(node: yaml.Node) -> str:
    """A node as its author wrote it, on one short line, without passwords."""
    if not isinstance(node, yaml.ScalarNode):
        text = node.start_mark.buffer[node.start_mark.pointer : node.end_mark.pointer]
        text = " ".join(text.split())
    elif node.tag.endswith(":str"):
        text = repr(node.value)
    else:
        text = node.value or "nothing"
    text = hide_secrets(text)
    return text if len(text) <= 60 else f"{text[:57]}…"


def read_name(key: yaml.Node) -> str:
    """The key of a mapping as text, whatever it looks like."""
    return key.value if isinstance(key, yaml.ScalarNode) else format_node(key)


def convert_node(node: yaml.Node, like: object) -> bool | int | float | str | list:
    """A node as a value of the type of `like`, [] for any list; ValueError where it is of another."""
    if like == [] and isinstance(node, yaml.SequenceNode):
        return to_python(node)
    if isinstance(like, list):
        if isinstance(node, yaml.ScalarNode) and node.value.startswith("("):  # yacs allows tuples
            node = yaml.compose(f"[{node.value.strip('()')}]", Loader)
        if not isinstance(node, yaml.SequenceNode) or len(node.value) != len(like):
            raise ValueError
        return [convert_node(item, like[0]) for item in node.value]
    if not isinstance(node, yaml.ScalarNode) or node.tag.endswith(":null"):
        raise ValueError
    if isinstance(like, str):
        return node.value
    if isinstance(like, bool):
        if not node.tag.endswith(":bool"):
            raise ValueError
        return node.value.lower() in ("true", "yes", "on")
    if isinstance(like, int):
        return int(node.value)
    value = float(node.value)
    if not math.isfinite(value):
        raise ValueError
    return value


def to_python(node: yaml.Node) -> object:
    """A node of a free mapping as what it looks like: None, bool, int, float, str, list or dict."""
    if isinstance(node, yaml.SequenceNode):
        return [to_python(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        names = [read_name(key) for key, _ in node.value]
        if len(set(names)) < len(names):
            raise ValueError(f"got {format_node(node)}, where a name is given twice; remove one")
        return {name: to_python(value) for name, (_, value) in zip(names, node.value, strict=True)}
    return yaml.constructor.SafeConstructor().construct_object(node)


def dump(values: dict) -> str:
    """A configuration as YAML; a file of it, given to `--cfg`, makes an equal configuration."""
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def to_dict(node: CfgNode) -> dict:
    """A configuration as plain dicts, for JSON."""
    return {name: to_dict(v) if isinstance(v, dict) else v for name, v in node.items()}

"""State dicts in the files of trainers: under which key they are, and their names without prefixes and counters."""

import re
from collections import Counter
from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from utils.text import quantity

# What wrappers put before a name: DDP at the beginning; torch.compile, DeepSpeed and FSDP anywhere.
WRAPPERS = re.compile(
    r"^(module\.)+|\b(_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# Counters among the tensors: of torch's AveragedModel and of thop's profile.
COUNTERS = ("n_averaged", "total_ops", "total_params")
# Keys of averages of the weights over the training.
AVERAGES = re.compile(r"(?i)(^|[._])(ema|averaged?|swa|shadow)(?![a-z])")
# Keys that are taken where a file holds several state dicts, and prefixes where one holds several models: the first of
# these. DINO's authors evaluate the teacher.
PREFERRED = ("model", "state_dict", "model_state_dict", "teacher")


class Cleaned(NamedTuple):
    """A state dict, and what was removed from it: for a message."""

    tensors: dict[str, Tensor]
    removed: list[str]


def find_state_dicts(content: object) -> dict[str, dict[str, Tensor]]:
    """All state dicts in the nested dicts and lists of `content`, by their dotted keys; "": `content` itself is one.

    Optimizer states are none, nor is what holds no more than scalars and the states of generators.
    """
    found: dict[str, dict[str, Tensor]] = {}
    seen = set()  # a file may hold something twice, or in itself

    def search(value: object, key: str, depth: int) -> bool:
        if not isinstance(value, dict | list | tuple) or id(value) in seen or depth > 8:
            return False
        seen.add(id(value))
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        if isinstance(value, dict) and "param_groups" in value:
            return False
        inner = [search(v, f"{key}.{k}".lstrip("."), depth + 1) for k, v in list(entries)]
        if any(inner) or not isinstance(value, dict):
            return any(inner)
        tensors = named_tensors(value)
        if any(tensor.ndim and tensor.dtype != torch.uint8 for tensor in tensors.values()):
            found[key] = tensors
        return key in found

    search(content, "", 0)
    if not found and isinstance(content, dict) and (tensors := named_tensors(content)):
        found[""] = tensors
    return found


def named_tensors(content: dict) -> dict[str, Tensor]:
    """The tensors directly in `content`."""
    return {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}


def choose(keys: Iterable[str], *, ema: bool = False) -> list[str]:
    """Those of `keys` that can be meant: one where that is clear, none where there is none.

    With `ema` averages of the weights, without it the weights; averages alone are taken for the weights.
    """
    keys = list(keys)
    averages = [key for key in keys if AVERAGES.search(key)]
    if ema:
        return averages
    candidates = [key for key in keys if key not in averages] or averages
    for name in PREFERRED:
        preferred = [key for key in candidates if key.rpartition(".")[2] == name]
        if preferred:
            return preferred
    return candidates


def clean(state: dict[str, Tensor]) -> Cleaned:
    """`state` without the prefixes of wrappers and without counters; of a detector, the backbone."""
    tensors = {WRAPPERS.sub("", name): tensor for name, tensor in state.items()}
    counters = [name for name in tensors if name.rpartition(".")[2] in COUNTERS]
    removed = [f"{quantity(len(counters), 'counter')} ({counters[0]} …)"] if counters else []
    tensors = {name: tensor for name, tensor in tensors.items() if name not in counters}
    return keep_prefix(tensors, "backbone.", removed)


def strip_prefix(state: dict[str, Tensor], known: Collection[str]) -> Cleaned:
    """`state` without the prefix that most of the `known` names have in it; tensors without the prefix are left out.

    Of several equal ones the preferred. Nothing changes without a prefix that has half of the known names.
    """
    counts = Counter()
    for name in state:
        parts = name.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in known:
                counts[".".join(parts[:i])] += 1
    most = max(counts.values(), default=0)
    candidates = [prefix for prefix, count in counts.items() if count == most]
    if 2 * most < len(known) or counts[""] == most:
        return Cleaned(state, [])
    return keep_prefix(state, f"{choose(candidates)[0]}.", [])


def keep_prefix(state: dict[str, Tensor], prefix: str, removed: list[str]) -> Cleaned:
    """What `state` holds under `prefix`, without it; all of `state` if that is nothing. `removed` is continued."""
    kept = {n.removeprefix(prefix): tensor for n, tensor in state.items() if n.startswith(prefix)}
    if not kept:
        return Cleaned(state, removed)
    rest = [name for name in state if not name.startswith(prefix)]
    removed = [*removed, f"the prefix {prefix!r}"]
    if rest:
        removed.append(f"{quantity(len(rest), 'tensor')} without it ({rest[0]} …)")
    return Cleaned(kept, removed)

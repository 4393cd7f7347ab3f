"""Agreement of a run's processes: settings, code, data and replicas of the training state, compared over all ranks.

Whatever each process finds out by itself is gathered before the processes work together. What differs is an error on
all of them that names the values and their ranks. Every function here is a collective.
"""

import hashlib
import json
import socket
from collections import Counter
from collections.abc import Iterable

import numpy as np
import torch

from analysis.runs import flatten
from data import ImageDataset, decoder_fingerprint
from engine import compat
from engine.state import TrainState
from utils.distributed import (
    as_bytes,
    broadcast_each,
    broadcast_object,
    gather,
    is_main,
    share_errors,
)
from utils.errors import CheckpointError, ConfigError, DataError, UserError
from utils.logging import logger
from utils.text import join_some

# What processes need not have alike: where their files are, how many workers load them, what device and version of
# Python they run on. The type of the device is compared.
OWN = {
    *("OUTPUT", "DATA.PATH", "DATA.CLASS_LIST", "DATA.VERIFY", "DATA.NUM_WORKERS"),
    *("DATA.CACHE_DIR", "DATA.CACHE_SIZE"),
    *("CHECKPOINT.RESUME", "CHECKPOINT.PRETRAINED", "DISTILL.TEACHER_PATH"),
    *("TEST.SETS", "TEST.OUT"),
    *("DEVICE", "versions.python"),
}
ABSENT = "absent"
BLOCK = 4096  # bytes that have a sum of their own in a digest


# --- What each process was started with, and sees -------------------------------------------------


def require_same_settings(mode: str, config: dict, environment: dict, device: torch.device) -> None:
    """Raise ConfigError unless all processes have the same `mode` of main.py, configuration, packages and code.

    environment: as `compat.describe_environment` has it.
    """
    revision = environment["revision"].removesuffix("-dirty")
    values = flatten(
        {"decoder": decoder_fingerprint(), "versions": environment["versions"], **config}
    )
    values |= {f"MODEL.ARGS.{name}": value for name, value in values.pop("MODEL.ARGS").items()}
    values |= {"versions.numpy": np.__version__, "the type of device": device.type}
    # Another number of threads adds in another order.
    values |= {"the number of CPU threads (THREADS)": environment["threads"]}
    settings = {name: str(value) for name, value in values.items() if name not in OWN}
    settings |= {"the command": mode, "the hash of the sources": compat.hash_sources()}
    # Without git the sources alone are compared.
    settings["the code revision"] = None if revision.startswith(compat.SOURCES) else revision
    require_same(settings)


def require_same(settings: dict[str, object]) -> None:
    """Raise ConfigError unless all processes have the same `settings`, by name."""
    if differences := find_differences(settings):
        raise _on_all(
            ConfigError,
            f"The processes of this run do not agree: {differences}. "
            "Start all of them with the same command, configuration, code and packages.",
        )


def require_same_data(classes: list[str], datasets: dict[str, ImageDataset]) -> None:
    """Raise DataError unless all processes see the same `classes`, in this order, and `datasets`, by name."""
    with share_errors():
        data = {
            name: f"{len(own)} images, {own.fingerprint[:16]}" for name, own in datasets.items()
        }
    if differences := find_differences({"class": classes, **data}):
        raise _on_all(
            DataError,
            f"The processes of this run do not see the same data: {differences}. "
            "Copy the data again to where it differs, or name a folder that all of them read.",
        )


def find_differences(values: dict[str, object]) -> str:
    """In which of the named `values` the processes differ, with values and ranks; empty where they agree.

    Of lists the first entry that differs is named. None differs from nothing.
    """
    found = gather(values)
    names = dict.fromkeys(name for own in found for name in own)
    columns = {name: [own.get(name, ABSENT) for own in found] for name in names}
    return join_some(
        _describe(name, column)
        for name, column in columns.items()
        if len({repr(value) for value in column if value is not None}) > 1
    )


def _describe(name: str, column: list) -> str:
    if all(isinstance(value, list) for value in column):
        place = next(i for i, entries in enumerate(_transpose(column)) if len(set(entries)) > 1)
        name, column = f"{name} {place}", _transpose(column)[place]
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(column):
        if value is not None:
            ranks.setdefault(str(value) or "''", []).append(rank)
    parts = [f"{_shorten(value)} on {name_ranks(own)}" for value, own in ranks.items()]
    return f"{name} is {' and '.join(parts)}"


def _transpose(lists: list[list]) -> list[tuple[str, ...]]:
    """The first entries of `lists`, the second ones, …, as text; ABSENT beyond the end of the shorter lists."""
    return [
        tuple(str(own[i]) if i < len(own) else ABSENT for own in lists)
        for i in range(max(map(len, lists)))
    ]


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}…"


def name_ranks(ranks: Iterable[int]) -> str:
    """Ranks in words: "rank 1", "ranks 0, 2-5"."""
    ranges: list[list[int]] = []
    for rank in sorted(ranks):
        if ranges and rank == ranges[-1][-1] + 1:
            ranges[-1][1:] = [rank]
        else:
            ranges.append([rank])
    words = ", ".join("-".join(map(str, ends)) for ends in ranges)
    return f"ranks {words}" if "," in words or "-" in words else f"rank {words}"


def _on_all(kind: type[UserError], message: str) -> UserError:
    error = kind(message)
    error.on_all = True
    return error


# --- Replicas of the training state ---------------------------------------------------------------


def send_state(state: TrainState) -> None:
    """Give every process the main process's `state`, to the bit, so that no other has to read a checkpoint."""
    moments = state.optimizer_tensors()
    kinds = {name: (t.shape, t.dtype, t.device.type) for name, t in moments.items()}
    kinds, counters = broadcast_object((kinds, state.counters()))
    if not is_main():
        moments = {
            name: torch.empty(shape, dtype=dtype, device=device)
            for name, (shape, dtype, device) in kinds.items()
        }
    broadcast_each(moments.values())
    if not is_main():
        state.set_optimizer_tensors(moments)
        state.load_counters(counters)
    tensors = _tensors(state)
    broadcast_each([*tensors["weights"], *tensors["EMA"]])


def send_weights(model: torch.nn.Module) -> None:
    """Give the `model` of every process the weights that the main process has loaded."""
    broadcast_each(model.state_dict().values())


class Replicas:
    """The copies of one training state on all processes; a copy with other bits is corrupt.

    Weights and counters are compared always. EMA and optimizer moments are where all processors are of one kind:
    others may round them otherwise, and then the main process's EMA counts.
    """

    def __init__(self, device: str):
        """`device` names this process's processor, in words that are equal where its bits are."""
        found = gather((socket.gethostname(), device))
        self._hosts = [host for host, _ in found]
        self._count = len(found)
        kinds: dict[str, list[int]] = {}
        for rank, (_, name) in enumerate(found):
            kinds.setdefault(name, []).append(rank)
        self._alike = len(kinds) == 1
        if not self._alike:
            listed = ", ".join(f"{name} on {name_ranks(ranks)}" for name, ranks in kinds.items())
            logger.warning(
                f"The processors differ ({listed}): weights are compared at every save, the EMA is taken from rank 0"
            )

    def compare(self, state: TrainState) -> None:
        """Raise CheckpointError, naming the rank that is corrupt, unless all processes have the same `state`."""
        if self._count == 1:
            return
        tensors = _tensors(state)
        if not self._alike:
            broadcast_each(tensors["EMA"])
            tensors = {"weights": tensors["weights"]}
        own = {name: hash_tensors(part) for name, part in tensors.items()}
        own["counters"] = json.dumps(state.counters())
        found = gather(own)
        for name in own:
            if len({copy[name] for copy in found}) > 1:
                raise _on_all(CheckpointError, self._accuse(name, [copy[name] for copy in found]))

    def _accuse(self, name: str, values: list[str]) -> str:
        """What is wrong with the copies `values` of the part `name`: the minority is corrupt, if there is one."""
        (most, count), *_ = Counter(values).most_common()
        if 2 * count > len(values):
            corrupt = [rank for rank, value in enumerate(values) if value != most]
            whose = " and ".join(
                f"rank {rank} ({self._hosts[rank]}): {values[rank]}" for rank in corrupt
            )
            what = f"The {name} of {name_ranks(corrupt)} are corrupt, their hash is not {most}: {whose}"
        else:
            whose = " and ".join(
                f"{value} on rank {rank} ({self._hosts[rank]})" for rank, value in enumerate(values)
            )
            what = (
                f"The {name} of the processes differ, one of them is corrupt: their hash is {whose}"
            )
        if not self._alike:
            what += ". Processors of several kinds may also round otherwise; use one kind"
        return (
            f"{what}. Nothing was saved. Test the memory and the processor of that machine, "
            "then start the same command again: it resumes from the latest checkpoint."
        )


def _tensors(state: TrainState) -> dict[str, list[torch.Tensor]]:
    return {
        "weights": list(state.model.state_dict().values()),
        "EMA": list(state.ema.module.state_dict().values()) if state.ema else [],
        "moments": list(state.optimizer_tensors().values()),
    }


def hash_tensors(tensors: Iterable[torch.Tensor]) -> str:
    """16 hex digits that change with every flipped bit of `tensors`, at the speed of memory.

    Each block of BLOCK bytes is added up as 64-bit integers, on its device; the sums and what is left of each tensor
    are hashed (BLAKE2b). One changed bit always changes its block's sum. Several in one block go unnoticed only if
    they cancel to the last of 64 bits, as when two words change places.
    """
    parts: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        data = as_bytes(tensor.contiguous())
        blocks = len(data) // BLOCK
        words, rest = data[: blocks * BLOCK], data[blocks * BLOCK :]
        if (
            words.storage_offset() % 8
        ):  # part of another tensor: it cannot be read as 64-bit integers
            words = words.clone()
        sums = words.view(torch.int64).view(blocks, BLOCK // 8).sum(1)
        parts.setdefault(tensor.device, []).extend((as_bytes(sums), rest))
    digest = hashlib.blake2b(digest_size=8)
    for own in parts.values():
        digest.update(torch.cat(own).cpu().numpy())
    return digest.hexdigest()

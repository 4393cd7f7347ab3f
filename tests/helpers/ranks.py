"""What one rank of a run has otherwise than the others: hooks, called with a process's own rank before it starts.

Each is bound to the rank that it is for: functools.partial(add_arguments, 1, ["--seed", "3"]).
"""

import errno
import os
from collections.abc import Iterable
from pathlib import Path

import torch

import main
from engine import compat
from engine.state import TrainState


def add_arguments(hit: int, more: Iterable[str], rank: int) -> None:
    """Rank `hit` is started with `more` behind its arguments."""
    run = main.main
    if rank == hit:
        main.main = lambda arguments: run([*arguments, *more])


def change_answer(hit: int, function: str, answer: str, rank: int) -> None:
    """`compat.<function>` answers `answer` on rank `hit`, as on another machine or with other code."""
    if rank == hit:
        setattr(compat, function, lambda *args: answer)


def work_in(hit: int, folder: Path, rank: int) -> None:
    """Rank `hit` runs in `folder`, as on a machine where relative paths lead to other files."""
    if rank == hit:
        os.chdir(folder)


def lose_file_handle(hit: int, name: str, rank: int) -> None:
    """The first file called `name` that rank `hit` opens fails, as network drives do after a change elsewhere."""
    open_file, failures = Path.open, []

    def fail_once(path: Path, *args, **kwargs):
        if path.name == name and not failures:
            failures.append(path)
            raise OSError(errno.ESTALE, "Stale file handle")
        return open_file(path, *args, **kwargs)

    if rank == hit:
        Path.open = fail_once


def flip_bit(hit: int, part: str, step: int, bit: int, rank: int) -> None:
    """One bit in the `part` of the state, "weights", "EMA" or "moments", flips on rank `hit` after `step`."""
    assign = TrainState.__setattr__

    def assign_and_flip(state: TrainState, name: str, value: object) -> None:
        assign(state, name, value)
        if name == "step" and value == step:
            number = largest(state, part).flatten()[3:4].view(torch.int32)
            number.bitwise_xor_(1 << bit)

    if rank == hit:
        TrainState.__setattr__ = assign_and_flip


def largest(state: TrainState, part: str) -> torch.Tensor:
    """The largest tensor of a part of the state."""
    tensors = {
        "weights": lambda: state.model.state_dict(),
        "EMA": lambda: state.ema.module.state_dict(),
        "moments": state.optimizer_tensors,
    }[part]()
    return max(tensors.values(), key=torch.numel)

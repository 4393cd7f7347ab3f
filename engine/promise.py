"""What does a run promise to repeat? A level, written into its log and its checkpoints.

Each level adds to the one before. L0: the same command on the same machine gives the same bits. L1: also killed and
resumed at any update, and with any number of loader workers. L2: another number of processes with the same global batch
sees the same samples, augmented and mixed the same way. L3: 1, 2, 4 … processes also
compute the same bits. Nothing is promised about another processor, number of threads or version of torch.
"""

import torch

TEXTS = {
    "L2 without bits": "repeated, resumed or on another number of processes, this run sees the same samples, augmented "
    "and mixed the same way; its bits differ, because CUDA's kernels add in any order",
    "L2": "repeated, killed and resumed at any update or with other loader workers, this run ends in the same bits; "
    "another number of processes sees the same samples, augmented and mixed the same way",
    "L3": "repeated, killed and resumed at any update, with other loader workers or on 1, 2, 4 … processes, this "
    "run ends in the same bits",
}


def level(device: torch.device, *, exact_world_size: bool) -> str:
    """The level of a run on `device`, a key of `TEXTS`."""
    if device.type == "cuda":
        return "L2 without bits"
    return "L3" if exact_world_size else "L2"

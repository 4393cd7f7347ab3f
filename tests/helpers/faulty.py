"""main.py with a model that fails on request.

python tests/helpers/faulty.py ARGUMENTS --opts MODEL.NAME=faulty MODEL.ARGS.….

White images become NaN inside it. `fault: hang` or `fault: die` stops `rank` for good in its training pass number
`at`, counted from 1; with many processes one pass comes before the first step.
"""

import hashlib
import os
import signal
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from timm.models import register_model
from torch import nn

import main

RANK = int(os.environ.get("RANK", 0))
built: list[nn.Module] = []  # what models.build made, the last one last


class Sick(nn.Module):
    """Passes images on, white ones as NaN."""

    cured = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        white = x.amin((1, 2, 3), keepdim=True) > 2
        return x if self.cured else torch.where(white, torch.nan, x)


class Faulty(nn.Module):
    """A linear classifier of an image's mean colours."""

    def __init__(self, num_classes, norm=False, fault="", rank=1, at=0, **ignored):
        super().__init__()
        self.sick = Sick()
        self.norm = nn.BatchNorm2d(3) if norm else nn.Identity()
        self.head = nn.Linear(3, num_classes)
        self.fault = fault if rank == RANK else ""
        self.left = at
        built.append(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= self.training
        if self.left == 0 and self.training and self.fault:
            if self.fault == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            threading.Event().wait()
        return self.head(self.norm(self.sick(x)).mean((2, 3)))


@register_model
def faulty(pretrained=False, **kwargs):
    return Faulty(**kwargs)


def print_weights(rank: int) -> None:
    """A hook of helpers.runs.run_group: after its run, the process prints the hash of the model's weights."""
    run = main.main

    def run_and_print(arguments: list[str]) -> int:
        code = run(arguments)
        weights = b"".join(p.detach().numpy().tobytes() for p in built[-1].parameters())
        print(f"weights {hashlib.sha256(weights).hexdigest()}")
        return code

    main.main = run_and_print


if __name__ == "__main__":
    main.leave(main.main(sys.argv[1:]))

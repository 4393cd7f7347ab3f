"""How does PyTorch get its memory on a CPU? No torch in here: it reads the answer when it first needs memory."""

import os


def use_large_pages() -> None:
    """Take large tensors in pages of 2 MiB where the system leaves that to programs; call it before torch is imported.

    The first touch of pages of 4 KiB takes a tenth of a training step.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

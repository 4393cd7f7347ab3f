"""Triton kernels: window attention, deformable attention and bilinear reads, forward and backward without atomics.

They take tensors as the linear layers leave them. Heads, windows, shifts and padding are arithmetic on addresses, and
scores and biases stay in registers, so nothing of the size of a score is kept for the backward pass. Every sum has a
fixed order: a second run gives the same bits. models/ops.py picks them, and holds the reference of each.

Shapes in this package:

    B batch   H, W map   C channels   M heads   D = C / M channels of a head   n positions of a window
    G groups, each of which reads its own channels or heads   N = H · W queries   Hk, Wk grid   S = Hk · Wk keys

Coordinates, softmax and sums are float32; products take the inputs' precision. NaN passes on.
"""

from models.fused.common import HEAD_WIDTHS
from models.fused.deformable import deformable_attend
from models.fused.reads import sample
from models.fused.windows import MAX_WINDOW, window_attend

__all__ = ["HEAD_WIDTHS", "MAX_WINDOW", "deformable_attend", "sample", "window_attend"]

"""RandAugment on the device: loader workers draw timm's operations and magnitudes, the device changes the pixels.

Each function repeats the arithmetic of Pillow's, on a part of a micro-batch: values are whole numbers from 0 to 255 in
float32 [n, 3, H, W], arguments float32 [n]. A value differs from Pillow's by 2 at most, where rounding decides.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from timm.data import auto_augment as timm_augment
from torch import Tensor
from torch.nn.functional import conv2d
from torchvision import transforms

from utils.errors import ConfigError

# --- Drawing, in the workers ----------------------------------------------------------------------

NOTHING = -1  # in place of an operation that timm's coin left out


class DrawRandAugment:
    """timm's RandAugment, which returns what it would do: [layers, 2], an index of `OPERATIONS` and its argument.

    The random numbers are timm's own, in the same order. Raises ConfigError for other policies and operations.
    """

    def __init__(self, augment: transforms.Compose):
        policies = augment.transforms
        if len(policies) != 1 or not isinstance(policies[0], timm_augment.RandAugment):
            raise ConfigError(
                "AUG.ON_DEVICE needs AUG.AUTO_AUGMENT to be a RandAugment policy, rand-…"
            )
        self.policy = policies[0]
        known = list(OPERATIONS)
        for op in self.policy.ops:
            if op.aug_fn not in known:
                raise ConfigError(
                    f"AUG.ON_DEVICE cannot compute {op.name} of AUG.AUTO_AUGMENT on the device"
                )
            op.aug_fn = partial(_note, known.index(op.aug_fn))

    def __call__(self) -> Tensor:
        """What is to be done to the next picture."""
        notes = self.policy([])
        left_out = [(NOTHING, 0.0)] * (self.policy.num_layers - len(notes))
        return torch.tensor(notes + left_out)


def _note(index: int, notes: list, *arguments: float, **_) -> list:
    return [*notes, (index, float(arguments[0]) if arguments else 0.0)]


class DeferredTransform:
    """A training transform whose RandAugment is drawn only: from pixels to the cropped image and what is to be done."""

    def __init__(self, crop: Callable, augment: transforms.Compose, to_tensor: Callable):
        self.crop = crop
        self.draw = DrawRandAugment(augment)
        self.to_tensor = to_tensor

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels to [3, img_size, img_size] and [layers, 2]."""
        picture = self.crop(pixels)
        ops = self.draw()
        return self.to_tensor(picture), ops


# --- Changing pixels, on the device ---------------------------------------------------------------


class RandAugmentOnDevice:
    """What `DrawRandAugment` drew, done to a micro-batch.

    fill: the colour, 0 … 255, of what moves leave empty. interpolation: of moves, bilinear or bicubic.
    """

    def __init__(self, *, fill: Sequence[int], interpolation: str, device: torch.device):
        self.fill = torch.tensor(fill, dtype=torch.float32, device=device).view(3, 1, 1)
        self.bicubic = interpolation == "bicubic"
        self.device = device

    def __call__(self, images: Tensor, ops: Tensor) -> Tensor:
        """Images uint8 [B, 3, H, W] from anywhere and `ops` [B, layers, 2] on the host to float32 on the device."""
        x = images.to(self.device, non_blocking=True).float()
        for layer in ops.unbind(1):
            indices = layer[:, 0].tolist()
            for index in sorted(set(indices) - {NOTHING}):
                function = list(OPERATIONS.values())[int(index)]
                chosen = torch.tensor([i for i, other in enumerate(indices) if other == index])
                arguments = layer[chosen, 1]
                part = chosen.to(self.device, non_blocking=True)
                if function in MOVES:
                    matrices = [function(a, *x.shape[:1:-1]) for a in arguments.tolist()]
                    changed = self._move(x.index_select(0, part), matrices)
                else:
                    amounts = arguments.to(self.device, non_blocking=True).view(-1, 1, 1, 1)
                    changed = function(x.index_select(0, part), amounts)
                x.index_copy_(0, part, changed)
        return x

    def _move(self, x: Tensor, matrices: list[tuple[float, ...]]) -> Tensor:
        """Every pixel of x read at a·x + b·y + c, d·x + e·y + f of its image, as `Image.transform`."""
        height, width = x.shape[2:]
        # In float64: whether a coordinate is outside decides between a pixel and the fill colour.
        table = torch.tensor(matrices, dtype=torch.float64).to(x.device, non_blocking=True)
        a, b, c, d, e, f = (column.view(-1, 1, 1) for column in table.unbind(1))
        along_x = torch.arange(width, device=x.device, dtype=torch.float64) + 0.5
        along_y = (torch.arange(height, device=x.device, dtype=torch.float64) + 0.5)[:, None]
        at_x, at_y = a * along_x + b * along_y + c, d * along_x + e * along_y + f  # (n, H, W)
        inside = (at_x >= 0) & (at_x < width) & (at_y >= 0) & (at_y < height)
        columns, right = _split(at_x - 0.5)
        rows, down = _split(at_y - 0.5)

        taps, interpolate = (range(-1, 3), _cubic) if self.bicubic else (range(2), _linear)
        pixels = x.flatten(2)
        lines = []
        for dy in taps:
            first = (rows + dy).clamp(0, height - 1) * width
            cells = [first + (columns + dx).clamp(0, width - 1) for dx in taps]
            values = [_gather(pixels, cell).view_as(x) for cell in cells]
            lines.append(interpolate(*values, right[:, None]))
        read = interpolate(*lines, down[:, None]).clamp(0, 255).floor()
        return torch.where(inside[:, None], read, self.fill)


def _split(position: Tensor) -> tuple[Tensor, Tensor]:
    cell = position.floor()
    return cell.long(), (position - cell).float()


def _gather(pixels: Tensor, cells: Tensor) -> Tensor:
    return pixels.gather(2, cells.flatten(1)[:, None].expand(-1, 3, -1))


def _linear(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    return a + (b - a) * t


def _cubic(a: Tensor, b: Tensor, c: Tensor, d: Tensor, t: Tensor) -> Tensor:
    """Pillow's cubic convolution, whose parameter is −1."""
    return b + t * (c - a + t * (2 * (a - b) + c - d + t * (b - a + d - c)))


# Moves: argument, width and height to Pillow's affine matrix (a, b, c, d, e, f).


def _rotate(degrees: float, width: int, height: int) -> tuple[float, ...]:
    angle = -math.radians(degrees)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y


def _shear_x(factor: float, width: int, height: int) -> tuple[float, ...]:
    return 1, factor, 0, 0, 1, 0


def _shear_y(factor: float, width: int, height: int) -> tuple[float, ...]:
    return 1, 0, 0, factor, 1, 0


def _translate_x(pixels: float, width: int, height: int) -> tuple[float, ...]:
    return 1, 0, pixels, 0, 1, 0


def _translate_y(pixels: float, width: int, height: int) -> tuple[float, ...]:
    return 1, 0, 0, 0, 1, pixels


def _translate_x_rel(share: float, width: int, height: int) -> tuple[float, ...]:
    return _translate_x(share * width, width, height)


def _translate_y_rel(share: float, width: int, height: int) -> tuple[float, ...]:
    return _translate_y(share * height, width, height)


MOVES = {
    *(_rotate, _shear_x, _shear_y),
    *(_translate_x, _translate_y, _translate_x_rel, _translate_y_rel),
}

# Colours: values and arguments to values.


def _grey(x: Tensor) -> Tensor:
    """Pillow's luma, [n, 1, H, W]."""
    red, green, blue = x.split(1, dim=1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) / 0x10000).floor()


def _blend(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    return (a + share * (b - a)).clamp(0, 255).floor()


def _color(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(_grey(x), x, factor)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = _grey(x).mean((1, 2, 3), keepdim=True, dtype=torch.float64)
    return _blend((mean + 0.5).floor().float(), x, factor)


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(torch.zeros_like(x), x, factor)


def _sharpness(x: Tensor, factor: Tensor) -> Tensor:
    smooth = x.clone()  # Pillow leaves the border as it is
    if min(x.shape[2:]) > 2:
        kernel = x.new_ones(3, 1, 3, 3)
        kernel[:, :, 1, 1] = 5
        smooth[:, :, 1:-1, 1:-1] = (conv2d(x, kernel, groups=3) / 13 + 0.5).floor()
    return _blend(smooth, x, factor)


def _invert(x: Tensor, _: Tensor) -> Tensor:
    return 255 - x


def _solarize(x: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(x < threshold, x, 255 - x)


def _solarize_add(x: Tensor, added: Tensor) -> Tensor:
    return torch.where(x < 128, (x + added).clamp(max=255), x)


def _posterize(x: Tensor, bits: Tensor) -> Tensor:
    step = 2.0 ** (8 - bits.clamp(0, 8))
    return (x / step).floor() * step


def _auto_contrast(x: Tensor, _: Tensor) -> Tensor:
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    scale = 255 / (high - low).double()
    stretched = (x * scale - low * scale).clamp(0, 255).floor().float()
    return torch.where(high > low, stretched, x)


def _equalize(x: Tensor, _: Tensor) -> Tensor:
    values = x.long().flatten(2)  # (n, 3, H · W)
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.long, device=x.device)
    counts.scatter_add_(2, values, torch.ones_like(values))
    levels = torch.arange(256, device=x.device)
    brightest = (levels * (counts > 0)).amax(2, keepdim=True)
    step = (values.shape[2] - counts.gather(2, brightest)) // 255  # (n, 3, 1)
    below = counts.cumsum(2) - counts
    table = (step // 2 + below) // step.clamp(min=1)
    table = torch.where(step > 0, table.clamp(max=255), levels)
    return table.gather(2, values).view_as(x).float()


OPERATIONS: dict[Callable, Callable] = {
    timm_augment.auto_contrast: _auto_contrast,
    timm_augment.equalize: _equalize,
    timm_augment.invert: _invert,
    timm_augment.rotate: _rotate,
    timm_augment.posterize: _posterize,
    timm_augment.solarize: _solarize,
    timm_augment.solarize_add: _solarize_add,
    timm_augment.color: _color,
    timm_augment.contrast: _contrast,
    timm_augment.brightness: _brightness,
    timm_augment.sharpness: _sharpness,
    timm_augment.shear_x: _shear_x,
    timm_augment.shear_y: _shear_y,
    timm_augment.translate_x_abs: _translate_x,
    timm_augment.translate_y_abs: _translate_y,
    timm_augment.translate_x_rel: _translate_x_rel,
    timm_augment.translate_y_rel: _translate_y_rel,
}

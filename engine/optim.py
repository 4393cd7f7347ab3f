"""Optimizers by name, with the recipe's decay groups, and the learning rate as a pure function of the step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.optim import Lamb, Lion, Muon, create_optimizer_v2
from torch import Tensor, nn

OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "lamb": Lamb,
    "lion": Lion,
    "muon": Muon,
}
# What an optimizer keeps of a parameter; Muon keeps the second set of those that it leaves to AdamW.
ADAM_STATE = {"step", "exp_avg", "exp_avg_sq"}
STATE = {
    torch.optim.AdamW: [ADAM_STATE],
    torch.optim.SGD: [{"momentum_buffer"}],
    Lamb: [ADAM_STATE],
    Lion: [{"exp_avg"}],
    Muon: [{"momentum_buffer"}, ADAM_STATE],
}


# --- Optimizers -----------------------------------------------------------------------------------


def parameter_groups(
    model: nn.Module, weight_decay: float, lr_scales: dict[str, float], *, hybrid: bool = False
) -> list[dict]:
    """Groups of parameters, decayed and not: vectors, biases and what `model.no_weight_decay()` names are not decayed.

    A name of `no_weight_decay` is a parameter's full name or its last part, as timm's models use both.
    Frozen parameters are in none.

    lr_scales: the factor on the learning rate, "lr_scale" of a group, of every parameter by name.
    hybrid: for Muon, further groups with `use_fallback`, of what its AdamW moves: the names of `no_weight_decay`, the
    classifier and the first convolution, which embeds the image. Muon itself finds other shapes that it cannot take.
    """
    exempt = set(getattr(model, "no_weight_decay", set)())
    ends = _ends(model) if hybrid else ()
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        last = name.rpartition(".")[2]
        named = name in exempt or last in exempt
        free = named or parameter.ndim <= 1 or last == "bias"
        fallback = hybrid and (named or name.startswith(ends))
        groups.setdefault((free, fallback, lr_scales[name]), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": 0.0 if free else weight_decay, "lr_scale": scale}
        | ({"use_fallback": True} if fallback else {})
        for (free, fallback, scale), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _ends(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of a timm model's first convolution and classifier."""
    settings = getattr(model, "pretrained_cfg", {})
    ends = [settings.get(name) or () for name in ("first_conv", "classifier")]
    names = [name for end in ends for name in ([end] if isinstance(end, str) else end)]
    return tuple(f"{name}." for name in names)


def create_optimizer(
    model: nn.Module,
    name: str,
    *,
    weight_decay: float,
    momentum: float,
    betas: Sequence[float],
    eps: float,
    lr_scales: dict[str, float],
) -> torch.optim.Optimizer:
    """torch's AdamW, or timm's optimizer `name`: "sgd", "lamb", "lion" or "muon". It ignores what it does not have.

    AdamW is fused: the bits of this form differ from the other forms' and it is one for every device, so it is fixed.
    SGD has Nesterov's momentum, or none for 0. LAMB clips no gradients, because the loop does. The learning rate is set
    at every step, from `Schedule` and the `lr_scale` of a group.
    """
    groups = parameter_groups(model, weight_decay, lr_scales, hybrid=name == "muon")
    settings = {"lr": 0.0, "betas": tuple(betas), "eps": eps}
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **settings)
    if name == "lamb":
        settings["max_grad_norm"] = None
    if name == "sgd":
        settings["nesterov"] = momentum > 0
    return create_optimizer_v2(groups, name, momentum=momentum, **settings)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, dict[str, Tensor]]:
    """The tensors that `optimizer` keeps of each parameter; LAMB's step, one for a group, is each parameter's."""
    return {
        parameter: {
            **{key: value for key, value in state.items() if isinstance(value, Tensor)},
            **({"step": group["step"].clone()} if "step" in group else {}),
        }
        for group in optimizer.param_groups
        for parameter in group["params"]
        if (state := optimizer.state.get(parameter))
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, state: dict[nn.Parameter, dict[str, Tensor]]
) -> None:
    """Put back what `optimizer_state` gave, on the parameters' devices, in place of all that `optimizer` keeps."""
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group.pop("step", None)
        for parameter in group["params"]:
            if parameter not in state:
                continue
            # Only the fused AdamW counts on the device.
            optimizer.state[parameter] = {
                key: value.to(parameter.device) if value.ndim or group.get("fused") else value
                for key, value in state[parameter].items()
            }
            if isinstance(optimizer, Lamb):
                group["step"] = optimizer.state[parameter].pop("step")


# --- Learning rate --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then cosine, per step: the learning rate of a step is a pure function of its number.

    As in the recipe of the papers (and timm's CosineLRScheduler without warm-up prefix) the cosine runs over all
    steps, so that warm-up replaces its beginning; and the rate of step k is the curve's value at k - 1, the first
    two steps sharing the warm-up's start, because the released code sets it after the step.
    """

    total: int
    warmup: int
    base: float
    start: float
    end: float

    def __call__(self, step: int) -> float:
        """Learning rate of the step that is number `step`, counted from 0."""
        t = max(step - 1, 0)
        if t < self.warmup:
            return self.start + (self.base - self.start) * t / self.warmup
        return self.end + 0.5 * (self.base - self.end) * (1 + math.cos(math.pi * t / self.total))

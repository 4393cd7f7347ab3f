"""Sanity checks: warnings of settings and class orders that are possible and probably not meant, with the remedy."""

import re

from analysis import imagenet
from utils.text import quantity

MAX_INITIAL_SHARE = 0.05  # of the initial weights in the average at the end of a run


def schedule_warnings(
    *,
    epochs: int,
    steps_per_epoch: int,
    ema_decay: float,
    unreached: dict[str, int],
    print_freq: int,
    eval_freq: int,
    save_freq: int,
    save_steps: int,
) -> list[str]:
    """Averages and intervals that are longer than the run; those of freq and steps as the keys have them.

    unreached: keys with the last epoch that they name, counted from 0.
    """
    steps, warnings = epochs * steps_per_epoch, []
    run = f"the run has {quantity(steps, 'step')}"
    if ema_decay and (initial := ema_decay**steps) > MAX_INITIAL_SHARE:
        fitting = _round_decay(0.01 ** (1 / steps))  # 1 % of the initial weights are left
        remedy = f"{fitting:g} would fit." if fitting >= 0.5 else "0 switches it off."
        warnings.append(
            f"TRAIN.EMA_DECAY {ema_decay:g} averages over about {1 / (1 - ema_decay):,.0f} steps, {run}: at its end "
            f"{initial:.1%} of the average are the initial weights. {remedy}"
        )
    for name, epoch in unreached.items():
        if epoch >= epochs:
            warnings.append(
                f"{name} names epoch {epoch}, counted from 0, and TRAIN.EPOCHS is {epochs}: it is never reached."
            )
    if print_freq > steps_per_epoch:
        warnings.append(
            f"PRINT_FREQ is {print_freq:,}, an epoch has {quantity(steps_per_epoch, 'step')}: only the last step of "
            "each epoch is recorded."
        )
    if save_steps >= steps:
        warnings.append(
            f"SAVE_STEPS is {save_steps:,}, {run}: there is no checkpoint inside of an epoch."
        )
    if eval_freq > epochs:
        warnings.append(
            f"EVAL_FREQ is {eval_freq:,}, TRAIN.EPOCHS {epochs:,}: only the end is evaluated."
        )
    if save_freq > epochs:
        warnings.append(
            f"SAVE_FREQ is {save_freq:,}, TRAIN.EPOCHS {epochs:,}: only the end and better accuracies are saved."
        )
    return warnings


def _round_decay(decay: float) -> float:
    """`decay` with one digit of what it leaves to a step: 0.9987 to 0.999."""
    return 1 - float(f"{1 - decay:.0e}")


def class_order_warnings(classes: list[str]) -> list[str]:
    """Why weights from elsewhere may count the class folders `classes`, in this order, otherwise."""
    warnings = []
    if len(classes) == 1000 and not imagenet.are_imagenet(classes):
        wnids = set(imagenet.wnids())
        other = next(name for name in classes if name not in wnids)
        warnings.append(
            f"The 1,000 class folders are not ImageNet-1k's WordNet ids, {other} among them: weights for ImageNet "
            "count the sorted ids, not the numbers of its devkit and not words."
        )
    by_number = sorted(classes, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
    alike = len({re.sub(r"\d+", "", name) for name in classes}) == 1
    if alike and by_number != classes:
        first = next(i for i, name in enumerate(classes) if name != by_number[i])
        warnings.append(
            f"Class folders are sorted as text, {classes[first]} before {by_number[first]}; weights from elsewhere may "
            "count them by number."
        )
    return warnings

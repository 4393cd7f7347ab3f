"""The two hot loops: an epoch of training, and an evaluation that counts every image once."""

import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from timm.utils import AverageMeter
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from analysis.collector import Collector
from data import NO_LABEL
from engine.distill import Distillation
from engine.grad_sync import GradSync
from engine.optim import Schedule
from engine.state import TrainState
from utils.bottleneck import bottleneck, shares
from utils.distributed import Process, all_reduce_sum
from utils.logging import MetricWriter, logger
from utils.rng import key, reseed
from utils.step_timer import StepTimer


@dataclass(frozen=True)
class Recipe:
    """What every step does; the state that it changes is `TrainState`."""

    seed: int
    epochs: int
    steps_per_epoch: int
    global_batch: int  # images of one step
    micro_batches: range  # the micro-batches of every step that are this process's
    schedule: Schedule
    transform: (
        Callable  # (uint8 images, labels, ops, mix=…) on the CPU -> (images, targets) on the device
    )
    mixup_off_epoch: int  # from which on images are not mixed; 0: never
    label_smoothing: float
    distillation: Distillation | None
    clip_grad: float  # largest gradient norm; 0 leaves the gradient as it is
    amp_dtype: torch.dtype
    print_freq: int  # steps between records


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Mixed precision in `dtype`; float32 is none."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


# --- Training -------------------------------------------------------------------------------------


def train_one_epoch(
    state: TrainState,
    grad_sync: GradSync,
    batches: Iterator,
    recipe: Recipe,
    process: Process,
    writer: MetricWriter,
    after_step: Callable[[], None],
) -> None:
    """Train from `state.step` to the end of epoch `state.epoch`; `grad_sync` belongs to `state.model`.

    `after_step` is called after every step: there the state may be saved and the run end.
    """
    end = (state.epoch + 1) * recipe.steps_per_epoch
    meters = {name: AverageMeter() for name in ("time", "loss", "grad_norm")}
    begin = time.perf_counter()
    since_step, timer, epoch_seconds = state.step, StepTimer(process.device), Counter()
    progress = tqdm(
        total=recipe.steps_per_epoch,
        initial=state.step % recipe.steps_per_epoch,
        desc=f"epoch {state.epoch}/{recipe.epochs}",
        disable=None if process.is_main else True,
        leave=False,
        dynamic_ncols=True,
    )
    while state.step < end:
        rate = recipe.schedule(state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        losses = forward_backward(state, grad_sync, batches, recipe, process, timer)
        with timer("optimizer"):
            norm = _step(state, recipe.clip_grad)
        state.step += 1
        progress.update()
        if state.step % recipe.print_freq == 0 or state.step == end:
            # The values are this step's own, so that a resumed run records the same as one that was not stopped.
            loss = grad_sync.mean_loss(losses).item()
            values = {"train/loss": loss, "train/lr": rate, "train/grad_norm": norm}
            if state.scaler.is_enabled():
                values["train/loss_scale"] = state.scaler.get_scale()
            writer.metrics(state.step, values)
            lap, steps = timer.flush(), state.step - since_step
            epoch_seconds.update(lap)
            seconds = sum(lap.values())
            speed = steps * recipe.global_batch / seconds
            times = {f"time/{phase}": share for phase, share in shares(lap).items()}
            writer.timing(state.step, {"time/images_per_s": speed, **times})
            for name, value in (("time", seconds / steps), ("loss", loss), ("grad_norm", norm)):
                meters[name].update(value)
            logger.info(_train_line(state, recipe, rate, meters, process.device))
            since_step = state.step
        with timer("save"):
            after_step()
    progress.close()
    epoch_seconds.update(timer.flush())
    logger.info(f"EPOCH {state.epoch} training takes {_clock(time.perf_counter() - begin)}")
    logger.info(bottleneck(epoch_seconds))


def forward_backward(
    state: TrainState,
    grad_sync: GradSync,
    batches: Iterator,
    recipe: Recipe,
    process: Process,
    timer: StepTimer,
) -> list[torch.Tensor]:
    """Leave the mean gradient of a step's micro-batches; return the losses of this process's."""
    state.optimizer.zero_grad(set_to_none=True)
    losses = []
    mix = not 0 < recipe.mixup_off_epoch <= state.step // recipe.steps_per_epoch
    for micro_batch in recipe.micro_batches:
        with timer("data_wait"):
            batch = next(batches)
        reseed(key(recipe.seed, "slot", state.step, micro_batch), process.device)
        with timer("transform"):
            images, targets = recipe.transform(batch.images, batch.labels, batch.ops, mix=mix)
        with grad_sync.accumulate(micro_batch, timer):
            with timer("forward"), autocast(process.device, recipe.amp_dtype):
                logits = grad_sync.net(images)
                teacher = recipe.distillation and recipe.distillation.logits(images)
            logits = logits.float()
            loss = F.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)
            if recipe.distillation:
                loss = recipe.distillation(loss, logits, teacher)
            loss = loss / grad_sync.divisor
            with timer("backward"):
                state.scaler.scale(loss).backward()
        losses.append(loss.detach())
    return losses


def _step(state: TrainState, clip_grad: float) -> float:
    """Clip the gradient and apply it; where it is not finite, the same on all processes, skip. Returns its norm."""
    state.scaler.unscale_(state.optimizer)
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), clip_grad or float("inf")).item()
    finite = norm < float("inf")
    # An enabled scaler skips by itself, and lowers its scale.
    if finite or state.scaler.is_enabled():
        state.scaler.step(state.optimizer)
        state.scaler.update()
    if finite and state.ema is not None:
        state.ema.update(state.model, state.step + 1 if state.ema.use_warmup else None)
    state.skipped = 0 if finite else state.skipped + 1
    if not finite:
        logger.warning(f"step {state.step + 1}: the gradient norm is {norm}, it is skipped")
    return norm


def _train_line(
    state: TrainState, recipe: Recipe, rate: float, meters: dict, device: torch.device
) -> str:
    index = (state.step - 1) % recipe.steps_per_epoch + 1
    left = meters["time"].avg * (recipe.epochs * recipe.steps_per_epoch - state.step)
    values = "\t".join(
        f"{name} {meter.val:.4f} ({meter.avg:.4f})" for name, meter in meters.items()
    )
    return (
        f"Train: [{state.epoch}/{recipe.epochs}][{index}/{recipe.steps_per_epoch}]\t"
        f"eta {_clock(left)} lr {rate:.6f}\t{values}\tmem {_memory(device):.0f}MB"
    )


# --- Evaluation -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accuracy:
    """The outcome of an evaluation: how many images, how many right, and the mean loss."""

    images: int
    top1: int
    top5: int
    loss: float  # of the images that could be read
    unreadable: int = 0  # of the images, counted as wrong

    @property
    def acc1(self) -> float:
        """Top-1 accuracy in per cent."""
        return 100 * self.top1 / self.images

    @property
    def acc5(self) -> float:
        """Top-5 accuracy in per cent."""
        return 100 * self.top5 / self.images

    def asdict(self) -> dict[str, float]:
        """Counts, percentages and loss."""
        return {**asdict(self), "acc1": self.acc1, "acc5": self.acc5}


@torch.inference_mode()
def validate(
    *,
    model: nn.Module,
    loader: DataLoader,
    normalize: Callable,
    process: Process,
    amp_dtype: torch.dtype,
    print_freq: int,
    collectors: Sequence[Collector] = (),
) -> Accuracy:
    """Classify this process's share of the images, then add the counts of all processes, once.

    print_freq: batches from one log line to the next; 0: none.
    collectors: what keeps the predictions of every image.

    No image is counted twice and none is left out, however many processes there are. The losses are added up in the
    order of the images, so that their sum does not depend on that number either.
    """
    model.eval()
    counts = torch.zeros(4, dtype=torch.int64, device=process.device)
    losses = torch.zeros(len(loader.dataset), dtype=torch.float64, device=process.device)
    time_meter = AverageMeter()
    since = time.perf_counter()
    progress = tqdm(
        loader,
        desc="test",
        disable=None if process.is_main else True,
        leave=False,
        dynamic_ncols=True,
    )
    for index, (images, labels, positions, bad) in enumerate(progress, start=1):
        for file in bad:
            logger.warning(f"{file.path} {file.reason}: counts as wrong")
        labels = labels.to(process.device, non_blocking=True)
        with autocast(process.device, amp_dtype):
            logits = model(normalize(images)).float()
        loss = F.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="none")
        positions = positions.to(process.device)
        losses[positions] = loss.double()
        for collector in collectors:
            collector.add(logits, labels != NO_LABEL, positions)
        guesses = logits.topk(min(5, logits.shape[1])).indices
        right = guesses == labels[:, None]
        sizes = torch.tensor((len(images), len(bad)), device=process.device)
        counts += torch.cat((sizes, torch.stack((right[:, 0].sum(), right.any(1).sum()))))
        if print_freq and index % print_freq == 0:
            n, unreadable, top1, top5 = counts.tolist()
            time_meter.update((time.perf_counter() - since) / print_freq, print_freq)
            since = time.perf_counter()
            logger.info(
                f"Test: [{index}/{len(loader)}]\tTime {time_meter.val:.3f} ({time_meter.avg:.3f})\t"
                f"Loss {losses.sum() / max(1, n - unreadable):.4f}\t"
                f"Acc@1 {100 * top1 / n:.3f}\tAcc@5 {100 * top5 / n:.3f}\t"
                f"Mem {_memory(process.device):.0f}MB"
            )
    model.train()
    n, unreadable, top1, top5 = all_reduce_sum(counts).tolist()
    loss = all_reduce_sum(losses).sum().item() / max(1, n - unreadable)
    return Accuracy(n, top1, top5, loss, unreadable)


def _memory(device: torch.device) -> float:
    """MiB at the peak so far: of the accelerator's memory, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"

"""The two hot loops: an epoch of training, and an evaluation that counts every image once."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from timm.utils import AverageMeter, ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from analysis.collector import Collector
from data import NO_LABEL
from engine.distill import Distillation
from engine.grad_sync import GradSync
from engine.optim import Schedule
from engine.results import StepResults, clock, peak_memory
from engine.state import TrainState
from utils.bottleneck import bottleneck
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
    pixels: tuple[int, ...]  # of a training image in each epoch
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
    after_step: Callable[[StepResults], None],
) -> None:
    """Train from `state.step` to the end of epoch `state.epoch`; `grad_sync` belongs to `state.model`.

    `after_step` is called after every step with the results so far: there they are read, the state may be saved and
    the run end.
    """
    end = (state.epoch + 1) * recipe.steps_per_epoch
    if state.step == end:  # stopped during the validation of this epoch
        return
    begin, timer = time.perf_counter(), StepTimer(process.device)
    results = StepResults(
        state,
        writer,
        timer,
        process.device,
        steps_per_epoch=recipe.steps_per_epoch,
        epochs=recipe.epochs,
        later_epochs=sum(recipe.pixels[state.epoch + 1 :]) / recipe.pixels[state.epoch],
        global_batch=recipe.global_batch,
    )
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
            norm = apply_gradient(state, recipe.clip_grad)
        state.step += 1
        progress.update()
        recorded = state.step % recipe.print_freq == 0 or state.step == end
        results.add(rate, norm, grad_sync.mean_loss(losses) if recorded else None)
        with timer("save"):
            after_step(results)
    progress.close()
    results.seconds.update(timer.lap().seconds())
    logger.info(f"EPOCH {state.epoch} training takes {clock(time.perf_counter() - begin)}")
    logger.info(bottleneck(results.seconds))


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


def apply_gradient(state: TrainState, clip_grad: float) -> torch.Tensor:
    """Clip the gradient and apply it; where it is not finite, the same on all processes, skip. Returns its norm.

    The device decides by itself, and the norm stays there, unless the optimizer or the model needs the host for that.
    """
    state.scaler.unscale_(state.optimizer)
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), clip_grad or float("inf"))
    finite = norm < float("inf")
    scaled = (
        state.scaler.is_enabled()
    )  # then the scaler makes the optimizer skip, and lowers its scale
    if state.skips_on_device and not scaled:
        # What an enabled scaler would set.
        state.optimizer.grad_scale, state.optimizer.found_inf = None, (~finite).float()
    if state.skips_on_device or scaled or finite:
        state.scaler.step(state.optimizer)
        state.scaler.update()
    if state.ema is not None:
        made = state.step + 1 if state.ema.use_warmup else None
        if state.skips_on_device:
            _average(state.ema, state.model, finite, made)
        elif finite:
            state.ema.update(state.model, made)
    return norm


@torch.no_grad()
def _average(ema: ModelEmaV3, model: nn.Module, finite: torch.Tensor, step: int | None) -> None:
    """`ema.update(model, step)` where the flag `finite` is set, on the device."""
    weight = (1 - ema.get_decay(step)) * finite.float()
    pairs = zip(ema.module.state_dict().values(), model.state_dict().values(), strict=True)
    floats = [(mean, value) for mean, value in pairs if mean.is_floating_point()]
    means, values = zip(*floats, strict=True)
    torch._foreach_lerp_(means, values, [weight] * len(means))


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
    batch_size: int,
    collectors: Sequence[Collector] = (),
) -> Accuracy:
    """Classify this process's share of the images, then add the counts of all processes, once.

    print_freq: batches from one log line to the next; 0: none.
    batch_size: images that the model is always given, with zeros if there are fewer: a compiled model is compiled again
        for another number; 0: as many as there are.
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
            logits = model(fill_up(normalize(images), batch_size))[: len(images)].float()
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
                f"Mem {peak_memory(process.device):.0f}MB"
            )
    model.train()
    n, unreadable, top1, top5 = all_reduce_sum(counts).tolist()
    loss = all_reduce_sum(losses).sum().item() / max(1, n - unreadable)
    return Accuracy(n, top1, top5, loss, unreadable)


def fill_up(images: torch.Tensor, batch_size: int) -> torch.Tensor:
    """At least `batch_size` images: those of `images` (B, C, H, W), then zeros."""
    missing = batch_size - len(images)
    return F.pad(images, (0, 0) * 3 + (0, missing)) if missing > 0 else images

"""Training run: from a frozen configuration to checkpoints and accuracies."""

from pathlib import Path

import torch
from yacs.config import CfgNode

import data
from engine import build, checkpoint, compat
from engine.checkpoint import Saver
from engine.evaluate import log_accuracy, score
from engine.hooks import AfterStep, Divergence, InterruptibleLoader
from engine.loop import train_one_epoch
from engine.run_dir import RunDir
from engine.state import TrainState
from utils import distributed
from utils.distributed import Process, explain_lost_process, init_distributed
from utils.errors import CheckpointError, DivergedError
from utils.files import write_atomically
from utils.logging import MetricWriter, logger, start_logging
from utils.signals import StopRequest
from utils.watchdog import Watchdog
from utils.yaml_nodes import dump

PROBED_IMAGES = 32  # whose sampling offsets are measured at every validation


def train(cfg: CfgNode, sources: dict[str, str], stop: StopRequest) -> None:
    """Train from the start, or from the run's latest valid checkpoint, to the last epoch.

    sources: where the values of `cfg` that are no defaults come from, for the log.
    """
    build.check_model(cfg)
    with (
        init_distributed(cfg.DEVICE, cfg.THREADS, 2 * cfg.TRAIN.HANG_SECONDS) as process,
        RunDir(build.run_path(cfg), process).lock() as run_dir,
        Saver(run_dir.checkpoints, cfg.CHECKPOINT.KEEP) as saver,
        Watchdog(cfg.TRAIN.HANG_SECONDS, run_dir.hang_file(), run_dir.report_hang) as watchdog,
        explain_lost_process(),
    ):
        own_path = run_dir.path if process.is_main else None  # only the main process writes there
        start_logging(cfg.MODEL.NAME, process.rank, own_path)
        build.log_start(cfg, sources, process)
        cfg = build.prepare_device(cfg, process.device)

        # --- Data ---------------------------------------------------------------------------------
        resumed = find_checkpoint(cfg, run_dir)
        train_set, val_set = build.open_data(cfg, resumed)
        logger.info(f"Training on {train_set}; validating on {val_set}")
        steps_per_epoch = data.steps_per_epoch(len(train_set), cfg.TRAIN.GLOBAL_BATCH_SIZE)
        metadata = build.build_metadata(cfg, train_set, val_set, steps_per_epoch, process)
        logger.info(f"Reproducibility: {compat.explain_reproducibility(metadata)}")
        if resumed is not None:
            compat.check_resume(resumed, metadata, cfg.CHECKPOINT.ACCEPT)

        # --- Model, and what a step does ----------------------------------------------------------
        num_classes = len(train_set.classes)
        state = build.build_state(cfg, num_classes, process.device, fresh=resumed is None)
        run_dir.require_space(state.num_bytes())
        recipe = build.build_recipe(cfg, steps_per_epoch, num_classes, process)
        grad_sync = build.build_grad_sync(cfg, state.model, recipe.micro_batches, process)

        # --- Resume -------------------------------------------------------------------------------
        if resumed is not None:
            checkpoint.restore(resumed, state)
            logger.info(f"Resumed from {resumed}: epoch {state.epoch}, step {state.step}")
        distributed.barrier()  # all have read what the main process is about to write and prune
        if process.is_main:
            write_atomically(run_dir.path / "config.yaml", dump(cfg))
        writer = MetricWriter(own_path, state.step, state.epoch, cfg.PRINT_FREQ)

        # --- After a step -------------------------------------------------------------------------
        sampler = build.train_sampler(cfg, train_set, recipe, process, start_step=0)
        limit = cfg.TRAIN.MAX_SKIPPED
        after_step = AfterStep(
            state=state,
            metadata=metadata,
            run_dir=run_dir,
            saver=saver,
            save_steps=cfg.SAVE_STEPS,
            steps_per_epoch=steps_per_epoch,
            stop=stop,
            divergence=Divergence(limit, run_dir.path, metadata, train_set, sampler, process),
            watchdog=watchdog,
            writer=writer,
            process=process,
        )

        # --- Epochs -------------------------------------------------------------------------------
        loader = build.val_loader(cfg, val_set, process)
        loader = InterruptibleLoader(loader, stop, watchdog, after_step.end_if_requested)
        batches = None
        stop.defer_to_steps()
        while state.epoch < cfg.TRAIN.EPOCHS:
            if batches is None:
                args = cfg, train_set, recipe, process, state.step, run_dir.path
                batches = watchdog.watch(build.train_batches(*args))
            try:
                train_one_epoch(state, grad_sync, batches, recipe, process, writer, after_step)
            except DivergedError as error:
                after_step.rollback(error)
                batches = None  # from the step of that checkpoint
                continue
            end_epoch(cfg, loader, after_step)
        after_step.finish()
        best = f"{state.best['acc1']:.2f}% at step {state.best['step']}"
        logger.info(f"Max accuracy: {best}. The run is complete: {run_dir.path}")


# --- Resume ---------------------------------------------------------------------------------------


def find_checkpoint(cfg: CfgNode, run_dir: RunDir) -> Path | None:
    """The checkpoint to resume from: the run's own latest, else the one that CHECKPOINT.RESUME names.

    The run's own comes first so that a command with --resume can be started again after it was stopped.
    """
    own = checkpoint.latest(run_dir.checkpoints) if cfg.CHECKPOINT.AUTO_RESUME else None
    if not cfg.CHECKPOINT.RESUME:
        return own
    named = checkpoint.resolve(Path(cfg.CHECKPOINT.RESUME))
    if own is None or own.resolve() == named.resolve():
        return named
    if named.resolve().is_relative_to(run_dir.path.resolve()):
        raise CheckpointError(
            f"{run_dir.path} is at {own.name} already. To branch off at {named.name}, give the new run another --tag."
        )
    logger.info(
        f"This run has started already: it resumes from its own {own.name}, not from {named}"
    )
    return own


# --- End of an epoch ------------------------------------------------------------------------------


def end_epoch(cfg: CfgNode, loader: InterruptibleLoader, after_step: AfterStep) -> None:
    """Close an epoch: evaluate where due, save where due or improved."""
    state = after_step.state
    last = state.epoch + 1 == cfg.TRAIN.EPOCHS
    improved = False
    if last or (state.epoch + 1) % cfg.EVAL_FREQ == 0:
        improved = validate_epoch(cfg, loader, state, after_step.writer, after_step.process)
    state.epoch += 1
    if last or improved or state.epoch % cfg.SAVE_FREQ == 0:
        after_step.save()
    after_step.write_status()


def validate_epoch(
    cfg: CfgNode,
    loader: InterruptibleLoader,
    state: TrainState,
    writer: MetricWriter,
    process: Process,
) -> bool:
    """Evaluate the model and its EMA and record the accuracies; whether the higher one is the run's best so far."""
    weights = {"val": state.model} | ({"val_ema": state.ema.module} if state.ema else {})
    values, best = {"epoch": state.epoch + 1}, 0.0
    for name, model in weights.items():
        result = score(cfg, loader, model, process)
        log_accuracy(result, name)
        values |= {f"{name}/{key}": getattr(result, key) for key in ("acc1", "acc5", "loss")}
        best = max(best, result.acc1)
    if process.is_main:
        writer.metrics(state.step, values | measure_offsets(cfg, loader, state.model, process))
    improved = best > state.best["acc1"]
    if improved:
        state.best = {"acc1": best, "step": state.step}
    logger.info(f"Max accuracy: {state.best['acc1']:.2f}%")
    return improved


@torch.inference_mode()
def measure_offsets(
    cfg: CfgNode, loader: InterruptibleLoader, model: torch.nn.Module, process: Process
) -> dict[str, float]:
    """Mean length of the sampling offsets of each deformable stage on a few images, in pixels of the input."""
    if not hasattr(model, "sampling_positions"):
        return {}
    images = [loader.dataset[i].image for i in range(min(PROBED_IMAGES, len(loader.dataset)))]
    model.eval()
    lengths: dict[str, list[float]] = {}
    normalize = build.normalize(cfg, process.device)
    for layer in model.sampling_positions(normalize(torch.stack(images))):
        name = f"offsets/stage{layer.stage + 1}_pixels"
        lengths.setdefault(name, []).append(layer.offset_length().mean().item())
    model.train()
    return {name: sum(values) / len(values) for name, values in lengths.items()}

"""Training run: from a frozen configuration to checkpoints and accuracies."""

from pathlib import Path

import numpy as np
import torch
from yacs.config import CfgNode

import data
from analysis import offsets
from analysis.runs import list_lost_points
from engine import agreement, build, checkpoint, compat
from engine.agreement import Replicas
from engine.checkpoint import Saver
from engine.compilation import explain_compile_errors
from engine.evaluate import log_accuracy, score
from engine.hooks import AfterStep, Divergence, InterruptibleLoader
from engine.loop import train_one_epoch
from engine.run_dir import RunDir
from engine.state import TrainState
from utils.distributed import Process, explain_failures, limit_waiting, on_main, share_errors
from utils.errors import CheckpointError, DivergedError
from utils.logging import MetricWriter, logger, start_logging
from utils.signals import StopRequest
from utils.watchdog import Watchdog
from utils.yaml_nodes import dump

PROBED_IMAGES = 32  # whose sampling offsets are measured at every validation


def train(cfg: CfgNode, sources: dict[str, str], stop: StopRequest) -> None:
    """Train from the start, or from the run's latest valid checkpoint, to the last epoch.

    sources: where the values of `cfg` that are no defaults come from, for the log.
    """
    with (
        build.join_run(cfg, "train") as process,
        RunDir(build.run_path(cfg), process).lock() as run_dir,
        Saver(run_dir.checkpoints, cfg.CHECKPOINT.KEEP) as saver,
        Watchdog(cfg.TRAIN.HANG_SECONDS, run_dir.hang_file(), run_dir.report_hang) as watchdog,
        explain_failures(),
        explain_compile_errors(),
    ):
        stop.raise_if_requested(run_dir.report_exit)
        folder = run_dir.path if process.is_main else None  # only the main process writes there
        start_logging(cfg.MODEL.NAME, process.rank, folder)
        build.log_start(cfg, sources, process, "train")
        cfg = build.prepare_device(cfg, process.device)

        # --- Data ---------------------------------------------------------------------------------
        resumed = on_main(lambda: find_checkpoint(cfg, run_dir))
        train_set, val_set = build.open_data(cfg, on_main(lambda: saved_classes(resumed)))
        steps_per_epoch = data.steps_per_epoch(len(train_set), cfg.TRAIN.GLOBAL_BATCH_SIZE)
        metadata = build.build_metadata(cfg, train_set, val_set, steps_per_epoch, process)
        logger.info(f"Reproducibility: {compat.explain_reproducibility(metadata)}")
        if resumed is not None:
            on_main(lambda: compat.check_resume(resumed, metadata, cfg.CHECKPOINT.ACCEPT))

        # --- Model, and what a step does ----------------------------------------------------------
        with share_errors():
            fresh = resumed is None and process.is_main
            state = build.build_state(cfg, train_set.classes, process.device, fresh=fresh)
            run_dir.require_space(state.num_bytes())
            recipe = build.build_recipe(cfg, steps_per_epoch, train_set.classes, process)
        grad_sync = build.build_grad_sync(cfg, state.model, recipe.micro_batches, process)

        # --- Resume -------------------------------------------------------------------------------
        replicas = start_replicas(state, resumed, metadata, process)
        with share_errors():
            run_dir.write_settings(dump(cfg), sources)
            args = cfg.PRINT_FREQ, compat.list_hparams(metadata["config"]), cfg.EVAL_FREQ
            writer = MetricWriter(folder, state.step, state.epoch, *args)

        # --- After a step -------------------------------------------------------------------------
        sampler = build.train_sampler(cfg, train_set, recipe, process, start_step=0)
        limit = cfg.TRAIN.MAX_SKIPPED
        after_step = AfterStep(
            state=state,
            replicas=replicas,
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
        loader = InterruptibleLoader(build.val_loader(cfg, val_set, process), after_step)
        batches = None
        after_step.start()
        limit_waiting(0)  # the watchdog ends what hangs
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


def saved_classes(path: Path | None) -> list[str] | None:
    """The class list of the checkpoint at `path`, if any."""
    return None if path is None else checkpoint.read_metadata(path)["classes"]


def find_checkpoint(cfg: CfgNode, run_dir: RunDir) -> Path | None:
    """The checkpoint to resume from: the run's own latest, else the one that CHECKPOINT.RESUME names.

    The run's own comes first so that a command with --resume can be started again after it was stopped.
    """
    if not cfg.CHECKPOINT.AUTO_RESUME and checkpoint.list_checkpoints(run_dir.checkpoints):
        raise CheckpointError(
            f"{run_dir.path} holds the checkpoints of a run, and CHECKPOINT.AUTO_RESUME False would mix another one "
            "into it. Give the new run another --tag, or leave AUTO_RESUME True to resume."
        )
    own = checkpoint.latest(run_dir.checkpoints)
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


def start_replicas(
    state: TrainState, resumed: Path | None, metadata: dict, process: Process
) -> Replicas:
    """Restore the checkpoint `resumed`, if any, on the main process, and give its state to all: the replicas."""
    if resumed is not None:
        on_main(lambda: compat.restore(resumed, state, metadata))
    agreement.send_state(state)
    replicas = Replicas(compat.device_name(process.device))
    replicas.compare(state)
    if resumed is not None:
        logger.info(f"Resumed from {resumed}: epoch {state.epoch}, step {state.step}")
    return replicas


# --- End of an epoch ------------------------------------------------------------------------------


def end_epoch(cfg: CfgNode, loader: InterruptibleLoader, after_step: AfterStep) -> None:
    """Close an epoch: evaluate where due, save where due or improved."""
    state = after_step.state
    last = state.epoch + 1 == cfg.TRAIN.EPOCHS
    improved = False
    if last or (state.epoch + 1) % cfg.EVAL_FREQ == 0:
        after_step.replicas.compare(state)  # each process evaluates its own
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
    values, accuracies = {"epoch": state.epoch + 1}, {}
    for name, model in weights.items():
        result = score(cfg, loader, model, process)
        log_accuracy(result, name)
        values |= {f"{name}/{key}": getattr(result, key) for key in ("acc1", "acc5", "loss")}
        accuracies[name] = result.acc1
    if process.is_main:
        numbers, pictures = probe_offsets(cfg, loader, state.model, process)
        writer.metrics(state.step, values | numbers)
        writer.pictures(state.step, pictures)
    best = max(accuracies, key=accuracies.get)
    improved = accuracies[best] > state.best["acc1"]
    if improved:
        state.best = {"acc1": accuracies[best], "step": state.step, "ema": best == "val_ema"}
    logger.info(f"Max accuracy: {state.best['acc1']:.2f}%")
    return improved


@torch.inference_mode()
def probe_offsets(
    cfg: CfgNode, loader: InterruptibleLoader, model: torch.nn.Module, process: Process
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Numbers and pictures of the sampling offsets of each deformable stage on a few images; warns of lost points."""
    if not hasattr(model, "sampling_positions"):
        return {}, {}
    spread = np.linspace(0, len(loader.dataset) - 1, min(PROBED_IMAGES, len(loader.dataset)))
    images = torch.stack([loader.dataset[int(i)].image for i in spread])
    model.eval()
    layers = model.sampling_positions(build.normalize(cfg, process.device)(images))
    model.train()
    numbers = offsets.measure_offsets(layers, clamped=model.config.plus_plus)
    for stage, share in list_lost_points(numbers).items():
        logger.warning(
            f"Offsets took {share:.0%} of the sampled points of {stage} to the border of the map or beyond, where they "
            "learn little. Lower the learning rate of the offset networks, such as "
            "TRAIN.LR_SCALES \"[['*.positions', 0.1]]\""
        )
    return numbers, offsets.draw_offsets(layers, images)

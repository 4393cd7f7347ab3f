"""Groups 5, 7 and 11: models raced against their peers, eager and compiled, and over batch sizes."""

import time
from collections.abc import Callable

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tools.gpu_checks.common import (
    Racer,
    Setting,
    describe,
    free,
    make_racers,
    seconds_in_turns,
    seconds_of,
)
from tools.gpu_checks.report import Report

PEER = "Swin-T, fused attention"


def check_eager(report: Report, setting: Setting) -> None:
    """Images a second of every model, evaluation and training, in turns."""
    batch, rounds = setting.pick((128, 8), (2, 2))
    dtype = torch.bfloat16 if setting.cuda else torch.float32
    racers = {name: make() for name, make in make_racers(setting, batch, dtype).items()}
    race(report, setting, racers, rounds, "eager")


def race(
    report: Report, setting: Setting, racers: dict[str, Racer], rounds: int, mode: str
) -> None:
    """Report every racer's images/s, and its ratio to Swin-T round by round."""
    for phase, step in (("evaluation", Racer.evaluate), ("training", Racer.train)):
        steps = {name: lambda r=racer, s=step: s(r) for name, racer in racers.items()}
        seconds = seconds_in_turns(setting, steps, rounds)
        for name, racer in racers.items():
            speed = describe([racer.batch / s for s in seconds[name]])
            report.add(f"{name}, {mode}, {phase}", speed, "images/s")
            if PEER in seconds and name != PEER:
                ratio = [p / s for p, s in zip(seconds[PEER], seconds[name], strict=True)]
                report.add(f"{name}, {mode}, {phase}: times {PEER}", describe(ratio, 2))


# --- Compiled -------------------------------------------------------------------------------------


def check_compiled(report: Report, setting: Setting) -> None:
    """Seconds to compile, graphs, and the same race of the models that were compiled."""
    batch, rounds = setting.pick((128, 8), (2, 2))
    dtype = torch.bfloat16 if setting.cuda else torch.float32
    makers = make_racers(setting, batch, dtype)
    wanted = setting.pick(("dat_tiny", PEER, "dat_pp_tiny"), ("dat_micro, reference",))
    racers = {}
    for name, make in makers.items():
        if name.startswith(tuple(wanted)):
            racers[name] = compile_racer(report, setting, name, make)
    race(report, setting, racers, rounds, "compiled")


def compile_racer(report: Report, setting: Setting, name: str, make: Callable[[], Racer]) -> Racer:
    """Compile a model for training and evaluation; one graph each."""
    torch._dynamo.reset()
    racer = make()
    counter = CompileCounterWithBackend(setting.pick("inductor", "aot_eager"))
    ours = name.startswith("dat")
    racer.net.compile(fullgraph=ours, dynamic=False, backend=counter)
    for phase, step in (("training", racer.train), ("evaluation", racer.evaluate)):
        before, start = counter.frame_count, time.perf_counter()
        step()
        setting.synchronize()
        report.add(f"{name}, {phase}: compiled in", time.perf_counter() - start, "s")
        graphs = counter.frame_count - before
        bar = "one" if ours else ""
        report.add(f"{name}, {phase}: graphs", graphs, bar=bar, ok=graphs == 1)
    return racer


def warm_up(report: Report, setting: Setting) -> None:
    """Compile what group 7 races, so that it finds the kernels in the cache."""
    dtype = torch.bfloat16 if setting.cuda else torch.float32
    for name, make in make_racers(setting, setting.pick(128, 2), dtype).items():
        if name.startswith(("dat_tiny", PEER, "dat_pp_tiny")):
            compile_racer(report, setting, name, make)
            free(setting)


# --- Batch sizes ----------------------------------------------------------------------------------


def check_batches(report: Report, setting: Setting) -> None:
    """Training images a second over batch sizes, in both half precisions: where launches bind."""
    batches = setting.pick((16, 32, 64, 128, 256, 512), (1, 2))
    dtypes = (torch.float16, torch.bfloat16) if setting.cuda else (torch.float32,)
    way = "auto"
    for dtype in dtypes:
        for batch in batches:
            free(setting)
            try:
                racer = Racer(setting, setting.pick("dat_tiny", "dat_micro"), way, batch, dtype)
                racer.train()
                seconds = [seconds_of(setting, racer.train) for _ in range(setting.pick(5, 1))]
            except torch.OutOfMemoryError:
                report.add(f"batch {batch}, {str(dtype)[6:]}", "does not fit")
                continue
            speed = describe([batch / s for s in seconds])
            report.add(f"batch {batch}, {str(dtype)[6:]}, training", speed, "images/s")

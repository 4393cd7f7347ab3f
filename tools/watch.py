#!/usr/bin/env python
"""Progress of a run in a terminal, from its files alone: steps, loss, accuracy, speed, time left, warnings.

Works over SSH and on another machine that sees the directory. Ends when the run has ended, or with Ctrl-C.

examples:
  python tools/watch.py output/dat_tiny/default
  python tools/watch.py output/dat_tiny/default --once
"""

import argparse
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from analysis.runs import EXIT_CODES, Run, Series, read_run, smooth
from utils.errors import as_exit_code

BARS = "▁▂▃▄▅▆▇█"
RECENT = 20  # records from which the speed is taken
SILENT = 300  # seconds without a record that are worth a warning


def describe(run: Run, width: int, now: float) -> list[str]:
    """What there is to say about `run` at the time `now`, in lines of at most `width` characters."""
    lines = [f"{run.name}  {state_words(run)}"]
    total, step = run.total_steps, run.last_step
    if total:
        room = max(10, width - 34)
        full = round(room * min(1, step / total))
        lines.append(
            f"[{'█' * full}{'·' * (room - full)}] {100 * step / total:3.0f} %  {step:,} / {total:,}"
        )
    else:
        lines.append(f"step {step:,}")
    lines += list(speed_lines(run)) + list(curve_lines(run, width))
    lines += [f"! {line}" for line in warnings(run, now)]
    return ["".join(c if c.isprintable() else "?" for c in line)[:width] for line in lines]


def state_words(run: Run) -> str:
    """The state in status.json, and what an exit code means."""
    code = run.status.get("exit_code")
    state = str(run.status.get("state", "state unknown"))
    return state if code in (None, 0) else f"{state}: {EXIT_CODES.get(code, f'exit code {code}')}"


def speed_lines(run: Run) -> Iterator[str]:
    """Images per second, epoch and time left."""
    speed = run.timing.get("time/images_per_s")
    if speed is None:
        return
    recent = float(np.median(speed.values[-RECENT:]))
    words = [f"{recent:,.0f} images/s"]
    batch, total = run.config.get("TRAIN.GLOBAL_BATCH_SIZE"), run.total_steps
    if isinstance(batch, int) and total and recent > 0 and run.last_step < total:
        words.append(f"{clock((total - run.last_step) * batch / recent)} left, validations apart")
    if run.steps_per_epoch:
        words.append(f"epoch {run.last_step / run.steps_per_epoch:.2f}")
    waiting = run.timing.get("time/data_wait")
    if waiting is not None:
        words.append(
            f"{100 * np.median(waiting.values[-RECENT:]):.0f} % of the time waits for images"
        )
    yield " · ".join(words)


def curve_lines(run: Run, width: int) -> Iterator[str]:
    """A sparkline and the last value of each curve."""
    room = max(10, width - 42)
    for tag, name in (
        ("train/loss", "training loss"),
        ("val/loss", "validation loss"),
        ("val/acc1", "top-1 in %"),
        ("val_ema/acc1", "top-1 in %, EMA"),
        ("train/grad_norm", "gradient norm"),
        ("train/lr", "learning rate"),
    ):
        series = run.metrics.get(tag)
        if series is None:
            continue
        drawn = smooth(series) if tag == "train/loss" else series
        last = series.values[-1]
        note = ""
        if tag.endswith("acc1"):
            note = (
                f"  best {np.nanmax(series.values):.2f}" if np.isfinite(series.values).any() else ""
            )
        yield f"{name:<16} {sparkline(drawn, room)} {last:.4g}{note}"


def sparkline(series: Series, width: int) -> str:
    """A series as `width` bars at most, the mean of equal parts; a blank where nothing is finite."""
    parts = np.array_split(series.values.astype(float), min(width, len(series.values)))
    means = np.array(
        [part[np.isfinite(part)].mean() if np.isfinite(part).any() else np.nan for part in parts]
    )
    if not np.isfinite(means).any():
        return " " * len(means)
    low, high = np.nanmin(means), np.nanmax(means)
    varies = high - low > 1e-9 * max(abs(low), abs(high))  # by more than rounding
    share = (means - low) / (high - low) if varies else np.where(np.isnan(means), np.nan, 0.5)
    return "".join(" " if np.isnan(s) else BARS[min(7, int(8 * s))] for s in share)


def warnings(run: Run, now: float) -> Iterator[str]:
    """What needs a look."""
    if run.skipped:
        yield f"{len(run.skipped)} steps without a finite gradient, the last was {run.skipped[-1]['step']:,}"
    if run.bad:
        yield f"{len({one.get('path') for one in run.bad})} training images cannot be read (bad_samples.jsonl)"
    for stage, share in run.lost_points().items():
        yield f"{share:.0%} of the sampled points of {stage} are lost at the border (TRAIN.LR_SCALES)"
    if failed := run.status.get("failed_saves"):
        yield f"{failed} checkpoints in a row could not be written"
    if error := run.status.get("error"):
        yield str(error)
    yield from (f"{name} was left behind" for name in run.faults)
    if run.damage:
        yield f"{run.damage[0]}" + (
            f" and {len(run.damage) - 1} more" if len(run.damage) > 1 else ""
        )
    file = run.path / "timing.jsonl"
    if run.status.get("state") == "running" and file.exists():
        silence = now - file.stat().st_mtime
        if silence > SILENT:
            yield f"no record for {clock(silence)}: it validates, hangs, or was killed"


def clock(seconds: float) -> str:
    """A time in hours, minutes and seconds."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


@as_exit_code
def main(arguments: list[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--once", action="store_true", help="print once and end")
    parser.add_argument("--interval", type=float, default=5.0, metavar="SECONDS", help="default 5")
    args = parser.parse_args(arguments)
    once = args.once or not sys.stdout.isatty()
    try:
        while True:
            run = read_run(args.run)
            width = shutil.get_terminal_size().columns
            if not once:
                sys.stdout.write("\x1b[H\x1b[2J")  # from the upper left corner of an empty screen
            print("\n".join(describe(run, width, time.time())), flush=True)
            if once or run.status.get("state", "running") != "running":
                return
            time.sleep(max(0.2, args.interval))
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

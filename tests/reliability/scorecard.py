#!/usr/bin/env python
"""What does this trainer survive, and does it end in the same bits? The 24 figures of the fault map, measured.

python tests/reliability/scorecard.py --short                    five minutes on two quiet cores
python tests/reliability/scorecard.py                            an hour
python tests/reliability/scorecard.py --only 1,7 --fault-seed 5  two figures, with the kills and damages of seed 5

One line per figure. The details of every trial are in the file of --out, which is written after each figure: what an
interrupted scorecard measured is not lost. Exit code 1 if a figure fails. A figure that this machine cannot measure
is not run and says why.
"""

import argparse
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])

import torch

from engine import compat
from reliability import cost, exact, inputs, process, storage
from reliability.harness import Lab, NotRunError, Outcome, close, kill, marked
from utils.files import write_atomically


@dataclass(frozen=True)
class Figure:
    """One line of the scorecard."""

    number: int
    name: str
    measure: Callable[[Lab], Outcome]
    short: str  # the target of the short form
    full: str = ""  # of the full one, where it is another

    def target(self, short: bool) -> str:
        """What has to be reached."""
        return self.short if short else self.full or self.short


# fmt: off
FIGURES = (
    Figure(1, "kill -9 at random times, bits equal after", process.kill_at_random_times, "20/20", "500/500"),
    Figure(2, "kill -9 at each point of the save path", storage.kill_points, "all points, 100 %"),
    Figure(3, "work lost by a kill; images repeated, skipped", process.work_lost, "≤ interval + 1; 0, 0"),
    Figure(4, "signals: exit 75, bits equal after", process.stop_on_request, "30/30", "300/300"),
    Figure(5, "a process dies: the others end, no orphans", process.rank_death, "≤ 5 s; 0"),
    Figure(6, "a hang is found, the stack names the line", process.hang, "≤ timeout + 5 s"),
    Figure(7, "damaged checkpoints detected", storage.detected, "220/220, 0 silent", "5000/5000, 0 silent"),
    Figure(8, "went on from the newest whole one", storage.fall_back, "100 %"),
    Figure(9, "no room: checkpoints intact, bits equal after", storage.no_room, "10/10", "40/40"),
    Figure(10, "second run in the same folder refused", storage.races, "100/100"),
    Figure(11, "bad files: kinds; fuzzed", inputs.bad_files, "≥ 35; 1,200; 0 foreign", "≥ 35; 12,000; 0 foreign"),
    Figure(12, "bad files reported = planted", inputs.bad_samples, "equal"),
    Figure(13, "wrong configurations: place, key, remedy", inputs.wrong_configurations, "≥ 70, 100 %"),
    Figure(14, "malicious files blocked, canary unharmed", inputs.malicious_files, "≥ 15, 100 %"),
    Figure(15, "workers × processes × position: bits equal", exact.grid, "8/8", "36/36"),
    Figure(16, "other numbers of processes: bits equal", exact.world_sizes, "W ≤ 4", "W ≤ 8"),
    Figure(17, "each feature off, other models: bits equal", exact.features, "all"),
    Figure(18, "evaluation: processes × batch × images", exact.evaluation, "72/72 equal"),
    Figure(19, "golden losses, order, augmentation", exact.golden, "equal"),
    Figure(20, "soak: speed drift, memory, leaks", cost.soak, "30 s, 0 leaked", "30 min, < 2 %, 0 leaked"),
    Figure(21, "cost of safety; stall of a save", cost.cost, "< 1 %; < 0.5 s/100 MB"),
    Figure(22, "resume: middle of an epoch as fast as start", cost.resume_time, "< 10 % apart"),
    Figure(23, "useful time under a kill per 60 s", process.effective_time, "≥ 80 %"),
    Figure(24, "metrics.jsonl after kills", process.metrics_equal, "byte-equal"),
)
# fmt: on


def measured(figure: Figure, lab: Lab) -> dict:
    """The record of one figure; whatever goes wrong in it is its result and not the end of the others."""
    start = time.monotonic()
    try:
        found = figure.measure(lab)
        words, result, details = found.measured, "PASS" if found.passed else "FAIL", found.details
    except NotRunError as error:
        words, result, details = str(error), "NOT RUN", {}
    except Exception as error:  # noqa: BLE001  what cannot be measured has failed
        words, result, details = f"{type(error).__name__}: {error}", "FAIL", {}
    return {
        "number": figure.number,
        "name": figure.name,
        "target": figure.target(lab.short),
        "measured": words,
        "result": result,
        "seconds": round(time.monotonic() - start, 1),
        "details": details,
    }


ROW = "{:>2}  {:<46} {:<24} {:<43} {} {:>6}"
COLOURS = {"PASS": 32, "FAIL": 31, "NOT RUN": 33}


def row(record: dict) -> str:
    """A record as a line of the table, coloured on a terminal."""
    words = " ".join(record["measured"].split())
    words = words if len(words) <= 43 else f"{words[:42]}…"
    result = f"{record['result']:<7}"
    if sys.stdout.isatty():
        result = f"\033[{COLOURS[record['result']]}m{result}\033[0m"
    seconds = f"{record['seconds']:.0f} s"
    return ROW.format(record["number"], record["name"], record["target"], words, result, seconds)


def scorecard(figures: list[Figure], lab: Lab, out: Path) -> int:
    """Measure `figures` in turn and write `out` after each; returns the number of failures."""
    head = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "form": "short" if lab.short else "full",
        "fault_seed": lab.seed,
        "revision": compat.revision(),
        "device": compat.device_name(torch.device("cpu")),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    print(
        f"The {head['form']} scorecard of {head['date']}: fault seed {lab.seed}, code {head['revision']}, "
        f"{head['cores']} cores of {head['device']}, torch {torch.__version__}"
    )
    print(ROW.format("#", "figure", "target", "measured", "result ", "time"), flush=True)
    found = []
    for figure in figures:
        if sys.stdout.isatty():
            print(f"{figure.number:>2}  {figure.name} …", end="\r", flush=True)
        found.append(measured(figure, lab))
        write_atomically(out, json.dumps({**head, "figures": found}, indent=1, default=str) + "\n")
        print(row(found[-1]), flush=True)
    results = [record["result"] for record in found]
    counts = ", ".join(f"{results.count(word)} {word.lower()}" for word in COLOURS)
    minutes = sum(record["seconds"] for record in found) / 60
    print(f"{counts} in {minutes:.1f} min; details in {out}; again: --fault-seed {lab.seed}")
    return results.count("FAIL")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="fewer trials, for every change")
    parser.add_argument("--only", metavar="N,N", help="these figures alone")
    parser.add_argument("--fault-seed", type=int, metavar="N", help="of every kill and damage")
    parser.add_argument("--out", type=Path, default=Path("output/scorecard.json"), metavar="FILE")
    parser.add_argument("--keep", action="store_true", help="leave the trials' folders in place")
    args = parser.parse_args(arguments)
    known = {str(figure.number): figure for figure in FIGURES}
    names = args.only.split(",") if args.only else list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--only {','.join(unknown)}: expected numbers from 1 to {len(FIGURES)}")
    args.figures = [known[name] for name in names]
    if args.out.is_dir():
        parser.error(f"--out {args.out}: a folder, expected a file to write")
    return args


def main(arguments: list[str]) -> int:
    """Run the scorecard; returns 1 if a figure fails, 130 if it was interrupted."""
    args = parse(arguments)
    seed = random.randrange(10_000) if args.fault_seed is None else args.fault_seed
    args.out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="scorecard-"))
    folder.chmod(0o755)  # a trial without root's rights reads there as well
    os.environ["SCORECARD"] = str(folder)  # marks what trials start as programs
    try:
        failures = scorecard(args.figures, Lab.opened(folder, seed, args.short), args.out)
    except KeyboardInterrupt:
        print(f"\ninterrupted; what was measured is in {args.out}", flush=True)
        kill(*marked(f"SCORECARD={folder}"))
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(130)  # at once: the kernel ends the other trials with their parents
    finally:
        close()
        if args.keep:
            print(f"the trials are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

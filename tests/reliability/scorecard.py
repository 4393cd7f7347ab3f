#!/usr/bin/env python
"""Scorecard of reliability: 29 checks of what a run survives, and whether it ends in the same bits.

python tests/reliability/scorecard.py --short                    ten minutes on two quiet cores
python tests/reliability/scorecard.py                            two and a half hours
python tests/reliability/scorecard.py --resume                   the checks that an interrupted one lacks
python tests/reliability/scorecard.py --only 1,7 --fault-seed 5  two checks, with the kills and damages of seed 5
python tests/reliability/scorecard.py --write docs/reliability.md

--out FILE holds the details of every trial and is written after each check. --resume keeps what FILE has, if its
commit, machine and form are the same, and runs the checks that it lacks, or those that --only names. --write FILE
replaces what a page has between its two scorecard markers. A check that this machine cannot run is reported as NOT RUN
with the reason. Exit code 1 if a check fails.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from engine import compat
from reliability import agreement, cost, disk, exact, inputs, jobs, process, storage
from reliability.harness import NotRunError, Result, Sandbox, close_workers, find_processes, kill
from utils.files import write_atomically


@dataclass(frozen=True)
class Check:
    """One row of the scorecard."""

    number: int
    name: str
    measure: Callable[[Sandbox], Result]
    short: str  # the target of the short form
    full: str = ""  # of the full form, where it differs

    def target(self, short: bool) -> str:
        """What has to be reached."""
        return self.short if short else self.full or self.short


# fmt: off
CHECKS = (
    Check(1, "kill -9 at random times, bits equal after", process.check_random_kills, "20/20", "500/500"),
    Check(2, "kill -9 at each point of a save", storage.check_kill_points, "11/11 points, all survived"),
    Check(3, "work lost by a kill; images repeated, skipped", process.check_work_lost, "≤ interval + 1; 0, 0"),
    Check(4, "signals: exit code 75, bits equal after", process.check_signals, "30/30", "300/300"),
    Check(5, "a process dies: the others end, no orphans", process.check_process_death, "≤ 5 s; 0"),
    Check(6, "a hang is found, the stack names the line", process.check_hang, "≤ timeout + 5 s"),
    Check(7, "damaged checkpoints detected", storage.check_damage, "220/220, 0 silent", "5000/5000, 0 silent"),
    Check(8, "resumed from the newest valid checkpoint", storage.check_fallback, "20/20", "200/200"),
    Check(9, "no space: checkpoints intact, bits equal after", storage.check_no_space, "10/10", "40/40"),
    Check(10, "second run in the same folder refused", storage.check_locks, "100/100"),
    Check(11, "bad files: kinds; fuzzed", inputs.check_bad_files, "≥ 35; 1,200; 0 foreign", "≥ 35; 12,000; 0 foreign"),
    Check(12, "bad files reported = planted", inputs.check_bad_samples, "equal"),
    Check(13, "wrong configurations: place, key, remedy", inputs.check_wrong_configurations, "≥ 70, 100 %"),
    Check(14, "malicious files blocked, nothing executed", inputs.check_malicious_files, "≥ 15, 100 %"),
    Check(15, "workers × processes × position: bits equal", exact.check_resume_grid, "8/8", "36/36"),
    Check(16, "other numbers of processes: bits equal", exact.check_numbers_of_processes, "up to 4", "up to 8"),
    Check(17, "each feature off, other models: bits equal", exact.check_features, "all"),
    Check(18, "evaluation: processes × batch × images", exact.check_evaluation, "72/72 equal"),
    Check(19, "losses, order, augmentation as recorded", exact.check_recorded_values, "equal"),
    Check(20, "soak: speed drift, memory growth, leaks", cost.check_soak,
          "30 s: ≥ -25 %, < +5 %, 0", "30 min: ≥ -2 %, < +2 %, 0"),
    Check(21, "cost of safety; stall of a save", cost.check_cost, "< 1 %; < 0.5 s/100 MB"),
    Check(22, "resume: middle of an epoch as fast as start", cost.check_resume_time, "< 10 % slower"),
    Check(23, "useful time under a kill per 60 s", process.check_useful_time, "≥ 80 %"),
    Check(24, "metrics.jsonl after kills", process.check_metrics, "byte-equal"),
    Check(25, "ranks agree, or the run ends and says why", agreement.check_agreement,
          "10/10, 5/5, 6/6 flips", "10/10, 5/5, 120/120 flips"),
    Check(26, "signals to all of a job: 75, bits equal after", jobs.check_signals_to_jobs, "12/12", "144/144"),
    Check(27, "pauses; other programs in a run's folder", jobs.check_neighbours, "5/5"),
    Check(28, "each operation on the disk fails once", disk.check_operations, "16/16 of all", "all"),
    Check(29, "power loss: saves kept, records byte-equal", disk.check_power_loss, "16/16 of all", "all"),
)
# fmt: on


def run_check(check: Check, sandbox: Sandbox) -> dict:
    """The record of one check; an exception in it is a failure of this check alone."""
    start = time.monotonic()
    try:
        found = check.measure(sandbox)
        words, result, details = found.measured, "PASS" if found.passed else "FAIL", found.details
    except NotRunError as error:
        words, result, details = str(error), "NOT RUN", {}
    except Exception as error:  # noqa: BLE001  what cannot be measured has failed
        words, result, details = f"{type(error).__name__}: {error}", "FAIL", {}
    return {
        "number": check.number,
        "name": check.name,
        "target": check.target(sandbox.short),
        "measured": words,
        "result": result,
        "seconds": round(time.monotonic() - start, 1),
        "details": details,
    }


# --- Tables ---------------------------------------------------------------------------------------

ROW = "{:>2}  {:<46} {:<26} {:<43} {} {:>6}"
COLOURS = {"PASS": 32, "FAIL": 31, "NOT RUN": 33}
BEGIN, END = "<!-- scorecard:begin -->", "<!-- scorecard:end -->"


def format_row(record: dict) -> str:
    """A record as a line of the console's table, coloured on a terminal."""
    words = " ".join(record["measured"].split())
    words = words if len(words) <= 43 else f"{words[:42]}…"
    result = f"{record['result']:<7}"
    if sys.stdout.isatty():
        result = f"\033[{COLOURS[record['result']]}m{result}\033[0m"
    seconds = f"{record['seconds']:.0f} s"
    return ROW.format(record["number"], record["name"], record["target"], words, result, seconds)


def count_results(records: list[dict]) -> str:
    """How many checks passed, failed and were not run."""
    results = [record["result"] for record in records]
    return ", ".join(f"{results.count(word)} {word.lower()}" for word in COLOURS)


def format_markdown(card: dict) -> str:
    """A scorecard as Markdown: commit, machine and date, then the table."""
    lines = [
        f"{card['form'].capitalize()} form, commit {card['commit']}, {card['date'].split()[0]}, {card['cores']} cores "
        f"of {card['machine']}, torch {card['versions']['torch']}, fault seed {card['fault_seed']}: "
        f"{count_results(card['checks'])}.",
        "",
        "| # | Check | Target | Measured | Result | Time |",
        "|--:|---|---|---|---|--:|",
    ]
    for record in card["checks"]:
        words = " ".join(record["measured"].split()).replace("|", "\\|")
        columns = record["number"], record["name"], record["target"], words, record["result"]
        lines.append(f"| {' | '.join(map(str, columns))} | {record['seconds']:.0f} s |")
    return "\n".join(lines)


def replace_table(page: str, table: str) -> str:
    """`page` with `table` between its markers."""
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


# --- Run ------------------------------------------------------------------------------------------


def new_card(short: bool, seed: int) -> dict:
    """A scorecard without checks: what it is measured on, and the seed of its faults."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "form": "short" if short else "full",
        "fault_seed": seed,
        "commit": compat.revision(),
        "machine": compat.device_name(torch.device("cpu")),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "checks": [],
    }


def run_checks(checks: list[Check], sandbox: Sandbox, card: dict, out: Path) -> None:
    """Run `checks` in turn; after each, print its row, put it into `card` and write that to `out`."""
    print(
        f"The {card['form']} scorecard of {card['date']}: fault seed {sandbox.seed}, commit {card['commit']}, "
        f"{card['cores']} cores of {card['machine']}, torch {torch.__version__}"
    )
    print(ROW.format("#", "check", "target", "measured", "result ", "time"), flush=True)
    for check in checks:
        if sys.stdout.isatty():
            print(f"{check.number:>2}  {check.name} …", end="\r", flush=True)
        record = run_check(check, sandbox)
        others = [other for other in card["checks"] if other["number"] != check.number]
        card["checks"] = sorted([*others, record], key=lambda record: record["number"])
        write_atomically(out, json.dumps(card, indent=1, default=str) + "\n")
        print(format_row(record), flush=True)
    minutes = sum(record["seconds"] for record in card["checks"]) / 60
    print(
        f"{count_results(card['checks'])} in {minutes:.1f} min; details in {out}; "
        f"the same faults again: --fault-seed {sandbox.seed}"
    )


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="fewer trials, for every change")
    parser.add_argument("--only", metavar="N,N", help="the numbers of some checks")
    parser.add_argument(
        "--resume", action="store_true", help="keep what --out has, run what it lacks"
    )
    parser.add_argument("--fault-seed", type=int, metavar="N", help="of every kill and damage")
    parser.add_argument("--out", type=Path, default=Path("output/scorecard.json"), metavar="FILE")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table into this page")
    parser.add_argument("--keep", action="store_true", help="leave the trials' folders in place")
    args = parser.parse_args(arguments)
    known = {str(check.number): check for check in CHECKS}
    names = args.only.split(",") if args.only else list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--only {','.join(unknown)}: expected numbers from 1 to {len(CHECKS)}")
    args.checks = [known[name] for name in names]
    if args.out.is_dir():
        parser.error(f"--out {args.out}: a folder, expected a file to write")
    seed = random.randrange(10_000) if args.fault_seed is None else args.fault_seed
    args.card = new_card(args.short, seed)
    if args.resume:
        args.card = resumed_card(args, parser)
    measured = {record["number"] for record in args.card["checks"]}
    if not args.only:
        args.checks = [check for check in args.checks if check.number not in measured]
    if args.write and len(measured | {check.number for check in args.checks}) < len(CHECKS):
        parser.error("--write: expected every check; remove --only")
    if args.write and not (args.write.is_file() and markers_in(args.write.read_text())):
        parser.error(f"--write {args.write}: expected a page with {BEGIN} and {END}, once each")
    return args


def resumed_card(args: argparse.Namespace, parser: argparse.ArgumentParser) -> dict:
    """The scorecard that --out holds; an error unless this program, machine and form made it."""
    if not args.out.is_file():
        parser.error(f"--resume: --out {args.out} does not exist")
    card = json.loads(args.out.read_text())
    for name in ("form", "commit", "machine", "cores", "versions"):
        if card[name] != args.card[name]:
            parser.error(
                f"--resume: {args.out} has {name} {card[name]}, now it is {args.card[name]}"
            )
    if args.fault_seed not in (None, card["fault_seed"]):
        parser.error(
            f"--resume: {args.out} has fault seed {card['fault_seed']}; remove --fault-seed"
        )
    return card


def markers_in(page: str) -> bool:
    """Whether `page` has both markers, once each and in order."""
    return page.count(BEGIN) == page.count(END) == 1 and page.index(BEGIN) < page.index(END)


def main(arguments: list[str]) -> int:
    """Run the scorecard; returns 1 if a check fails, 130 if it was interrupted."""
    args = parse_arguments(arguments)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="scorecard-"))
    folder.chmod(0o755)  # a trial without root's rights reads there as well
    os.environ["SCORECARD"] = str(folder)  # marks what trials start as programs
    try:
        sandbox = Sandbox.create(folder, args.card["fault_seed"], args.short)
        run_checks(args.checks, sandbox, args.card, args.out)
    except KeyboardInterrupt:
        print(f"\ninterrupted; what was measured is in {args.out}", flush=True)
        kill(*find_processes(f"SCORECARD={folder}"))
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(130)  # at once: the kernel ends the other trials with their parents
    finally:
        close_workers()
        if args.keep:
            print(f"the trials are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    if args.write:
        write_atomically(
            args.write, replace_table(args.write.read_text(), format_markdown(args.card))
        )
    return int(any(record["result"] == "FAIL" for record in args.card["checks"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Figures 11 to 14: what do damaged, odd, wrong and malicious inputs get for an answer?"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import pickle
import shutil
import struct
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch

import config
from engine import checkpoint
from reliability.bad_files import (
    ANY,
    BAD,
    IGNORED,
    fuzz,
    make_bad_archives,
    make_bad_images,
    read_fuzzed,
)
from reliability.harness import ROOT, Lab, Outcome, apart, finish, launch, records, run_of
from reliability.wrong_configs import answer, cases
from utils.errors import ConfigError

OWN_CODES = {2, 3, 4, 6}
CHUNK = 100  # fuzzed files read by one process
CHUNK_SECONDS = 120

# --- 11, 12: bad files ----------------------------------------------------------------------------


@functools.cache
def run_on_bad_files(lab: Lab) -> dict:
    """Train two epochs on every kind of bad file with a loader worker; what was planted and what was reported."""
    folder = lab.room("bad-files")
    images = Path(shutil.copytree(lab.folder / "images", folder / "images"))
    planted = make_bad_images(images / "train" / "class_0")
    count = 48 + sum(expected != IGNORED for expected in planted.values())
    sound = sorted((images / "train" / "class_1").iterdir())
    for number in range(-count % 4):  # whole steps: every file is read in every epoch
        shutil.copy(sound[0], sound[0].with_name(f"more-{number}.jpg"))
    settings = ["DATA.NUM_WORKERS=1", "DATA.MAX_BAD_SAMPLES=1000", "TRAIN.GLOBAL_BATCH_SIZE=4"]
    command = lab.arguments(folder, *settings, "SAVE_STEPS=0", images=images)
    finish(*command, log=folder / "log")
    reported = records(run_of(folder) / "bad_samples.jsonl")
    readable = {
        os.fsencode(name).decode(errors="backslashreplace"): e for name, e in planted.items()
    }
    return {"planted": readable, "reported": sorted({Path(r["path"]).name for r in reported})}


def read_chunk(first: int, folder: Path) -> dict[str, int]:
    """How often each outcome came of fuzzed files `first` to `first` + CHUNK - 1; foreign exceptions by seed."""
    warnings.simplefilter("ignore")  # Pillow tells much about files, whether it reads them or not
    logging.disable()
    outcomes: Counter[str] = Counter()
    for seed in range(first, first + CHUNK):
        try:
            outcomes[read_fuzzed(seed, folder)] += 1
        except Exception as error:  # noqa: BLE001  what this figure looks for
            outcomes[f"seed {seed}: {type(error).__name__}: {error}"] += 1
        shutil.rmtree(folder / str(seed), ignore_errors=True)
    return dict(outcomes)


def fuzzed(lab: Lab, first: int) -> dict[str, int]:
    """`read_chunk` in a process that may hang or crash."""
    try:
        folder = lab.room("fuzz", first)
        return apart(read_chunk, first, folder, seconds=CHUNK_SECONDS)
    except (EOFError, TimeoutError) as error:
        return {f"seeds from {first}: {type(error).__name__}": 1}


def parse_fuzzed(lab: Lab, count: int) -> list[str]:
    """Seeds of damaged configurations that are answered with another exception than ConfigError."""
    shipped = [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))]
    file, wrong = lab.room("fuzz", "yaml") / "fuzzed.yaml", []
    for number in range(count):
        source = lab.random("yaml", number)
        file.write_bytes(fuzz(source.choice(shipped), source))
        try:
            with contextlib.suppress(ConfigError):
                config.parse(["--cfg", str(file), "--data-path", "data"])
        except Exception as error:  # noqa: BLE001  what this figure looks for
            wrong.append(f"yaml {number}: {type(error).__name__}: {error}")
    return wrong


def bad_files(lab: Lab) -> Outcome:
    """Every kind of bad image in a run, then files, archives and configurations damaged at random."""
    run = run_on_bad_files(lab)
    kinds = sum(expected == BAD for expected in run["planted"].values())
    total = lab.count(1000, 10_000)
    start = lab.random("fuzz").randrange(2**32)
    outcomes: Counter[str] = Counter()
    for found in lab.map(fuzzed, range(start, start + total, CHUNK)):
        outcomes.update(found)
    foreign = [name for name in outcomes if name.startswith("seed")] + parse_fuzzed(lab, total // 5)
    measured = f"{kinds} kinds; {total + total // 5} fuzzed, {len(foreign)} foreign exceptions"
    details = {"first seed": start, "outcomes": dict(outcomes), "foreign": foreign}
    return Outcome(measured, kinds >= 35 and not foreign, details)


def bad_samples(lab: Lab) -> Outcome:
    """The files that bad_samples.jsonl names, against those that were planted."""
    run = run_on_bad_files(lab)
    planted = {name for name, expected in run["planted"].items() if expected == BAD}
    either = {name for name, expected in run["planted"].items() if expected == ANY}
    reported = set(run["reported"])
    missed, others = sorted(planted - reported), sorted(reported - planted - either)
    measured = f"{len(planted)} planted, {len(missed)} missed, {len(others)} others"
    return Outcome(measured, not missed and not others, {"missed": missed, "others": others})


# --- 13: wrong configurations ---------------------------------------------------------------------


def wrong_configurations(lab: Lab) -> Outcome:
    """Every wrong file or command line is answered in one line with its place, the key and the remedy."""
    wrong, unanswered = list(cases()), []
    with contextlib.chdir(lab.room("configs")):
        for text, words, parts in wrong:
            message = answer(text, words)
            if len(message.splitlines()) != 1 or not all(part in message for part in parts):
                unanswered.append({"file": text, "words": words, "message": message})
    measured = f"{len(wrong) - len(unanswered)}/{len(wrong)}"
    return Outcome(measured, not unanswered and len(wrong) >= 70, {"unanswered": unanswered})


# --- 14: malicious files --------------------------------------------------------------------------


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.system, (f"touch '{self.canary}'",)


def pickled(name: str, write: Callable[[Payload, Path], None]) -> Callable:
    """A case: `write` puts the payload into the file `name`, which --pretrained names."""

    def arguments(lab: Lab, folder: Path, canary: Path) -> list[str]:
        write(Payload(canary), folder / name)
        return [*lab.arguments(folder), "--pretrained", str(folder / name)]

    return arguments


def as_pickle(payload: Payload, file: Path) -> None:
    """A bare pickle."""
    file.write_bytes(pickle.dumps({"model": payload}))


def as_old_torch(payload: Payload, file: Path) -> None:
    """What torch.save wrote before 1.6."""
    torch.save({"model": payload}, file, _use_new_zipfile_serialization=False)


def as_torch(payload: Payload, file: Path) -> None:
    """What torch.save writes."""
    torch.save({"model": payload, "w": torch.zeros(2)}, file)


def as_long_header(payload: Payload, file: Path) -> None:
    """A safetensors file whose header claims to be as long as the address space."""
    file.write_bytes(struct.pack("<Q", 2**62) + b"{}")


def configured(text: str, name: str = "evil.yaml") -> Callable:
    """A case: the configuration file `name` holds `text`, in which CANARY stands for the canary."""

    def arguments(lab: Lab, folder: Path, canary: Path) -> list[str]:
        (folder / name).write_text(text.replace("CANARY", str(canary)))
        (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
        return ["--cfg", str(folder / name), "--data-path", str(lab.folder / "images")]

    return arguments


def given(*words: str) -> Callable:
    """A case: these words after a sound command line."""
    return lambda lab, folder, canary: [*lab.arguments(folder), *words]


def archived(kind: str) -> Callable:
    """A case: the training set is one of tests/reliability/bad_files.py's archives."""

    def arguments(lab: Lab, folder: Path, canary: Path) -> list[str]:
        make_bad_archives(folder / "archives")
        images = folder / "archives" / kind
        shutil.copytree(lab.folder / "images" / "val", images / "val")
        settings = "TRAIN.GLOBAL_BATCH_SIZE=4", "DATA.MAX_BAD_SAMPLES=0", "DATA.VAL_SUBSET=True"
        return lab.arguments(folder, *settings, images=images)

    return arguments


def forged(change: Callable[[Path, Path], None]) -> Callable:
    """A case: a run's checkpoint was changed and its manifest made to fit."""

    def arguments(lab: Lab, folder: Path, canary: Path) -> list[str]:
        finish(
            *lab.arguments(folder, "TRAIN.EPOCHS=1", "TRAIN.WARMUP_EPOCHS=0"), log=folder / "log"
        )
        for step in checkpoint.list_checkpoints(run_of(folder) / "checkpoints"):
            change(step, canary)
        return lab.arguments(folder)

    return arguments


def with_pickle(step: Path, canary: Path) -> None:
    """A pickle in the place of the optimizer's tensors."""
    content = pickle.dumps(Payload(canary))
    (step / "optimizer.safetensors").write_bytes(content)
    manifest = json.loads((step / checkpoint.MANIFEST).read_text())
    manifest["optimizer.safetensors"] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (step / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def with_a_way_out(step: Path, canary: Path) -> None:
    """A manifest that leads out of the checkpoint."""
    manifest = json.loads((step / checkpoint.MANIFEST).read_text())
    manifest["../../../../images/train/class_0/0000.jpg"] = {"bytes": 0, "sha256": ""}
    (step / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def with_other_tensors(step: Path, canary: Path) -> None:
    """Tensors of no model's names."""
    content = safetensors.torch.save({"../evil": torch.zeros(2)})
    (step / "model.safetensors").write_bytes(content)
    manifest = json.loads((step / checkpoint.MANIFEST).read_text())
    manifest["model.safetensors"] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (step / checkpoint.MANIFEST).write_text(json.dumps(manifest))


BILLION = "\n".join(
    ["a0: &a0 x", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10))]
)
MALICIOUS = {
    "pickle in torch's format": pickled("w.pth", as_torch),
    "pickle in torch's old format": pickled("w.pt", as_old_torch),
    "bare pickle": pickled("w.bin", as_pickle),
    "pickle with a safe name": pickled("w.safetensors", as_pickle),
    "endless safetensors header": pickled("w.safetensors", as_long_header),
    "pickle in a checkpoint": forged(with_pickle),
    "manifest with a way out": forged(with_a_way_out),
    "forged tensors": forged(with_other_tensors),
    "YAML that calls": configured("TAG: !!python/object/apply:os.system ['touch CANARY']"),
    "YAML that imports": configured("TAG: !!python/module:antigravity"),
    "YAML that names": configured("OUTPUT: !!python/name:os.system"),
    "billion laughs": configured(BILLION),
    "configuration as code": configured("open('CANARY', 'w')", "config.py"),
    "code as a base": configured("BASE: evil.py"),
    "tag out of the folder": given("--tag", "../../evil"),
    "model from the hub": given("--opts", "MODEL.NAME=hf-hub:someone/evil"),
    "model from a folder": given("--opts", "MODEL.NAME=local-dir:/tmp/evil"),
    "weights over http": given("--pretrained", "http://127.0.0.1/w.pth"),
    "weights without a hash": given("--pretrained", "https://127.0.0.1/w.pth"),
    "weights from file://": given("--pretrained", "file:///etc/passwd"),
    "zip with ../": archived("zip_parent"),
    "zip with / in front": archived("zip_absolute"),
    "zip with a link": archived("zip_link"),
    "zip bomb": archived("zip_bomb"),
    "tar with ../": archived("tar_parent"),
    "tar with / in front": archived("tar_absolute"),
    "tar with a link": archived("tar_link"),
    "tar with a hard link": archived("tar_hard_link"),
    "tar with a device": archived("tar_device"),
}


def attacked(lab: Lab, name: str) -> dict:
    """Give one malicious thing to main.py: it has to be refused with one of the codes, and nothing may happen."""
    folder = lab.room("malicious", str(list(MALICIOUS).index(name)))
    canary = folder / "canary"
    command = MALICIOUS[name](lab, folder, canary)
    victim = launch(command, log=folder / "words")
    codes = victim.wait(60)
    leaks = [str(path) for path in (lab.folder / "evil", lab.folder / "evil.jpg") if path.exists()]
    return {
        "name": name,
        "exit_codes": codes,
        "says": victim.words.strip().splitlines()[-1][:200] if victim.words.strip() else "",
        "blocked": codes[0] in OWN_CODES and not canary.exists() and not leaks,
    }


def malicious_files(lab: Lab) -> Outcome:
    """Pickles, YAML tags, archives, forged checkpoints, addresses: each refused, the canary unharmed."""
    trials = lab.map(attacked, MALICIOUS)
    blocked = sum(trial["blocked"] for trial in trials)
    measured = f"{blocked}/{len(trials)}"
    return Outcome(measured, blocked == len(trials) >= 15, {"trials": trials})

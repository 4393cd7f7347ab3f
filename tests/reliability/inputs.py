"""Checks 11 to 14: damaged, odd, wrong and malicious inputs."""

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
from reliability.harness import (
    ROOT,
    Result,
    Sandbox,
    finish,
    launch,
    read_records,
    run_in_fork,
    run_of,
)
from reliability.wrong_configs import answer, cases
from utils.errors import ConfigError

OWN_CODES = {2, 3, 4, 6}
CHUNK = 100  # fuzzed files read by one process
CHUNK_SECONDS = 120

# --- 11, 12: bad files ----------------------------------------------------------------------------


@functools.cache
def run_on_bad_files(sandbox: Sandbox) -> dict:
    """Train two epochs on every kind of bad file with a loader worker; what was planted and what was reported."""
    folder = sandbox.new_folder("bad-files")
    images = Path(shutil.copytree(sandbox.folder / "images", folder / "images"))
    planted = make_bad_images(images / "train" / "class_0")
    count = 48 + sum(expected != IGNORED for expected in planted.values())
    good = sorted((images / "train" / "class_1").iterdir())
    for number in range(-count % 4):  # full steps: every file is read in every epoch
        shutil.copy(good[0], good[0].with_name(f"more-{number}.jpg"))
    settings = ["DATA.NUM_WORKERS=1", "DATA.MAX_BAD_SAMPLES=1000", "TRAIN.GLOBAL_BATCH_SIZE=4"]
    command = sandbox.arguments(folder, *settings, "SAVE_STEPS=0", images=images)
    finish(*command, log=folder / "log")
    reported = read_records(run_of(folder) / "bad_samples.jsonl")
    readable = {
        os.fsencode(name).decode(errors="backslashreplace"): e for name, e in planted.items()
    }
    return {"planted": readable, "reported": sorted({Path(r["path"]).name for r in reported})}


def read_chunk(first: int, folder: Path) -> dict[str, int]:
    """How often each outcome came of fuzzed files `first` to `first` + CHUNK - 1; foreign exceptions by seed."""
    warnings.simplefilter("ignore")  # Pillow warns about many files that it reads
    logging.disable()
    outcomes: Counter[str] = Counter()
    for seed in range(first, first + CHUNK):
        try:
            outcomes[read_fuzzed(seed, folder)] += 1
        except Exception as error:  # noqa: BLE001  what this check looks for
            outcomes[f"seed {seed}: {type(error).__name__}: {error}"] += 1
        shutil.rmtree(folder / str(seed), ignore_errors=True)
    return dict(outcomes)


def fuzz_trial(sandbox: Sandbox, first: int) -> dict[str, int]:
    """`read_chunk` in a process that may hang or crash."""
    try:
        folder = sandbox.new_folder("fuzz", first)
        return run_in_fork(read_chunk, first, folder, seconds=CHUNK_SECONDS)
    except (EOFError, TimeoutError) as error:
        return {f"seeds from {first}: {type(error).__name__}": 1}


def fuzz_configs(sandbox: Sandbox, count: int) -> list[str]:
    """Seeds of damaged configurations that are answered with another exception than ConfigError."""
    shipped = [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))]
    file, wrong = sandbox.new_folder("fuzz", "yaml") / "fuzzed.yaml", []
    for number in range(count):
        source = sandbox.random("yaml", number)
        file.write_bytes(fuzz(source.choice(shipped), source))
        try:
            with contextlib.suppress(ConfigError):
                config.parse(["--cfg", str(file), "--data-path", "data"])
        except Exception as error:  # noqa: BLE001  what this check looks for
            wrong.append(f"yaml {number}: {type(error).__name__}: {error}")
    return wrong


def check_bad_files(sandbox: Sandbox) -> Result:
    """Every kind of bad image in a run, then files, archives and configurations damaged at random."""
    run = run_on_bad_files(sandbox)
    kinds = sum(expected == BAD for expected in run["planted"].values())
    total = sandbox.count(1000, 10_000)
    start = sandbox.random("fuzz").randrange(2**32)
    outcomes: Counter[str] = Counter()
    for found in sandbox.map(fuzz_trial, range(start, start + total, CHUNK)):
        outcomes.update(found)
    foreign = [name for name in outcomes if name.startswith("seed")] + fuzz_configs(
        sandbox, total // 5
    )
    measured = f"{kinds} kinds; {total + total // 5} fuzzed, {len(foreign)} foreign exceptions"
    details = {"first seed": start, "outcomes": dict(outcomes), "foreign": foreign}
    return Result(measured, kinds >= 35 and not foreign, details)


def check_bad_samples(sandbox: Sandbox) -> Result:
    """The files that bad_samples.jsonl names, against those that were planted."""
    run = run_on_bad_files(sandbox)
    planted = {name for name, expected in run["planted"].items() if expected == BAD}
    either = {name for name, expected in run["planted"].items() if expected == ANY}
    reported = set(run["reported"])
    missed, others = sorted(planted - reported), sorted(reported - planted - either)
    measured = f"{len(planted)} planted, {len(missed)} missed, {len(others)} others"
    return Result(measured, not missed and not others, {"missed": missed, "others": others})


# --- 13: wrong configurations ---------------------------------------------------------------------


def check_wrong_configurations(sandbox: Sandbox) -> Result:
    """Every wrong file or command line is refused in one line with its place, the key and the remedy."""
    wrong, wrong_answers = list(cases()), []
    with contextlib.chdir(sandbox.new_folder("configs")):
        for text, words, parts in wrong:
            message = answer(text, words)
            if len(message.splitlines()) != 1 or not all(part in message for part in parts):
                wrong_answers.append({"file": text, "words": words, "message": message})
    measured = f"{len(wrong) - len(wrong_answers)}/{len(wrong)}"
    return Result(
        measured, not wrong_answers and len(wrong) >= 70, {"wrong_answers": wrong_answers}
    )


# --- 14: malicious files --------------------------------------------------------------------------


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.system, (f"touch '{self.canary}'",)


def pickle_case(name: str, write: Callable[[Payload, Path], None]) -> Callable:
    """A case: `write` puts the payload into the file `name`, which --pretrained names."""

    def arguments(sandbox: Sandbox, folder: Path, canary: Path) -> list[str]:
        write(Payload(canary), folder / name)
        return [*sandbox.arguments(folder), "--pretrained", str(folder / name)]

    return arguments


def write_pickle(payload: Payload, file: Path) -> None:
    """A bare pickle."""
    file.write_bytes(pickle.dumps({"model": payload}))


def write_legacy_torch(payload: Payload, file: Path) -> None:
    """What torch.save wrote before 1.6."""
    torch.save({"model": payload}, file, _use_new_zipfile_serialization=False)


def write_torch(payload: Payload, file: Path) -> None:
    """What torch.save writes."""
    torch.save({"model": payload, "w": torch.zeros(2)}, file)


def write_long_header(payload: Payload, file: Path) -> None:
    """A safetensors file whose header claims to be as long as the address space."""
    file.write_bytes(struct.pack("<Q", 2**62) + b"{}")


def config_case(text: str, name: str = "evil.yaml") -> Callable:
    """A case: the configuration file `name` holds `text`, in which CANARY is replaced by the canary's path."""

    def arguments(sandbox: Sandbox, folder: Path, canary: Path) -> list[str]:
        (folder / name).write_text(text.replace("CANARY", str(canary)))
        (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
        return ["--cfg", str(folder / name), "--data-path", str(sandbox.folder / "images")]

    return arguments


def command_case(*words: str) -> Callable:
    """A case: these words after a valid command line."""
    return lambda sandbox, folder, canary: [*sandbox.arguments(folder), *words]


def archive_case(kind: str) -> Callable:
    """A case: the training set is one of tests/reliability/bad_files.py's archives."""

    def arguments(sandbox: Sandbox, folder: Path, canary: Path) -> list[str]:
        make_bad_archives(folder / "archives")
        images = folder / "archives" / kind
        shutil.copytree(sandbox.folder / "images" / "val", images / "val")
        settings = "TRAIN.GLOBAL_BATCH_SIZE=4", "DATA.MAX_BAD_SAMPLES=0", "DATA.VAL_SUBSET=True"
        return sandbox.arguments(folder, *settings, images=images)

    return arguments


def checkpoint_case(change: Callable[[Path, Path], None]) -> Callable:
    """A case: a run's checkpoint was changed and its manifest made to fit."""

    def arguments(sandbox: Sandbox, folder: Path, canary: Path) -> list[str]:
        finish(
            *sandbox.arguments(folder, "TRAIN.EPOCHS=1", "TRAIN.WARMUP_EPOCHS=0"),
            log=folder / "log",
        )
        for step in checkpoint.list_checkpoints(run_of(folder) / "checkpoints"):
            change(step, canary)
        return sandbox.arguments(folder)

    return arguments


def plant_pickle(step: Path, canary: Path) -> None:
    """A pickle in the place of the optimizer's tensors."""
    content = pickle.dumps(Payload(canary))
    (step / "optimizer.safetensors").write_bytes(content)
    manifest = json.loads((step / checkpoint.MANIFEST).read_text())
    manifest["optimizer.safetensors"] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (step / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def plant_outside_path(step: Path, canary: Path) -> None:
    """A manifest that leads out of the checkpoint."""
    manifest = json.loads((step / checkpoint.MANIFEST).read_text())
    manifest["../../../../images/train/class_0/000.jpg"] = {"bytes": 0, "sha256": ""}
    (step / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def plant_other_tensors(step: Path, canary: Path) -> None:
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
    "pickle in torch's format": pickle_case("w.pth", write_torch),
    "pickle in torch's old format": pickle_case("w.pt", write_legacy_torch),
    "bare pickle": pickle_case("w.bin", write_pickle),
    "pickle with a safe name": pickle_case("w.safetensors", write_pickle),
    "endless safetensors header": pickle_case("w.safetensors", write_long_header),
    "pickle in a checkpoint": checkpoint_case(plant_pickle),
    "manifest with a way out": checkpoint_case(plant_outside_path),
    "forged tensors": checkpoint_case(plant_other_tensors),
    "YAML that calls": config_case("TAG: !!python/object/apply:os.system ['touch CANARY']"),
    "YAML that imports": config_case("TAG: !!python/module:antigravity"),
    "YAML that names": config_case("OUTPUT: !!python/name:os.system"),
    "billion laughs": config_case(BILLION),
    "configuration as code": config_case("open('CANARY', 'w')", "config.py"),
    "code as a base": config_case("BASE: evil.py"),
    "tag out of the folder": command_case("--tag", "../../evil"),
    "model from the hub": command_case("--opts", "MODEL.NAME=hf-hub:someone/evil"),
    "model from a folder": command_case("--opts", "MODEL.NAME=local-dir:/tmp/evil"),
    "weights over http": command_case("--pretrained", "http://127.0.0.1/w.pth"),
    "weights without a hash": command_case("--pretrained", "https://127.0.0.1/w.pth"),
    "weights from file://": command_case("--pretrained", "file:///etc/passwd"),
    "zip with ../": archive_case("zip_parent"),
    "zip with / in front": archive_case("zip_absolute"),
    "zip with a link": archive_case("zip_link"),
    "zip bomb": archive_case("zip_bomb"),
    "tar with ../": archive_case("tar_parent"),
    "tar with / in front": archive_case("tar_absolute"),
    "tar with a link": archive_case("tar_link"),
    "tar with a hard link": archive_case("tar_hard_link"),
    "tar with a device": archive_case("tar_device"),
}


def malicious_trial(sandbox: Sandbox, name: str) -> dict:
    """Give one malicious thing to main.py: it has to be refused with one of the codes, and nothing may happen."""
    folder = sandbox.new_folder("malicious", str(list(MALICIOUS).index(name)))
    canary = folder / "canary"
    command = MALICIOUS[name](sandbox, folder, canary)
    victim = launch(command, log=folder / "log")
    codes = victim.wait(60)
    leaks = [
        str(path)
        for path in (sandbox.folder / "evil", sandbox.folder / "evil.jpg")
        if path.exists()
    ]
    return {
        "name": name,
        "exit_codes": codes,
        "message": victim.output.strip().splitlines()[-1][:200] if victim.output.strip() else "",
        "blocked": codes[0] in OWN_CODES and not canary.exists() and not leaks,
    }


def check_malicious_files(sandbox: Sandbox) -> Result:
    """Pickles, YAML tags, archives, forged checkpoints, addresses: each refused, the canary unharmed."""
    trials = sandbox.map(malicious_trial, MALICIOUS)
    blocked = sum(trial["blocked"] for trial in trials)
    measured = f"{blocked}/{len(trials)}"
    return Result(measured, blocked == len(trials) >= 15, {"trials": trials})

"""Names of the project's first edition and what they are called now: keys, values, fields of checkpoints.

Where a person types an old key it is refused with the new one. What old checkpoints and run directories hold is
translated when it is read, so that those runs resume and evaluate.
"""

from collections.abc import Callable, Container

KEYS = {
    "TRAIN.EVAL_FREQ": "EVAL_FREQ",
    "CHECKPOINT.EPOCHS": "SAVE_FREQ",
    "CHECKPOINT.UPDATES": "SAVE_STEPS",
    "TEST.PROTOCOL": "TEST.CROP_MODE",
}
VALUES = {"TEST.PROTOCOL": {"official": "squash", "standard": "center"}}
# Arguments of our own models, MODEL.ARGS.<name>.
MODEL_ARGS = {
    "heads": "num_heads",
    "groups": "offset_groups",
    "reductions": "sr_ratios",
    "table_img_size": "rpe_img_size",
}
METADATA = {
    "update": "step",
    "updates_per_epoch": "steps_per_epoch",
    "promise": "reproducibility",
    "processes": "world_size",
}
# Fields of metrics.jsonl, timing.jsonl and skipped.jsonl.
RECORDS = {"update": "step", "slots": "micro_batches"}
# Tensors of our models' checkpoints, a part of their name.
TENSORS = {".perception.": ".lpu.", "displacement_bias_table": "rpe_table"}
# What keys that came later would have been, in checkpoints of either edition that lack them.
LATER_KEYS = {
    "AUG.MIXUP_OFF_EPOCH": 0,
    "AUG.ON_DEVICE": False,
    "AUG.REPEATS": 1,
    "DATA.HOLDOUT": 0.0,
    "DATA.IMG_SIZE_SCHEDULE": [],
    "DATA.IN_CHANS": 3,
    "MODEL.COMPILE": False,
    "MODEL.KERNELS": "reference",
    "MODEL.STOCHASTIC_DEPTH": "independent",
    "teacher": None,
    "TRAIN.DETERMINISTIC": False,
    "TRAIN.EMA_WARMUP": False,
    "TRAIN.FREEZE": "",
    "TRAIN.LAYER_DECAY": 1.0,
    "TRAIN.LR_BASE_SIZE": 512,
    "TRAIN.LR_SCALES": [],
    "TRAIN.OPTIMIZER.NAME": "adamw",
    "TRAIN.WARMUP_STEPS": 0,
}
REPRODUCIBILITY = {
    "L2": "bitwise",
    "L3": "bitwise on any number of processes",
    "L2 without bits": "same samples",
}


def translate_keys(values: dict) -> dict:
    """A nested configuration of the first edition under today's keys; today's passes unchanged."""
    values = {name: dict(v) if isinstance(v, dict) else v for name, v in values.items()}
    for old, new in KEYS.items():
        group, _, last = old.rpartition(".")
        if not isinstance(values.get(group), dict) or last not in values[group]:
            continue
        value = values[group].pop(last)
        value = VALUES.get(old, {}).get(value, value) if isinstance(value, str) else value
        new_group, _, new_last = new.rpartition(".")
        (values[new_group] if new_group else values)[new_last] = value
    model = values.get("MODEL")
    args = model.get("ARGS") if isinstance(model, dict) else None
    if isinstance(args, dict) and is_own_model(str(model.get("NAME", ""))):
        values["MODEL"] = model | {"ARGS": {MODEL_ARGS.get(n, n): v for n, v in args.items()}}
    return values


def translate_metadata(metadata: dict, make: Callable[[dict], dict] = dict) -> dict:
    """The state.json of a first-edition checkpoint with today's fields; `make` builds the result's objects."""
    translated = {METADATA.get(name, name): value for name, value in metadata.items()}
    best = translated.get("best")
    if isinstance(best, dict) and "update" in best:
        translated["best"] = make({METADATA.get(n, n): v for n, v in best.items()})
    level = translated.get("reproducibility")
    if isinstance(level, str):
        translated["reproducibility"] = REPRODUCIBILITY.get(level, level)
    if isinstance(translated.get("config"), dict):
        translated["config"] = make(translate_keys(translated["config"]))
    return make(translated)


def translate_record(record: dict) -> dict:
    """A line of a run's record files with today's fields; today's passes unchanged."""
    return {RECORDS.get(name, name): value for name, value in record.items()}


def translate_tensors(tensors: dict[str, object], known: Container[str]) -> dict[str, object]:
    """`tensors` under today's names; what is in `known`, the names that a model has, stays as it is."""
    renamed = {}
    for name, tensor in tensors.items():
        new = name
        for old, now in TENSORS.items() if name not in known else ():
            new = new.replace(old, now)
        renamed[new] = tensor
    return renamed


def is_own_model(name: str) -> bool:
    """Whether `name` is one of models/dat.py's variants, whose arguments were renamed."""
    return name.startswith("dat_")

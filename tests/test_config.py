"""Covers config.py: refusals with place and remedy, precedence, BASE files, round trips, the shipped configurations."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import config
from utils.errors import ConfigError

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(text: str, name: str = "run.yaml") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return name


def parse(*argv: str, yaml: str = "TAG: test\n") -> config.Command:
    return config.parse(["--cfg", write(yaml), "--data-path", "data", *argv])


def refusal(*argv: str, yaml: str = "TAG: test\n") -> str:
    with pytest.raises(ConfigError) as caught:
        parse(*argv, yaml=yaml)
    return str(caught.value)


# --- Refused files --------------------------------------------------------------------------------

# (what run.yaml holds, how the only line of the message begins, what else it says)
WRONG_FILES = [
    # keys
    ("TRAIN:\n  BASE_LRR: 1e-3", "run.yaml:2: TRAIN.BASE_LRR: unknown key", "did you mean TRAIN.BASE_LR?"),
    ("EPOCHS: 3", "run.yaml:1: EPOCHS: unknown key", "TRAIN.EPOCHS or CHECKPOINT.EPOCHS"),
    ("train:\n  epochs: 3", "run.yaml:1: train: unknown key", "did you mean TRAIN?"),
    ("DATA:\n  MIXUP: 0.8", "run.yaml:2: DATA.MIXUP: unknown key", "did you mean AUG.MIXUP?"),
    ("TRIAN:\n  EPOCHS: 3", "run.yaml:1: TRIAN: unknown key", "did you mean TRAIN?"),
    ("AUG:\n  mixup: 0.8", "run.yaml:2: AUG.mixup: unknown key", "did you mean AUG.MIXUP?"),
    ("TRAIN:\n  WARMUP_EPOCH: 5\n  EPOCHS: 6", "run.yaml:2: TRAIN.WARMUP_EPOCH:", "TRAIN.WARMUP_EPOCHS?"),
    ("ZZZ: 1", "run.yaml:1: ZZZ: unknown key", "config.py lists every key"),
    ("1: 2", "run.yaml:1: 1: unknown key", "config.py"),
    ("? [a, b]\n: 2", "run.yaml:1: [a, b]: unknown key", "config.py"),
    ("TRAIN.EPOCHS: 30", "run.yaml:1: TRAIN.EPOCHS: dots are for --opts", "below their group"),
    ("TRAIN:\n  EPOCHS: 30\n  EPOCHS: 40", "run.yaml:3: TRAIN.EPOCHS: stands twice", "line 2; remove one"),
    ("TAG: a\nTRAIN: {EPOCHS: 30}\nTRAIN: {SEED: 1}", "run.yaml:3: TRAIN: stands twice", "line 2"),
    ("MODEL:\n  TYPE: swin", "run.yaml:2: MODEL.TYPE: unknown key", "use MODEL.NAME"),
    ("TRAIN:\n  OPTIMIZER:\n    NAME: adamw", "run.yaml:2: TRAIN.OPTIMIZER:", "use TRAIN.ADAM_BETAS"),
    ("TRAIN:\n  ACCUMULATION_STEPS: 4", "run.yaml:2: TRAIN.ACCUMULATION_STEPS:", "TRAIN.GLOBAL_BATCH_SIZE"),
    ("AMP_ENABLE: true", "run.yaml:1: AMP_ENABLE: unknown key", "use AMP_DTYPE"),
    ("TRAIN: 30", "run.yaml:1: TRAIN: got 30, expected keys below it", "set TRAIN.<key>"),
    ("TAG: a\nTRAIN:\n", "run.yaml:2: TRAIN: got nothing", "or remove it"),
    # types
    ("TRAIN:\n  EPOCHS: many", "run.yaml:2: TRAIN.EPOCHS: got 'many', expected an integer of at least 1", ""),
    ("TRAIN:\n  EPOCHS: 30.5", "run.yaml:2: TRAIN.EPOCHS: got 30.5, expected an integer", "passes over"),
    ("TRAIN:\n  EPOCHS: true", "run.yaml:2: TRAIN.EPOCHS: got true, expected an integer", ""),
    ("TRAIN:\n  EPOCHS: [30]", "run.yaml:2: TRAIN.EPOCHS: got [30], expected an integer", ""),
    ("TRAIN:\n  EPOCHS:", "run.yaml:2: TRAIN.EPOCHS: got nothing, expected an integer", ""),
    ("TRAIN:\n  BASE_LR: fast", "run.yaml:2: TRAIN.BASE_LR: got 'fast', expected a number above 0", ""),
    ("TRAIN:\n  BASE_LR: yes", "run.yaml:2: TRAIN.BASE_LR: got yes, expected a number", ""),
    ("TRAIN:\n  BASE_LR: .nan", "run.yaml:2: TRAIN.BASE_LR: got .nan, expected a number", ""),
    ("TRAIN:\n  CLIP_GRAD: inf", "run.yaml:2: TRAIN.CLIP_GRAD: got 'inf', expected a number", "0: not clipped"),
    ("TRAIN:\n  BASE_LR: 5e-4 * 8", "run.yaml:2: TRAIN.BASE_LR: got '5e-4 * 8', expected a number", ""),
    ("AUG:\n  REPROB: 25%", "run.yaml:2: AUG.REPROB: got '25%', expected a number from 0 to 1", ""),
    ("DATA:\n  VAL_SUBSET: 1", "run.yaml:2: DATA.VAL_SUBSET: got 1, expected True or False", ""),
    ("DATA:\n  VAL_SUBSET: 'True'", "run.yaml:2: DATA.VAL_SUBSET: got 'True', expected True or False", ""),
    ("AUG:\n  SCALE: 0.08, 1.0", "run.yaml:2: AUG.SCALE: got '0.08, 1.0', expected a list", "[0.08, 1.0]"),
    ("AUG:\n  SCALE: 0.5", "run.yaml:2: AUG.SCALE: got 0.5, expected a list", "[0.08, 1.0]"),
    ("AUG:\n  SCALE: [0.5]", "run.yaml:2: AUG.SCALE: got [0.5], expected a list", "[0.08, 1.0]"),
    ("AUG:\n  SCALE: (0.5, [)", "run.yaml:2: AUG.SCALE: got '(0.5, [)', expected a list", ""),
    ("DATA:\n  MEAN: [a, b, c]", "run.yaml:2: DATA.MEAN: got [a, b, c], expected a list", ""),
    ("DATA:\n  IMG_SIZE: [224, 224]", "run.yaml:2: DATA.IMG_SIZE: got [224, 224], expected an integer", ""),
    ("OUTPUT: [a]", "run.yaml:1: OUTPUT: got [a], expected a path", ""),
    ("AUG:\n  AUTO_AUGMENT: null", "run.yaml:2: AUG.AUTO_AUGMENT: got null, expected ''", ""),
    ("MODEL:\n  NAME: {a: 1}", "run.yaml:2: MODEL.NAME: got {a: 1}, expected a model's name", ""),
    ("MODEL:\n  ARGS: 3", "run.yaml:2: MODEL.ARGS: got 3, expected keys below it", ""),
    # values
    ("DATA:\n  BATCH_SIZE: 0", "run.yaml:2: DATA.BATCH_SIZE: got 0, expected an integer of at least 1", ""),
    ("DATA:\n  NUM_WORKERS: -1", "run.yaml:2: DATA.NUM_WORKERS: got -1, expected an integer of at least 0", ""),
    ("DATA:\n  IMG_SIZE: 31", "run.yaml:2: DATA.IMG_SIZE: got 31, expected an integer of at least 32", ""),
    ("AUG:\n  HFLIP: 20", "run.yaml:2: AUG.HFLIP: got 20, expected a number from 0 to 1", "written 0.2"),
    ("AUG:\n  MIXUP_PROB: 1.5", "run.yaml:2: AUG.MIXUP_PROB: got 1.5, expected a number from 0 to 1", ""),
    ("AUG:\n  MIXUP: -1", "run.yaml:2: AUG.MIXUP: got -1, expected a number of at least 0", ""),
    ("AUG:\n  MIXUP_MODE: half", "run.yaml:2: AUG.MIXUP_MODE: got 'half', expected one of batch, pair", ""),
    ("AUG:\n  SCALE: [1.0, 0.08]", "run.yaml:2: AUG.SCALE: got [1.0, 0.08]", "0 < first ≤ second ≤ 1"),
    ("AUG:\n  SCALE: [8, 100]", "run.yaml:2: AUG.SCALE: got [8, 100]", "second ≤ 1"),
    ("AUG:\n  RATIO: [1.33, 0.75]", "run.yaml:2: AUG.RATIO: got [1.33, 0.75]", "0 < first ≤ second"),
    ("AUG:\n  AUTO_AUGMENT: rand-m9-fast", "run.yaml:2: AUG.AUTO_AUGMENT: got 'rand-m9-fast'", "rand-m9-mstd0.5"),
    ("AUG:\n  AUTO_AUGMENT: none", "run.yaml:2: AUG.AUTO_AUGMENT: got 'none', expected '' or a policy", ""),
    ("AUG:\n  REMODE: pixels", "run.yaml:2: AUG.REMODE: got 'pixels'", "did you mean pixel?"),
    ("AUG:\n  RECOUNT: 0", "run.yaml:2: AUG.RECOUNT: got 0, expected an integer of at least 1", ""),
    ("DATA:\n  MEAN: [123.7, 116.3, 103.5]", "run.yaml:2: DATA.MEAN: got [123.7", "divide values of 0 … 255 by 255"),
    ("DATA:\n  STD: [0, 1, 1]", "run.yaml:2: DATA.STD: got [0, 1, 1]", "above 0"),
    ("DATA:\n  INTERPOLATION: cubic", "run.yaml:2: DATA.INTERPOLATION: got 'cubic'", "did you mean bicubic?"),
    ("AMP_DTYPE: bf16", "run.yaml:1: AMP_DTYPE: got 'bf16'", "did you mean bfloat16?"),
    ("DEVICE: gpu", "run.yaml:1: DEVICE: got 'gpu', expected one of auto, cpu, cuda", "did you mean cpu?"),
    ("MODEL:\n  NUM_CLASSES: 1", "run.yaml:2: MODEL.NUM_CLASSES: got 1, expected an integer of 0 or at least 2", ""),
    ("MODEL:\n  DROP_PATH_RATE: 1.0", "run.yaml:2: MODEL.DROP_PATH_RATE: got 1.0", "from 0 to below 1"),
    ("MODEL:\n  LABEL_SMOOTHING: 10", "run.yaml:2: MODEL.LABEL_SMOOTHING: got 10", "10 % is written 0.1"),
    ("MODEL:\n  NAME: ../other", "run.yaml:2: MODEL.NAME: got '../other', expected a model's name", ""),
    ("TRAIN:\n  EPOCHS: 0", "run.yaml:2: TRAIN.EPOCHS: got 0, expected an integer of at least 1", ""),
    ("TRAIN:\n  BASE_LR: 0", "run.yaml:2: TRAIN.BASE_LR: got 0, expected a number above 0", ""),
    ("TRAIN:\n  WEIGHT_DECAY: 5", "run.yaml:2: TRAIN.WEIGHT_DECAY: got 5, expected a number from 0 to 1", ""),
    ("TRAIN:\n  CLIP_GRAD: -5", "run.yaml:2: TRAIN.CLIP_GRAD: got -5, expected a number of at least 0", ""),
    ("TRAIN:\n  ADAM_BETAS: [0.999, 0.9]", "run.yaml:2: TRAIN.ADAM_BETAS: got [0.999, 0.9]", "swapped?"),
    ("TRAIN:\n  EMA_DECAY: 1", "run.yaml:2: TRAIN.EMA_DECAY: got 1", "from 0.5 to below 1"),
    ("TRAIN:\n  EMA_DECAY: 0.0001", "run.yaml:2: TRAIN.EMA_DECAY: got 0.0001", "would be 0.9999"),
    ("CHECKPOINT:\n  KEEP: 1", "run.yaml:2: CHECKPOINT.KEEP: got 1, expected an integer of at least 2", ""),
    ("CHECKPOINT:\n  RESUME: w.pth", "run.yaml:2: CHECKPOINT.RESUME: got 'w.pth'", "weights go to --pretrained"),
    ("CHECKPOINT:\n  PRETRAINED: https://x/w.pth", "run.yaml:2: CHECKPOINT.PRETRAINED: got 'https:", "#sha256=<64 hex"),
    ("CHECKPOINT:\n  PRETRAINED: https://x/w#sha256=ab", "run.yaml:2: CHECKPOINT.PRETRAINED: got 'https:", "SHA-256"),
    ("CHECKPOINT:\n  RESUME: https://x/run", "run.yaml:2: CHECKPOINT.RESUME: got 'https:", "URL"),
    ("OUTPUT: ~/runs", "run.yaml:1: OUTPUT: got '~/runs', expected a path, written out", ""),
    ("OUTPUT: ''", "run.yaml:1: OUTPUT: got '', expected a path", "folder of all runs"),
    ("TAG: a/b", "run.yaml:1: TAG: got 'a/b', expected a folder's name", ""),
    ("TEST:\n  CROP_PCT: 87.5", "run.yaml:2: TEST.CROP_PCT: got 87.5", "87.5 % is written 0.875"),
    ("TEST:\n  PROTOCOL: offical", "run.yaml:2: TEST.PROTOCOL: got 'offical'", "did you mean official?"),
    ("PRINT_FREQ: 0", "run.yaml:1: PRINT_FREQ: got 0, expected an integer of at least 1", ""),
    ("MODEL:\n  ARGS: {num_classes: 10}", "run.yaml:2: MODEL.ARGS.num_classes: has a key", "use MODEL.NUM_CLASSES"),
    ("MODEL:\n  ARGS: {img_size: 64}", "run.yaml:2: MODEL.ARGS.img_size: has a key", "use DATA.IMG_SIZE"),
    ("MODEL:\n  ARGS: {drop-rate: 1}", "run.yaml:2: MODEL.ARGS.drop-rate: not an argument's name", ""),
    ("MODEL:\n  ARGS: {a: {b: 1, b: 2}}", "run.yaml:2: MODEL.ARGS.a: got {b: 1, b: 2}", "twice; remove one"),
    # the file
    ("", "run.yaml: is empty", "MODEL: {NAME: dat_tiny}"),
    ("# nothing\n", "run.yaml: is empty", "expected keys"),
    ("- TAG", "run.yaml: got - TAG", "expected keys"),
    ("dat_tiny", "run.yaml: got 'dat_tiny'", "expected keys"),
    ("TRAIN:\n\tEPOCHS: 3", "run.yaml:2: not valid YAML", "spaces, not tabs"),
    ("TRAIN:\n  EPOCHS: [3\nTAG: a", "run.yaml:3: not valid YAML", "look at the lines"),
    ("TAG: a\n---\nTAG: b", "run.yaml:2: not valid YAML: but found another document", ""),
    ("TAG: a\nSEED: \x07", "run.yaml:2: holds a character that is not text, 0x7", "remove it"),
    ("TAG: !!python/object/apply:os.system ['touch canary']", "run.yaml:1: not valid YAML", "a tag (!…)"),
    ("TAG: &a x\nOUTPUT: *a", "run.yaml:2: not valid YAML", "an alias (*…)"),
    ("TAG: " + "[" * 5000, "run.yaml: is nested too deeply", ""),
    # BASE
    ("BASE: other.yaml", "run.yaml:1: BASE: other.yaml: no such file", "its folder holds run.yaml"),
    ("TAG: a\nBASE: runn.yaml", "run.yaml:2: BASE: runn.yaml: no such file", "did you mean run.yaml?"),
    ("BASE: run.yaml", "run.yaml:1: BASE: the files form a circle", "run.yaml → run.yaml; remove"),
    ("BASE: [3]", "run.yaml:1: BASE: 3: expected a .yaml file", ""),
    ("BASE:", "run.yaml:1: BASE: got nothing", "expected a path"),
    ("BASE: config.py", "run.yaml:1: BASE: config.py: expected a .yaml file", "never run as code"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "begin", "also"), WRONG_FILES)
def test_a_wrong_file_is_refused_with_its_line(text, begin, also):
    message = refusal(yaml=text)
    assert len(message.splitlines()) == 1, message
    assert message.startswith(begin)
    assert also in message
    assert not Path("canary").exists()


# (what run.yaml holds, the keys that do not fit, the reason or remedy)
WRONG_TOGETHER = [
    ("DATA: {BATCH_SIZE: 100}", ["run.yaml:1", "DATA.BATCH_SIZE 100", "4096 (defaults)"], "slot to 64 or 128"),
    ("TRAIN: {GLOBAL_BATCH_SIZE: 64}", ["TRAIN.GLOBAL_BATCH_SIZE 64"], "update to 128 images, or the slot to 64"),
    ("DATA: {BATCH_SIZE: 32}\nTRAIN: {GLOBAL_BATCH_SIZE: 100}", ["GLOBAL_BATCH_SIZE 100"], "slot to 20 or 50"),
    ("DATA: {BATCH_SIZE: 1}", ["DATA.BATCH_SIZE 1", "AUG.MIXUP 0.8"], "even slot"),
    ("DATA: {BATCH_SIZE: 5}\nTRAIN: {GLOBAL_BATCH_SIZE: 25}\nAUG: {MIXUP: 0}", ["AUG.CUTMIX 1.0"], "even slot"),
    ("TRAIN: {EPOCHS: 20}", ["TRAIN.WARMUP_EPOCHS 20 (defaults), TRAIN.EPOCHS 20"], "shorten it"),
    ("TRAIN: {EPOCHS: 10}", ["TRAIN.EPOCHS 10"], "warm-up must end"),
    ("TRAIN: {MIN_LR: 1e-3}", ["TRAIN.MIN_LR 0.001", "TRAIN.BASE_LR 0.0005 (defaults)"], "lower MIN_LR"),
    ("TRAIN: {WARMUP_LR: 1e-3}", ["TRAIN.WARMUP_LR 0.001"], "lower WARMUP_LR"),
    ("TRAIN: {BASE_LR: 4e-3}", ["TRAIN.BASE_LR 0.004"], "write 0.0005"),
    ("AUG: {PADDING: 4, SCALE: [0.2, 1]}", ["AUG.SCALE [0.2, 1.0], AUG.PADDING 4"], "set AUG.PADDING to 0"),
    ("AUG: {PADDING: 4, RATIO: [1, 1]}", ["AUG.RATIO [1.0, 1.0]"], "set AUG.PADDING to 0"),
    ("AUG: {PADDING: 17}\nDATA: {IMG_SIZE: 32}", ["AUG.PADDING 17, DATA.IMG_SIZE 32 (run.yaml:2)"], "4 for 32"),
    ("AUG: {COLOR_JITTER: 0.3}", ["AUG.COLOR_JITTER 0.3"], "set AUG.AUTO_AUGMENT to ''"),
    ("THREADS: 1\nTRAIN: {EXACT_WORLD_SIZE: on, GLOBAL_BATCH_SIZE: 768}", ["6 is no power of two"], "512 or 1024"),
    ("TRAIN: {EXACT_WORLD_SIZE: on}", ["TRAIN.EXACT_WORLD_SIZE True, THREADS 0 (defaults)"], "set THREADS"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "names", "remedy"), WRONG_TOGETHER)
def test_values_that_do_not_fit_are_refused_together(text, names, remedy):
    message = refusal(yaml=text)
    assert len(message.splitlines()) == 1, message
    for part in [*names, remedy]:
        assert part in message


# --- Refused command lines ------------------------------------------------------------------------

# (words after --cfg and --data-path, how the only line of the message begins, what else it says)
WRONG_WORDS = [
    ("--evall", "--evall: unknown flag", "did you mean --eval?"),
    ("--batch_size 64", "--batch_size: unknown flag", "did you mean --batch-size?"),
    ("--batch 64", "--batch: unknown flag", "did you mean --batch-size?"),
    ("--epochs=3", "--epochs: unknown flag", "use --opts TRAIN.EPOCHS or CHECKPOINT.EPOCHS"),
    ("--accumulation-steps 4", "--accumulation-steps: unknown flag", "TRAIN.GLOBAL_BATCH_SIZE"),
    ("--use-checkpoint", "--use-checkpoint: unknown flag", "MODEL.GRAD_CHECKPOINTING True"),
    ("--local_rank 0", "--local_rank: unknown flag", "torchrun"),
    ("--xyzzy", "--xyzzy: unknown flag", "--help lists every flag"),
    ("-x", "-x: unknown flag", "--help lists every flag"),
    ("TRAIN.EPOCHS", "'TRAIN.EPOCHS': belongs to no flag", "follow --opts"),
    ("--batch-size", "--batch-size: expected one argument", "--help"),
    ("-hx", "--help: ignored explicit argument 'x'", "--help"),
    ("-j", "--workers: expected one argument", "--help"),
    ("--eval=yes --pretrained w.pth", "--eval: ignored explicit argument 'yes'", "--help"),
    ("--batch-size 0", "--batch-size: DATA.BATCH_SIZE: got 0, expected an integer of at least 1", ""),
    ("--batch-size many", "--batch-size: DATA.BATCH_SIZE: got 'many', expected an integer", ""),
    ("--seed -1", "--seed: SEED: got -1, expected an integer of at least 0", ""),
    ("--seed [1", "--seed: SEED: got '[1', expected an integer", ""),
    ("--amp-dtype fp16", "--amp-dtype: AMP_DTYPE: got 'fp16'", "did you mean float16?"),
    ("--tag a/b", "--tag: TAG: got 'a/b', expected a folder's name", ""),
    ("--output=~/runs", "--output: OUTPUT: got '~/runs', expected a path, written out", ""),
    ("--resume w.pth", "--resume: CHECKPOINT.RESUME: got 'w.pth'", "weights go to --pretrained"),
    ("--batch-size 100", "--batch-size: DATA.BATCH_SIZE 100", "slot to 64 or 128"),
    ("--eval --throughput", "--throughput: excludes --eval", "one after the other"),
    ("--eval --opts CHECKPOINT.AUTO_RESUME False", "--opts: CHECKPOINT.AUTO_RESUME False", "--pretrained FILE"),
    ("--resume run --pretrained w.pth", "--pretrained: CHECKPOINT.PRETRAINED 'w.pth'", "drop one"),
    ("--eval --resume run --pretrained w.pth", "--pretrained: CHECKPOINT.PRETRAINED 'w.pth'", "drop one"),
    ("--pretrained https://host/w.pth", "--pretrained: CHECKPOINT.PRETRAINED: got 'https://host", "#sha256=<64"),
    ("--pretrained http://host/w.pth#sha256=" + "0" * 64, "--pretrained: CHECKPOINT.PRETRAINED: got", "only https"),
    ("--pretrained file:///w.pth", "--pretrained: CHECKPOINT.PRETRAINED: got 'file:///w.pth'", "only https"),
    ("--pretrained ftp://host/w.pth", "--pretrained: CHECKPOINT.PRETRAINED: got 'ftp://host", "only https"),
    ("--opts TRAIN.EPOCHS", "--opts: TRAIN.EPOCHS: has no value", "TRAIN.EPOCHS=VALUE"),
    ("--opts TRAIN.EPOCHS SEED 3", "--opts: TRAIN.EPOCHS: has no value", "TRAIN.EPOCHS VALUE"),
    ("--opts TRAIN.EPOCH 3", "--opts: TRAIN.EPOCH: unknown key", "did you mean TRAIN.EPOCHS"),
    ("--opts TRAIN 3", "--opts: TRAIN: got 3, expected keys below it", "TRAIN.<key>"),
    ("--opts TRAIN.EPOCHS=3.5", "--opts: TRAIN.EPOCHS: got 3.5, expected an integer", ""),
    ("--opts AUG.SCALE [0.2,", "--opts: AUG.SCALE: got '[0.2,', expected a list", "[0.08, 1.0]"),
    ("--opts BASE other.yaml", "--opts: BASE: unknown key", "at the top of a file"),
    ("--opts MODEL.ARGS.a.b 3", "--opts: MODEL.ARGS.a.b: not an argument's name", "MODEL.ARGS.name"),
    ("--opts SEED=", "--opts: SEED: got nothing, expected an integer", ""),
    ("--opts MODEL.DROP_RATE 0.1", "--opts: MODEL.DROP_RATE: unknown key", "MODEL.ARGS.drop_rate"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "begin", "also"), WRONG_WORDS)
def test_a_wrong_command_line_is_refused_with_its_flag(words, begin, also):
    message = refusal(*words.split(" "))
    assert len(message.splitlines()) == 1, message
    assert message.startswith(begin)
    assert also in message


def test_a_device_is_not_read_to_its_end():
    Path("zero.yaml").symlink_to("/dev/zero")
    os.mkfifo("pipe.yaml")
    for name in ("zero.yaml", "pipe.yaml"):
        message = refusal(yaml=f"BASE: {name}")
        assert message.startswith(f"run.yaml:1: BASE: {name}: is a device")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([], ["--cfg: missing", "--cfg configs/dat_tiny.yaml"]),
        (["--cfg", "nowhere/x.yaml"], ["--cfg: nowhere/x.yaml: no such file", "its folder"]),
        (["--cfg", "folder.yaml"], ["--cfg: folder.yaml: Is a directory", "a readable file"]),
        (["--cfg", "config.py"], ["--cfg: config.py: expected a .yaml file", "never run as code"]),
        (["--cfg", "latin.yaml"], ["--cfg: latin.yaml: ", "UTF-8"]),
        (["--cfg", "ok.yaml"], ["DATA.PATH '': train needs a dataset", "add --data-path"]),
        (["--cfg", "ok.yaml", "--eval"], ["eval needs a dataset", "add --data-path"]),
    ],
)
def test_the_file_and_the_data_must_be_named(argv, parts):
    Path("folder.yaml").mkdir()
    Path("latin.yaml").write_bytes("TAG: caf\xe9".encode("latin-1"))
    write("TAG: test", "ok.yaml")
    with pytest.raises(ConfigError) as caught:
        config.parse(argv)
    assert len(str(caught.value).splitlines()) == 1
    for part in parts:
        assert part in str(caught.value)


def test_all_problems_are_reported_at_once():
    write("TRAIN: {EPOCHS: many}\n", "base.yaml")
    text = "BASE: base.yaml\nAUG:\n  HFLIP: 50\n  MIXUPP: 1\nTRAIN:\n  MIN_LR: 1\n"
    message = refusal("--evall", "-j", "x", "--opts", "SEED=-1", "DATA.STD", "--tag", yaml=text)
    lines = [line.strip().split(": got")[0] for line in message.splitlines()]
    assert lines == [
        "9 problems:",
        "--tag: expected one argument; see main.py --help",
        "--evall: unknown flag; did you mean --eval?",
        "base.yaml:1: TRAIN.EPOCHS",
        "run.yaml:3: AUG.HFLIP",
        "run.yaml:4: AUG.MIXUPP: unknown key; did you mean AUG.MIXUP?",
        "--opts: SEED",
        "--opts: DATA.STD: has no value; write DATA.STD VALUE or DATA.STD=VALUE",
        "--workers: DATA.NUM_WORKERS",
        "run.yaml:6: TRAIN.MIN_LR 1.0, TRAIN.BASE_LR 0.0005 (defaults): the last rate is above "
        "the highest; lower MIN_LR",
    ]


def test_mangled_files_are_read_or_refused_and_nothing_else():
    scraps = [
        "- ",
        "[",
        "{",
        "}",
        ":",
        "\t",
        "\n",
        "!!int ",
        "&a ",
        "*a",
        "? ",
        "|\n",
        "'",
        "%YAML 9\n",
        "\0",
        "1:30",
    ]
    rng = random.Random(0)
    outcomes = set()
    for _ in range(200):
        text = rng.choice(SHIPPED).read_text()
        for _ in range(3):
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(scraps) + text[at + rng.choice([0, 1, 30]) :]
        try:
            parse(yaml=text)
            outcomes.add("read")
        except ConfigError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


# --- What is accepted -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("TRAIN.BASE_LR", "1e-3", 1e-3),
        ("TRAIN.BASE_LR", "'1e-3'", 1e-3),
        ("TRAIN.CLIP_GRAD", "1", 1.0),
        ("TRAIN.ADAM_BETAS", "[0, 0.95]", [0.0, 0.95]),
        ("TRAIN.ADAM_BETAS", "(0.8, 0.9)", [0.8, 0.9]),
        ("TRAIN.GLOBAL_BATCH_SIZE", "1_024", 1024),
        ("DATA.VAL_SUBSET", "yes", True),
        ("AUG.AUTO_AUGMENT", "''", ""),
        ("AUG.AUTO_AUGMENT", "rand-m7-n3-mstd1-p0.5-inc1-tweights", "rand-m7-n3-mstd1-p0.5-inc1-tweights"),
        ("AUG.AUTO_AUGMENT", "augmix-m5-w4-d2-b1", "augmix-m5-w4-d2-b1"),
        ("CHECKPOINT.PRETRAINED", "https://host/w.pth#sha256=" + "0a" * 32, "https://host/w.pth#sha256=" + "0a" * 32),
        ("TAG", "007", "007"),
        ("TAG", "2026-11-22", "2026-11-22"),
        ("TAG", "no", "no"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("way", ["file", "opts"])
def test_values_are_read_as_meant(way, key, text, value):
    group, _, last = key.rpartition(".")
    if way == "file":
        cfg = parse(yaml=f"{group}:\n  {last}: {text}" if group else f"{last}: {text}").cfg
    else:
        cfg = parse("--opts", key, text.strip("'")).cfg  # the shell removes quotes
    found = cfg[group][last] if group else cfg[last]
    assert found == value
    assert type(found) is type(value)


def test_the_last_place_wins_and_is_remembered():
    write("SEED: 1\nTAG: base\nTRAIN: {EPOCHS: 100, CLIP_GRAD: 1.0}\nPRINT_FREQ: 1", "sub/a.yaml")
    write("TAG: second\nTHREADS: 3\n", "sub/b.yaml")
    yaml = "BASE: [sub/a.yaml, sub/b.yaml]\nTRAIN:\n  EPOCHS: 200\nDATA: {BATCH_SIZE: 64}\nSEED: 2"
    command = parse(
        *["--opts", "SEED=3", "DATA.BATCH_SIZE", "32", "PRINT_FREQ", "10"],
        *["--batch-size", "16", "-j4"],
        yaml=yaml,
    )
    cfg = command.cfg
    assert (cfg.SEED, cfg.TAG, cfg.THREADS) == (3, "second", 3)
    assert (cfg.TRAIN.EPOCHS, cfg.TRAIN.CLIP_GRAD) == (200, 1.0)
    assert (cfg.DATA.BATCH_SIZE, cfg.DATA.NUM_WORKERS, cfg.PRINT_FREQ) == (16, 4, 10)
    assert command.sources == {
        "SEED": "--opts",
        "TAG": "sub/b.yaml:1",
        "THREADS": "sub/b.yaml:2",
        "TRAIN.EPOCHS": "run.yaml:3",
        "TRAIN.CLIP_GRAD": "sub/a.yaml:3",
        "DATA.BATCH_SIZE": "--batch-size",
        "DATA.NUM_WORKERS": "--workers",
        "DATA.PATH": "--data-path",
    }


def test_a_base_in_a_folder_may_build_on_a_base_beside_it():
    write("TRAIN: {EPOCHS: 50}", "sub/a.yaml")
    write("BASE: a.yaml\nSEED: 5", "sub/b.yaml")
    cfg = parse(yaml="BASE: sub/b.yaml").cfg
    assert (cfg.TRAIN.EPOCHS, cfg.SEED) == (50, 5)


def test_a_circle_of_bases_is_refused():
    write("BASE: ../run.yaml", "sub/a.yaml")
    message = refusal(yaml="BASE: sub/a.yaml")
    assert message.startswith("sub/a.yaml:1: BASE: the files form a circle")
    assert "run.yaml → sub/a.yaml → run.yaml" in message


def test_arguments_of_the_model_are_merged_one_by_one():
    write("MODEL: {ARGS: {window_size: 7, qkv_bias: true}}", "base.yaml")
    text = "BASE: base.yaml\nMODEL:\n  ARGS:\n    eps: 1e-5\n    window_size: 12\n"
    words = ["--opts", "MODEL.ARGS.depths", "[2, 2]", "MODEL.ARGS.layer=None", "MODEL.ARGS.x", ""]
    command = parse(*words, yaml=text)
    assert dict(command.cfg.MODEL.ARGS) == {
        **{"window_size": 12, "qkv_bias": True, "eps": 1e-5},
        **{"depths": [2, 2], "layer": "None", "x": None},
    }
    assert command.sources["MODEL.ARGS.window_size"] == "run.yaml:5"


def test_checks_of_training_do_not_hinder_other_modes():
    assert parse("--eval", "--batch-size", "100", "--pretrained", "w.pth").mode == "eval"
    assert parse("--eval").mode == "eval"  # the run folder may hold a checkpoint
    assert config.parse(["--cfg", "run.yaml", "--throughput"]).mode == "throughput"
    assert parse("--opts").mode == "train"


def test_a_resumed_run_keeps_the_weights_that_it_began_with():
    cfg = parse("--resume", "run", yaml="CHECKPOINT: {PRETRAINED: w.pth}").cfg
    assert (cfg.CHECKPOINT.RESUME, cfg.CHECKPOINT.PRETRAINED) == ("run", "w.pth")
    message = refusal("--eval", "--resume", "run", yaml="CHECKPOINT: {PRETRAINED: w.pth}")
    assert message.startswith("run.yaml:1: CHECKPOINT.PRETRAINED 'w.pth'")  # which one is meant?


def test_the_configuration_is_frozen():
    command = parse()
    with pytest.raises(AttributeError):
        command.cfg.TRAIN.EPOCHS = 1


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_configurations_are_valid_and_survive_a_round_trip(file):
    head = file.read_text().split("\n\n")[0]
    assert f"main.py --cfg configs/{file.name}" in head
    assert "Cost:" in head
    command = config.parse(["--cfg", str(file), "--data-path", "data"])
    again = config.parse(["--cfg", write(config.dump(command.cfg))])
    assert again.cfg == command.cfg


def test_awkward_values_survive_a_round_trip():
    args = "{a: '1e-3', b: 1e-3, c: null, d: 'no', e: [1, '2', {f: x}], g: 2026-11-22, h: '', i: é}"
    text = f"TAG: 'null'\nTRAIN: {{ADAM_EPS: 1e-30}}\nOUTPUT: '- a: #'\nMODEL: {{ARGS: {args}}}"
    cfg = parse(yaml=text).cfg
    again = config.parse(["--cfg", write(config.dump(cfg))]).cfg
    assert again == cfg
    assert config.dump(cfg).startswith("OUTPUT: ")  # in the order of the schema
    assert again.MODEL.ARGS.a == "1e-3"
    assert again.MODEL.ARGS.b == 1e-3


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16, 32])
def test_processes_that_divide_the_slots_are_accepted(world_size):
    config.check_world_size(parse().cfg, world_size)


@pytest.mark.parametrize(
    ("argv", "world_size", "remedies"),
    [
        ((), 24, ["start 16 or 32 processes", "set TRAIN.GLOBAL_BATCH_SIZE to 6144"]),
        ((), 64, ["start 32 processes", "set --batch-size to 64"]),
        (("--batch-size", "512"), 16, ["start 8 processes", "set --batch-size to 256"]),
    ],
)
def test_other_numbers_of_processes_are_refused_with_some_that_work(argv, world_size, remedies):
    with pytest.raises(ConfigError, match=f"{world_size} processes cannot share") as caught:
        config.check_world_size(parse(*argv).cfg, world_size)
    for remedy in remedies:
        assert remedy in str(caught.value)


# --- Help and start -------------------------------------------------------------------------------


def test_help_lists_every_flag_and_three_examples(capsys):
    with pytest.raises(SystemExit) as caught:
        config.parse(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for flag in [*config.FLAGS, "-j", "--cfg", "--eval", "--throughput", "--opts"]:
        assert flag in text
    assert text.count("main.py --cfg configs/") == 3


def test_flags_and_groups_belong_to_keys():
    assert set(config.FLAGS.values()) <= set(config.KEYS)
    assert {name.rpartition(".")[0] for name in config.KEYS} <= {"", *config.GROUPS}


def test_every_default_passes_its_own_check():
    for key in config.SCHEMA:
        assert key.check.holds(key.default), key.name
        assert key.text


def test_a_refusal_comes_without_torch_and_at_once():
    code = (
        "import sys, config\n"
        "try: config.parse(['--cfg', 'nowhere.yaml'])\n"
        "except config.ConfigError: pass\n"
        "print(sorted({'torch', 'timm', 'numpy'} & set(sys.modules)))"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    assert time.perf_counter() - start < 2  # 0.15 s on a quiet machine

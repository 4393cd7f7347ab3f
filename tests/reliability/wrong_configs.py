"""Wrong configurations and command lines, and the one line that has to answer each: place, key and remedy."""

from collections.abc import Iterator
from pathlib import Path

import config
from utils.errors import ConfigError

# (content of run.yaml, start of the only line of the message, another part of it)
WRONG_FILES = [
    # keys
    ("TRAIN:\n  BASE_LRR: 1e-3", "run.yaml:2: TRAIN.BASE_LRR: unknown key", "did you mean TRAIN.BASE_LR?"),
    ("EPOCHS: 3", "run.yaml:1: EPOCHS: unknown key", "TRAIN.EPOCHS"),
    ("train:\n  epochs: 3", "run.yaml:1: train: unknown key", "did you mean TRAIN?"),
    ("DATA:\n  MIXUP: 0.8", "run.yaml:2: DATA.MIXUP: unknown key", "did you mean AUG.MIXUP?"),
    ("TRIAN:\n  EPOCHS: 3", "run.yaml:1: TRIAN: unknown key", "did you mean TRAIN?"),
    ("AUG:\n  mixup: 0.8", "run.yaml:2: AUG.mixup: unknown key", "did you mean AUG.MIXUP?"),
    ("TRAIN:\n  WARMUP_EPOCH: 5\n  EPOCHS: 6", "run.yaml:2: TRAIN.WARMUP_EPOCH:", "TRAIN.WARMUP_EPOCHS?"),
    ("ZZZ: 1", "run.yaml:1: ZZZ: unknown key", "config.py lists every key"),
    ("1: 2", "run.yaml:1: 1: unknown key", "config.py"),
    ("? [a, b]\n: 2", "run.yaml:1: [a, b]: unknown key", "config.py"),
    ("TRAIN.EPOCHS: 30", "run.yaml:1: TRAIN.EPOCHS: dots are for --opts", "below their group"),
    ("TRAIN:\n  EPOCHS: 30\n  EPOCHS: 40", "run.yaml:3: TRAIN.EPOCHS: is given twice", "line 2; remove one"),
    ("TAG: a\nTRAIN: {EPOCHS: 30}\nTRAIN: {SEED: 1}", "run.yaml:3: TRAIN: is given twice", "line 2"),
    ("MODEL:\n  TYPE: swin", "run.yaml:2: MODEL.TYPE: unknown key", "use MODEL.NAME"),
    ("TRAIN: {OPTIMIZER: {BETAS: [0.9, 0.95]}}", "run.yaml:1: TRAIN.OPTIMIZER.BETAS:", "use TRAIN.ADAM_BETAS"),
    ("TRAIN:\n  OPTIMIZER: sgd", "run.yaml:2: TRAIN.OPTIMIZER: got 'sgd', expected keys below it", ""),
    ("TRAIN: {OPTIMIZER: {NAME: lambs}}", "run.yaml:1: TRAIN.OPTIMIZER.NAME: got 'lambs'", "did you mean lamb?"),
    ("TRAIN:\n  ACCUMULATION_STEPS: 4", "run.yaml:2: TRAIN.ACCUMULATION_STEPS:", "TRAIN.GLOBAL_BATCH_SIZE"),
    ("AMP_ENABLE: true", "run.yaml:1: AMP_ENABLE: unknown key", "use AMP_DTYPE"),
    ("TRAIN: 30", "run.yaml:1: TRAIN: got 30, expected keys below it", "set TRAIN.<key>"),
    ("TAG: a\nTRAIN:\n", "run.yaml:2: TRAIN: got nothing", "or remove it"),
    # spaces of web pages
    ("TAG:\u00a0a", "run.yaml:1: holds no-break space (U+00A0)", "a plain space, as in text copied"),
    ("MODEL:\n\u00a0\u00a0NAME: dat_tiny", "run.yaml:2: holds no-break space (U+00A0)", "replace it"),
    ("SEED: 1\nTAG: b\nDATA: {IMG_SIZE:\u202f32}", "run.yaml:3: holds narrow no-break space (U+202F)", ""),
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
    ("DATA:\n  IMG_SIZE: [224, 16]", "run.yaml:2: DATA.IMG_SIZE: got [224, 16], expected an integer", "[height, w"),
    ("DATA:\n  IMG_SIZE: [96, 96, 96]", "run.yaml:2: DATA.IMG_SIZE: got [96, 96, 96], expected an integer", ""),
    ("DATA:\n  IN_CHANS: 4", "run.yaml:2: DATA.IN_CHANS: got 4, expected an integer 1 or 3", "luma"),
    ("MODEL:\n  ARGS: {in_chans: 1}", "run.yaml:2: MODEL.ARGS.in_chans: has a key", "use DATA.IN_CHANS"),
    ("OUTPUT: [a]", "run.yaml:1: OUTPUT: got [a], expected a path", ""),
    ("AUG:\n  AUTO_AUGMENT: null", "run.yaml:2: AUG.AUTO_AUGMENT: got null, expected ''", ""),
    ("MODEL:\n  NAME: {a: 1}", "run.yaml:2: MODEL.NAME: got {a: 1}, expected a model's name", ""),
    ("MODEL:\n  ARGS: 3", "run.yaml:2: MODEL.ARGS: got 3, expected keys below it", ""),
    # values
    ("DATA:\n  BATCH_SIZE: 0", "run.yaml:2: DATA.BATCH_SIZE: got 0, expected an integer of at least 1", ""),
    ("DATA:\n  NUM_WORKERS: -1", "run.yaml:2: DATA.NUM_WORKERS: got -1, expected an integer of at least 0", ""),
    ("DATA:\n  IMG_SIZE: 31", "run.yaml:2: DATA.IMG_SIZE: got 31, expected an integer of at least 32", ""),
    ("DATA:\n  IMG_SIZE_SCHEDULE: 96", "run.yaml:2: DATA.IMG_SIZE_SCHEDULE: got 96, expected a list of [first", ""),
    ("DATA:\n  IMG_SIZE_SCHEDULE: [[9, 96], [0, 64]]", "run.yaml:2: DATA.IMG_SIZE_SCHEDULE: got [[9,", "ascending"),
    ("DATA:\n  IMG_SIZE_SCHEDULE: [[0, 31]]", "run.yaml:2: DATA.IMG_SIZE_SCHEDULE: got [[0,", "at least 32"),
    ("DATA:\n  IMG_SIZE_SCHEDULE: [0, 96]", "run.yaml:2: DATA.IMG_SIZE_SCHEDULE: got [0,", "[[0, 96], [10, 128]]"),
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
    ("TRAIN:\n  FREEZE: 'stem, head'", "run.yaml:2: TRAIN.FREEZE: got 'stem, head', expected names", "'*,!head'"),
    ("TRAIN:\n  LR_SCALES: {a: 1}", "run.yaml:2: TRAIN.LR_SCALES: got {a: 1}, expected a list of [name", "0.1]]"),
    ("TRAIN:\n  LR_SCALES: [[stem, 0]]", "run.yaml:2: TRAIN.LR_SCALES: got [[stem, 0]]", "factor above 0"),
    ("TRAIN:\n  LAYER_DECAY: 0", "run.yaml:2: TRAIN.LAYER_DECAY: got 0, expected a number above 0, up to 1", ""),
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
    ("TEST:\n  CROP_MODE: squahs", "run.yaml:2: TEST.CROP_MODE: got 'squahs'", "did you mean squash?"),
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

# (content of run.yaml, the keys that conflict, the reason or remedy)
WRONG_TOGETHER = [
    ("DATA: {BATCH_SIZE: 100}", ["run.yaml:1", "DATA.BATCH_SIZE 100", "4096 (defaults)"], "batch size to 64 or 128"),
    ("TRAIN: {GLOBAL_BATCH_SIZE: 64}", ["TRAIN.GLOBAL_BATCH_SIZE 64"], "set it to 128, or the batch size to 64"),
    ("DATA: {BATCH_SIZE: 32}\nTRAIN: {GLOBAL_BATCH_SIZE: 100}", ["GLOBAL_BATCH_SIZE 100"], "batch size to 20 or 50"),
    ("DATA: {BATCH_SIZE: 1}", ["DATA.BATCH_SIZE 1", "AUG.MIXUP 0.8"], "even size"),
    ("DATA: {BATCH_SIZE: 5}\nTRAIN: {GLOBAL_BATCH_SIZE: 25}\nAUG: {MIXUP: 0}", ["AUG.CUTMIX 1.0"], "even size"),
    ("TRAIN: {EPOCHS: 20}", ["TRAIN.WARMUP_EPOCHS 20 (defaults), TRAIN.EPOCHS 20"], "shorten it"),
    ("TRAIN: {EPOCHS: 10}", ["TRAIN.EPOCHS 10"], "warm-up must end"),
    ("TRAIN: {EMA_WARMUP: on}", ["TRAIN.EMA_WARMUP True", "TRAIN.EMA_DECAY 0.0 (defaults)"], "set EMA_DECAY"),
    ("TRAIN: {MIN_LR: 1e-3}", ["TRAIN.MIN_LR 0.001", "TRAIN.BASE_LR 0.0005 (defaults)"], "lower MIN_LR"),
    ("TRAIN: {WARMUP_LR: 1e-3}", ["TRAIN.WARMUP_LR 0.001"], "lower WARMUP_LR"),
    ("TRAIN: {BASE_LR: 4e-3}", ["TRAIN.BASE_LR 0.004"], "write 0.0005"),
    ("AUG: {PADDING: 4, SCALE: [0.2, 1]}", ["AUG.SCALE [0.2, 1.0], AUG.PADDING 4"], "set AUG.PADDING to 0"),
    ("AUG: {PADDING: 4, RATIO: [1, 1]}", ["AUG.RATIO [1.0, 1.0]"], "set AUG.PADDING to 0"),
    ("AUG: {PADDING: 17}\nDATA: {IMG_SIZE: 32}", ["AUG.PADDING 17, DATA.IMG_SIZE 32 (run.yaml:2),"], "4 for 32"),
    ("AUG: {PADDING: 17}\nDATA: {IMG_SIZE_SCHEDULE: [[0, 32]]}", ["IMG_SIZE_SCHEDULE [[0, 32]]"], "more border"),
    ("AUG: {REPEATS: 5000}", ["AUG.REPEATS 5000, TRAIN.GLOBAL_BATCH_SIZE 4096"], "lower REPEATS"),
    ("DISTILL: {TYPE: soft}", ["DISTILL.TYPE 'soft', DISTILL.TEACHER_PATH '' (defaults)"], "no teacher"),
    ("DISTILL: {TEACHER_PATH: run, TAU: 3}", ["DISTILL.TAU 3.0, DISTILL.TYPE 'hard' (def"], "set TYPE to soft"),
    ("AUG: {COLOR_JITTER: 0.3}", ["AUG.COLOR_JITTER 0.3"], "set AUG.AUTO_AUGMENT to ''"),
    ("THREADS: 1\nTRAIN: {EXACT_WORLD_SIZE: on, GLOBAL_BATCH_SIZE: 768}", ["6 is no power of two"], "512 or 1024"),
    ("TRAIN: {EXACT_WORLD_SIZE: on}", ["TRAIN.EXACT_WORLD_SIZE True, THREADS 0 (defaults)"], "set THREADS"),
]  # fmt: skip

# (words after --cfg and --data-path, start of the only line of the message, another part of it)
WRONG_WORDS = [
    ("--evall", "--evall: unknown flag", "did you mean --eval?"),
    ("--batch_size 64", "--batch_size: unknown flag", "did you mean --batch-size?"),
    ("--batch 64", "--batch: unknown flag", "did you mean --batch-size?"),
    ("--epochs=3", "--epochs: unknown flag", "use --opts TRAIN.EPOCHS"),
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
    ("--batch-size 100", "--batch-size: DATA.BATCH_SIZE 100", "batch size to 64 or 128"),
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


def cases() -> Iterator[tuple[str, list[str], list[str]]]:
    """For each case: content of run.yaml, the words after it and --data-path, the parts of the message."""
    for text, begin, also in WRONG_FILES:
        yield text, [], [begin, also]
    for text, names, remedy in WRONG_TOGETHER:
        yield text, [], [*names, remedy]
    for words, begin, also in WRONG_WORDS:
        yield "TAG: test\n", words.split(" "), [begin, also]


def answer(text: str, words: list[str]) -> str:
    """The ConfigError of a run.yaml that is written into the working directory; empty if there is none."""
    Path("run.yaml").write_text(text)
    try:
        config.parse(["--cfg", "run.yaml", "--data-path", "data", *words])
    except ConfigError as error:
        return str(error)
    return ""

"""Covers config.py: refusals with place and remedy, precedence, BASE files, round trips, the shipped configurations."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from reliability.wrong_configs import WRONG_FILES, WRONG_TOGETHER, WRONG_WORDS

import config
from utils import first_edition
from utils.errors import ConfigError
from utils.yaml_nodes import dump, to_dict

ROOT = Path(__file__).parents[2]
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


@pytest.mark.parametrize(("text", "begin", "also"), WRONG_FILES)
def test_a_wrong_file_is_refused_with_its_line(text, begin, also):
    message = refusal(yaml=text)
    assert len(message.splitlines()) == 1, message
    assert message.startswith(begin)
    assert also in message
    assert not Path("canary").exists()


@pytest.mark.parametrize(("text", "names", "remedy"), WRONG_TOGETHER)
def test_values_that_do_not_fit_are_refused_together(text, names, remedy):
    message = refusal(yaml=text)
    assert len(message.splitlines()) == 1, message
    for part in [*names, remedy]:
        assert part in message


# --- Refused command lines ------------------------------------------------------------------------


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
    ],
)
def test_the_file_must_be_named_and_readable(argv, parts):
    Path("folder.yaml").mkdir()
    Path("latin.yaml").write_bytes("TAG: caf\xe9".encode("latin-1"))
    write("TAG: test", "ok.yaml")
    with pytest.raises(ConfigError) as caught:
        config.parse(argv)
    assert len(str(caught.value).splitlines()) == 1
    for part in parts:
        assert part in str(caught.value)


def test_a_size_is_one_number_or_height_and_width():
    for text, expected in (("96", 96), ("[96, 96]", 96), ("[96, 128]", [96, 128])):
        cfg = parse(yaml=f"DATA: {{IMG_SIZE: {text}}}").cfg
        assert (
            expected
            == cfg.DATA.IMG_SIZE
            == parse("--opts", f"DATA.IMG_SIZE={text}").cfg.DATA.IMG_SIZE
        )
        assert expected == config.load_values(to_dict(cfg), "").DATA.IMG_SIZE
        assert expected == config.load(write(dump(cfg), "again.yaml")).DATA.IMG_SIZE


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
        ("AUG.AUTO_AUGMENT", "rand-m0-n10-p1.0", "rand-m0-n10-p1.0"),
        ("OUTPUT", "runs/a$b/c~", "runs/a$b/c~"),
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
    args = (
        "{a: '1e-3', b: 1e-3, c: null, d: 'no', e: [1, '2', {f: x}], g: 2026-11-22, h: '', i: é, "
    )
    args += f"j: {{it's: 1, 2: 3, {'k' * 70}1: 4, {'k' * 70}2: 5}}}}"
    text = f"TAG: 'null'\nTRAIN: {{ADAM_EPS: 1e-30}}\nOUTPUT: '- a: #'\nMODEL: {{ARGS: {args}}}"
    cfg = parse(yaml=text).cfg
    again = config.parse(["--cfg", write(config.dump(cfg))]).cfg
    assert again == cfg
    assert config.dump(cfg).startswith("OUTPUT: ")  # in the order of the schema
    assert again.MODEL.ARGS.a == "1e-3"
    assert again.MODEL.ARGS.b == 1e-3
    assert list(again.MODEL.ARGS.j)[:2] == ["it's", "2"]


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
    assert {name.rpartition(".")[0] for name in config.KEYS} <= {"", *config.READER.groups}


def test_every_default_passes_its_own_check():
    for key in config.SCHEMA:
        assert key.check.holds(key.default), key.name
        assert key.text


def test_a_refusal_does_not_import_torch():
    code = (
        "import sys, config\n"
        "try: config.parse(['--cfg', 'nowhere.yaml'])\n"
        "except config.ConfigError: pass\n"
        "print(sorted({'torch', 'timm', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# --- For tools, and of the first edition -----------------------------------------------------------


def test_tools_load_a_file_or_the_values_of_a_checkpoint():
    path = write("MODEL: {NAME: dat_micro, ARGS: {window_size: 4}}\nDATA: {IMG_SIZE: 32}")
    cfg = config.load(path, ["SEED=3", "MODEL.ARGS.patch_size", "2"])
    assert (cfg.SEED, cfg.MODEL.ARGS) == (3, {"window_size": 4, "patch_size": 2})
    assert config.dump(config.load_values(to_dict(cfg), "here")) == config.dump(cfg)
    with pytest.raises(ConfigError, match=r"state\.json: SEED: got -1, expected an integer"):
        config.load_values({"SEED": -1}, "state.json")
    with pytest.raises(ConfigError, match=r"state\.json: SEEDS: unknown key; did you mean SEED"):
        config.load_values({"SEEDS": 1}, "state.json")


@pytest.mark.parametrize(("old", "new"), first_edition.KEYS.items())
def test_an_old_key_is_refused_with_its_new_name(old, new):
    group, last = old.split(".")
    assert f"{old}: unknown key; use {new}" in refusal(yaml=f"{group}: {{{last}: 1}}")
    assert f"{old}: unknown key; use {new}" in refusal("--opts", old, "1")


@pytest.mark.parametrize(("old", "new"), first_edition.MODEL_ARGS.items())
def test_an_old_argument_of_our_models_is_refused_with_its_new_name(old, new):
    message = refusal("--opts", f"MODEL.ARGS.{old}", "[1, 1, 1, 1]")
    assert f"renamed; use MODEL.ARGS.{new}" in message
    other = parse("--opts", f"MODEL.ARGS.{old}=3", yaml="MODEL: {NAME: resnet18}")
    assert {old: 3} == other.cfg.MODEL.ARGS  # timm's models have arguments of those names


def test_the_configuration_that_an_old_run_left_is_read():
    old = ROOT / "tests/golden/first_edition/run/config.yaml"
    cfg = config.parse(["--cfg", str(old)]).cfg
    assert (cfg.EVAL_FREQ, cfg.SAVE_FREQ, cfg.SAVE_STEPS) == (2, 2, 3)
    assert (cfg.TEST.CROP_MODE, cfg.MODEL.ARGS.num_heads) == ("center", [1, 2, 2, 2])
    write(old.read_text(), "mine.yaml")  # elsewhere, it is a file that somebody wrote
    with pytest.raises(ConfigError, match="use SAVE_FREQ"):
        config.parse(["--cfg", "mine.yaml"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"", "is empty"),
        (b"TAG: [\n", r"config\.yaml:2: not valid YAML"),
        (b"TAG:\ta\n", "indent with spaces, not tabs"),
        (b"\xff\xfe\0", "expected a readable file of UTF-8 text"),
        (b"TAG: !x y\n", "a tag"),
        (b"TRAIN:\n", "TRAIN: got nothing, expected keys below it"),
        (b"TRAIN: {EVAL_FREQ: 1, EVAL_FREQ: 2}\n", "TRAIN.EVAL_FREQ: is given twice"),
        (b"TEST: {PROTOCOL: [official]}\n", "TEST.CROP_MODE: got"),
        (b"MODEL: 3\n", "MODEL: got 3, expected keys below it"),
        (b"MODEL: {NAME: dat_tiny, ARGS: 3}\n", "MODEL.ARGS: got 3, expected keys below it"),
    ],
)
def test_what_is_wrong_with_a_runs_configuration_is_named(content, words, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        config.parse(["--cfg", str(file)])

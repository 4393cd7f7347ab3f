"""Words: the names that this project gave up are found nowhere but where old ones are translated or refused.

docs/migrating.md lists the new ones. A pattern matches a word in its old meaning; ordinary uses of it stay.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ANY = (
    r"(?i)(?<![a-z]){}(?![a-z])"  # between letters of no kind: in prose, snake_case and UPPER_CASE
)

# What to write instead, and the patterns of the old word.
WORDS = {
    "step": [
        r"\b(an?|the|each|every|per|last|first|next|of|any|one|no|\d+) updates?\b",
        r"\bupdates?[-_](?!at\b)\w|\b(?!step_)[a-z]+_updates?\b(?!\()",
        r"""update-(<|\d|\{)|["']updates?["']|\bstate\.update\b(?!\()|CHECKPOINT\.UPDATES""",
    ],
    "micro-batch": [ANY.format("slots?") + r"(?!__|=True)", r"\bSlot[A-Z]\w*"],
    "AfterStep, or between steps": [ANY.format("boundar(y|ies)")],
    "InterruptibleLoader": [r"\bInterruptible\b"],
    "reproducibility": [ANY.format("promise[ds]?"), r"\b[Ll]evel L\d|\bL3\b(?! cache)|L2 without"],
    "resume compatibility, or world_size": [
        r"(?i)(?<![a-z])(?<!COMM_)world(?![a-z])(?![ _-]?sizes?)"
    ],
    "metadata": [ANY.format("facts")],
    "RunDir": [r"\bRunFolder\b"],
    "lock": [ANY.format("claimed")],
    "reported": [ANY.format("told"), r"\bit is said\b", r"\btells? of\b"],
    "is": [r"\bstands\b"],
    "valid, finite or complete": [
        r"\b(newest|latest|last|a|is|are|be|not|no|longer|found) whole(?! (run|number|epoch))\b",
        r"\bwhole (one|checkpoint|file|archive|pack)s?\b|\bnot_whole|_whole\b|\bwhole=",
    ],
    "valid or finite": [ANY.format("sound")],
    "again, or from scratch": [ANY.format("anew")],
    "init_distributed": [r"\bjoined\(|\bdistributed\.joined\b"],
    "download": [ANY.format("fetched")],
    "resumes or continues": [ANY.format("(go|goes|went|going|gone)[ _]on")],
    "available": [r"\bat hand\b"],
    "gradient synchronisation": [r"\b(Fast|Exact)Reduction\b|engine[./]reduce\b|reduce\.py"],
    "step timer": [r"\bPhases\b|engine[./]phases\b|phases\.py"],
    "samplers": [r"data[./]stream\b|stream\.py"],
    "mixup": [r"data[./]mixing\b|mixing\.py"],
    "readers": [r"\bfiles\.Source\b|data[./]files\b|\bclass Source\b|\bSource\("],
    "num_heads, offset_groups or sr_ratios": [
        r"MODEL\.ARGS\.(heads|groups|reductions)\b",
        r"""^ *ARGS: \{.*\b(heads|groups|reductions):|\breductions\b|(?<!_)\bheads=\(""",
    ],
    "rpe_table or rpe_img_size": [r"displacement_bias_table|\btable_img_size"],
    "StochasticDepth": [r"class DropPath\b|\bDropPath\(|\bAddToSome\b"],
    "configs/mixers": [r"figure1"],
    "tools/visualize.py": [r"tools[./]attention\b"],
    "tests/reliability": [r"\b(tools|tests)[./](figures|scorecard|lab)\b|\bfigures/"],
    "TEST.CROP_MODE": [r"\bPROTOCOL\b"],
    "squash or center": [r"CROP_MODE\W{1,4}(official|standard)\b"],
    "EVAL_FREQ": [r"TRAIN\.EVAL_FREQ\b"],
    "SAVE_FREQ or SAVE_STEPS": [r"CHECKPOINT\.(EPOCHS|UPDATES)\b"],
}

# Where old names are refused or translated, and where they are listed.
TRANSLATIONS = {
    *("config.py", "utils/first_edition.py", "engine/compat.py", "models/convert.py"),
    *("CHANGELOG.md", "docs/migrating.md", "tests/unit/test_words.py", "tests/unit/test_config.py"),
    *("tests/unit/test_compat.py", "tests/unit/test_logging.py", "tests/unit/test_tools.py"),
    "tests/runs/test_first_edition.py",
}
# The word in the key of a micro-batch's random numbers, in quotes, which fixes the bits of runs.
SLOT_KEYS = ["utils/rng.py", "engine/loop.py", "tools/replay.py", "tests/reliability/cost.py"]
SLOT_KEYS += ["tests/unit/test_samplers.py"]
QUOTED = dict.fromkeys(SLOT_KEYS, ("slot",))

SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".cff", ".sh"}
FOLDERS = ["configs", "data", "docs", "engine", "models", "analysis", "tools", "tests", "utils"]
FOLDERS += [".ci", ".github"]
FIRST_EDITION = ROOT / "tests" / "golden" / "first_edition"  # a run that the first edition wrote


def text_files() -> list[Path]:
    """The text files of the project: those of its folders, and those beside them."""
    found = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in FOLDERS:
        found += (ROOT / folder).rglob("*")
    return sorted(
        path
        for path in found
        if path.is_file()
        and (path.suffix in SUFFIXES or path.name in ("Makefile", "run"))
        and FIRST_EDITION not in path.parents
    )


def line_of(match: re.Match) -> int:
    """The number of the line in which a match begins."""
    return match.string.count("\n", 0, match.start()) + 1


def old_words(path: Path) -> list[str]:
    """Each line with an old word: its number, the word, and what to write instead."""
    name = path.relative_to(ROOT).as_posix()
    if name in TRANSLATIONS:
        return []
    text = path.read_text()
    for word in QUOTED.get(name, ()):
        text = text.replace(f'"{word}"', "")
    return [
        f"{name}:{line_of(match)}: {match[0]!r}, expected {instead}"
        for instead, patterns in WORDS.items()
        for pattern in patterns
        for match in re.finditer(pattern, text, re.MULTILINE)
    ]


@pytest.mark.parametrize("path", text_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_old_words_are_gone(path):
    assert old_words(path) == []


@pytest.mark.parametrize(
    "line",
    [
        *("each update", "updates_per_epoch", "skipped_updates", '"update": 3', "slot_count"),
        *("SlotSampler", "own_slots", "at_boundary", "the world", "world.check", "facts"),
        *("the newest whole one", "a whole checkpoint", "it goes on", "test_it_goes_on_with"),
        *("TRAIN.EVAL_FREQ", "MODEL.ARGS.heads=1", "TEST.PROTOCOL official", "Promise L2"),
    ],
)
def test_an_old_word_is_found(line):
    assert any(re.search(p, line) for patterns in WORDS.values() for p in patterns)


@pytest.mark.parametrize(
    "line",
    [
        *("found.update(more)", "ema.update(model)", "step_update(step)", "to update a key"),
        *("@dataclass(slots=True)", "__slots__ = ()", "world_size=2", "LOCAL_WORLD_SIZE"),
        *("a world size", "a whole number", "the whole run", "reduction='mean'", "L2 norm"),
        *("EVAL_FREQ=3", "num_heads: [1, 2]", "CROP_MODE squash", "plt.figure()"),
    ],
)
def test_an_ordinary_word_is_left_alone(line):
    assert not [p for patterns in WORDS.values() for p in patterns if re.search(p, line)]

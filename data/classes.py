"""Class lists: names read from files, and the class of each folder of a split; a position in the list is a label."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from data.readers import Reader
from utils.errors import DataError
from utils.text import join_some, plain_name, quantity

# A line of ImageNet's synset_words.txt, LOC_synset_mapping.txt and the like: a WordNet id, then words.
SYNSET_LINE = re.compile(r"(n\d{8})[\s,:;]\s*\S.*")
MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}
PLAIN = "expected one folder name per line, as UTF-8"


def sort_classes(names: Iterable[str]) -> list[str]:
    """Class folders in the order of their labels: by name, or by value if all are plain decimal numbers."""
    names = sorted(names)
    numbers = all(name.isascii() and name.isdecimal() for name in names)
    return sorted(names, key=int) if numbers else names


# --- Files ----------------------------------------------------------------------------------------


def read_class_list(path: str | Path) -> list[str]:
    """Class names from a text file, one folder name per line; the line's number is the label.

    Of lines such as "n01440764 tench, Tinca tinca" the first word counts. JSON is read too: a list of names, or names
    or [name, …] by label, or labels by name. UTF-8 or, with a mark at its beginning, UTF-16. Raises DataError if the
    file cannot be read, names no class or names one twice.
    """
    try:
        content = Path(path).read_bytes()
        text = content.decode(next((MARKS[m] for m in MARKS if content.startswith(m)), "utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read as a class list ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: cannot be read as a class list ({error}); {PLAIN}") from error
    if "\0" in text:
        raise DataError(f"{path}: holds zero bytes, {PLAIN}")
    if text.lstrip().startswith(("{", "[")):
        classes = _read_json(path, text)
    else:
        classes = [name.strip() for name in re.split(r"\r\n|\r|\n", text) if name.strip()]
    if not classes:
        raise DataError(f"{path}: names no class, expected one folder name per line")
    if all(synsets := [SYNSET_LINE.fullmatch(name) for name in classes]):
        classes = [synset[1] for synset in synsets]
    if repeated := sorted(name for name, times in Counter(classes).items() if times > 1):
        raise DataError(
            f"{path}: names {join_some(repeated, 5)} more than once; remove the repeated lines"
        )
    return classes


def _read_json(path: str | Path, text: str) -> list[str]:
    """The names in a JSON list, or in an object whose keys or values are the labels 0, 1, 2 …"""
    try:
        values = json.loads(text)
        if isinstance(values, dict):
            pairs = [(int(label), name) for label, name in values.items() if label.isdecimal()]
            if len(pairs) < len(values):  # labels by name, as torchvision's class_to_idx
                pairs = [(int(label), name) for name, label in values.items()]
            pairs.sort(key=lambda pair: pair[0])
            if [label for label, _ in pairs] != list(range(len(pairs))):
                raise ValueError("its labels are not 0, 1, 2 …")
            values = [name for _, name in pairs]
        names = [value[0] if isinstance(value, list) and value else value for value in values]
        if not all(isinstance(name, str) and name.strip() for name in names):
            raise ValueError("not all names are text")
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path}: not a class list in JSON ({error}); expected a list of names, or names by label"
        ) from error
    return [name.strip() for name in names]


# --- Folders --------------------------------------------------------------------------------------


def match_folders(reader: Reader, classes: list[str], allow_missing: bool) -> dict[str, str]:
    """The class of each folder of `reader`: that of its name.

    A name counts as the same in another Unicode form (NFC, NFD) or with spaces at its ends. Raises DataError for less
    than two classes, folders that `classes` lack, empty folders and, without `allow_missing`, classes without folder.
    """
    path, folders, known = reader.path, reader.folders, set(classes)
    if len(known) < 2:
        below = level_below(reader) or "; sort the images into one folder per class"
        raise DataError(f"{path}: has one class, {classes[0]}, expected at least two{below}")
    by_form: dict[str, list[str]] = {}
    for name in classes:
        by_form.setdefault(plain_name(name), []).append(name)
    if twins := [names for names in by_form.values() if len(names) > 1]:
        raise DataError(f"{path}: {_describe_twins(twins[0])} are two classes; {_MERGE}")
    found = {
        folder: folder if folder in known else by_form.get(plain_name(folder), [folder])[0]
        for folder in folders
    }
    if unknown := set(found.values()) - known:
        raise DataError(
            f"{path}: {_some(unknown)} not in the class list of {len(known)} ({_some(known)}); use the data that the "
            f"list is from, or rename or remove the folders{_other_case(unknown, known)}{level_below(reader)}"
        )
    if len(set(found.values())) < len(found):
        repeated = Counter(found.values()).most_common(1)[0][0]
        twins = [folder for folder, name in found.items() if name == repeated]
        raise DataError(f"{path}: {_describe_twins(twins)} are two folders of one class; {_MERGE}")
    if empty := folders - set(reader.class_ranges()):
        raise DataError(
            f"{path}: no image in {_some(empty)}; expected at least one per class folder, "
            f"fill or remove it{describe_ignored(reader.ignored)}"
        )
    if (missing := known - set(found.values())) and not allow_missing:
        raise DataError(
            f"{path}: no folder for {_some(missing)} of the {len(known)} classes; complete the data, "
            "or declare it a subset with DATA.VAL_SUBSET=True"
        )
    return found


def same_names(first: Iterable[str], second: Iterable[str]) -> bool:
    """Whether two class lists have the same names in any order, whatever their Unicode form."""
    return sorted(map(plain_name, first)) == sorted(map(plain_name, second))


_MERGE = "they are one name in two spellings: merge or rename them"


def _describe_twins(names: Iterable[str]) -> str:
    return " and ".join(ascii(name) for name in sorted(names))


def _other_case(unknown: set[str], known: set[str]) -> str:
    """The end of a message: names that differ from known ones in capital letters alone."""
    by_case = {name.casefold(): name for name in known}
    pairs = [(name, by_case[name.casefold()]) for name in unknown if name.casefold() in by_case]
    return f"; {min(pairs)[0]} is spelled {min(pairs)[1]} there: rename it" if pairs else ""


def level_below(reader: Reader) -> str:
    """The end of a message: the folders inside of a split's only folder; empty without any."""
    if len(reader.folders) > 1:
        return ""
    inside = {name.split(b"/")[1] for name in reader.names.tolist() if name.count(b"/") > 1}
    if not inside:
        return ""
    names = [name.decode(errors="surrogateescape") for name in inside]
    return (
        f"; is {_some(reader.folders)} a folder too much? It holds {quantity(len(inside), 'folder')} "
        f"({_some(names)}): move them up a level"
    )


def describe_ignored(ignored: Counter[str]) -> str:
    """The end of a message: how many files are no images, by suffix."""
    if not ignored:
        return ""
    reasons = sorted(ignored.items(), key=lambda item: (-item[1], item[0]))
    kinds = join_some((f"{reason} {number:,}" for reason, number in reasons), 5)
    return f", {quantity(ignored.total(), 'other file')} ignored ({kinds})"


def _some(names: Iterable[str]) -> str:
    return join_some(sorted(names), 5)

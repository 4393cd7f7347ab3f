"""Records of a run: the lines of metrics.jsonl, timing.jsonl and skipped.jsonl, those of older versions too."""

import json
from collections.abc import Iterator
from pathlib import Path

from utils.errors import StorageError
from utils.first_edition import translate_record
from utils.logging import logger


def read_records(path: Path) -> Iterator[dict]:
    """The records in the file `path` under today's names: a "step" of 0 or more, an "epoch" of 1 or more, numbers.

    Damaged lines, and a last line that a kill cut off, are reported and skipped. Raises StorageError if there is no
    such file, or if it cannot be read.
    """
    for number, record in number_records(path):
        if record is None:
            logger.warning(f"{path}:{number}: damaged record, skipped")
        else:
            yield record


def number_records(path: Path) -> Iterator[tuple[int, dict | None]]:
    """The line numbers, from 1, and records of `read_records`; None for a damaged one."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}.") from error
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            record = translate_record(record)
        yield number, record if isinstance(record, dict) and _is_valid(record) else None


def _is_valid(record: dict) -> bool:
    """Whether counters and values are numbers that the tools can compute with."""
    counters = {"step": record.get("step"), "epoch": record.get("epoch", 1)}
    if not all(type(value) is int and value < 2**63 for value in counters.values()):
        return False
    values = [value for name, value in record.items() if name != "micro_batches"]
    # Larger integers are no float.
    numbers = all(type(v) is float or (type(v) is int and abs(v) < 2**63) for v in values)
    return numbers and counters["step"] >= 0 and counters["epoch"] >= 1

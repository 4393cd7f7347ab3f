"""Records of a run: the lines of metrics.jsonl, timing.jsonl and skipped.jsonl, those of older versions too."""

import json
from collections.abc import Iterator
from pathlib import Path

from utils.errors import StorageError
from utils.first_edition import translate_record
from utils.logging import logger


def read_records(path: Path) -> Iterator[dict]:
    """The records in the file `path` under today's names; each has an integer "step".

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
        valid = isinstance(record, dict) and type(record.get("step")) is int
        yield number, record if valid else None

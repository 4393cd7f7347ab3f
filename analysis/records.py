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
            if type(record.get("step")) is int:
                yield record
                continue
        logger.warning(f"{path}:{number}: damaged record, skipped")

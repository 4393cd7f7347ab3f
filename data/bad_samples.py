"""Bad samples: the training images that could not be read in a run, in its bad_samples.jsonl."""

import fcntl
import json
from pathlib import Path

from data.dataset import BadFile
from utils.errors import DataError, StorageError
from utils.files import write_atomically
from utils.logging import logger

SHOWN = 20  # files that a message lists


def allowed_files(limit: int, num_samples: int) -> int:
    """How many different files may be bad: `limit`, or if that is -1 one in 10,000 and at least 10."""
    return max(10, num_samples // 10_000) if limit < 0 else limit


class BadSamples:
    """The damaged files that the processes of a run have met, sample by sample, in `path`.

    It is a sorted set of records: what a resumed run meets again is there already, so that the file
    depends neither on stops nor on the number of processes. What this process knows is kept in memory
    too: a file that cannot be read or written, or a disk without locks, does not lift the limit.

    limit: different files that may be bad.
    """

    def __init__(self, path: Path, limit: int):
        self.path = path
        self.limit = limit
        self._known: set[BadFile] = set()

    def add(self, bad: list[BadFile]) -> None:
        """Record `bad` and report it; DataError with the list once more than `limit` files are bad."""
        if not bad:
            return
        for file in bad:
            logger.warning(
                f"{file.path} {file.reason}: replaced by another image of its class, in epoch "
                f"{file.epoch} for sample {file.index}"
            )
        self._known.update(bad)
        try:
            self._merge()
        except (OSError, StorageError) as error:
            logger.warning(f"{self.path} lacks records, which the log has: {error}")
        paths = sorted({file.path for file in self._known})
        if len(paths) > self.limit:
            listed = "\n  ".join(paths[:SHOWN])
            raise DataError(
                f"{len(paths)} training images cannot be read, {self.limit} are allowed: restore "
                f"them and delete {self.path}, which holds the reasons, or raise "
                f"DATA.MAX_BAD_SAMPLES.\n  {listed}"
            )

    def _merge(self) -> None:
        """Make the file and the memory hold the records of both."""
        with self.path.with_name(f".{self.path.name}.lock").open("w", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:  # some network drives have no locks
                logger.warning(f"{self.path}: {error.strerror}; processes may overwrite records")
            lines = self.path.read_bytes().splitlines() if self.path.exists() else []
            records = [_read_record(line) for line in lines]
            if damaged := records.count(None):
                logger.warning(f"{self.path}: {damaged} damaged records are dropped")
            found = {record for record in records if record}
            self._known |= found
            if damaged or self._known != found:
                ordered = sorted(self._known, key=lambda file: (file.epoch, file.index, file.path))
                text = [json.dumps(file._asdict()) + "\n" for file in ordered]
                write_atomically(self.path, "".join(text))


def _read_record(line: bytes) -> BadFile | None:
    """The record in `line`; None where it is damaged."""
    try:
        record = BadFile(**json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return None
    kinds = str, str, int, int
    return record if all(map(isinstance, record, kinds)) else None

"""Bad samples: the training images that could not be read in a run, in its bad_samples.jsonl."""

import fcntl
import json
from pathlib import Path

from data.dataset import BadFile
from utils.errors import DataError
from utils.files import write_atomically
from utils.logging import logger

SHOWN = 20  # files that a message lists


def allowed_files(limit: int, num_samples: int) -> int:
    """How many different files may be bad: `limit`, or if that is -1 one in 10,000 and at least 10."""
    return max(10, num_samples // 10_000) if limit < 0 else limit


class BadSamples:
    """The damaged files that the processes of a run have met, sample by sample, in `path`.

    It is a sorted set of records: what a resumed run meets again is there already, so that the file
    depends neither on stops nor on the number of processes.

    limit: different files that may be bad.
    """

    def __init__(self, path: Path, limit: int):
        self.path = path
        self.limit = limit

    def add(self, bad: list[BadFile]) -> None:
        """Record `bad` and report it; DataError with the list once more than `limit` files are bad."""
        if not bad:
            return
        for file in bad:
            logger.warning(
                f"{file.path} {file.reason}: replaced by another image of its class, in epoch "
                f"{file.epoch} for sample {file.index}"
            )
        try:
            paths = sorted({file.path for file in self._merged(bad)})
        except OSError as error:
            logger.warning(
                f"{self.path} cannot be written ({error.strerror}); the log has the same records"
            )
            return
        if len(paths) > self.limit:
            listed = "\n  ".join(paths[:SHOWN])
            raise DataError(
                f"{len(paths)} training images cannot be read, {self.limit} are allowed: restore "
                f"them and delete {self.path}, which holds the reasons, or raise "
                f"DATA.MAX_BAD_SAMPLES.\n  {listed}"
            )

    def _merged(self, bad: list[BadFile]) -> set[BadFile]:
        """The records of the file and `bad`, which the file holds afterwards."""
        with self.path.with_name(f".{self.path.name}.lock").open("w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
            known = {BadFile(**json.loads(line)) for line in text.splitlines()}
            if not known.issuperset(bad):
                known.update(bad)
                ordered = sorted(known, key=lambda file: (file.epoch, file.index, file.path))
                lines = [json.dumps(file._asdict()) + "\n" for file in ordered]
                write_atomically(self.path, "".join(lines))
        return known

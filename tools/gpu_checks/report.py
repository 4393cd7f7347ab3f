"""Results of tools/gpu_check.py: lines of JSON, written as they come, and the table of a file."""

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TextIO

from utils.errors import ConfigError, StorageError


class Report:
    """What a group finds, a line of JSON each."""

    def __init__(self, group: int, output: TextIO):
        self.group = group
        self._output = output

    def add(
        self, what: str, value: object, unit: str = "", *, bar: str = "", ok: bool | None = None
    ) -> None:
        """Add a result; with a `bar`, what it has to be, `ok` says whether it is."""
        self._write({"group": self.group, "what": what, "value": value, "unit": unit})
        if bar:
            self._write({"group": self.group, "bar": f"{what}: {bar}", "ok": bool(ok)})

    def skip(self, reason: str) -> None:
        """Say why the group, or what is named in `reason`, was not run."""
        self._write({"group": self.group, "skipped": reason})

    def _write(self, record: dict) -> None:
        self._output.write(json.dumps(record) + "\n")
        self._output.flush()


class ResultFile:
    """The file of a check: its first line says what was checked, then results, and how each group ended."""

    def __init__(self, path: Path, subject: dict):
        """Open the file, or continue it. Raises ConfigError for the file of another subject, StorageError."""
        self.path = path
        self.records = read_records(path)
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror}") from error
        if not self.records:
            self.add({"subject": subject, "date": time.strftime("%Y-%m-%d")})
        before = self.records[0].get("subject")
        if before != subject:
            raise ConfigError(
                f"{path} holds results of {before}, and this is {subject}. Name another file with --json."
            )

    def add(self, record: dict) -> None:
        """Write a record, at once."""
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def drop(self, group: int) -> None:
        """Forget what a former, unfinished run of `group` has left."""
        kept = [record for record in self.records if record.get("group") != group]
        if len(kept) < len(self.records):
            self.records = kept
            self._file.close()
            lines = (json.dumps(record) + "\n" for record in kept)
            self.path.write_text("".join(lines), encoding="utf-8")
            self._file = self.path.open("a", encoding="utf-8")

    def done(self) -> set[int]:
        """The groups that ran to their end."""
        return {r["group"] for r in self.records if r.get("end") == "done"}

    def failures(self) -> list[str]:
        """Bars that were missed, and groups that did not end."""
        missed = [r["bar"] for r in self.records if r.get("ok") is False]
        broken = [r for r in self.records if r.get("end", "done") != "done"]
        return missed + [f"group {r['group']} {r['end']}" for r in broken]


def read_records(path: Path) -> list[dict]:
    """The records of a file, without a line that a kill cut off; none if there is no file. Raises ConfigError."""
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        if records and "subject" not in records[0]:
            raise ValueError("no subject")
    except (ValueError, OSError, TypeError) as error:
        raise ConfigError(f"{path} is no file of this program; name another with --json") from error
    return records


def table(records: list[dict], titles: Callable[[int], str]) -> str:
    """The results as a Markdown table; `titles` gives a group's title."""
    if not records:
        return "nothing was measured"
    subject, date = records[0]["subject"], records[0]["date"]
    lines = [", ".join(f"{name} {value}" for name, value in subject.items()) + f", {date}", ""]
    lines += ["| group | what | result | |", "| --- | --- | --- | --- |"]
    lines += _rows(records[1:], titles)
    return "\n".join(lines)


def _rows(records: Iterable[dict], titles: Callable[[int], str]) -> Iterable[str]:
    for record in records:
        group = f"{record['group']} {titles(record['group'])}"
        if "what" in record:
            value = record["value"]
            value = f"{value:,.4g}" if isinstance(value, float) else value
            yield f"| {group} | {record['what']} | {value} {record['unit']} | |"
        elif "bar" in record:
            yield f"| {group} | {record['bar']} | | {'OK' if record['ok'] else 'MISSED'} |"
        elif "skipped" in record:
            yield f"| {group} | not run: {record['skipped']} | | |"
        elif record["end"] != "done":
            yield f"| {group} | {record['end']} after {record['seconds']:.0f} s | | FAILED |"

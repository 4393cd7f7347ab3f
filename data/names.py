"""Name table of an archive: file names end to end, where NumPy's array would give each the length of the longest."""

from collections.abc import Iterator, Sequence

import numpy as np


class Names(Sequence):
    """A sequence of bytes that is used like NumPy's array of them."""

    def __init__(self, names: Sequence[bytes]):
        lengths = np.fromiter(map(len, names), np.int64, len(names))
        self._text = b"".join(names)
        self._ends = np.concatenate(([0], np.cumsum(lengths)))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int | slice | np.ndarray | range) -> "bytes | Names":
        """One name, or those of a slice, of positions, or of a mask."""
        if isinstance(index, slice | range | np.ndarray):
            positions = np.arange(len(self))[index]
            return Names([self[position] for position in positions.tolist()])
        position = range(len(self))[index]
        return self._text[self._ends[position] : self._ends[position + 1]]

    def __iter__(self) -> Iterator[bytes]:
        start = 0
        for end in self._ends[1:].tolist():
            yield self._text[start:end]
            start = end

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.tolist(), np.bytes_)

    @property
    def nbytes(self) -> int:
        """Bytes that the table takes."""
        return len(self._text) + self._ends.nbytes

    def tolist(self) -> list[bytes]:
        """All names."""
        return list(self)

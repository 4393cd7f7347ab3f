"""Remote files: data on HTTP servers and in object storage (S3, Google Cloud), read by range through fsspec.

A file is read in blocks, which `data/block_cache.py` keeps. The blocks of later images are requested in advance
(`RemoteFile.prefetch`), many at a time, so that the latency of a request is not waited for. A file is the one that it
was when the run opened it, or the run ends: it is compared where its bytes are not what the index says.

fsspec's own caches are not used: "filecache" and "simplecache" download complete files, "blockcache" keeps one list of
blocks per process, none of them has a limit of size or checksums.
"""

import asyncio
import functools
import hashlib
import importlib.util
import io
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

from data.block_cache import BLOCK, BlockCache
from utils.addresses import SCHEMES, is_address
from utils.errors import ConfigError, DataError

REQUESTS = 32  # of a process at once
MOST_BLOCKS = 16  # of a request
MOST_PENDING = 512  # blocks in memory that are to be read soon, or cannot be kept on a disk
TIMEOUT = 15.0  # seconds for the answer to a request
PAUSES = (0.1, 0.5, 2.0, 8.0, 20.0)  # seconds before each retry
# What a server's answer means is final, but for these: try later, too early, too many requests.
TRY_AGAIN = {408, 425, 429}
MISSING, DENIED = {404, 410}, {401, 403}
# What a file has one of, and what changes when it is overwritten; each kind of server has its own name for it.
VERSIONS = ("ETag", "etag", "generation", "md5Hash", "Last-Modified", "LastModified", "updated")
# Proxies and passwords as curl takes them: HTTPS_PROXY, ~/.netrc.
OPTIONS = {"aiohttp": {"client_kwargs": {"trust_env": True}}, "s3fs": {}, "gcsfs": {}}

T = TypeVar("T")


def open_root(path: str, cache_dir: str, cache_size: float) -> "Path | RemotePath":
    """The folder of a dataset: a path, or the address of one on a server.

    cache_dir: folder in which parts of remote files are kept; empty: `dat` in the user's cache folder.
    cache_size: of the parts that are kept, in GiB; 0: none.
    """
    if not is_address(path):
        return Path(path)
    cache = BlockCache(Path(cache_dir or default_cache()), int(cache_size * 2**30))
    cache.prepare()
    return RemotePath(path.rstrip("/"), cache)


def default_cache() -> Path:
    """The project's folder in the user's cache folder. Raises ConfigError for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "dat")
    except RuntimeError as error:
        message = (
            "this user has no home folder to keep parts of the data in; name a folder, or set HOME"
        )
        raise ConfigError(f"DATA.CACHE_DIR is empty, and {message}") from error


# --- Paths and files ------------------------------------------------------------------------------


class RemotePath(NamedTuple):
    """The address of a file or folder: what readers use of `pathlib.Path`."""

    address: str
    cache: BlockCache

    def __str__(self) -> str:
        return self.address

    def __truediv__(self, name: str) -> "RemotePath":
        return self._replace(address=f"{self.address}/{name}")

    @property
    def name(self) -> str:
        """What comes after the last slash."""
        return self.address.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return os.path.splitext(self.name)[0]

    def absence(self) -> str:
        """Why there is no file to read here: "not found", "permission denied"; empty if there is one.

        Raises DataError if the server does not answer.
        """
        client = _client_of(self.address)
        try:
            client.submit(client.describe(self.address)).result()
            client.submit(client.read(self.address, 0, 1)).result()
        except _RefusedError as refusal:
            return str(refusal)
        return ""

    def read_bytes(self) -> bytes:
        """The content of the file. Raises DataError."""
        (file,) = open_remote_files([self])
        return file.read(file.size, 0)

    def read_text(self, encoding: str) -> str:
        """The content of the file as text. Raises DataError, or ValueError if it is no text."""
        return self.read_bytes().decode(encoding)


class RemoteFile:
    """A file on a server, with its size in bytes, as it was when it was opened.

    version: what the server calls this version of the file: an ETag, a generation or a time; empty if it has none.
    """

    def __init__(self, path: RemotePath, size: int, version: str):
        self.path = path.address
        self.size = size
        self.version = version
        self.cache = path.cache
        identity = f"{path.address}\n{size}\n{version}".encode()
        self.key = hashlib.blake2b(identity, digest_size=16).hexdigest()

    def read(self, length: int, offset: int, *, fresh: bool = False) -> bytes:
        """`length` bytes from `offset`; `fresh`: from the server, after a check that it has the file that was opened.

        Raises EOFError if the file ends before, DataError if the server does not give them.
        """
        if offset < 0 or offset + length > self.size:
            raise EOFError(f"the archive ends inside the file, at byte {self.size}")
        if not length:
            return b""
        numbers = _block_range(length, offset)
        if fresh:
            self._forget(numbers)
        self.prefetch(length, offset)
        data = b"".join(self._block(number) for number in numbers)
        start = offset - numbers[0] * BLOCK
        return data[start : start + length]

    def state(self) -> list[int | str]:
        """Size and version."""
        return [self.size, self.version]

    def prefetch(self, length: int, offset: int) -> None:
        """Request what is not kept of `length` bytes from `offset`, to be read soon."""
        client = _client_of(self.path)
        numbers = [
            number
            for number in _block_range(min(length, self.size - offset), offset)
            if (self.key, number) not in client.pending and not self.cache.has(self.key, number)
        ]
        while numbers:
            count = 1
            while count < min(len(numbers), MOST_BLOCKS) and numbers[count] == numbers[0] + count:
                count += 1
            request = client.submit(self._fetch(client, numbers[:count]))
            client.pending.update(dict.fromkeys([(self.key, n) for n in numbers[:count]], request))
            numbers = numbers[count:]
        while len(client.pending) > MOST_PENDING:
            del client.pending[next(iter(client.pending))]

    def stream(self) -> BinaryIO:
        """The file from its beginning, to be closed."""
        return io.BufferedReader(_Stream(self))

    def _block(self, number: int) -> bytes:
        client = _client_of(self.path)
        request = client.pending.get((self.key, number))
        if request is None:
            length = min(BLOCK, self.size - number * BLOCK)
            data = self.cache.load(self.key, number, length)
            if data is not None:
                return data
            request = client.submit(self._fetch(client, [number]))
        data = request.result()[number]
        if self.cache.has(self.key, number):
            client.pending.pop((self.key, number), None)
        return data

    def _forget(self, numbers: range) -> None:
        client = _client_of(self.path)
        for number in numbers:
            client.pending.pop((self.key, number), None)
            self.cache.remove(self.key, number)
        client.submit(self._require_unchanged(client)).result()

    async def _fetch(self, client: "_Client", numbers: list[int]) -> dict[int, bytes]:
        """The blocks `numbers`, which follow one another, from the server; they are kept, too."""
        start, end = numbers[0] * BLOCK, min((numbers[-1] + 1) * BLOCK, self.size)
        try:
            data = await client.read(self.path, start, end)
        except _RefusedError as refusal:
            await self._require_unchanged(client)
            raise DataError(
                f"{self.path}: {refusal}, bytes {start} to {end}. Restore it or the permission to read it, then "
                "start the run again: it resumes from its last checkpoint."
            ) from None
        blocks = {n: data[n * BLOCK - start : (n + 1) * BLOCK - start] for n in numbers}
        for number, block in blocks.items():
            self.cache.store(self.key, number, block)
        return blocks

    async def _require_unchanged(self, client: "_Client") -> None:
        """Raise DataError if the server has another file than the one that was opened."""
        try:
            found = await client.describe(self.path)
        except _RefusedError:
            return  # what was asked for before is refused, too, and says why
        if found != (self.size, self.version):
            raise DataError(
                f"{self.path}: changed since the run opened it: it had {self.size} bytes and version {self.version}, "
                f"it has {found[0]} bytes and version {found[1]}. Restore the file, or train on the new one in a "
                "new run."
            )


class _Stream(io.RawIOBase):
    """A remote file as programs read files that have a position."""

    def __init__(self, file: RemoteFile):
        self.file = file
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.file.size}
        self.position = origin[whence] + offset
        return self.position

    def readinto(self, buffer: memoryview) -> int:
        length = max(0, min(len(buffer), self.file.size - self.position))
        buffer[:length] = self.file.read(length, self.position)
        self.position += length
        return length


def open_remote_files(paths: Sequence[RemotePath]) -> list[RemoteFile]:
    """Files of one folder, all requested at once. Raises DataError if one cannot be read."""
    client = _client_of(paths[0].address) if paths else None
    requests = [client.submit(client.describe(path.address)) for path in paths]
    files = []
    for path, request in zip(paths, requests, strict=True):
        try:
            files.append(RemoteFile(path, *request.result()))
        except _RefusedError as refusal:
            raise DataError(f"{path}: {refusal}. Check the address and your permissions.") from None
    return files


def _block_range(length: int, offset: int) -> range:
    """The numbers of the blocks that hold `length` bytes from `offset`."""
    return range(offset // BLOCK, (offset + length - 1) // BLOCK + 1)


# --- Requests -------------------------------------------------------------------------------------


class _RefusedError(Exception):
    """A server's final answer: there is no such file, or it is not to be read; stays inside this module."""


class _Client:
    """The requests of this process to servers of one scheme, in fsspec's thread.

    pending: what is requested and not read yet, by file and block, oldest first; and what was read but is not kept.
    """

    def __init__(self, scheme: str):
        package = SCHEMES[scheme]
        try:
            import fsspec  # only here: data on disks needs none of it

            # What was listed before a file has changed would be wrong.
            self.fs = fsspec.filesystem(scheme, use_listings_cache=False, **OPTIONS[package])
        except ImportError as error:
            raise DataError(
                f"{scheme}:// needs the package {package}, which is not installed: pip install {package}"
            ) from error
        _give_own_random()
        self.running = asyncio.Semaphore(REQUESTS)
        self.pending: dict[tuple[str, int], Future] = {}

    def submit(self, coroutine: Awaitable[T]) -> "Future[T]":
        """Start `coroutine` in fsspec's thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.fs.loop)

    async def describe(self, address: str) -> tuple[int, str]:
        """The size and version of a file. Raises _RefusedError, or DataError if the server does not answer."""
        info = await self.ask(address, lambda: self.fs._info(address))
        if info["type"] != "file":
            raise _RefusedError("not found")
        if info["size"] is None:
            raise _RefusedError("its server does not say how large it is")
        return info["size"], str(next((info[name] for name in VERSIONS if info.get(name)), ""))

    async def read(self, address: str, start: int, end: int) -> bytes:
        """The bytes `start` to `end` of a file. Raises as `describe` does."""
        data = await self.ask(address, lambda: self.fs._cat_file(address, start=start, end=end))
        if len(data) > end - start:
            raise DataError(
                f"{address}: its server sends the complete file where a part is requested. Use a server with range "
                "requests, such as nginx or Apache."
            )
        if len(data) < end - start:  # and no more are announced: the file is shorter
            raise _RefusedError(f"ends {end - start - len(data)} bytes early")
        return data

    async def ask(self, address: str, request: Callable[[], Awaitable[T]]) -> T:
        """The answer to `request`, after a few more tries if there is none. Raises _RefusedError or DataError."""
        start = time.monotonic()
        for pause in (*PAUSES, None):
            try:
                async with self.running:
                    return await asyncio.wait_for(request(), TIMEOUT)
            except _failures() as error:
                status, reason = _status(error), _describe(error)
            if status is not None and 400 <= status < 500 and status not in TRY_AGAIN:
                raise _RefusedError(reason) from None
            if pause is not None:
                await asyncio.sleep(pause)
        raise DataError(
            f"{address}: no answer after {len(PAUSES) + 1} tries in {time.monotonic() - start:.0f} s ({reason}). Check "
            "the server and the network, then start the run again: it resumes from its last checkpoint."
        )


def _client_of(address: str) -> _Client:
    return _client(address.partition(":")[0], os.getpid())


@functools.lru_cache(maxsize=16)
def _client(scheme: str, pid: int) -> _Client:
    """A client per scheme and process: a forked worker has none of its parent's threads."""
    return _Client(scheme)


def _give_own_random() -> None:
    """Give the packages that read from servers a module `random` of their own.

    They draw from it in their thread, for pauses and the order of connections. The images that are augmented in another
    thread meanwhile would get other random numbers.
    """
    spec = importlib.util.find_spec("random")
    own = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own)
    packages = {"aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "s3fs"}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in packages and getattr(module, "random", None) is random:
            module.random = own


# --- Errors of the packages -----------------------------------------------------------------------


def _failures() -> tuple[type[Exception], ...]:
    """What requests raise where they fail: errors of the system, and of the packages that are imported."""
    names = {
        "aiohttp": ("ClientError",),
        "botocore.exceptions": ("BotoCoreError", "ClientError"),
        "gcsfs.retry": ("HttpError",),
        "google.auth.exceptions": ("GoogleAuthError",),
    }
    found = [
        getattr(sys.modules[module], name)
        for module, classes in names.items()
        if module in sys.modules
        for name in classes
    ]
    return OSError, TimeoutError, *found


def _causes(error: BaseException) -> list[BaseException]:
    """`error` and what it was raised from, the first cause first."""
    causes = [error]
    while (cause := causes[0].__cause__) is not None:
        causes.insert(0, cause)
    return causes


def _status(error: Exception) -> int | None:
    """The HTTP status that `error` means; None if there was no answer."""
    causes = _causes(error)
    for cause in causes:
        response = getattr(cause, "response", None)  # botocore's, a dictionary
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            status = getattr(
                cause, "code" if type(cause).__name__ == "HttpError" else "status", None
            )
        if isinstance(status, int):
            return status
    if any(type(cause).__name__ == "NoCredentialsError" for cause in causes):
        return 401
    if len(causes) == 1 and isinstance(error, FileNotFoundError):
        return 404
    return 403 if isinstance(error, PermissionError) else None


def _describe(error: Exception) -> str:
    """What went wrong, in our own words: the packages' may hold a signed address or a key."""
    status = _status(error)
    if status in MISSING:
        return "not found"
    if status in DENIED:
        return f"permission denied (HTTP status {status})"
    if status is not None:
        return f"HTTP status {status}"
    causes = _causes(error)
    if any(isinstance(cause, TimeoutError) for cause in causes):
        return f"no answer within {TIMEOUT:g} s"
    first = causes[0]
    return getattr(first, "strerror", None) or type(first).__name__

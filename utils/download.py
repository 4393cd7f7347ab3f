"""Downloads over https into torch.hub's cache, checked against the SHA-256 in the address."""

import fcntl
import hashlib
import re
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

from utils.errors import CheckpointError
from utils.logging import logger

PINNED_URL = re.compile(r"(https://[^\s#]+)#sha256=([0-9a-fA-F]{64})")


def download(source: str) -> Path:
    """The local file of `source`: a path as it is, or https://…#sha256=<64 hex digits> in torch.hub's cache.

    The first process of a machine downloads it, others wait; each compares the hash before anything is opened.
    Raises CheckpointError.
    """
    pinned = PINNED_URL.fullmatch(source)
    if pinned is None and re.match(r"[a-z]+://", source):
        raise CheckpointError(
            f"{source}: a download needs https and its SHA-256: https://host/file.pth#sha256=<64 hex digits>. "
            "Or download the file yourself and give its path."
        )
    if pinned is None:
        return Path(source)
    from torch import hub  # config.py imports PINNED_URL and needs no torch

    url, digest = pinned[1], pinned[2].lower()
    path = Path(hub.get_dir(), "checkpoints", digest + Path(urlsplit(url).path).suffix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w", encoding="utf-8") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            if not path.exists() or _sha256(path) != digest:
                logger.info(f"Downloading {url} to {path}")
                hub.download_url_to_file(url, str(path), hash_prefix=digest, progress=False)
    except (OSError, RuntimeError, ValueError, HTTPException) as error:
        raise CheckpointError(
            f"{url} cannot be downloaded to {path}: {error}. "
            "Check the address and its SHA-256, or download the file yourself and give its path."
        ) from error
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Addresses of data on servers: which ones are read, and the package that each kind needs."""

import re

# The schemes that data is read from, and the package that fsspec reads each with.
SCHEMES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs"}
# Passwords (user:password@) and signatures (?…) would be written to logs, config.yaml and checkpoints.
ADDRESS = re.compile(rf"({'|'.join(SCHEMES)})://[^\s@?#/][^\s@?#]*")


def is_address(path: str) -> bool:
    """Whether `path` is an address that data is read from, without a password or a query."""
    return ADDRESS.fullmatch(path) is not None


def hide_secrets(text: str) -> str:
    """`text` without the passwords and queries of addresses in it."""
    return re.sub(r"(://[^\s?]*)\?[^\s'\"]*", r"\1?…", re.sub(r"://[^\s/]*@", "://…@", text))

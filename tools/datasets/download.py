"""Downloads of published archives by torchvision, compared with their MD5."""

from pathlib import Path

from torchvision.datasets.utils import download_url

from utils.errors import DataError


def download(url: str, md5: str, folder: Path) -> Path:
    """The file at `url` in `folder`, downloaded unless it is there already. Raises DataError."""
    path = folder / url.rpartition("/")[2]
    try:
        download_url(url, str(folder), path.name, md5)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{url} was not downloaded to {path}: {error}. Download it yourself and name the file "
            "as SOURCE."
        ) from error
    return path

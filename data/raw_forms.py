"""Raw forms of datasets: which download does a folder hold, and which command prepares it?

`tools/prepare.py` reads these forms; training refuses them and names the command.
"""

import shlex
from pathlib import Path
from typing import NamedTuple


class RawForm(NamedTuple):
    """A dataset as it is downloaded.

    pattern: a glob, relative to the folder that holds the download; a match identifies the form.
    name: for people.
    dataset: the subcommand of tools/prepare.py that reads it.
    """

    pattern: str
    name: str
    dataset: str


ARCHIVES = "ImageNet's original archives"
CLASS_TARS = "the tars of ImageNet's classes"
KAGGLE = "Kaggle's CLS-LOC"
FLAT_VAL = "ImageNet's validation images without class folders"
SHARDS = "timm's WebDataset shards"
PARQUET = "Hugging Face's parquet files"

CLASS_TAR = f"n{8 * '[0-9]'}.tar"
# In the folder, in data/ or train/, and in the hub's branch of converted files.
PARQUET_FILES = ("*.parquet", "*/*.parquet", "default/*/*.parquet")

RAW_FORMS = (
    RawForm("ILSVRC2012_img_train.tar", ARCHIVES, "imagenet"),
    RawForm("ILSVRC2012_img_val.tar", ARCHIVES, "imagenet"),
    RawForm("ILSVRC/Data/CLS-LOC", KAGGLE, "imagenet"),
    RawForm("Data/CLS-LOC", KAGGLE, "imagenet"),
    RawForm(f"train/{CLASS_TAR}", CLASS_TARS, "imagenet"),
    RawForm(CLASS_TAR, CLASS_TARS, "imagenet"),
    RawForm("val/ILSVRC2012_val_*.JPEG", FLAT_VAL, "imagenet"),
    RawForm("imagenet1k-train-*.tar", SHARDS, "imagenet"),
    RawForm("imagenet1k-validation-*.tar", SHARDS, "imagenet"),
    *(RawForm(pattern, PARQUET, "imagenet") for pattern in PARQUET_FILES),
    RawForm("cifar-10-python.tar.gz", "CIFAR-10's archive", "cifar10"),
    RawForm("cifar-10-batches-py", "CIFAR-10's batches", "cifar10"),
    RawForm("data_batch_1", "CIFAR-10's batches", "cifar10"),
    RawForm("imagenette2*.tgz", "Imagenette's archive", "imagenette"),
)


def find_raw_form(root: str | Path) -> RawForm | None:
    """The raw form that the folder `root` holds, None if it holds none."""
    for form in RAW_FORMS:
        if next(Path(root).glob(form.pattern), None) is not None:
            return form
    return None


def describe_raw_form(root: str | Path) -> str | None:
    """What the folder `root` holds and the command that prepares it; None if it is no raw form."""
    form = find_raw_form(root)
    if form is None:
        return None
    command = f"python tools/prepare.py {form.dataset} {shlex.quote(str(root))} OUT"
    return f"{root} holds {form.name}: prepare them with `{command}`"

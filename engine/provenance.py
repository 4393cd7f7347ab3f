"""What is known of weights where they lie: their classes, and how the images of their training were prepared."""

from dataclasses import dataclass
from pathlib import Path

from engine import checkpoint
from engine.hub_folder import CONFIG, hub_folder_of, label_names, read_evaluation_values


@dataclass(frozen=True)
class Provenance:
    """What a checkpoint of this project, or the config.json of a Hugging Face folder, says of the weights in it.

    path: of the checkpoint, or of the config.json. step: the checkpoint, None of a Hugging Face folder. classes: in the
    order of the logits, None where it names none. metadata: the checkpoint's; of a Hugging Face folder "config" alone,
    with the values of an evaluation.
    """

    path: Path
    step: Path | None
    classes: list[str] | None
    metadata: dict


def find_provenance(path: Path) -> Provenance | None:
    """What is known of the weights at `path`, a file or folder; None of a bare file.

    Raises CheckpointError where it cannot be read.
    """
    if step := checkpoint.containing(path):
        metadata = checkpoint.read_metadata(step)
        return Provenance(step, step, metadata["classes"], metadata)
    if folder := hub_folder_of(path):
        metadata = {"config": read_evaluation_values(folder)}
        return Provenance(folder / CONFIG, None, label_names(folder), metadata)
    return None

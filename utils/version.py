"""Version numbers of the project and of the checkpoints that it writes; CHANGELOG.md says what changed with each."""

__version__ = "2.0.0"
CHECKPOINT_FORMAT = 2

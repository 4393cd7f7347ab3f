"""Version of the project, and of the format of its checkpoints."""

__version__ = "2.0.0"
CHECKPOINT_FORMAT = 2  # 1: the first edition's names, translated when read

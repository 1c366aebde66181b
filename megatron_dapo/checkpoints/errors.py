"""What can be wrong with a checkpoint, and each with its remedy in the message."""

from __future__ import annotations


class DamagedCheckpointError(ValueError):
    """A file of the checkpoint is missing, cut or changed. The message names the file."""


class ForeignCheckpointError(ValueError):
    """A whole checkpoint that this run cannot take up: another model, or a format that is not read here."""

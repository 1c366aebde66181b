"""How an engine fails that does not live in this process, and what may be asked of one too early."""

from __future__ import annotations


class EngineFailedError(RuntimeError):
    """The engine writes no more until it is started again. Which requests are unfinished is known to who gave them."""


class EngineDiedError(EngineFailedError):
    """Its process has ended. The message ends with the last lines of its log."""


class EngineHangsError(EngineFailedError):
    """Its process lives and does not answer. The message ends with the last lines of its log."""


class PortInUseError(RuntimeError):
    """Another process listens where the engine's server should."""


class WeightsNotLoadedError(RuntimeError):
    """Generation was asked for before a first, or after a failed, `load_weights`."""

"""The errors a user can meet. Each names the thing, the value and the limit, and says how to mend it."""

from __future__ import annotations

import errno


class HastenError(Exception):
    """Anything wrong with what hasten was given. Shown as `error: MESSAGE` and `hint: HINT`, never a traceback."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(HastenError):
    """A model's config.json: unknown architecture, dtype or rope type; a field that is missing or makes no sense."""


class CheckpointError(HastenError):
    """Weights or tokenizer on disk: missing, truncated, lying headers, shapes or vocabulary against the config, NaN."""


class FormatError(HastenError):
    """A weight format: unknown name, impossible group or shape, packed arrays that contradict their header."""


class InputError(HastenError):
    """Text, prompts, flags or files given by the user: empty, binary, too short, unreadable."""


class ContextError(InputError):
    """More tokens than the model's or the engine's context holds."""


class BudgetError(HastenError):
    """A quality budget that cannot be read or cannot be met."""


class OutputError(HastenError):
    """The output cannot be written: exists, not writable, disk full. Nothing half-written is left."""


def unwritable(path: object, error: OSError) -> OutputError:
    """What to raise where `path` could not be written."""
    full = error.errno in (None, errno.ENOSPC, errno.EDQUOT)  # None: NumPy, where a write ends midway
    hint = "free some space, or choose an output on another disk" if full else "choose an output that can be written"
    return OutputError(f"cannot write {path}: {error.strerror or error}", hint)


class MemoryLimitError(HastenError):
    """Predicted memory is more than this machine or container has."""


class DependencyError(HastenError):
    """An optional library is missing; the hint names the extra to install."""


class HubError(HastenError):
    """A hub id that cannot be resolved or fetched."""


class BackendError(HastenError):
    """The backend cannot run this graph here: an unknown instruction set asked for, an op or format it lacks."""

"""What the exit code of a command means: one table, by error class, printed by `optserve --help`."""

from __future__ import annotations

from optserve.wire import errors

OK = 0
FAILED = 1
USAGE = 2
UNREACHABLE = 3
NOT_FOUND = 4
CORRUPT = 5
EXISTS = 6
TIMED_OUT = 7
MISSING_EXTRA = 8
INTERRUPTED = 130

MEANINGS: dict[int, str] = {
    OK: "done",
    FAILED: "the operation failed",
    USAGE: "wrong arguments or values; nothing was changed",
    UNREACHABLE: "no server answers at the address",
    NOT_FOUND: "no such job or checkpoint",
    CORRUPT: "a checkpoint is corrupt, or does not fit the job",
    EXISTS: "the name is taken",
    TIMED_OUT: "a deadline passed",
    MISSING_EXTRA: "an optional dependency is not installed",
    INTERRUPTED: "interrupted by Ctrl-C",
}

CODES: dict[type[errors.OptserveError], int] = {
    errors.InputError: USAGE,
    errors.ServerUnavailableError: UNREACHABLE,
    errors.JobNotFoundError: NOT_FOUND,
    errors.JobLostError: NOT_FOUND,
    errors.CheckpointNotFoundError: NOT_FOUND,
    errors.CheckpointCorruptError: CORRUPT,
    errors.CheckpointMismatchError: CORRUPT,
    errors.JobExistsError: EXISTS,
    errors.JobSpecMismatchError: EXISTS,
    errors.CheckpointExistsError: EXISTS,
    errors.JobNotInitializedError: TIMED_OUT,
    errors.RoundTimeoutError: TIMED_OUT,
    errors.DeadlineExceededError: TIMED_OUT,
    errors.MissingExtraError: MISSING_EXTRA,
}
"""The nearest class in an error's ancestry decides; a class that is not here means FAILED."""


def code_of(error: errors.OptserveError) -> int:
    """The exit code that stands for an error."""
    return next((CODES[ancestor] for ancestor in type(error).__mro__ if ancestor in CODES), FAILED)


def describe() -> str:
    """The table as help text; the \\b keeps click from wrapping it."""
    return "\b\nExit codes:\n" + "\n".join(f"  {code:>3}  {meaning}" for code, meaning in MEANINGS.items())

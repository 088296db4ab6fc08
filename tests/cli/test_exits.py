"""The exit codes: one table, complete, and printed by --help."""

import pytest

from optserve.cli import exits
from optserve.wire import errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.OptserveError, exits.FAILED),
        (errors.ServerStoppingError, exits.FAILED),
        (errors.StorageError, exits.FAILED),
        (errors.InvalidHyperparameterError, exits.USAGE),
        (errors.InsecureAddressError, exits.USAGE),
        (errors.ServerUnavailableError, exits.UNREACHABLE),
        (errors.JobNotFoundError, exits.NOT_FOUND),
        (errors.CheckpointNotFoundError, exits.NOT_FOUND),
        (errors.CheckpointCorruptError, exits.CORRUPT),
        (errors.CheckpointMismatchError, exits.CORRUPT),
        (errors.CheckpointExistsError, exits.EXISTS),
        (errors.DeadlineExceededError, exits.TIMED_OUT),
        (errors.MissingExtraError, exits.MISSING_EXTRA),
    ],
)
def test_an_error_class_has_its_exit_code(error: type[errors.OptserveError], code: int) -> None:
    assert exits.code_of(error("m")) == code


def test_every_code_of_the_table_has_a_meaning_in_the_help() -> None:
    text = exits.describe()
    for code in {*exits.CODES.values(), exits.OK, exits.FAILED, exits.INTERRUPTED}:
        assert f"{code:>5}  {exits.MEANINGS[code]}" in text


def test_meanings_name_no_code_twice() -> None:
    assert len(set(exits.MEANINGS.values())) == len(exits.MEANINGS)

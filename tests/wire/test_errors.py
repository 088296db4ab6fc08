"""The error tree: every reason has its class, both directions of the translation, and what a message about a name says."""

from __future__ import annotations

import re

import grpc
import pytest

from optserve.v1 import types_pb2 as pb
from optserve.wire import errors
from optserve.wire.errors import InternalError, OptserveError
from optserve.wire.names import nearest
from optserve.wire.reasons import ERRORS, from_detail, to_detail

BUILTINS = {
    errors.InputError: ValueError,
    errors.RoundTimeoutError: TimeoutError,
    errors.JobNotInitializedError: TimeoutError,
    errors.StorageError: OSError,
    errors.OutOfMemoryError: MemoryError,
    errors.ServerUnavailableError: ConnectionError,
    errors.DeadlineExceededError: TimeoutError,
    errors.AddressInUseError: OSError,
    errors.ClosedError: ValueError,
    errors.ReadOnlyError: TypeError,
    errors.MissingExtraError: ImportError,
    errors.RoundFailedError: RuntimeError,
}


def test_every_reason_of_the_contract_has_its_own_class() -> None:
    assert set(ERRORS) == set(pb.ErrorReason.values()) - {pb.ERROR_REASON_UNSPECIFIED}
    assert len(set(ERRORS.values())) == len(ERRORS)


@pytest.mark.parametrize("reason", ERRORS, ids=pb.ErrorReason.Name)
def test_class_is_named_after_its_reason(reason: int) -> None:
    words = pb.ErrorReason.Name(reason).removeprefix("ERROR_REASON_").split("_")
    name = "".join(word.capitalize() for word in words)
    assert ERRORS[reason].__name__.removesuffix("Error") in (name, name.removesuffix("Failed"))


@pytest.mark.parametrize("reason", ERRORS, ids=pb.ErrorReason.Name)
def test_error_round_trip_keeps_reason_message_and_metadata(reason: int) -> None:
    error = ERRORS[reason]("gradient 'w' has shape (4, 3)", parameter="w", found=(4, 3))
    detail = pb.ErrorDetail.FromString(to_detail(error).SerializeToString())
    back = from_detail(detail.reason, detail.message, detail.metadata)
    assert type(back) is type(error)
    assert str(back) == str(error) == "gradient 'w' has shape (4, 3)"
    assert back.metadata == {"parameter": "w", "found": "(4, 3)"}


@pytest.mark.parametrize("reason", ERRORS, ids=pb.ErrorReason.Name)
def test_status_is_one_of_grpc(reason: int) -> None:
    assert ERRORS[reason].status in grpc.StatusCode.__members__
    assert ERRORS[reason].status != "OK"


@pytest.mark.parametrize(("error", "builtin"), BUILTINS.items(), ids=lambda entry: entry.__name__)
def test_error_is_caught_as_the_builtin_that_torch_or_numpy_would_raise(error: type, builtin: type) -> None:
    assert issubclass(error, builtin)


@pytest.mark.parametrize("reason", [pb.ERROR_REASON_UNSPECIFIED, 4711])
def test_reason_of_a_newer_server_is_an_internal_error_that_keeps_the_message(reason: int) -> None:
    error = from_detail(reason, "something new", {"job": "digits"})
    assert type(error) is InternalError
    assert re.search(rf"something new .*{reason}", str(error))
    assert error.metadata == {"job": "digits"}


@pytest.mark.parametrize("key", ["message", "self", "not an identifier", ""])
def test_metadata_may_have_any_key(key: str) -> None:
    error = from_detail(pb.ERROR_REASON_JOB_NOT_FOUND, "no job 'x'", {key: "value"})
    assert (str(error), error.metadata) == ("no job 'x'", {key: "value"})


def test_tree_at_the_top_of_the_file_is_the_tree() -> None:
    drawn = set(re.findall(r"\b(\w+Error)(?= \(|\s|$)", errors.__doc__ or "", re.MULTILINE))
    classes = {name for name, item in vars(errors).items() if isinstance(item, type) and issubclass(item, OptserveError)}
    assert drawn >= classes


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adm", "; did you mean 'Adam'? known: Adam, AdamW, SGD"),
        ("ADAM", "; did you mean 'Adam'? known: Adam, AdamW, SGD"),
        ("zzzzzz", "; known: Adam, AdamW, SGD"),
    ],
)
def test_message_about_an_unknown_name_offers_the_nearest(name: str, expected: str) -> None:
    assert nearest(name, ["Adam", "AdamW", "SGD"]) == expected

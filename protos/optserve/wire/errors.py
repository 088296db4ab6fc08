"""Every error that optserve raises.

OptserveError
├── InputError (ValueError)             the call is wrong; nothing was changed
│   ├── InvalidArgumentError            ├── InvalidNameError
│   ├── UnknownOptimizerError           ├── UnknownHyperparameterError
│   ├── InvalidHyperparameterError      ├── UnknownScheduleError
│   ├── UnknownParameterError           ├── DuplicateParameterError
│   ├── ShapeMismatchError              ├── DtypeMismatchError
│   ├── NonfiniteGradientError          ├── InvalidStateDictError
│   ├── InsecureAddressError            ├── MissingFunctionError
│   └── UnsupportedParameterError (RuntimeError)
├── StreamError (RuntimeError)          chunks that do not fit together
│   ├── InvalidChunkError               ├── IncompleteStreamError
│   └── ProtocolViolationError
├── JobError (RuntimeError)             the job is not there, or not what was expected
│   ├── JobNotFoundError                ├── JobExistsError
│   ├── JobSpecMismatchError            ├── JobNotInitializedError (TimeoutError)
│   ├── JobLostError                    └── RolledBackError
├── WorkerError (RuntimeError)          this worker's call does not count
│   ├── FencedError                     ├── TooManyWorkersError
│   ├── RankHeldError                   ├── NotJoinedError
│   ├── SequenceGapError                ├── SequenceConflictError
│   └── RanksDisagreeError
├── RoundError (RuntimeError)           the round applied nothing
│   ├── RoundFailedError                └── RoundTimeoutError (TimeoutError)
├── CheckpointError (RuntimeError)
│   ├── CheckpointNotFoundError         ├── CheckpointExistsError
│   ├── CheckpointCorruptError          └── CheckpointMismatchError
├── ServerError (RuntimeError)          the server cannot do it now
│   ├── StorageError (OSError)          ├── TooManyStreamsError
│   ├── OutOfMemoryError (MemoryError)  ├── ServerStoppingError
│   ├── ServerUnavailableError (ConnectionError)
│   ├── DeadlineExceededError (TimeoutError)
│   ├── AddressInUseError (OSError)     └── InternalError
├── ClosedError (ValueError)            the object is closed
├── ReadOnlyError (TypeError)           the mapping is edited by a call, not by assignment
└── MissingExtraError (ImportError)     `pip install "optserve[...]"`
"""

from __future__ import annotations

from typing import ClassVar

from optserve.v1 import types_pb2 as pb


class OptserveError(Exception):
    """Base of the tree. `reason` is what programs match on; `metadata` holds the message's facts as text."""

    reason: ClassVar[pb.ErrorReason] = pb.ERROR_REASON_UNSPECIFIED
    status: ClassVar[str] = "UNKNOWN"
    """Name of the gRPC status code that carries it."""

    def __init__(self, message: str, /, **metadata: object) -> None:
        super().__init__(message)
        self.metadata: dict[str, str] = {key: str(value) for key, value in metadata.items()}


class InputError(OptserveError, ValueError):
    """The call is wrong; nothing was changed."""

    status = "INVALID_ARGUMENT"


class InvalidArgumentError(InputError):
    """A field is missing, out of range or contradicts another one."""

    reason = pb.ERROR_REASON_INVALID_ARGUMENT


class InvalidNameError(InputError):
    """A job, worker or checkpoint name is not allowed."""

    reason = pb.ERROR_REASON_INVALID_NAME


class UnknownOptimizerError(InputError):
    """No optimizer of that name."""

    reason = pb.ERROR_REASON_UNKNOWN_OPTIMIZER


class UnknownHyperparameterError(InputError):
    """The optimizer has no such hyperparameter."""

    reason = pb.ERROR_REASON_UNKNOWN_HYPERPARAMETER


class InvalidHyperparameterError(InputError):
    """A hyperparameter's value is not allowed; the message is torch's where torch has the check."""

    reason = pb.ERROR_REASON_INVALID_HYPERPARAMETER


class UnknownScheduleError(InputError):
    """No schedule of that name, or it has no such argument."""

    reason = pb.ERROR_REASON_UNKNOWN_SCHEDULE


class UnknownParameterError(InputError):
    """No such parameter, group or array in the job."""

    reason = pb.ERROR_REASON_UNKNOWN_PARAMETER


class DuplicateParameterError(InputError):
    """A parameter is named twice."""

    reason = pb.ERROR_REASON_DUPLICATE_PARAMETER


class ShapeMismatchError(InputError):
    """An array's shape is not its parameter's."""

    reason = pb.ERROR_REASON_SHAPE_MISMATCH


class DtypeMismatchError(InputError):
    """An array's dtype is not its parameter's, or not one that optserve holds."""

    reason = pb.ERROR_REASON_DTYPE_MISMATCH


class NonfiniteGradientError(InputError):
    """A gradient holds NaN or Inf. The worker may push again in the same round."""

    reason = pb.ERROR_REASON_NONFINITE_GRADIENT


class InvalidStateDictError(InputError):
    """A state_dict is of another optimizer, or does not fit the job's parameters."""

    reason = pb.ERROR_REASON_INVALID_STATE_DICT


class InsecureAddressError(InputError):
    """The address leaves the loopback and `--insecure` was not given."""

    reason = pb.ERROR_REASON_INSECURE_ADDRESS


class MissingFunctionError(InputError):
    """The schedule calls a function of the client's, whose numbers did not come; `metadata["awaited"]` holds the epochs."""

    reason = pb.ERROR_REASON_MISSING_FUNCTION


class UnsupportedParameterError(InputError, RuntimeError):
    """The optimizer takes no parameter of this shape or dtype; the message is torch's, which raises either builtin."""

    reason = pb.ERROR_REASON_UNSUPPORTED_PARAMETER


class StreamError(OptserveError, RuntimeError):
    """Chunks that do not fit together; nothing was changed."""

    status = "INVALID_ARGUMENT"


class InvalidChunkError(StreamError):
    """A chunk lies outside its array, repeats or overlaps another, or is too large."""

    reason = pb.ERROR_REASON_INVALID_CHUNK


class IncompleteStreamError(StreamError):
    """A stream ended before everything that was announced had come."""

    reason = pb.ERROR_REASON_INCOMPLETE_STREAM


class ProtocolViolationError(StreamError):
    """Messages came in an order that the protocol does not allow, or could not be parsed."""

    reason = pb.ERROR_REASON_PROTOCOL_VIOLATION


class JobError(OptserveError, RuntimeError):
    """The job is not there, or not what was expected."""

    status = "FAILED_PRECONDITION"


class JobNotFoundError(JobError):
    """No job of that name or id."""

    reason = pb.ERROR_REASON_JOB_NOT_FOUND
    status = "NOT_FOUND"


class JobExistsError(JobError):
    """A job of that name exists."""

    reason = pb.ERROR_REASON_JOB_EXISTS
    status = "ALREADY_EXISTS"


class JobSpecMismatchError(JobError):
    """The job exists with another spec."""

    reason = pb.ERROR_REASON_JOB_SPEC_MISMATCH
    status = "ALREADY_EXISTS"


class JobNotInitializedError(JobError, TimeoutError):
    """The job's creator has not uploaded its initial values within the deadline."""

    reason = pb.ERROR_REASON_JOB_NOT_INITIALIZED


class JobLostError(JobError):
    """The server no longer knows the job that this client worked with: its state was in memory only."""

    reason = pb.ERROR_REASON_JOB_LOST


class RolledBackError(JobError):
    """The job stands before what this client saw last; `metadata["from"]` and `["to"]` hold the versions."""

    reason = pb.ERROR_REASON_ROLLED_BACK


class WorkerError(OptserveError, RuntimeError):
    """This worker's call does not count."""

    status = "FAILED_PRECONDITION"


class FencedError(WorkerError):
    """Another worker joined under this one's name."""

    reason = pb.ERROR_REASON_FENCED


class TooManyWorkersError(WorkerError):
    """Every rank of the job is taken, or the rank is not below `workers`."""

    reason = pb.ERROR_REASON_TOO_MANY_WORKERS


class RankHeldError(WorkerError):
    """The rank is held by a worker of another name."""

    reason = pb.ERROR_REASON_RANK_HELD


class NotJoinedError(WorkerError):
    """The session is not a worker of the job."""

    reason = pb.ERROR_REASON_NOT_JOINED


class SequenceGapError(WorkerError):
    """A sequence number was left out."""

    reason = pb.ERROR_REASON_SEQUENCE_GAP


class SequenceConflictError(WorkerError):
    """The same sequence number came with other content."""

    reason = pb.ERROR_REASON_SEQUENCE_CONFLICT


class RanksDisagreeError(WorkerError):
    """Two ranks made the same counted call with different arguments, or brought different hyperparameters to one round."""

    reason = pb.ERROR_REASON_RANKS_DISAGREE


class RoundError(OptserveError, RuntimeError):
    """The round applied nothing."""

    status = "ABORTED"


class RoundFailedError(RoundError):
    """The round ended with an error for all of its members."""

    reason = pb.ERROR_REASON_ROUND_FAILED


class RoundTimeoutError(RoundError, TimeoutError):
    """The round's deadline passed; the message names the missing ranks."""

    reason = pb.ERROR_REASON_ROUND_TIMEOUT
    status = "DEADLINE_EXCEEDED"


class CheckpointError(OptserveError, RuntimeError):
    """A checkpoint cannot be used."""

    status = "FAILED_PRECONDITION"


class CheckpointNotFoundError(CheckpointError):
    """No checkpoint of that name."""

    reason = pb.ERROR_REASON_CHECKPOINT_NOT_FOUND
    status = "NOT_FOUND"


class CheckpointExistsError(CheckpointError):
    """A checkpoint of that name exists at another version."""

    reason = pb.ERROR_REASON_CHECKPOINT_EXISTS
    status = "ALREADY_EXISTS"


class CheckpointCorruptError(CheckpointError):
    """A checkpoint's files are truncated or altered."""

    reason = pb.ERROR_REASON_CHECKPOINT_CORRUPT
    status = "DATA_LOSS"


class CheckpointMismatchError(CheckpointError):
    """A checkpoint is of another optimizer or of other parameters."""

    reason = pb.ERROR_REASON_CHECKPOINT_MISMATCH


class ServerError(OptserveError, RuntimeError):
    """The server cannot do it now."""

    status = "UNAVAILABLE"


class StorageError(ServerError, OSError):
    """The storage under the data directory failed or is full."""

    reason = pb.ERROR_REASON_STORAGE_FAILED
    status = "INTERNAL"


class TooManyStreamsError(ServerError):
    """More streams are open than `--max-streams` allows."""

    reason = pb.ERROR_REASON_TOO_MANY_STREAMS
    status = "RESOURCE_EXHAUSTED"


class OutOfMemoryError(ServerError, MemoryError):
    """The server has not the memory for it."""

    reason = pb.ERROR_REASON_OUT_OF_MEMORY
    status = "RESOURCE_EXHAUSTED"


class ServerStoppingError(ServerError):
    """The server is stopping; a client that retries finds its successor."""

    reason = pb.ERROR_REASON_SERVER_STOPPING


class ServerUnavailableError(ServerError, ConnectionError):
    """The server did not answer within the deadline."""

    reason = pb.ERROR_REASON_SERVER_UNAVAILABLE


class DeadlineExceededError(ServerError, TimeoutError):
    """A deadline passed before the call was done."""

    reason = pb.ERROR_REASON_DEADLINE_EXCEEDED
    status = "DEADLINE_EXCEEDED"


class AddressInUseError(ServerError, OSError):
    """The address is taken by another process."""

    reason = pb.ERROR_REASON_ADDRESS_IN_USE


class InternalError(ServerError):
    """A defect of optserve itself; the server's log has the traceback."""

    reason = pb.ERROR_REASON_INTERNAL
    status = "INTERNAL"


class ClosedError(OptserveError, ValueError):
    """The object is closed."""

    reason = pb.ERROR_REASON_CLOSED
    status = "FAILED_PRECONDITION"


class ReadOnlyError(OptserveError, TypeError):
    """The mapping is edited by a call, not by assignment; the message names the call."""

    reason = pb.ERROR_REASON_READ_ONLY


class MissingExtraError(OptserveError, ImportError):
    """An optional dependency is not installed; the message names the extra."""

    reason = pb.ERROR_REASON_MISSING_EXTRA

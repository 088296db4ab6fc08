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
│   ├── UnsupportedParameterError (RuntimeError)
│   └── UnsupportedGradientError (RuntimeError)
├── StreamError (RuntimeError)          chunks that do not fit together
│   ├── InvalidChunkError               ├── IncompleteStreamError
│   └── ProtocolViolationError
├── JobError (RuntimeError)             the job is not there, or not what was expected
│   ├── JobNotFoundError                ├── JobExistsError
│   ├── JobSpecMismatchError            ├── JobNotInitializedError (TimeoutError)
│   ├── JobLostError                    ├── RolledBackError
│   └── StaleLayoutError
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

from optserve.wire.errors.base import (
    OptserveError,
)
from optserve.wire.errors.inputs import (
    DtypeMismatchError,
    DuplicateParameterError,
    InputError,
    InsecureAddressError,
    InvalidArgumentError,
    InvalidHyperparameterError,
    InvalidNameError,
    InvalidStateDictError,
    MissingFunctionError,
    NonfiniteGradientError,
    ShapeMismatchError,
    UnknownHyperparameterError,
    UnknownOptimizerError,
    UnknownParameterError,
    UnknownScheduleError,
    UnsupportedGradientError,
    UnsupportedParameterError,
)
from optserve.wire.errors.jobs import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointExistsError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    FencedError,
    JobError,
    JobExistsError,
    JobLostError,
    JobNotFoundError,
    JobNotInitializedError,
    JobSpecMismatchError,
    NotJoinedError,
    RankHeldError,
    RanksDisagreeError,
    RolledBackError,
    RoundError,
    RoundFailedError,
    RoundTimeoutError,
    SequenceConflictError,
    SequenceGapError,
    StaleLayoutError,
    TooManyWorkersError,
    WorkerError,
)
from optserve.wire.errors.servers import (
    AddressInUseError,
    ClosedError,
    DeadlineExceededError,
    IncompleteStreamError,
    InternalError,
    InvalidChunkError,
    MissingExtraError,
    OutOfMemoryError,
    ProtocolViolationError,
    ReadOnlyError,
    ServerError,
    ServerStoppingError,
    ServerUnavailableError,
    StorageError,
    StreamError,
    TooManyStreamsError,
)

__all__ = [
    "AddressInUseError",
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointExistsError",
    "CheckpointMismatchError",
    "CheckpointNotFoundError",
    "ClosedError",
    "DeadlineExceededError",
    "DtypeMismatchError",
    "DuplicateParameterError",
    "FencedError",
    "IncompleteStreamError",
    "InputError",
    "InsecureAddressError",
    "InternalError",
    "InvalidArgumentError",
    "InvalidChunkError",
    "InvalidHyperparameterError",
    "InvalidNameError",
    "InvalidStateDictError",
    "JobError",
    "JobExistsError",
    "JobLostError",
    "JobNotFoundError",
    "JobNotInitializedError",
    "JobSpecMismatchError",
    "MissingExtraError",
    "MissingFunctionError",
    "NonfiniteGradientError",
    "NotJoinedError",
    "OptserveError",
    "OutOfMemoryError",
    "ProtocolViolationError",
    "RankHeldError",
    "RanksDisagreeError",
    "ReadOnlyError",
    "RolledBackError",
    "RoundError",
    "RoundFailedError",
    "RoundTimeoutError",
    "SequenceConflictError",
    "SequenceGapError",
    "ServerError",
    "ServerStoppingError",
    "ServerUnavailableError",
    "ShapeMismatchError",
    "StaleLayoutError",
    "StorageError",
    "StreamError",
    "TooManyStreamsError",
    "TooManyWorkersError",
    "UnknownHyperparameterError",
    "UnknownOptimizerError",
    "UnknownParameterError",
    "UnknownScheduleError",
    "UnsupportedGradientError",
    "UnsupportedParameterError",
    "WorkerError",
]

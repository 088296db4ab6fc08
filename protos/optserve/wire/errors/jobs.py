"""Errors of jobs, workers, rounds and checkpoints."""

from __future__ import annotations

from optserve.v1 import types_pb2 as pb
from optserve.wire.errors.base import OptserveError


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


class StaleLayoutError(JobError):
    """A parameter was renamed, replaced or removed since this client asked for the job's layout."""

    reason = pb.ERROR_REASON_STALE_LAYOUT


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

"""Errors of calls that are wrong in themselves."""

from __future__ import annotations

from optserve.v1 import types_pb2 as pb
from optserve.wire.errors.base import OptserveError


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


class UnsupportedGradientError(InputError, RuntimeError):
    """The optimizer takes no sparse gradient, no dense one, or none with these hyperparameters; the message is torch's."""

    reason = pb.ERROR_REASON_UNSUPPORTED_GRADIENT

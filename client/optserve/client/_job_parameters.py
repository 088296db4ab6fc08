"""Edits of a running job's parameters."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from optserve.client import _bundles, _sparse
from optserve.client._info import Position
from optserve.client._job_calls import JobCalls
from optserve.v1 import parameters_pb2
from optserve.wire import dtypes
from optserve.wire.errors import InvalidArgumentError, UnknownParameterError

Edited = (
    parameters_pb2.RenameParameterResponse | parameters_pb2.ReplaceParameterResponse | parameters_pb2.RemoveParameterResponse
)


class ParameterCalls(JobCalls):
    """Renames, replaces and removes parameters in mid-run.

    A push that is under way is sent again if its arrays still fit; a worker that goes on with the old names or shapes gets
    UnknownParameterError or ShapeMismatchError from its next push. Each is refused with InvalidArgumentError while accumulated
    rounds wait for the step. After an error nothing has changed.
    """

    def rename_parameter(self, name: str, new_name: str) -> Position:
        """Gives a parameter another name; its value and state stay.

        UnknownParameterError, DuplicateParameterError, InvalidNameError, InvalidArgumentError.
        """
        name, new_name = _text(name), _text(new_name, "new_name")
        return self._edited(
            self._caller.mutate(
                lambda call: self._connection.call(
                    parameters_pb2.RenameParameterRequest(call=call, parameter=name, new_name=new_name),
                    parameters_pb2.RenameParameterResponse,
                )
            )
        )

    def replace_parameter(self, name: str, value: npt.ArrayLike, keep_state: bool = False) -> Position:
        """Gives a parameter another value, perhaps of another shape and dtype. Its optimizer state begins again at step 0; with
        `keep_state` it stays, which needs the same shape and dtype.

        UnknownParameterError, DtypeMismatchError, ShapeMismatchError, UnsupportedParameterError with torch's message, and
        InvalidArgumentError for an optimizer whose state is of all parameters together (LBFGS).
        """
        name = _text(name)
        array = _sparse.array_of(value, f"the value of parameter {name!r}", name)
        dtypes.to_wire(array.dtype, f"the value of parameter {name!r}")
        array = np.ascontiguousarray(array).reshape(array.shape)
        return self._edited(
            self._caller.mutate(
                lambda call: self._connection.upload(
                    parameters_pb2.ReplaceParameterRequest,
                    _bundles.value_items(call, name, array, keep_state),
                    parameters_pb2.ReplaceParameterResponse,
                )
            )
        )

    def remove_parameter(self, name: str) -> Position:
        """Takes a parameter with its state out of the job.

        UnknownParameterError; InvalidArgumentError for the last one of its group, and for LBFGS.
        """
        name = _text(name)
        return self._edited(
            self._caller.mutate(
                lambda call: self._connection.call(
                    parameters_pb2.RemoveParameterRequest(call=call, parameter=name), parameters_pb2.RemoveParameterResponse
                )
            )
        )

    def _edited(self, answer: Edited) -> Position:
        return self._told(answer.layout, answer.position)


def _text(name: object, what: str = "") -> str:
    if isinstance(name, str):
        return name
    if what:
        raise InvalidArgumentError(f"{what} is of type {type(name).__name__}; it must be a str")
    raise UnknownParameterError(f"a parameter's name is a str; found one of type {type(name).__name__}")

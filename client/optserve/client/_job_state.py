"""A job's optimizer state as torch's state_dict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, overload

from optserve.client import _bundles, _matching, _state_dict
from optserve.client._info import Position
from optserve.client._job_calls import JobCalls
from optserve.client._state_dict import StateDict
from optserve.v1 import state_pb2
from optserve.wire.errors import InvalidArgumentError


@dataclass(frozen=True)
class Loaded(Position):
    """Where a job stands after a state_dict was loaded by name.

    `missing` are the job's parameters that the state_dict does not have: they keep their state. `unexpected` are those of the
    state_dict that the job does not have: they are left out.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


class StateCalls(JobCalls):
    """state_dict out and in."""

    def state_dict(self) -> StateDict:
        """torch's state_dict of one whole version: integer ids plus param_names, NumPy arrays, no parameters."""
        request = state_pb2.GetStateRequest(job_id=self.job_id)
        position, state_dict = self._caller.download(request, _bundles.read_state)
        self._saw(position)
        return state_dict

    @overload
    def load_state_dict(
        self, state_dict: Mapping[str, Any], *, by: Literal["position"] = "position", strict: bool = True
    ) -> Position: ...

    @overload
    def load_state_dict(self, state_dict: Mapping[str, Any], *, by: Literal["name"], strict: bool = True) -> Loaded: ...

    def load_state_dict(
        self, state_dict: Mapping[str, Any], *, by: Literal["position", "name"] = "position", strict: bool = True
    ) -> Position:
        """Replaces optimizer state and hyperparameters by those of a state_dict, ours or torch's own.

        By position, as torch does: as many groups, each of as many parameters. By name: matched by the state_dict's
        `param_names`, whatever their order and grouping; a group gets the hyperparameters of the group in which its parameters
        are. With strict=False only what both have is loaded, and a group of which nothing is found keeps its hyperparameters.

        Arrays are anything NumPy takes, or torch tensors. InvalidStateDictError if it does not fit; then nothing changed.
        """
        names = [list(group.parameters) for group in self._get().groups]
        loading = _state_dict.parse(state_dict, _matcher(names, by, strict), self._layout)
        answer = self._caller.mutate(
            lambda call: self._connection.upload(
                state_pb2.LoadStateRequest, _bundles.state_items(call, loading), state_pb2.LoadStateResponse
            )
        )
        position = self._saw(answer.position)
        if by == "position":
            return position
        return Loaded(**vars(position), missing=loading.matched.missing, unexpected=loading.matched.unexpected)


def _matcher(names: _matching.Names, by: str, strict: bool) -> _state_dict.Match:
    """InvalidArgumentError for what is not allowed, or does not go together."""
    if by not in ("position", "name"):
        raise InvalidArgumentError(f"by is {by!r}; allowed are 'position' and 'name'")
    if not isinstance(strict, bool):
        raise InvalidArgumentError(f"strict is {strict!r}; it must be True or False")
    if by == "name":
        return partial(_matching.by_name, names=names, strict=strict)
    if not strict:
        raise InvalidArgumentError('strict=False goes with by="name": by position every parameter must have its counterpart')
    return partial(_matching.by_position, names=names)

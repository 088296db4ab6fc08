"""The head of a push, checked for form."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from optserve.server.jobs import rules
from optserve.server.rounds.contributions import Push
from optserve.server.services import decode
from optserve.v1 import data_pb2
from optserve.wire import dtypes, errors, metrics

_KINDS = {
    data_pb2.CONTRIBUTION_GRADIENT: "GRADIENT",
    data_pb2.CONTRIBUTION_SKIP: "SKIP",
    data_pb2.CONTRIBUTION_NONFINITE: "NONFINITE",
    data_pb2.CONTRIBUTION_ABANDON: "ABANDON",
}

_WITHOUT_WEIGHT = (data_pb2.CONTRIBUTION_SKIP, data_pb2.CONTRIBUTION_ABANDON)


def push(begin: data_pb2.PushBegin) -> Push:
    """What does not depend on the job. InvalidArgumentError, UnknownParameterError, DtypeMismatchError, and errors of edits."""
    if begin.contribution not in _KINDS:
        raise errors.InvalidArgumentError(
            f"contribution is {begin.contribution}; it must be one of {', '.join(_KINDS.values())}"
        )
    _check_closure(begin)
    if not (math.isfinite(begin.weight) and begin.weight >= 0):
        raise errors.InvalidArgumentError(f"weight is {begin.weight}; it must be finite and at least 0")
    beyond = [index for index in begin.absent if index >= begin.parameter_count]
    if beyond:
        raise errors.UnknownParameterError(f"parameter {beyond[0]} is absent, but only {begin.parameter_count} are announced")
    if len({entry.parameter for entry in begin.sparse}) < len(begin.sparse):
        raise errors.InvalidArgumentError("rows of one parameter are announced twice; sum rows that repeat")
    changes = decode.group_changes(begin.changes)
    identity, saw = decode.caller(begin.call, _fingerprint(begin, changes))
    norm, value = (_clip(begin, name) for name in ("clip_grad_norm", "clip_grad_value"))
    rules.check_one(norm, value)
    has_gradient = begin.contribution == data_pb2.CONTRIBUTION_GRADIENT
    return Push(
        caller=identity,
        seen=saw,
        kind=begin.contribution,
        weight=0.0 if begin.contribution in _WITHOUT_WEIGHT else begin.weight,
        parameter_count=begin.parameter_count,
        absent=frozenset(begin.absent),
        metrics=metrics.checked(begin.metrics),
        nonfinite=frozenset(begin.nonfinite),
        changes=changes,
        layout_version=begin.layout_version,
        dtypes=_dtypes(begin) if has_gradient else {},
        sparse=tuple(begin.sparse) if has_gradient else (),
        loss_scale=_loss_scale(begin),
        clip_grad_norm=norm,
        clip_grad_value=value,
        loss=_loss(begin),
        evaluation=begin.evaluation,
    )


def _check_closure(begin: data_pb2.PushBegin) -> None:
    """InvalidArgumentError where what only a step with a closure has comes without one."""
    if begin.evaluation and not begin.closure:
        raise errors.InvalidArgumentError(
            f"evaluation is {begin.evaluation}, but closure is 0: only a step with one is searched"
        )
    if begin.contribution == data_pb2.CONTRIBUTION_ABANDON and not begin.evaluation:
        raise errors.InvalidArgumentError(
            "contribution is ABANDON, but evaluation is 0: no search has begun that could be given up"
        )


def _fingerprint(begin: data_pb2.PushBegin, changes: Mapping[int, object]) -> str:
    """Of what a repeat must carry too; the pushes of one step with a closure are one call, whatever they hold."""
    if begin.closure:
        return decode.digest(repr(("closure", begin.closure)).encode())
    content = (
        begin.contribution,
        begin.weight,
        begin.parameter_count,
        tuple(begin.absent),
        begin.content_fingerprint,
        changes,
        sorted(begin.dtypes.items()),
        [(entry.parameter, entry.count, entry.dtype) for entry in begin.sparse],
        [
            getattr(begin, name) if begin.HasField(name) else None
            for name in ("loss_scale", "clip_grad_norm", "clip_grad_value", "loss")
        ],
    )
    return decode.digest(repr(content).encode())


def _clip(begin: data_pb2.PushBegin, name: str) -> float | None:
    return rules.clip(name, getattr(begin, name)) if begin.HasField(name) else None


def _loss_scale(begin: data_pb2.PushBegin) -> float | None:
    if not begin.HasField("loss_scale"):
        return None
    if not (math.isfinite(begin.loss_scale) and begin.loss_scale > 0):
        raise errors.InvalidArgumentError(f"loss_scale is {begin.loss_scale}; it must be finite and above 0")
    return begin.loss_scale


def _loss(begin: data_pb2.PushBegin) -> float | None:
    if not begin.HasField("loss"):
        return None
    if math.isnan(begin.loss):
        raise errors.InvalidArgumentError("loss is NaN; a closure must return a number")
    return begin.loss


def _dtypes(begin: data_pb2.PushBegin) -> dict[int, np.dtype[np.generic]]:
    found = {array_id: dtypes.from_wire(kind, f"the gradient of array {array_id}") for array_id, kind in begin.dtypes.items()}
    for array_id, dtype in found.items():
        if dtypes.is_complex(dtype):
            raise errors.DtypeMismatchError(
                f"the gradient of array {array_id} is announced as {dtype}; chunks hold reals, complex numbers as pairs",
                found=dtype,
            )
    return found

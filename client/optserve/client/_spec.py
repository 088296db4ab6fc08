"""What a user gives to create_job and add_param_group, as the contract has it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from optserve.client import _sparse
from optserve.client._info import CONSISTENCY, ON_MISSING, ON_NONFINITE
from optserve.v1 import jobs_pb2
from optserve.v1 import types_pb2 as pb
from optserve.wire import dtypes
from optserve.wire.errors import DuplicateParameterError, InvalidArgumentError, InvalidNameError, UnknownOptimizerError
from optserve.wire.layout import Layout
from optserve.wire.names import nearest
from optserve.wire.values import plain, to_hyperparameters

Array = npt.NDArray[np.generic]
Params = Mapping[str, npt.ArrayLike] | Iterable[tuple[str, npt.ArrayLike]]
"""Parameters by name, or (name, array) pairs as torch's named_parameters() gives them."""

ParamGroup = Mapping[str, object]
"""{"params": Params, hyperparameter: value, ...}"""

_Number = TypeVar("_Number")


@dataclass(frozen=True)
class Group:
    """One group: its values as C-contiguous arrays, and what differs from the defaults."""

    values: dict[str, Array]
    hyperparameters: dict[str, object]

    def to_proto(self) -> jobs_pb2.GroupSpec:
        return jobs_pb2.GroupSpec(
            hyperparameters=to_hyperparameters(self.hyperparameters),
            parameters=[
                pb.Parameter(name=name, shape=array.shape, dtype=dtypes.to_wire(array.dtype, f"parameter {name!r}"))
                for name, array in self.values.items()
            ],
        )


def _iterable(params: object) -> Iterable[object]:
    """What iterates over names or groups: neither one array nor a text, whose items are something else."""
    if isinstance(params, str) or hasattr(params, "__array__") or not isinstance(params, Iterable):
        raise InvalidArgumentError(
            f"params must be a mapping of names to arrays, or (name, array) pairs; got {type(params).__name__}"
        )
    return params


def _values(params: object) -> dict[str, Array]:
    values: dict[str, Array] = {}
    for pair in params.items() if isinstance(params, Mapping) else _iterable(params):
        if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            raise InvalidArgumentError(f"params must name every array by a string; got {type(pair).__name__} without a name")
        name, value = pair
        if name in values:
            raise DuplicateParameterError(f"parameter {name!r} appears more than once", parameter=name)
        array = _sparse.array_of(value, f"parameter {name!r}", name)
        dtypes.to_wire(array.dtype, f"parameter {name!r}")
        values[name] = np.ascontiguousarray(array).reshape(array.shape)
    return values


def group(entry: ParamGroup) -> Group:
    """One group from torch's form of it."""
    if not isinstance(entry, Mapping) or "params" not in entry:
        raise InvalidArgumentError('a param group is a dict with the key "params"; got ' + _shown(entry))
    return Group(_values(entry["params"]), {name: value for name, value in entry.items() if name != "params"})


def _shown(entry: object) -> str:
    return f"one with {sorted(map(str, entry))}" if isinstance(entry, Mapping) else type(entry).__name__


def groups(params: Params | ParamGroup | Iterable[ParamGroup]) -> list[Group]:
    """The groups of create_job: one dict of arrays, one group, or several.

    InvalidArgumentError, DtypeMismatchError or DuplicateParameterError if they cannot be a job's.
    """
    found: list[Group]
    if isinstance(params, Mapping) and not isinstance(params.get("params"), Mapping):
        found = [Group(_values(params), {})] if params else []
    elif isinstance(params, Mapping):
        found = [group(params)]
    else:
        entries = list(_iterable(params))
        if entries and all(isinstance(entry, tuple) for entry in entries):
            found = [Group(_values(entries), {})]
        else:
            found = [group(entry) for entry in entries]  # type: ignore[arg-type]
    if not found:
        raise InvalidArgumentError("optimizer got an empty parameter list")
    layout = Layout()
    for index, entry in enumerate(found):
        layout = layout.extended(index, [(name, array.shape, array.dtype) for name, array in entry.values.items()])
    return found


def chosen(what: str, value: str, words: Mapping[str, _Number]) -> _Number:
    """The number of a word. InvalidArgumentError lists the words."""
    try:
        return words[value]
    except KeyError:
        raise InvalidArgumentError(f"{what} is {value!r}{nearest(str(value), list(words))}") from None


@dataclass(frozen=True)
class JobOptions:
    """How a job takes its steps."""

    workers: int
    consistency: str
    on_nonfinite: str
    on_missing: str
    quorum: int
    round_timeout_seconds: float
    lease_seconds: float
    clip_grad_norm: object = None
    clip_grad_value: object = None
    accumulation: object = 1


def _step_rules(options: JobOptions) -> jobs_pb2.StepRules:
    """InvalidArgumentError for what is no number; which numbers are allowed is the server's to check."""
    clips: dict[str, float | None] = {}
    for name in ("clip_grad_norm", "clip_grad_value"):
        value = plain(getattr(options, name))
        try:
            if isinstance(value, bool) or not isinstance(value, int | float | None):
                raise TypeError
            clips[name] = None if value is None else float(value)
        except (TypeError, OverflowError):
            raise InvalidArgumentError(f"{name} is {value!r}; it must be a number above 0, or None") from None
    return jobs_pb2.StepRules(**clips, accumulation=_count("accumulation", options.accumulation))


def _count(what: str, value: object) -> int:
    count = plain(value)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InvalidArgumentError(f"{what} is {count!r}; it must be a whole number of at least 1")
    if count >= 1 << 32:
        raise InvalidArgumentError(f"{what} is {count}; it must be below 2^32")
    return count


def job_spec(
    name: str | None, groups: list[Group], optimizer: str, defaults: Mapping[str, object], options: JobOptions
) -> jobs_pb2.JobSpec:
    """The spec of a new job; the server checks what is the server's to check."""
    if name is not None and not isinstance(name, str):
        raise InvalidNameError(f"a job's name is of type {type(name).__name__}; it must be a str, or None")
    if not isinstance(optimizer, str):
        raise UnknownOptimizerError(f'optimizer is {optimizer!r}; it must be the name of one, as in optimizer="adam"')
    return jobs_pb2.JobSpec(
        name=name or "",
        optimizer=optimizer,
        defaults=to_hyperparameters(defaults),
        groups=[entry.to_proto() for entry in groups],
        workers=_count("workers", options.workers),
        consistency=chosen("consistency", options.consistency, CONSISTENCY),
        on_nonfinite=chosen("on_nonfinite", options.on_nonfinite, ON_NONFINITE),
        on_missing=chosen("on_missing", options.on_missing, ON_MISSING),
        quorum=_count("quorum", options.quorum),
        round_timeout_seconds=options.round_timeout_seconds,
        lease_seconds=options.lease_seconds,
        rules=_step_rules(options),
    )

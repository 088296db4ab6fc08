"""torch's state_dict layout, out and in: integer ids in the order of the groups, hyperparameters, and no parameters.

Deviations from torch's: `param_names` is always there, the state of 16-bit parameters is float32.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from optserve.v1 import state_pb2
from optserve.v1 import types_pb2 as pb
from optserve.wire import dtypes
from optserve.wire.bundle import Tensor
from optserve.wire.errors import InvalidHyperparameterError, InvalidStateDictError
from optserve.wire.layout import Layout
from optserve.wire.values import from_hyperparameters, to_hyperparameters

Array = npt.NDArray[np.generic]
StateDict = dict[str, Any]

_NOT_STATE = frozenset({"params", "param_names"})
_MASTER = "master"


def build(begin: state_pb2.StateBegin, tensors: Sequence[Tensor]) -> StateDict:
    """A state_dict from what the server sent. The arrays are views of one buffer that belongs to the caller."""
    names = [name for group in begin.groups for name in group.parameters]
    ids = {name: index for index, name in enumerate(names)}
    state: dict[int, dict[str, Array]] = {}
    for name in sorted(begin.steps, key=ids.__getitem__):
        state[ids[name]] = {"step": np.array(begin.steps[name], np.float32)} if begin.has_step else {}
    for name, slot, array in tensors:
        if slot != _MASTER:
            state.setdefault(ids[name], {})[slot] = array
    groups = [
        {
            **from_hyperparameters(group.hyperparameters),
            "params": [ids[name] for name in group.parameters],
            "param_names": list(group.parameters),
        }
        for group in begin.groups
    ]
    return {"state": dict(sorted(state.items())), "param_groups": groups}


@dataclass(frozen=True)
class Loading:
    """A state_dict as the contract has it."""

    groups: list[pb.Group]
    steps: dict[str, float]
    tensors: list[Tensor]


def parse(state_dict: Mapping[str, Any], names: Sequence[Sequence[str]], layout: Layout) -> Loading:
    """What load_state_dict sends: ours or torch's own dict, matched by position as torch does. `names` are the job's, by group.

    InvalidStateDictError if it does not fit the job's groups and parameters.
    """
    whole = _dict(state_dict, "a state_dict", "state", "param_groups")
    saved_groups = _list(whole["param_groups"], "param_groups")
    groups = [_dict(group, f"param group {index}", "params") for index, group in enumerate(saved_groups)]
    ids = [_list(group["params"], f"params of group {index}") for index, group in enumerate(groups)]
    if len(ids) != len(names):
        raise InvalidStateDictError(
            f"loaded state dict has a different number of parameter groups: {len(ids)}; the job has {len(names)}"
        )
    for index, (found, wanted) in enumerate(zip(ids, names, strict=True)):
        if len(found) != len(wanted):
            raise InvalidStateDictError(
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
                f"group {index} has {len(found)} parameters; the job's has {len(wanted)}"
            )
    by_id: dict[Any, str] = {}
    for key, name in zip(chain.from_iterable(ids), chain.from_iterable(names), strict=True):
        if not isinstance(key, Hashable) or key in by_id:
            raise InvalidStateDictError(f"params name the parameter {key!r}; each must have an id of its own")
        by_id[key] = name
    loading = Loading([_group(group, wanted) for group, wanted in zip(groups, names, strict=True)], {}, [])
    for key, entry in _dict(whole["state"], "the state").items():
        if key not in by_id:
            raise InvalidStateDictError(f"the state of parameter {key!r} is in no param group")
        _add(loading, by_id[key], _dict(entry, f"the state of parameter {key!r}"), layout)
    return loading


def _dict(value: object, what: str, *keys: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise InvalidStateDictError(f"{what} is a {type(value).__name__}; it must be a dict")
    for key in keys:
        if key not in value:
            raise InvalidStateDictError(f"{what} must have {' and '.join(map(repr, keys))}; it lacks {key!r}")
    return value


def _list(value: object, what: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise InvalidStateDictError(f"{what} is a {type(value).__name__}; it must be a list")
    return list(value)


def _group(saved: Mapping[Any, Any], names: Sequence[str]) -> pb.Group:
    hyperparameters = {key: value for key, value in saved.items() if key not in _NOT_STATE}
    try:
        return pb.Group(hyperparameters=to_hyperparameters(hyperparameters), parameters=names)
    except InvalidHyperparameterError as error:
        raise InvalidStateDictError(f"a param group cannot be loaded: {error}") from error


def _add(loading: Loading, name: str, entry: Mapping[Any, Any], layout: Layout) -> None:
    place = layout.place(name)
    slots = {slot: value for slot, value in entry.items() if slot != "step" and value is not None}
    if "step" in entry:
        try:
            loading.steps[name] = float(entry["step"])
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidStateDictError(f"the step of parameter {name!r} is no number: {error}") from error
    wanted = dtypes.state_dtype(place.dtype)
    for slot, value in slots.items():
        if not isinstance(slot, str):
            raise InvalidStateDictError(f"the state of parameter {name!r} has the key {slot!r}; keys are str")
        array = _array(value, f"{slot} of parameter {name!r}")
        is_complex = array.dtype.kind == "c"
        if is_complex and not place.is_complex:
            raise InvalidStateDictError(
                f"{slot} of parameter {name!r} has dtype {array.dtype}; the parameter has dtype {place.dtype}"
            )
        # What must be complex, what has another shape than its parameter, and what is a scalar: the server's to say.
        with np.errstate(over="ignore"):  # beyond float32 is infinite there, as in torch
            array = array.astype(wanted if is_complex else dtypes.storage_dtype(wanted), copy=False)
        loading.tensors.append((name, slot, array))


def _array(value: object, what: str) -> Array:
    """InvalidStateDictError unless it is an array of numbers."""
    try:
        array = _converted(value)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a meta tensor
        raise InvalidStateDictError(f"{what} is a {type(value).__name__} that is no array: {error}") from error
    if array.dtype.kind not in "fiuc" and array.dtype.name != "bfloat16":
        raise InvalidStateDictError(f"{what} has dtype {array.dtype}; it must be an array of floats or complex numbers")
    return array


def _converted(value: Any) -> Array:
    """Anything that NumPy takes, and torch's tensors without importing torch: detached, on the CPU, bfloat16 widened."""
    for method in ("detach", "cpu", "resolve_conj", "resolve_neg"):
        convert = getattr(value, method, None)
        if callable(convert):
            value = convert()
    try:
        return np.asarray(value)
    except TypeError:
        widen = getattr(value, "float", None)
        if not callable(widen):
            raise
        return np.asarray(widen())

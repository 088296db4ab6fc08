"""torch's state_dict layout, out and in: integer ids in the order of the groups, hyperparameters, and no parameters.

Deviations from torch's: `param_names` is always there, the state of 16-bit parameters is float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from optserve.v1 import state_pb2
from optserve.v1 import types_pb2 as pb
from optserve.wire import dtypes
from optserve.wire.bundle import Tensor
from optserve.wire.errors import InvalidStateDictError
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
    try:
        state, saved_groups = state_dict["state"], state_dict["param_groups"]
        ids = [list(group["params"]) for group in saved_groups]
    except (KeyError, TypeError) as error:
        raise InvalidStateDictError(
            f'a state_dict has the keys "state" and "param_groups", each group "params"; this one lacks {error}'
        ) from None
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
    by_id = {key: name for found, wanted in zip(ids, names, strict=True) for key, name in zip(found, wanted, strict=True)}
    loading = Loading(_groups(saved_groups, names), {}, [])
    for key, entry in state.items():
        if key not in by_id:
            raise InvalidStateDictError(f"the state of parameter {key!r} is in no param group")
        _add(loading, by_id[key], entry, layout)
    return loading


def _groups(saved: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]]) -> list[pb.Group]:
    return [
        pb.Group(
            hyperparameters=to_hyperparameters({key: _number(value) for key, value in group.items() if key not in _NOT_STATE}),
            parameters=wanted,
        )
        for group, wanted in zip(saved, names, strict=True)
    ]


def _number(value: object) -> object:
    """torch allows a tensor as lr or beta."""
    if isinstance(value, tuple | list):
        return tuple(_number(entry) for entry in value)
    item = getattr(value, "item", None)
    return item() if item is not None and getattr(value, "shape", None) == () else value


def _add(loading: Loading, name: str, entry: Mapping[str, Any], layout: Layout) -> None:
    place = layout.place(name)
    slots = {slot: value for slot, value in entry.items() if slot != "step" and value is not None}
    if "step" in entry:
        try:
            loading.steps[name] = float(entry["step"])
        except (TypeError, ValueError):
            raise InvalidStateDictError(f"the step of parameter {name!r} is {entry['step']!r}, which is no number") from None
    wanted = dtypes.state_dtype(place.dtype)
    for slot, value in slots.items():
        array = _array(value, f"{slot} of parameter {name!r}")
        is_complex = array.dtype.kind == "c"
        if is_complex and not place.is_complex:
            raise InvalidStateDictError(
                f"{slot} of parameter {name!r} has dtype {array.dtype}; the parameter has dtype {place.dtype}"
            )
        # What must be complex, what has another shape than its parameter, and what is a scalar: the server's to say.
        loading.tensors.append((name, slot, array.astype(wanted if is_complex else dtypes.storage_dtype(wanted), copy=False)))


def _array(value: Any, what: str) -> Array:
    """Anything that NumPy takes, and torch's tensors without importing torch: detached, on the CPU, bfloat16 widened."""
    for method in ("detach", "cpu", "resolve_conj", "resolve_neg"):
        convert = getattr(value, method, None)
        if callable(convert):
            value = convert()
    try:
        array = np.asarray(value)
    except TypeError:
        widen = getattr(value, "float", None)
        if not callable(widen):
            raise InvalidStateDictError(f"{what} is a {type(value).__name__}; it must be an array") from None
        array = np.asarray(widen())
    if array.dtype.kind not in "fiuc" and array.dtype.name != "bfloat16":
        raise InvalidStateDictError(f"{what} has dtype {array.dtype}; it must be an array of floats or complex numbers")
    return array

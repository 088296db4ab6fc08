"""torch's state_dict layout, out and in: integer ids in the order of the groups, hyperparameters, and no parameters.

Deviations from torch's: `param_names` is always there, the state of 16-bit parameters is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from optserve.client import _lbfgs_state
from optserve.client._matching import Matched, Saved
from optserve.v1 import state_pb2
from optserve.wire import dtypes
from optserve.wire.bundle import Tensor
from optserve.wire.errors import InvalidStateDictError
from optserve.wire.layout import Layout
from optserve.wire.values import from_hyperparameters

Array = npt.NDArray[np.generic]
StateDict = dict[str, Any]
Match = Callable[[Sequence[Saved]], Matched]

_MASTER = "master"


def build(begin: state_pb2.StateBegin, tensors: Sequence[Tensor]) -> StateDict:
    """A state_dict from what the server sent. The arrays are views of one buffer that belongs to the caller."""
    names = [name for group in begin.groups for name in group.parameters]
    ids = {name: index for index, name in enumerate(names)}
    state: dict[int, dict[str, Any]] = {}
    for name in sorted(begin.steps, key=ids.__getitem__):
        count = begin.steps[name]
        step = int(count) if begin.integer_steps else np.array(count, np.float32)
        state[ids[name]] = {"step": step} if begin.has_step else {}
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
    for index, entry in state.items():
        if _lbfgs_state.is_one(entry):
            state[index] = _lbfgs_state.outward(entry, groups[0])
    return {"state": dict(sorted(state.items())), "param_groups": groups}


@dataclass(frozen=True)
class Loading:
    """A state_dict as the contract has it. `matched` says for which parameters."""

    matched: Matched
    steps: dict[str, float] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)

    @property
    def loaded(self) -> list[str] | None:
        """The parameters that are loaded, if the others keep their state; None: all are."""
        return [name for name in self.matched.names.values() if name is not None] if self.matched.missing else None


def parse(state_dict: Mapping[str, Any], match: Match, layout: Layout) -> Loading:
    """What load_state_dict sends: ours or torch's own dict.

    InvalidStateDictError if it does not fit the job's groups and parameters, as `match` finds them in it.
    """
    whole = _dict(state_dict, "a state_dict", "state", "param_groups")
    saved_groups = _list(whole["param_groups"], "param_groups")
    groups = [_dict(group, f"param group {index}", "params") for index, group in enumerate(saved_groups)]
    ids = [_list(group["params"], f"params of group {index}") for index, group in enumerate(groups)]
    loading = Loading(match([Saved(*entry) for entry in zip(ids, groups, strict=True)]))
    for key, entry in _dict(whole["state"], "the state").items():
        if key not in loading.matched.names:
            raise InvalidStateDictError(f"the state of parameter {key!r} is in no param group")
        name = loading.matched.names[key]
        if name is not None:
            _add(loading, name, _dict(entry, f"the state of parameter {key!r}"), layout)
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


def _add(loading: Loading, name: str, entry: Mapping[Any, Any], layout: Layout) -> None:
    if _lbfgs_state.is_one(entry):
        _check_order(loading.matched, layout)
        loading.tensors.extend((name, slot, array) for slot, array in _lbfgs_state.inward(entry, layout, _array).items())
        return
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


def _check_order(matched: Matched, layout: Layout) -> None:
    """InvalidStateDictError unless all parameters come in the job's order, which is that of a state that is one vector."""
    if list(matched.names.values()) != [place.name for place in layout.places]:
        raise InvalidStateDictError(
            "LBFGS's state is of all parameters as one vector; those of the state_dict are not the job's in the job's order"
        )


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

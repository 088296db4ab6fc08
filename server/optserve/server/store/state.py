"""A store's content outside of it, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from optserve.server.formulas import Optimizer
from optserve.wire.dtypes import DTYPES
from optserve.wire.errors import InvalidStateDictError
from optserve.wire.layout import Layout, Place

MASTER = "master"
"""The slot name under which float32 masters of 16-bit parameters travel."""

FlatArray = npt.NDArray[Any]


@dataclass(frozen=True)
class StoreState:
    """Copies, by parameter name.

    `values` have the wire dtype. `state` is keyed "slot/parameter" in the state dtype; "master/parameter" are the masters of
    16-bit parameters. `steps` holds the parameters that have state.
    """

    values: dict[str, FlatArray] = field(default_factory=dict)
    state: dict[str, FlatArray] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)


def check(content: StoreState, layout: Layout, optimizer: Optimizer, with_values: bool) -> dict[int, dict[str, FlatArray]]:
    """The slots of each parameter's index. InvalidStateDictError if anything does not fit."""
    if with_values:
        _check_values(content.values, layout)
    found: dict[int, dict[str, FlatArray]] = {}
    for key, array in content.state.items():
        slot, _, name = key.partition("/")
        place = _place(layout, name, f"state {key!r}")
        allowed = (*optimizer.slot_keys, *([MASTER] if place.dtype.itemsize == 2 else []))
        if slot not in allowed:
            raise InvalidStateDictError(
                f"state {slot!r} of {name!r} is not {optimizer.name}'s; allowed are {', '.join(allowed)}"
            )
        _check_shape(array, place, f"state {slot!r} of {name!r}")
        found.setdefault(place.index, {})[slot] = array
    for name, step in content.steps.items():
        place = _place(layout, name, "the step count of")
        if isinstance(step, bool) or not isinstance(step, int | np.integer) or not 0 <= step < 2**62:
            raise InvalidStateDictError(f"the step of {name!r} is {step!r}; it must be an integer, 0 or more")
        found.setdefault(place.index, {})
    _check_complete(content, layout, optimizer, found)
    return found


def _place(layout: Layout, name: str, what: str) -> Place:
    try:
        return layout.by_name[name]
    except KeyError:
        raise InvalidStateDictError(f"{what} names the parameter {name!r}, which the job does not have") from None


def _check_values(values: Mapping[str, FlatArray], layout: Layout) -> None:
    for name in values:
        _place(layout, name, "a value")
    for place in layout.places:
        if place.name not in values:
            raise InvalidStateDictError(f"the value of parameter {place.name!r} is missing")
        found = values[place.name]
        _check_shape(found, place, f"the value of {place.name!r}")
        if found.dtype != place.dtype:
            raise InvalidStateDictError(f"the value of {place.name!r} has dtype {found.dtype}; the parameter has {place.dtype}")


def _check_shape(array: FlatArray, place: Place, what: str) -> None:
    if array.shape != place.shape:
        raise InvalidStateDictError(f"{what} has shape {array.shape}; the parameter has shape {place.shape}")
    if array.dtype not in DTYPES.values():
        raise InvalidStateDictError(f"{what} has dtype {array.dtype}; allowed are floating-point numbers")


def _check_complete(
    content: StoreState, layout: Layout, optimizer: Optimizer, found: Mapping[int, Mapping[str, FlatArray]]
) -> None:
    """Within a group, parameters with state must have the same slots: a forgotten one would silently begin at zero."""
    slots_of: dict[int, tuple[str, set[str]]] = {}
    groups = {array.array_id: array.group for array in layout.arrays}
    for index, slots in found.items():
        place = layout.places[index]
        own = set(slots) - {MASTER}
        if not own and place.name not in content.steps:
            continue
        if own and optimizer.counts_steps and place.name not in content.steps:
            raise InvalidStateDictError(f"parameter {place.name!r} has {', '.join(sorted(own))} but no step")
        missing = set(optimizer.slots(optimizer.defaults)) - own
        if missing:
            raise InvalidStateDictError(f"parameter {place.name!r} has {_listed(own)} but no {_listed(missing)}")
        first, expected = slots_of.setdefault(groups[place.array_id], (place.name, own))
        if own != expected:
            raise InvalidStateDictError(
                f"parameter {place.name!r} has the state {_listed(own)}; {first!r} of the same group has {_listed(expected)}"
            )


def _listed(slots: set[str]) -> str:
    return ", ".join(sorted(slots)) or "(none)"

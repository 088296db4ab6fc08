"""A store's content outside of it, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from optserve.server.formulas import Elementwise, Group, Optimizer, Searching
from optserve.server.store import extras
from optserve.server.store.slots import Shape, real_shape, slot_shapes
from optserve.wire.dtypes import DTYPES, is_complex
from optserve.wire.errors import InvalidStateDictError
from optserve.wire.layout import Layout, Place

MASTER = "master"
"""The slot name under which float32 masters of 16-bit parameters travel."""

_WINDOW, _EXTRAS = "window/", "extras/"
"""No slot is called so."""

FlatArray = npt.NDArray[Any]
Found = Mapping[int, Mapping[str, FlatArray]]
"""State by the parameter's index: slots, scalars and MASTER by name."""


@dataclass(frozen=True)
class StoreState:
    """Copies, by parameter name.

    `values` have the wire dtype. `state` is keyed "slot/parameter": tensors in the state dtype, complex for complex parameters
    if they have the parameter's shape, and carried scalars as 0-d float32; "master/parameter" are the masters of 16-bit
    parameters. `steps` holds the parameters that have state. `extras` is the state that belongs to no one parameter, by torch's
    name. `window` is the running sum of the `window_rounds` rounds that wait for a step: "sum/parameter" in the state dtype, or
    "ids/parameter" and "rows/parameter" where it has rows only.
    """

    values: dict[str, FlatArray] = field(default_factory=dict)
    state: dict[str, FlatArray] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    extras: dict[str, FlatArray] = field(default_factory=dict)
    window: dict[str, FlatArray] = field(default_factory=dict)
    window_rounds: int = 0

    @property
    def tensors(self) -> dict[str, FlatArray]:
        """All but the values under names of one file: "exp_avg/w1", "window/sum/w1", "extras/d"."""
        window = {f"{_WINDOW}{key}": array for key, array in self.window.items()}
        return self.state | {f"{_EXTRAS}{key}": array for key, array in self.extras.items()} | window

    @classmethod
    def from_tensors(
        cls, values: Mapping[str, FlatArray], tensors: Mapping[str, FlatArray], steps: Mapping[str, int], window_rounds: int = 0
    ) -> StoreState:
        """The content of which these are the values and the `tensors`."""
        found = cls(dict(values), {}, dict(steps), window_rounds=window_rounds)
        for key, array in tensors.items():
            if key.startswith(_WINDOW):
                found.window[key.removeprefix(_WINDOW)] = array
            elif key.startswith(_EXTRAS):
                found.extras[key.removeprefix(_EXTRAS)] = array
            else:
                found.state[key] = array
        return found


def check(
    content: StoreState,
    layout: Layout,
    optimizer: Optimizer,
    groups: Sequence[Group],
    with_values: bool,
    loaded: frozenset[str] | None = None,
) -> dict[int, dict[str, FlatArray]]:
    """The state of each parameter's index. `groups` are the hyperparameters that it belongs to; `loaded` are the only
    parameters that it may be of, None: all of them.

    InvalidStateDictError if anything does not fit.
    """
    if loaded is not None:
        _check_partial(content, layout, optimizer, loaded)
    if with_values:
        _check_values(content.values, layout)
    extras.check(content.extras, optimizer, layout)
    found: dict[int, dict[str, FlatArray]] = {}
    group_of = {array.array_id: groups[array.group] for array in layout.arrays}
    for key, array in content.state.items():
        slot, _, name = key.partition("/")
        place = _place(layout, name, f"state {key!r}")
        _check_entry(slot, array, place, optimizer, group_of[place.array_id])
        found.setdefault(place.index, {})[slot] = array
    for name, step in content.steps.items():
        place = _place(layout, name, "the step count of")
        if isinstance(step, bool) or not isinstance(step, int | np.integer) or not 0 <= step < 2**62:
            raise InvalidStateDictError(f"the step of {name!r} is {step!r}; it must be an integer, 0 or more")
        found.setdefault(place.index, {})
    _check_complete(content, layout, optimizer, groups, found)
    return found


def shapes_of(found: Found, places: Sequence[Place], optimizer: Optimizer) -> dict[int, dict[str, Shape]]:
    """The shapes, as reals, of the slots that were found, by position of the parameter in `places`."""
    return {
        position: {
            slot: real_shape(place) if np.iscomplexobj(array) else array.shape
            for slot, array in found.get(place.index, {}).items()
            if slot in optimizer.slot_keys
        }
        for position, place in enumerate(places)
    }


def _place(layout: Layout, name: str, what: str) -> Place:
    try:
        return layout.by_name[name]
    except KeyError:
        raise InvalidStateDictError(f"{what} names the parameter {name!r}, which the job does not have") from None


def _check_partial(content: StoreState, layout: Layout, optimizer: Optimizer, loaded: frozenset[str]) -> None:
    if isinstance(optimizer, Searching):
        raise InvalidStateDictError(
            f"{optimizer.name}'s state is of all parameters as one vector; it cannot be loaded for some of them"
        )
    for name in loaded:
        _place(layout, name, "what is loaded")
    for name in (*(key.partition("/")[2] for key in content.state), *content.steps):
        if name not in loaded:
            raise InvalidStateDictError(f"there is state of the parameter {name!r}, which is not among those that are loaded")


def _check_values(values: Mapping[str, FlatArray], layout: Layout) -> None:
    for name in values:
        _place(layout, name, "a value")
    for place in layout.places:
        if place.name not in values:
            raise InvalidStateDictError(f"the value of parameter {place.name!r} is missing")
        found = values[place.name]
        _check_shape(found, place.shape, place, f"the value of {place.name!r}")
        if found.dtype != place.dtype:
            raise InvalidStateDictError(f"the value of {place.name!r} has dtype {found.dtype}; the parameter has {place.dtype}")


def _check_entry(slot: str, array: FlatArray, place: Place, optimizer: Optimizer, group: Group) -> None:
    what = f"state {slot!r} of {place.name!r}"
    allowed = (*optimizer.scalar_keys, *optimizer.slot_keys, *([MASTER] if place.dtype.itemsize == 2 else []))
    if slot not in allowed:
        raise InvalidStateDictError(f"{what} is not {optimizer.name}'s; allowed are {', '.join(allowed)}")
    if slot in optimizer.scalar_keys:
        _check_shape(array, (), place, what)
        _check_dtype(array, False, place, what)
        return
    shape = real_shape(place) if slot == MASTER else _slot_shape(slot, place, optimizer, group, what)
    is_pair = place.is_complex and shape == real_shape(place)
    _check_shape(array, place.shape if is_pair else shape, place, what)
    _check_dtype(array, is_pair, place, what)


def _slot_shape(slot: str, place: Place, optimizer: Optimizer, group: Group, what: str) -> Shape:
    """As reals. A slot that these hyperparameters do not need may be left over from earlier ones."""
    if isinstance(optimizer, Elementwise):
        return real_shape(place)
    shapes = {**slot_shapes(optimizer, optimizer.defaults, place), **slot_shapes(optimizer, group, place)}
    if slot not in shapes:
        kept = ", ".join(shapes) or "(none)"
        raise InvalidStateDictError(f"{what} is not {optimizer.name}'s for the shape {place.shape}; allowed are {kept}")
    return shapes[slot]


def _check_shape(array: FlatArray, shape: Shape, place: Place, what: str) -> None:
    if array.shape != shape:
        wanted = "the parameter has shape" if shape == place.shape else "it must have"
        raise InvalidStateDictError(f"{what} has shape {array.shape}; {wanted} {shape}")
    if array.dtype not in DTYPES.values():
        raise InvalidStateDictError(f"{what} has dtype {array.dtype}; allowed are floating-point numbers")


def _check_dtype(array: FlatArray, wants_complex: bool, place: Place, what: str) -> None:
    if is_complex(array.dtype) != wants_complex:
        wanted = "complex" if wants_complex else "real"
        raise InvalidStateDictError(f"{what} has dtype {array.dtype}; it is {wanted}, the parameter has dtype {place.dtype}")


def _check_complete(content: StoreState, layout: Layout, optimizer: Optimizer, groups: Sequence[Group], found: Found) -> None:
    """What hyperparameters need is there: a forgotten slot would silently begin at zero. What earlier ones needed may be there
    for some parameters only, in torch too: it is not made for those whose state begins later."""
    group_of = {array.array_id: groups[array.group] for array in layout.arrays}
    for index, state in found.items():
        place = layout.places[index]
        own = set(state) - {MASTER}
        if not own and place.name not in content.steps:
            continue
        if own and optimizer.counts_steps and place.name not in content.steps:
            raise InvalidStateDictError(f"parameter {place.name!r} has {', '.join(sorted(own))} but no step")
        needed = set(slot_shapes(optimizer, group_of[place.array_id], place))
        needed |= set(optimizer.scalar_keys) if needed else set()
        if needed - own:
            raise InvalidStateDictError(f"parameter {place.name!r} has {_listed(own)} but no {_listed(needed - own)}")


def _listed(slots: set[str]) -> str:
    return ", ".join(sorted(slots)) or "(none)"

"""A schedule's state_dict in torch's own types, out and in."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from optserve.wire.errors import InvalidStateDictError
from optserve.wire.values import plain

_MILESTONES, _FUNCTIONS, _PARTS = "milestones", "lr_lambdas", "_schedulers"


def from_text(text: str) -> dict[str, Any]:
    """torch's state_dict, which a scheduler of that class loads."""
    found: dict[str, Any] = json.loads(text, object_hook=_with_counter)
    return found


def _with_counter(entries: dict[str, Any]) -> dict[str, Any]:
    if _MILESTONES in entries:
        entries[_MILESTONES] = Counter(dict(map(tuple, entries[_MILESTONES])))
    return entries


def to_text(state_dict: Mapping[str, Any]) -> str:
    """The inverse; numbers may be NumPy's or torch's. InvalidStateDictError for what no state_dict of torch's holds."""
    if not isinstance(state_dict, Mapping):
        raise InvalidStateDictError(f"a schedule's state_dict is a dict; found a {type(state_dict).__name__}")
    try:
        return json.dumps(_json(state_dict, "the state_dict"))
    except (TypeError, RecursionError) as error:
        raise InvalidStateDictError(f"the state_dict cannot be sent: {error}") from error


def _json(value: Any, where: str) -> Any:
    if isinstance(value, Counter):
        return sorted([plain(key), count] for key, count in value.items())
    if isinstance(value, Mapping):
        # A callable object's state stays here with the object: see load_functions.
        return {
            str(key): [None] * len(entry) if key == _FUNCTIONS and _is_list(entry) else _json(entry, f"{where}[{key!r}]")
            for key, entry in value.items()
        }
    if _is_list(value):
        return [_json(entry, f"{where}[{index}]") for index, entry in enumerate(value)]
    found = plain(value)
    if found is None or isinstance(found, bool | int | float | str):
        return found
    raise InvalidStateDictError(f"{where} is of type {type(value).__name__}, which no schedule's state_dict holds")


def load_functions(state_dict: Mapping[str, Any], functions: Sequence[Any]) -> None:
    """Gives callable objects their state, as torch does; `functions` are the schedule's in depth-first order."""
    for index, entries in enumerate(_saved(state_dict)):
        for group, saved in enumerate(entries):
            if saved is not None:
                _object(functions, index, group).__dict__.update(saved)


def check_functions(state_dict: Mapping[str, Any], functions: Sequence[Any]) -> None:
    """InvalidStateDictError if a state_dict has the state of a callable object that is not here."""
    for index, entries in enumerate(_saved(state_dict)):
        for group, saved in enumerate(entries):
            if saved is not None and not (isinstance(saved, Mapping) and hasattr(_object(functions, index, group), "__dict__")):
                raise InvalidStateDictError(
                    f"lr_lambdas[{group}] has the state of a callable object, and this client holds none; set the schedule "
                    "with one, or leave None there"
                )


def _object(functions: Sequence[Any], index: int, group: int) -> Any:
    held = functions[index] if index < len(functions) else None
    return held if callable(held) or held is None else next(iter(held[group : group + 1]), None)


def _saved(state_dict: Mapping[str, Any]) -> list[Sequence[Any]]:
    """The lr_lambdas of a state_dict and of those in it, in depth-first order."""
    functions, parts = state_dict.get(_FUNCTIONS), state_dict.get(_PARTS)
    found = [functions] if _is_list(functions) else []
    inner = [part for part in parts if isinstance(part, Mapping)] if _is_list(parts) else []
    return found + [entries for part in inner for entries in _saved(part)]


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple)

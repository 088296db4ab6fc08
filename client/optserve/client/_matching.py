"""Which parameter of a state_dict is which of the job's: by position, as in torch, or by name."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from optserve.v1 import types_pb2 as pb
from optserve.wire.errors import InvalidHyperparameterError, InvalidStateDictError
from optserve.wire.values import to_hyperparameters

_NOT_STATE = frozenset({"params", "param_names"})

_NAMES_SHOWN = 8
"""Of the parameters that a message lists."""

Names = Sequence[Sequence[str]]
"""The job's parameters, by group."""


@dataclass(frozen=True)
class Saved:
    """One group of a state_dict: the ids of its parameters in order, and all else that it holds."""

    ids: list[Any]
    entries: Mapping[Any, Any]


@dataclass(frozen=True)
class Matched:
    """`names` are the job's by the state_dict's id, None for a parameter that the job does not have.

    `groups` are the job's with what they get; one that gets nothing is empty. `missing` are the job's parameters that the
    state_dict does not have, `unexpected` those of the state_dict that the job does not have.
    """

    names: dict[Any, str | None]
    groups: list[pb.Group]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


def by_position(saved: Sequence[Saved], names: Names) -> Matched:
    """InvalidStateDictError unless there are as many groups, each of as many parameters."""
    if len(saved) != len(names):
        raise InvalidStateDictError(
            f"loaded state dict has a different number of parameter groups: {len(saved)}; the job has {len(names)}"
        )
    for index, (group, wanted) in enumerate(zip(saved, names, strict=True)):
        if len(group.ids) != len(wanted):
            raise InvalidStateDictError(
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
                f"group {index} has {len(group.ids)} parameters; the job's has {len(wanted)}"
            )
    found = _by_id(saved, list(chain.from_iterable(names)))
    return Matched(dict(found), [_group(group, wanted) for group, wanted in zip(saved, names, strict=True)])


def by_name(saved: Sequence[Saved], names: Names, strict: bool) -> Matched:
    """InvalidStateDictError if the state_dict has no names, if (strict) they are not the job's, or if a group of the job would
    get the hyperparameters of several groups that differ."""
    saved_names = [_names_of(index, group) for index, group in enumerate(saved)]
    found = _by_id(saved, list(chain.from_iterable(saved_names)))
    group_of = {name: index for index, group in enumerate(saved_names) for name in group}
    if len(group_of) != len(found):
        repeated = sorted(name for name in group_of if list(chain.from_iterable(saved_names)).count(name) > 1)
        raise InvalidStateDictError(f"the state_dict's param_names have {_listed(repeated)} more than once")
    ours = dict.fromkeys(chain.from_iterable(names))
    missing = tuple(name for name in ours if name not in group_of)
    unexpected = tuple(name for name in group_of if name not in ours)
    if strict and (missing or unexpected):
        raise InvalidStateDictError(
            f"the state_dict's names are not the job's: missing are {_listed(missing)}; unexpected are {_listed(unexpected)}; "
            "strict=False loads those that both have"
        )
    groups = [_merged(index, wanted, saved, group_of) for index, wanted in enumerate(names)]
    return Matched({key: name if name in ours else None for key, name in found.items()}, groups, missing, unexpected)


def _by_id(saved: Sequence[Saved], names: Sequence[str]) -> dict[Any, str]:
    found: dict[Any, str] = {}
    for key, name in zip(chain.from_iterable(group.ids for group in saved), names, strict=True):
        if not isinstance(key, Hashable) or key in found:
            raise InvalidStateDictError(f"params name the parameter {key!r}; each must have an id of its own")
        found[key] = name
    return found


def _names_of(index: int, group: Saved) -> list[str]:
    names = group.entries.get("param_names")
    if names is None:
        raise InvalidStateDictError(
            f"param group {index} has no 'param_names', so it cannot be loaded by name; torch writes them if the optimizer was "
            'made of named_parameters(). Load it with by="position"'
        )
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise InvalidStateDictError(f"param_names of group {index} are {names!r}; they must be a list of str")
    if len(names) != len(group.ids):
        raise InvalidStateDictError(f"group {index} has {len(group.ids)} params and {len(names)} param_names")
    return list(names)


def _merged(index: int, wanted: Sequence[str], saved: Sequence[Saved], group_of: Mapping[str, int]) -> pb.Group:
    """A group of the job with what the groups hold in which its parameters are found."""
    sources = sorted({group_of[name] for name in wanted if name in group_of})
    if not sources:
        return pb.Group(parameters=wanted)
    found = [_group(saved[source], wanted) for source in sources]
    for source, other in zip(sources[1:], found[1:], strict=True):
        odd = _differences(found[0], other)
        if odd:
            raise InvalidStateDictError(
                f"the parameters of group {index} are in groups {sources[0]} and {source} of the state_dict, which differ in "
                f"{', '.join(odd)}; a group has one of each"
            )
    return found[0]


def _differences(here: pb.Group, there: pb.Group) -> list[str]:
    mine = {entry.name: entry for entry in here.hyperparameters}
    theirs = {entry.name: entry for entry in there.hyperparameters}
    return [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]


def _group(saved: Saved, names: Sequence[str]) -> pb.Group:
    hyperparameters = {key: value for key, value in saved.entries.items() if key not in _NOT_STATE}
    try:
        return pb.Group(hyperparameters=to_hyperparameters(hyperparameters), parameters=names)
    except InvalidHyperparameterError as error:
        raise InvalidStateDictError(f"a param group cannot be loaded: {error}") from error


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    more = f" and {len(found) - _NAMES_SHOWN} more" if len(found) > _NAMES_SHOWN else ""
    return (", ".join(map(repr, found[:_NAMES_SHOWN])) or "none") + more

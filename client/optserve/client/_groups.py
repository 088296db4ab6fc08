"""param_groups of a job and of its workers: torch's list of dicts to read; assigning names the call that edits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from optserve.client._info import group_entries
from optserve.v1 import types_pb2 as pb
from optserve.wire.errors import ReadOnlyError, UnknownParameterError
from optserve.wire.layout import Layout
from optserve.wire.values import Value

Entries = Mapping[str, Value | list[str]]
"""One group: "params" (names) first, then the hyperparameters in torch's order."""


def advice(owner: str) -> str:
    """What `owner` (job, worker) says to who assigns."""
    return (
        f"{owner}.param_groups is read-only; edit a group with {owner}.update_group(0, lr=...), "
        "add one with job.add_param_group({...})"
    )


class ReadOnlyList(list[Any]):
    """A list that refuses to be changed. A copy (list(), copy.deepcopy()) is an ordinary one."""

    def __init__(self, entries: Iterable[Any], advice: str) -> None:
        super().__init__(entries)
        self._advice = advice

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise ReadOnlyError(self._advice)

    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse
    append = extend = insert = pop = remove = clear = sort = reverse = _refuse

    def __reduce__(self) -> tuple[type[list[Any]], tuple[list[Any]]]:
        return list, (list(self),)


class ReadOnlyGroup(dict[str, Any]):
    """One group that refuses to be changed. A copy (dict(), copy.deepcopy()) is an ordinary one."""

    def __init__(self, index: int, entries: Entries, owner: str) -> None:
        super().__init__(entries)
        self._index = index
        self._owner = owner
        dict.__setitem__(
            self, "params", ReadOnlyList(self["params"], "a group keeps its parameters; add_param_group adds a group")
        )

    def __setitem__(self, key: str, value: object) -> NoReturn:
        self._refuse(key, value)

    def _refuse(self, *given: Any, **_: Any) -> NoReturn:
        key, value = (*given, ..., ...)[:2]
        name = key if isinstance(key, str) and key.isidentifier() and key != "params" else "lr"
        shown = "..." if value is ... else repr(value)
        call = f"{self._owner}.update_group({self._index}, {name}={shown})"
        raise ReadOnlyError(f"{self._owner}.param_groups is read-only; edit a group with {call}")

    __delitem__ = __ior__ = pop = popitem = setdefault = update = clear = _refuse

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        return dict, ({**self, "params": list(self["params"])},)


def read_only(groups: Iterable[Entries], owner: str) -> ReadOnlyList:
    """What param_groups of `owner` (job, worker) returns."""
    return ReadOnlyList((ReadOnlyGroup(index, entries, owner) for index, entries in enumerate(groups)), advice(owner))


class KnownGroups:
    """A job's groups as the last reply told them. Its owner's lock guards the writing; `entries` is replaced, never changed."""

    def __init__(self) -> None:
        self.entries: tuple[Entries, ...] = ()
        self._told_at = pb.Position()

    def version(self, seen: pb.Position | None) -> int:
        """The version that they are of, if that is in the lineage that was seen last; 0 has the server tell all of them."""
        return self._told_at.version if seen is not None and seen.lineage_id == self._told_at.lineage_id else 0

    def check(self, index: int) -> None:
        """UnknownParameterError if there is no such group."""
        if not 0 <= index < len(self.entries):
            raise UnknownParameterError(f"the job has {len(self.entries)} param groups; there is no group {index}")

    def told_all(self, position: pb.Position, groups: Iterable[pb.Group], layout: Layout) -> None:
        """A reply that holds every group."""
        names = layout.names_by_group
        self.entries = tuple({**group_entries(group), "params": names.get(index, [])} for index, group in enumerate(groups))
        self._told_at = position

    def told(self, changed: pb.ChangedGroups) -> None:
        """A reply that holds those that changed, in a message that may be empty; after another lineage it holds all."""
        if not changed.groups:
            return
        entries = list(self.entries) if changed.position.lineage_id == self._told_at.lineage_id else []
        for index, group in sorted(changed.groups.items()):
            names = list(group.parameters) or entries[index]["params"]
            entries[index : index + 1] = [{**group_entries(group), "params": names}]
        self.entries = tuple(entries)
        self._told_at = changed.position

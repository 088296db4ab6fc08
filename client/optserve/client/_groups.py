"""job.param_groups: torch's list of dicts to read; assigning names the call that edits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from optserve.wire.errors import ReadOnlyError
from optserve.wire.values import Value

ADVICE = "job.param_groups is read-only; edit a group with job.update_group(0, lr=...), add one with job.add_param_group({...})"


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

    def __init__(self, index: int, entries: Mapping[str, Value | list[str]]) -> None:
        super().__init__(entries)
        self._index = index
        dict.__setitem__(
            self, "params", ReadOnlyList(self["params"], "a group keeps its parameters; add_param_group adds a group")
        )

    def __setitem__(self, key: str, value: object) -> NoReturn:
        self._refuse(key, value)

    def _refuse(self, *given: Any, **_: Any) -> NoReturn:
        key, value = (*given, ..., ...)[:2]
        name = key if isinstance(key, str) and key.isidentifier() and key != "params" else "lr"
        shown = "..." if value is ... else repr(value)
        raise ReadOnlyError(f"job.param_groups is read-only; edit a group with job.update_group({self._index}, {name}={shown})")

    __delitem__ = __ior__ = pop = popitem = setdefault = update = clear = _refuse

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        return dict, ({**self, "params": list(self["params"])},)


def read_only(groups: Iterable[Mapping[str, Value | list[str]]]) -> ReadOnlyList:
    """What job.param_groups returns."""
    return ReadOnlyList(
        (ReadOnlyGroup(index, entries) for index, entries in enumerate(groups)),
        ADVICE,
    )

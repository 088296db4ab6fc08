"""Schedules in schedules on the command line: LinearLR(total_iters=5), CosineAnnealingLR(T_max=20). Read, never evaluated."""

from __future__ import annotations

import ast

from optserve.wire.arguments import SCHEDULERS, Entry, ScheduleValue
from optserve.wire.values import Value

WORDS: dict[str, Value] = {"true": True, "false": False, "none": None}

_LISTS = ("betas", "milestones")
"""Keys whose value is a list even if it has one number."""


def parse(text: str) -> tuple[Entry, ...]:
    """The argument `schedulers`, with brackets around it or without. ValueError says what is not of that form."""
    try:
        tree = ast.parse(f"[{text}]", mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ValueError(f"{text!r} cannot be read: {error}") from None
    if not isinstance(tree, ast.List):
        raise ValueError(f"{text!r} is no list of schedules")
    inner = tree.elts[0] if len(tree.elts) == 1 else None
    return _entries(inner if isinstance(inner, ast.List) else tree)


def listed(key: str, value: Value) -> Value:
    """The value, but one number as a list where a list is wanted."""
    if key in _LISTS and isinstance(value, int | float) and not isinstance(value, bool):
        return (value,)
    return value


def _entries(tree: ast.List) -> tuple[Entry, ...]:
    return tuple(_entry(node) for node in tree.elts)


def _entry(node: ast.expr) -> Entry:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise ValueError(f"{ast.unparse(node)!r} is not of the form NAME(key=value, ...), as in StepLR(step_size=30)")
    arguments: dict[str, ScheduleValue] = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in arguments:
            raise ValueError(f"{ast.unparse(node)!r} is not of the form NAME(key=value, ...), each key once")
        arguments[keyword.arg] = _value(keyword.arg, keyword.value)
    return node.func.id, arguments


def _value(key: str, node: ast.expr) -> ScheduleValue:
    if key == SCHEDULERS:
        if not isinstance(node, ast.List):
            raise ValueError(f"schedulers={ast.unparse(node)} is no list of schedules: put it in brackets")
        return _entries(node)
    if isinstance(node, ast.Name):
        return WORDS.get(node.id.lower(), node.id)
    try:
        found = ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"{key}={ast.unparse(node)} is no number, word or list of numbers") from None
    if isinstance(found, list | tuple) and all(isinstance(entry, int | float) for entry in found):
        return tuple(found)
    if found is None or isinstance(found, bool | int | float | str):
        return listed(key, found)
    raise ValueError(f"{key}={ast.unparse(node)} is no number, word or list of numbers")

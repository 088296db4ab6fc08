"""What commands print: tables for a person, JSON for a program."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import click

WIDE = 1_000
"""Columns of a table that goes into a pipe or file: nothing is cut there."""


def print_json(document: object, *, one_line: bool = False) -> None:
    """NaN and Inf, which JSON has not, become null; tuples become lists."""
    click.echo(json.dumps(_plain(document), indent=None if one_line else 2, ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], empty: str = "") -> None:
    """A table; numbers stand right. `empty` is said instead of a table without rows."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [list(row) for row in rows]
    if not cells:
        click.echo(empty)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        right = all(isinstance(row[index], int | float) for row in cells)
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(text(cell)) for cell in row))
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)


def print_pairs(pairs: Iterable[tuple[str, object]]) -> None:
    """Facts, one a line."""
    entries = [(key, text(value)) for key, value in pairs]
    width = max(len(key) for key, _ in entries)
    for key, value in entries:
        click.echo(f"{key:<{width}}  {value}")


def text(value: object) -> str:
    """A value as a person reads it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, tuple | list):
        return ", ".join(text(entry) for entry in value)
    return str(value)


def size(count: float) -> str:
    """Bytes as a person reads them: powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def moment(seconds: float) -> str:
    """A time since 1970 in the local time zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))

"""What commands print: tables for a person, JSON for a program."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDE = 1_000
"""Columns of a table that goes into a pipe or file: nothing is cut there."""

MOST_NUMBERS = 8
"""Of those in one line, where there are others like it."""

_GAP = 2
"""Columns between two columns of a table."""


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
    """A table; numbers stand right, and no word is broken. `empty` is said instead of a table without rows."""
    from rich.table import Table
    from rich.text import Text

    cells = [list(row) for row in rows]
    if not cells:
        click.echo(empty)
        return
    texts = [[text(cell) for cell in row] for row in cells]
    console = _console()
    widths = _widths([list(column) for column in zip(columns, *texts, strict=True)], console.width)
    console.width = max(console.width, sum(widths) + _GAP * len(widths))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, (column, width) in enumerate(zip(columns, widths, strict=True)):
        right = all(isinstance(row[index], int | float) for row in cells)
        table.add_column(column, justify="right" if right else "left", width=width)
    for row in texts:
        table.add_row(*(Text(cell) for cell in row))
    print_rich(table, console)


def _widths(columns: list[list[str]], available: int) -> list[int]:
    """The widths of columns: the widest one gives way first, but none becomes narrower than its longest word."""
    least = [max(len(word) for cell in column for word in cell.split() or [""]) for column in columns]
    widths = [max(len(cell) for cell in column) for column in columns]
    while sum(widths) + _GAP * (len(widths) - 1) > available:
        slack = [index for index, width in enumerate(widths) if width > least[index]]
        if not slack:
            break  # the terminal wraps what is left
        widths[max(slack, key=lambda index: widths[index])] -= 1
    return widths


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDE)


def print_rich(table: Table, console: Console | None = None) -> None:
    """A table without spaces at the end of its lines, as wide as the terminal."""
    console = console or _console()
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        click.echo(line.rstrip())


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
        return ", ".join("none" if entry is None else text(entry) for entry in value)
    shown = str(value)
    return shown if shown.isprintable() else repr(shown)  # a name with a line break, or a code for the terminal


def numbers(values: Mapping[str, float], most: int | None = None) -> str:
    """Numbers by name, the first `most` of them."""
    shown = [f"{name}={value:.4g}" for name, value in list(values.items())[:most]]
    return " ".join(shown if len(shown) == len(values) else [*shown, f"and {len(values) - len(shown)} more"])


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

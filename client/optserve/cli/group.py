"""`optserve group ...`: a job's parameter groups."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from optserve.cli.assignments import Assignment, collect
from optserve.cli.options import example, json_option, opened, server_option
from optserve.cli.output import print_json, print_table, text
from optserve.wire.errors import InvalidArgumentError
from optserve.wire.values import Value

if TYPE_CHECKING:
    import numpy.typing as npt

GroupEntries = Mapping[str, Value | list[str]]


@click.group(epilog=example("optserve group set digits 0 lr=1e-4"))
def group() -> None:
    """Look at and edit parameter groups while the job runs."""


def document(index: int, entries: GroupEntries) -> dict[str, object]:
    """A group as --json shows it: its index, then torch's keys."""
    return {"group": index, **entries}


def describe(entries: GroupEntries) -> str:
    """The hyperparameters except lr, and except those that are none, off or 0."""
    shown = {key: value for key, value in entries.items() if key not in ("params", "lr") and value not in (None, False)}
    return " ".join(f"{key}={text(value).replace(' ', '')}" for key, value in shown.items())


def _print_group(index: int, entries: GroupEntries, as_json: bool) -> None:
    if as_json:
        print_json(document(index, entries))
    else:
        click.echo(f"group {index}: lr={text(entries['lr'])} {describe(entries)}")


@group.command("list", epilog=example("optserve group list digits", "optserve group list digits --json"))
@click.argument("job")
@server_option
@json_option
def list_groups(job: str, server: str, as_json: bool) -> None:
    """List the groups with their hyperparameters of now."""
    with opened(server, job) as found:
        groups = found.info().groups
    if as_json:
        print_json([document(index, entries) for index, entries in enumerate(groups)])
        return
    rows = [[index, entries["lr"], describe(entries), entries["params"]] for index, entries in enumerate(groups)]
    print_table(["GROUP", "LR", "HYPERPARAMETERS", "PARAMETERS"], rows)


@group.command(
    "set", epilog=example("optserve group set digits 0 lr=1e-4", "optserve group set digits 1 betas=0.9,0.95 amsgrad=true")
)
@click.argument("job")
@click.argument("index", type=click.IntRange(min=0))
@click.argument("values", nargs=-1, required=True, type=Assignment())
@server_option
@json_option
def set_values(job: str, index: int, values: tuple[tuple[str, Value], ...], server: str, as_json: bool) -> None:
    """Change hyperparameters of group INDEX, from the next step on.

    A list is numbers with commas between them: betas=0.9,0.95.
    """
    changes = collect(values)
    with opened(server, job) as found:
        found.update_group(index, **changes)
        _print_group(index, found.info().groups[index], as_json)


@group.command("add", epilog=example("optserve group add digits head.npz lr=1e-3"))
@click.argument("job")
@click.argument("parameters", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("values", nargs=-1, type=Assignment())
@server_option
@json_option
def add(job: str, parameters: Path, values: tuple[tuple[str, Value], ...], server: str, as_json: bool) -> None:
    """Add a group with the arrays of the .npz file PARAMETERS as its parameters."""
    changes = collect(values)
    arrays = _read_npz(parameters)
    with opened(server, job) as found:
        found.add_param_group({"params": arrays, **changes})
        groups = found.info().groups
        _print_group(len(groups) - 1, groups[-1], as_json)


def _read_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    import numpy as np

    try:
        # Opened here, for np.load forgets to close a torn file. TypeError: an .npy file's bare array.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        arrays = {}
    if not arrays or not all(isinstance(array, np.ndarray) for array in arrays.values()):
        raise InvalidArgumentError(
            f"{path} is not what is allowed: an .npz file of plain arrays under their parameters' names, as np.savez writes it"
        )
    return arrays

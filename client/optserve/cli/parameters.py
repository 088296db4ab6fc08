"""`optserve job rename-parameter`, `replace-parameter` and `remove-parameter`: the parameters of a job that runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from optserve.cli.options import example, json_option, opened, server_option
from optserve.cli.output import print_json
from optserve.wire.errors import InvalidArgumentError

if TYPE_CHECKING:
    import numpy.typing as npt

    from optserve.client import Position


def _print(text: str, facts: dict[str, object], position: Position, as_json: bool) -> None:
    if as_json:
        print_json({**facts, "version": position.version, "step": position.step})
    else:
        click.echo(f"{text}: the job stands at step {position.step}, version {position.version}")


@click.command("rename-parameter", epilog=example("optserve job rename-parameter digits layers.0.weight stem.weight"))
@click.argument("job", metavar="JOB")
@click.argument("old")
@click.argument("new")
@server_option
@json_option
def rename(job: str, old: str, new: str, server: str, as_json: bool) -> None:
    """Give parameter OLD the name NEW. Its value and optimizer state stay; workers must push by the new name."""
    with opened(server, job) as found:
        position = found.rename_parameter(old, new)
    _print(f"renamed {old!r} to {new!r}", {"parameter": new, "old_name": old}, position, as_json)


@click.command("replace-parameter", epilog=example("optserve job replace-parameter digits head.weight head.npy --keep-state"))
@click.argument("job", metavar="JOB")
@click.argument("name")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--keep-state", is_flag=True, help="Keep its optimizer state; needs the same shape and dtype.")
@server_option
@json_option
def replace(job: str, name: str, file: Path, keep_state: bool, server: str, as_json: bool) -> None:
    """Give parameter NAME the value in FILE, an array as np.save writes it, with that array's shape and dtype.

    Its optimizer state begins again at step 0.
    """
    value = _read_npy(file)
    with opened(server, job) as found:
        position = found.replace_parameter(name, value, keep_state)
    shape, dtype = value.shape, str(value.dtype)
    _print(
        f"replaced {name!r} by {shape} of {dtype}",
        {"parameter": name, "shape": shape, "dtype": dtype, "kept_state": keep_state},
        position,
        as_json,
    )


@click.command("remove-parameter", epilog=example("optserve job remove-parameter digits head.bias"))
@click.argument("job", metavar="JOB")
@click.argument("name")
@server_option
@json_option
def remove_parameter(job: str, name: str, server: str, as_json: bool) -> None:
    """Take parameter NAME with its optimizer state out of the job. The last one of a group stays."""
    with opened(server, job) as found:
        position = found.remove_parameter(name)
    _print(f"removed {name!r}", {"parameter": name, "removed": True}, position, as_json)


def _read_npy(path: Path) -> npt.NDArray[Any]:
    import numpy as np

    try:
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            if isinstance(found, np.ndarray):
                return found
            found.close()
    except (ValueError, EOFError, OSError):  # OSError: a torn file
        pass
    raise InvalidArgumentError(f"{path} is not what is allowed: an .npy file of one plain array, as np.save writes it")

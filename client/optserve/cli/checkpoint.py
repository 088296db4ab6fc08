"""`optserve checkpoint ...`: a job's checkpoints on the server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from optserve.cli.destinations import check_new_folder
from optserve.cli.options import example, json_option, opened, server_option
from optserve.cli.output import moment, print_json, print_table, size

if TYPE_CHECKING:
    from optserve.client import Checkpoint


@click.group(epilog=example("optserve checkpoint save digits epoch-3", "optserve checkpoint restore digits epoch-3"))
def checkpoint() -> None:
    """Save, list, verify, restore, download and delete checkpoints."""


def document(found: Checkpoint) -> dict[str, object]:
    """A checkpoint as --json shows it."""
    return {
        "name": found.name,
        "version": found.position.version,
        "step": found.position.step,
        "lineage_id": found.position.lineage_id,
        "size_bytes": found.size_bytes,
        "time_seconds": found.time_seconds,
    }


def _print(what: str, found: Checkpoint, as_json: bool) -> None:
    if as_json:
        print_json(document(found))
    else:
        click.echo(
            f"{what} {found.name!r}: step {found.position.step}, version {found.position.version}, {size(found.size_bytes)}"
        )


@checkpoint.command(epilog=example("optserve checkpoint save digits epoch-3"))
@click.argument("job")
@click.argument("name")
@click.option("--overwrite", is_flag=True, help="Take the place of a checkpoint of that name.")
@server_option
@json_option
def save(job: str, name: str, overwrite: bool, server: str, as_json: bool) -> None:
    """Save parameters, optimizer state, groups and schedule as NAME, on the server."""
    with opened(server, job) as found:
        _print("saved", found.save_checkpoint(name, overwrite=overwrite), as_json)


@checkpoint.command("list", epilog=example("optserve checkpoint list digits"))
@click.argument("job")
@server_option
@json_option
def list_checkpoints(job: str, server: str, as_json: bool) -> None:
    """List the job's checkpoints, oldest first."""
    with opened(server, job) as found:
        entries = found.checkpoints()
    if as_json:
        print_json([document(entry) for entry in entries])
        return
    rows = [
        [entry.name, entry.position.step, entry.position.version, size(entry.size_bytes), moment(entry.time_seconds)]
        for entry in entries
    ]
    print_table(["NAME", "STEP", "VERSION", "SIZE", "SAVED"], rows, empty="no checkpoints")


@checkpoint.command(epilog=example("optserve checkpoint verify digits epoch-3"))
@click.argument("job")
@click.argument("name")
@server_option
@json_option
def verify(job: str, name: str, server: str, as_json: bool) -> None:
    """Read NAME whole on the server and compare its sizes and hashes. Exits with 5 if it is corrupt."""
    with opened(server, job) as found:
        _print("whole", found.verify_checkpoint(name), as_json)


@checkpoint.command(epilog=example("optserve checkpoint restore digits epoch-3"))
@click.argument("job")
@click.argument("name")
@server_option
@json_option
def restore(job: str, name: str, server: str, as_json: bool) -> None:
    """Put the job back where NAME stands. Its workers are told, and go on from there."""
    with opened(server, job) as found:
        position = found.restore_checkpoint(name)
    if as_json:
        keys = ("name", "version", "step", "lineage_id")
        print_json(dict(zip(keys, (name, position.version, position.step, position.lineage_id), strict=True)))
    else:
        click.echo(f"restored {name!r}: the job stands at step {position.step}, version {position.version}")


@checkpoint.command(epilog=example("optserve checkpoint download digits epoch-3 ./epoch-3"))
@click.argument("job")
@click.argument("name")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), required=False)
@server_option
@json_option
def download(job: str, name: str, folder: Path | None, server: str, as_json: bool) -> None:
    """Copy NAME's files into FOLDER (default: a folder called NAME).

    `server.create_job(..., from_checkpoint=FOLDER)` makes a job of them again; the .safetensors files open anywhere.
    """
    target = folder or Path(name)
    check_new_folder(target)
    with opened(server, job) as found:
        found.download_checkpoint(name, target)
    print_files(target, as_json)


def print_files(folder: Path, as_json: bool) -> None:
    """Tells which files a folder has now."""
    files = {entry.name: entry.stat().st_size for entry in sorted(folder.iterdir()) if entry.is_file()}
    if as_json:
        print_json({"folder": str(folder), "files": [{"name": name, "size_bytes": count} for name, count in files.items()]})
        return
    for name, count in files.items():
        click.echo(f"{folder / name}  {size(count)}")


@checkpoint.command(epilog=example("optserve checkpoint delete digits epoch-3"))
@click.argument("job")
@click.argument("name")
@server_option
@json_option
def delete(job: str, name: str, server: str, as_json: bool) -> None:
    """Delete NAME from the server."""
    with opened(server, job) as found:
        found.delete_checkpoint(name)
    if as_json:
        print_json({"name": name, "deleted": True})
    else:
        click.echo(f"deleted {name!r}")

"""`optserve job pull` and `optserve job export`: a job's weights and state as files."""

from __future__ import annotations

import uuid
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from optserve.cli.checkpoint import print_files
from optserve.cli.destinations import check_new_folder, check_writable
from optserve.cli.options import example, json_option, opened, server_option
from optserve.cli.output import print_json, size

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from optserve.client import Job


@click.command(epilog=example("optserve job pull digits --out weights.npz"))
@click.argument("job", metavar="JOB")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The .npz file to write.")
@server_option
@json_option
def pull(job: str, out: Path, server: str, as_json: bool) -> None:
    """Fetch the weights of now into an .npz file, one array a parameter.

    bfloat16, which .npz has not, is written as float32, which holds every bfloat16 exactly.
    """
    import numpy as np

    check_writable(out.parent, out)
    with opened(server, job) as found:
        with _busy(f"pulling {job}"):
            weights = found.pull()
        step = found.info().position.step
    arrays = {name: array.astype(np.float32) if array.dtype.kind == "V" else array for name, array in weights.items()}
    _write_npz(out, arrays)
    total = sum(array.nbytes for array in arrays.values())
    if as_json:
        print_json({"file": str(out), "step": step, "parameters": len(arrays), "bytes": total})
    else:
        click.echo(f"{out}: {len(arrays)} parameters, {size(total)}, step {step}")


def _write_npz(path: Path, arrays: Mapping[str, npt.NDArray[np.generic]]) -> None:
    """Whole or not at all. By hand, for np.savez takes no array of the name "file"."""
    import numpy as np
    from numpy.lib import format as npy

    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with zipfile.ZipFile(partial, "w") as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    npy.write_array(entry, np.asarray(array, order="C"), allow_pickle=False)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@click.command(epilog=example("optserve job export digits ./digits"))
@click.argument("job", metavar="JOB")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@server_option
@json_option
def export(job: str, folder: Path, server: str, as_json: bool) -> None:
    """Write the whole job of now into FOLDER: weights and optimizer state as safetensors, the rest as JSON.

    The same files as a checkpoint's: `server.create_job(..., from_checkpoint=FOLDER)` makes a job of them again.
    """
    check_new_folder(folder)
    with opened(server, job) as found, _temporary_checkpoint(found) as name, _busy(f"exporting {job}"):
        found.download_checkpoint(name, folder)
    print_files(folder, as_json)


@contextmanager
def _temporary_checkpoint(found: Job) -> Iterator[str]:
    name = f"export-{uuid.uuid4().hex[:12]}"
    found.save_checkpoint(name)
    try:
        yield name
    finally:
        found.delete_checkpoint(name)


@contextmanager
def _busy(what: str) -> Iterator[None]:
    """Something moves on the screen, if a person looks."""
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield

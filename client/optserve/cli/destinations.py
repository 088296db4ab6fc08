"""Where a command is going to write, looked at before it does any work."""

from __future__ import annotations

import os
from pathlib import Path

from optserve.wire.errors import InvalidArgumentError


def check_new_folder(folder: Path) -> None:
    """InvalidArgumentError unless the folder can be made. Nothing is ever overwritten; folders above it are made too."""
    if os.path.lexists(folder):
        raise InvalidArgumentError(f"{folder} exists; the files go into a new folder")
    nearest = next(parent for parent in folder.absolute().parents if parent.exists())
    check_writable(nearest, folder)


def check_writable(folder: Path, target: Path) -> None:
    """InvalidArgumentError unless `folder`, which `target` is to lie in, is a folder that this user may write to."""
    if not folder.exists():
        raise InvalidArgumentError(f"{target} cannot be written: there is no folder {folder}")
    if not folder.is_dir():
        raise InvalidArgumentError(f"{target} cannot be written: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InvalidArgumentError(f"{target} cannot be written: no permission to write to {folder}")

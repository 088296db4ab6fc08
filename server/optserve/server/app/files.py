"""The two files that a server keeps beside its storage: the data dir's lock and the address file."""

from __future__ import annotations

import os
from pathlib import Path

from optserve.wire import errors


def lock(data_dir: Path) -> int | None:
    """Holds the data dir for this process; the lock ends with it, however it ends."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return None
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise errors.StorageError(f"cannot use the data dir {data_dir}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise errors.StorageError(f"the data dir {data_dir} is in use by another server") from error
    return descriptor


def write_whole(path: Path, text: str) -> None:
    """A reader sees the whole address or no file."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text + "\n")
    temporary.replace(path)

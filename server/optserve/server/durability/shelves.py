"""Folders that appear, are replaced and vanish whole, whatever operation of the storage fails or is the last one.

A new folder is filled under a hidden name and renamed. One that is replaced is renamed to ".old-<name>" first, because a
rename cannot replace a folder that holds files; until the new one has its name, the old one is found under the hidden one.
What is deleted is renamed to a hidden name first. Hidden leftovers are reclaimed when the server starts.
"""

from __future__ import annotations

import logging
import re
import threading
import uuid

from optserve.server.storage import Storage, remove_tree
from optserve.wire.errors import CheckpointExistsError, InvalidNameError, StorageError

_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_OLD, _TEMPORARY = ".old-", ".tmp-"


def check_name(name: str, what: str = "checkpoint name") -> None:
    """InvalidNameError if it could be a path, a hidden file, or too long for a file system."""
    if not _NAME.fullmatch(name):
        raise InvalidNameError(
            f"{what} {name[:200]!r} is not allowed; use letters, digits, '.', '_' and '-', at most 128, not '.' first",
            name=name,
        )


class Shelves:
    """`lock` guards the names: hold it from `locate` until the files are open. A shelf is the path of a folder of folders."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.lock = threading.RLock()

    def names(self, shelf: str) -> list[str]:
        """Sorted; none if there is no such shelf."""
        found = self.storage.list(shelf)
        visible = {name.removeprefix(_OLD) for name in found if _NAME.fullmatch(name.removeprefix(_OLD))}
        return sorted(name for name in visible if self.locate(shelf, name))

    def locate(self, shelf: str, name: str) -> str | None:
        """The folder's path now."""
        for path in (f"{shelf}/{name}", f"{shelf}/{_OLD}{name}"):
            if self.storage.is_folder(path):
                return path
        return None

    def temporary(self, shelf: str) -> str:
        """A new hidden folder; makes the shelf if need be."""
        if not self.storage.is_folder(shelf):
            self.storage.make_folder(shelf)
            parent = shelf
            while parent:
                parent = parent.rpartition("/")[0]
                self.storage.fsync_folder(parent)
        path = f"{shelf}/{_TEMPORARY}{uuid.uuid4().hex}"
        self.storage.make_folder(path)
        return path

    def publish(self, temporary: str, shelf: str, name: str, *, replace: bool) -> None:
        """Gives a filled folder its name. CheckpointExistsError if it is taken and not to be replaced."""
        target, old = f"{shelf}/{name}", f"{shelf}/{_OLD}{name}"
        self.storage.fsync_folder(temporary)
        with self.lock:
            found = self.locate(shelf, name)
            if found and not replace:
                raise exists(name)
            if found == target:
                if self.storage.is_folder(old):
                    self._hide(shelf, old)
                self.storage.rename(target, old)
            try:
                self.storage.rename(temporary, target)
            except StorageError:
                if found == target:
                    self._quietly_rename(old, target)
                raise
            self.storage.fsync_folder(shelf)
            if found:
                self.discard(old)

    def remove(self, shelf: str, name: str) -> bool:
        """False if there is none. Once it returns, the folder stays gone even if its bytes could not all be freed."""
        with self.lock:
            hidden = [
                self._hide(shelf, path) for path in (f"{shelf}/{_OLD}{name}", f"{shelf}/{name}") if self.storage.is_folder(path)
            ]
            if hidden:
                self.storage.fsync_folder(shelf)
        for path in hidden:
            self.discard(path)
        return bool(hidden)

    def discard(self, path: str) -> None:
        """Frees a hidden folder; what cannot be freed now is freed by `reclaim`."""
        try:
            if self.storage.is_folder(path):
                remove_tree(self.storage, path)
        except StorageError as error:
            _LOG.warning("leftover %s stays until the next start: %s", path, error)

    def reclaim(self, shelf: str) -> None:
        """Frees what an earlier process left, and gives a folder that it was replacing its name back."""
        for name in self.storage.list(shelf):
            path = f"{shelf}/{name}"
            if name.startswith(_OLD) and not self.storage.is_folder(f"{shelf}/{name.removeprefix(_OLD)}"):
                self._quietly_rename(path, f"{shelf}/{name.removeprefix(_OLD)}")
            elif name.startswith((_OLD, _TEMPORARY)):
                self.discard(path)

    def _hide(self, shelf: str, path: str) -> str:
        hidden = f"{shelf}/{_TEMPORARY}{uuid.uuid4().hex}"
        self.storage.rename(path, hidden)
        return hidden

    def _quietly_rename(self, old: str, new: str) -> None:
        try:
            self.storage.rename(old, new)
        except StorageError as error:
            _LOG.warning("%s keeps its hidden name until the next start: %s", old, error)


def exists(name: str) -> CheckpointExistsError:
    return CheckpointExistsError(f"checkpoint {name!r} exists", name=name)

"""The small file interface through which every byte under the data directory goes."""

from optserve.server.storage.disk import DiskStorage
from optserve.server.storage.files import Reader, Storage, Writer, remove_tree
from optserve.server.storage.memory import MemoryStorage

__all__ = ["DiskStorage", "MemoryStorage", "Reader", "Storage", "Writer", "remove_tree"]

"""glibc's allocator, tuned for megabyte messages.

By default each 1 MiB message is mapped and unmapped anew, and page faults, not gRPC, limit the wire: 1.8 GB/s became 3.3-4.3 on
loopback (DESIGN.md, section 4). Does nothing on another libc.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
_SETTINGS = ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 512 << 20), (_M_TOP_PAD, 16 << 20), (_M_ARENA_MAX, 2))


def tune() -> bool:
    """Whether the settings were taken. Only at a process's start: threads that exist keep their arenas."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(option, value) == 1 for option, value in _SETTINGS)

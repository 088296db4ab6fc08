"""The process's compute threads, as many as cores, shared by all jobs."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

Item = TypeVar("Item")


def core_count() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(core_count(), thread_name_prefix="optserve-compute")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has none of its parent's threads


def each(work: Callable[[Item], None], items: Sequence[Item], threads: int | None = None) -> None:
    """Does the work for every item, in this thread and up to `threads - 1` others (None: one thread a core).

    The order is not defined. The first error ends its own thread's share and is raised when all threads have stopped.
    """
    count = min(core_count() if threads is None else threads, len(items))
    if count <= 1:
        for item in items:
            work(item)
        return
    queue = deque(items)

    def drain() -> None:
        while True:
            try:
                item = queue.popleft()
            except IndexError:
                return
            work(item)

    helpers = [_pool().submit(drain) for _ in range(count - 1)]
    try:
        drain()
    finally:
        for helper in helpers:
            if not helper.cancel():
                helper.result()

"""The two environment variables that the client reads; nothing else of it reads any."""

from __future__ import annotations

import os

from optserve.wire.errors import InvalidArgumentError


def server_address() -> str | None:
    """OPTSERVE_SERVER; None if it is not set or empty."""
    return os.environ.get("OPTSERVE_SERVER") or None


def rank() -> int | None:
    """RANK, as torchrun and its like set it; None if it is not set or empty."""
    value = os.environ.get("RANK")
    if not value:
        return None
    if not value.isascii() or not value.isdigit():
        raise InvalidArgumentError(f"the environment variable RANK is {value!r}; allowed are whole numbers from 0")
    return int(value)

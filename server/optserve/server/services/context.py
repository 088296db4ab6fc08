"""What a service asks of a call's context: gRPC's, or that of a call in process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

LONGEST_WAIT_SECONDS = 3600.0
"""Of a call that came without a deadline."""


class CallContext(Protocol):
    """The part of grpc.ServicerContext that services use."""

    def is_active(self) -> bool:
        """False once the client is gone, has cancelled, or the deadline has passed."""

    def time_remaining(self) -> float | None:
        """Seconds until the deadline; None without one."""

    def cancel(self) -> object:
        """Ends the call from this side."""

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """Calls it, in another thread, when the call ends; False if it has ended."""


def seconds_left(context: CallContext, limit: float) -> float:
    """How long a wait may take: until a little before the call's deadline, so that the typed error still arrives."""
    limit = max(0.0, limit)  # in this order a NaN becomes 0
    left = context.time_remaining()
    return limit if left is None else max(0.0, min(limit, left - min(0.5, left / 10)))

"""Heartbeats: a thread that keeps a lease running, so that a long evaluation or compilation is not death."""

from __future__ import annotations

import threading

from optserve.client._connection import Connection, logger
from optserve.client._session import Session
from optserve.v1 import workers_pb2
from optserve.wire.errors import FencedError, JobNotFoundError, OptserveError


class Heartbeat:
    """Renews a session's lease three times as often as it would end. Its errors end nothing but, at most, itself.

    It holds no worker or job: when those are forgotten without being closed, their finalizer stops it and the lease ends.
    """

    def __init__(self, connection: Connection, session: Session, lease_seconds: float, who: str) -> None:
        self._connection = connection
        self._session = session
        self._interval_seconds = lease_seconds / 3
        self._who = who
        self.stopped = threading.Event()
        threading.Thread(target=self._run, name=f"optserve-heartbeat-{who}", daemon=True).start()

    def stop(self) -> None:
        """Idempotent; does not wait."""
        self.stopped.set()

    def _run(self) -> None:
        quiet = False
        while not self.stopped.wait(self._interval_seconds):
            session = self._session
            request = workers_pb2.HeartbeatRequest(job_id=session.job_id, session_id=session.session_id, epoch=session.epoch)
            try:
                self._connection.once(request, workers_pb2.HeartbeatResponse, max(1.0, self._interval_seconds))
                quiet = False
            except (FencedError, JobNotFoundError) as error:
                logger.info("%s: heartbeats end: %s", self._who, error)
                return
            except OptserveError as error:
                if self._connection.closed.is_set():
                    return
                if not quiet and not self.stopped.is_set():
                    logger.warning("%s: a heartbeat failed: %s", self._who, error)
                quiet = True

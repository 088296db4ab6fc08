"""A server in this process: no address, no gRPC, nothing on disk. All connections of the process share it."""

from __future__ import annotations

import os
import threading
from typing import Any

from optserve.client._direct import DirectTransport
from optserve.wire.errors import MissingExtraError

_STOP_SECONDS = 5.0

_lock = threading.Lock()
"""Guards the server and its count of users."""
_app: Any = None
_users = 0
_pid = 0


def transport() -> DirectTransport:
    """A connection to this process's server, which is started with the first and stopped with the last one.

    MissingExtraError if the server's dependencies are not installed.
    """
    global _app, _users, _pid
    with _lock:
        if _app is None or _pid != os.getpid():  # a server's threads do not survive a fork
            _app, _users, _pid = _started(), 0, os.getpid()
        _users += 1
        app = _app
    return DirectTransport(app.handlers, lambda: _release(app))


def _started() -> Any:
    try:
        from optserve.server.app import App, ServerConfig
    except ImportError as error:
        raise MissingExtraError(
            f'no server can be embedded here ({error}): pip install "optserve[server]", or give connect() a server\'s address'
        ) from error
    return App(ServerConfig(address=None))


def _release(app: Any) -> None:
    global _app, _users
    with _lock:
        if app is not _app:
            return
        _users -= 1
        if _users:
            return
        _app = None
    app.stop(_STOP_SECONDS)

"""A proxy between a client and a server that cuts their connection at any byte."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class Proxy:
    """Forwards TCP to a server; cuts the connection once so many bytes have gone in one direction."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.cuts = 0
        self._direction, self._left = "", 0
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def cut_after(self, direction: str, count: int) -> None:
        """ "up": from the client to the server; "down": back."""
        with self._lock:
            self._direction, self._left = direction, count

    def cut(self) -> None:
        with self._lock:
            found, self._sockets = self._sockets, set()
            self._direction = ""
            self.cuts += 1
        for entry in found:
            with suppress(OSError):
                entry.shutdown(socket.SHUT_RDWR)
            entry.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            with self._lock:
                self._sockets |= {client, server}
            for source, sink, direction in ((client, server, "up"), (server, client, "down")):
                thread = threading.Thread(target=self._forward, args=(source, sink, direction), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _forward(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(self._passed(data, direction))
                with self._lock:
                    over = self._direction == direction and self._left <= 0
                if over:
                    self.cut()
        for entry in (source, sink):
            with suppress(OSError):
                entry.shutdown(socket.SHUT_RDWR)
            entry.close()

    def _passed(self, data: bytes, direction: str) -> bytes:
        with self._lock:
            if self._direction != direction:
                return data
            passed = data[: max(self._left, 0)]
            self._left -= len(data)
            return passed

"""A server: its configuration, its parts wired together, its start and its stop."""

from optserve.server.app.app import App
from optserve.server.app.config import ServerConfig
from optserve.server.app.serve import serve, start_line

__all__ = ["App", "ServerConfig", "serve", "start_line"]

"""Curves of jobs: what their rounds come to, as TensorBoard event files."""

from optserve.server.metrics.curves import Curves

__all__ = ["Curves"]

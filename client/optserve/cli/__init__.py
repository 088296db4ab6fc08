"""The command line: `optserve serve`, `optserve demo`, `optserve job list`, ..."""

from optserve.cli.program import main

__all__ = ["main"]

"""What a message about an unknown name says."""

from __future__ import annotations

import difflib


def nearest(name: str, known: list[str]) -> str:
    """The end of a message about an unknown name: "; did you mean 'adam'? known: ..."."""
    matches = difflib.get_close_matches(name.lower(), [entry.lower() for entry in known], n=1)
    hint = f"; did you mean {next(entry for entry in known if entry.lower() == matches[0])!r}?" if matches else ";"
    return f"{hint} known: {', '.join(known)}"

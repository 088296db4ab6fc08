"""A job's lineages: which versions still count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optserve.server.records import Position
from optserve.wire import errors


@dataclass
class History:
    """The lineage of now, the version it began at, and where each earlier one ended."""

    lineage_id: str
    began_at: int = 0
    ended: dict[str, int] = field(default_factory=dict)

    def branch(self, lineage_id: str, version: int) -> None:
        """Begins a new lineage at a version; of every earlier one, what came after is gone."""
        self.ended[self.lineage_id] = version
        self.ended = {lineage: min(end, version) for lineage, end in self.ended.items()}
        self.lineage_id = lineage_id
        self.began_at = version

    def check(self, lineage_id: str, version: int, now: Position, **facts: object) -> None:
        """RolledBackError if a client that saw (lineage, version) saw something that the job no longer has.

        A lineage that is not known began after the last checkpoint and ended with a kill: what it held is not known either.
        """
        if not lineage_id or not version:
            return
        known = lineage_id == self.lineage_id or lineage_id in self.ended
        end = now.version if lineage_id == self.lineage_id else self.ended.get(lineage_id, self.began_at)
        if known and version <= end:
            return
        what = f"version {version} is gone, it went back to version {end}" if known else "its history was lost in a kill"
        raise rolled_back(f"the job stands before what this client saw: {what}", version, end, now, **facts)

    def to_document(self) -> dict[str, Any]:
        return {"lineage_id": self.lineage_id, "ended": self.ended}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> History:
        """TypeError or KeyError if it is none."""
        ended = dict(document["ended"])
        lineage_id = document["lineage_id"]
        if not all(isinstance(entry, str) for entry in (lineage_id, *ended)) or not all(
            type(end) is int for end in ended.values()
        ):
            raise TypeError(f"{document!r} is not a history")
        return cls(lineage_id, 0, ended)


def rolled_back(why: str, version: int, end: int, now: Position, **facts: object) -> errors.RolledBackError:
    """For a client that saw `version`, of which the versions after `end` are gone. Its metadata are where to go on from."""
    return errors.RolledBackError(
        f"{why} and is at version {now.version}, step {now.step}; pull the weights and go on from there",
        **{"from": version, "to": end, "lineage_id": now.lineage_id, "version": now.version, "step": now.step},
        **facts,
    )

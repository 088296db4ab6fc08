"""Identity of calls: who calls, which call it is, and what the caller has seen."""

from __future__ import annotations

import threading
import uuid

from optserve.v1 import types_pb2 as pb
from optserve.wire.errors import RolledBackError


class Session:
    """One caller of one job. Its owner's lock guards `seq` and `epoch`; `seen` guards itself."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self.session_id = str(uuid.uuid4())
        self.epoch = 0
        self.seq = 0
        """Of the last call that is known to be applied."""
        self._lock = threading.Lock()
        self._seen: pb.Position | None = None
        self._ended: set[str] = set()

    @property
    def seen(self) -> pb.Position | None:
        """The last position that any reply carried."""
        return self._seen

    def saw(self, position: pb.Position) -> None:
        """Takes a reply's position; a late reply of a lineage that was left is ignored."""
        with self._lock:
            seen = self._seen
            if not position.lineage_id or position.lineage_id in self._ended:
                return
            if seen is not None and seen.lineage_id != position.lineage_id:
                self._ended.add(seen.lineage_id)
            elif seen is not None and seen.version > position.version:
                return
            self._seen = position

    def rolled_back(self, error: RolledBackError) -> None:
        """Goes on from where the job stands: the next call is not refused again."""
        lineage_id = error.metadata.get("lineage_id", "")
        with self._lock:
            if self._seen is not None and self._seen.lineage_id != lineage_id:
                self._ended.add(self._seen.lineage_id)
            self._seen = None
        self.saw(pb.Position(lineage_id=lineage_id, version=int(error.metadata.get("version", 0))))

    def identity(self) -> pb.CallIdentity:
        """Of the next mutating call, and of its repeats."""
        return pb.CallIdentity(
            job_id=self.job_id, session_id=self.session_id, epoch=self.epoch, seq=self.seq + 1, seen=self._seen
        )

    def renew(self) -> None:
        """Another session: for a caller that is no worker, when it is not known what became of its last call."""
        self.session_id = str(uuid.uuid4())
        self.seq = 0

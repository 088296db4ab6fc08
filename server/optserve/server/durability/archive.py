"""Jobs in and out of checkpoints: what of a job goes into which file, and which checkpoint a start continues from."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from optserve.server.backends import Backend
from optserve.server.durability.checkpoints import Checkpoints, Content, Info
from optserve.server.durability.upload import Upload
from optserve.server.jobs import Job
from optserve.server.records import Caller, Restored, new_id
from optserve.server.store import StoreState
from optserve.wire import errors

logger = logging.getLogger("optserve.server")

SHUTDOWN = "shutdown"
"""The checkpoint that a stopping server leaves of each job."""

IMPORTED = "imported"
"""The checkpoint that a job was created from."""

_UPLOAD = "upload-"
"""Begins the name of a folder that belongs to a call, not to a job."""


class Archive:
    """The checkpoints of a server's jobs; a job's folder is its id. Thread safe."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints

    def save(self, job_id: str, name: str, document: dict[str, Any], tensors: StoreState, *, replace: bool = False) -> Info:
        """All or nothing. The same name at the same position gives what was saved; at another one CheckpointExistsError."""
        if not replace:
            found = self._saved(job_id, name, document["position"])
            if found is not None:
                return found
        newest = max((info.time_seconds for info in self.checkpoints.list(job_id)), default=0.0)
        now = max(time.time(), newest + 1e-3)  # a clock that was set back must not make it look older than the others
        content = Content(document, tensors.values, tensors.tensors)
        try:
            return self.checkpoints.save(job_id, name, content, now, replace=replace)
        except errors.CheckpointExistsError:  # another call was faster
            found = self._saved(job_id, name, document["position"])
            if found is None:
                raise
            return found

    @staticmethod
    def check_name(name: str) -> None:
        """InvalidNameError for the names that the server itself saves under."""
        if name in (SHUTDOWN, IMPORTED):
            raise errors.InvalidNameError(f"checkpoint name {name!r} is the server's own; choose another", name=name)

    def _saved(self, job_id: str, name: str, position: dict[str, Any]) -> Info | None:
        """The checkpoint if it is of that position, None if there is none of that name."""
        try:
            found = self.checkpoints.info(job_id, name)
        except errors.CheckpointNotFoundError:
            return None
        if found.position != position:
            raise errors.CheckpointExistsError(
                f"checkpoint {name!r} exists (version {found.position['version']}); overwrite or delete it, or choose another",
                name=name,
            )
        return found

    def restored(self, job_id: str, name: str, caller: Caller, lineage_id: str) -> Restored:
        """The record that puts a job where a checkpoint stands."""
        content = self.checkpoints.read(job_id, name)
        return Restored(caller, lineage_id, content.document, content.parameters, content.state)

    @contextmanager
    def receive(self, files: Sequence[tuple[str, int]]) -> Iterator[tuple[str, Upload]]:
        """A checkpoint from elsewhere, and the folder that it has until the `with` ends.

        It is in no job's folder: its document is the other job's, and the next start must not take it for this one's.
        """
        folder = f"{_UPLOAD}{new_id()}"
        try:
            with self.checkpoints.receive(folder, IMPORTED, files) as upload:
                yield folder, upload
        finally:
            self.checkpoints.delete_folder(folder)

    def imported(self, folder: str, job_id: str, name: str, backend: Backend, lineage_id: str) -> Job:
        """A new job of that name from a received checkpoint."""
        return self._load(folder, IMPORTED, job_id, name, backend, lineage_id)

    def _load(self, folder: str, checkpoint: str, job_id: str, name: str | None, backend: Backend, lineage_id: str) -> Job:
        content = self.checkpoints.read(folder, checkpoint)
        return Job.from_document(job_id, name, content.document, content.parameters, content.state, backend, lineage_id)

    def recover(self, backend: Backend) -> list[Job]:
        """Every job from its newest checkpoint that is whole, the last saved one first.

        What cannot be read is said in the log, and left where it is.
        """
        found: list[tuple[float, Job]] = []
        for job_id in self.checkpoints.folders():
            if job_id.startswith(_UPLOAD):  # its call ended with the server
                self.checkpoints.delete_folder(job_id)
                continue
            for info in reversed(self.checkpoints.list(job_id)):
                try:
                    job = self._load(job_id, info.name, job_id, None, backend, new_id())
                except errors.OptserveError as error:
                    logger.error("job %s: checkpoint %r was not used: %s", job_id, info.name, error)
                    continue
                if not job.name:  # its session ended with the server
                    self.checkpoints.delete_folder(job_id)
                    break
                logger.info("job %r continues from checkpoint %r at version %d", job.name, info.name, job.position.version)
                found.append((info.time_seconds, job))
                break
        return [job for _, job in sorted(found, key=lambda entry: entry[0], reverse=True)]

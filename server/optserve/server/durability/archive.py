"""Jobs in and out of checkpoints: what of a job goes into which file, and which checkpoint a start continues from."""

from __future__ import annotations

import logging
import time
from typing import Any

from optserve.server.backends import Backend
from optserve.server.durability.checkpoints import Checkpoints, Content, Info
from optserve.server.jobs import Job
from optserve.server.records import Caller, Restored, new_id
from optserve.server.store import StoreState
from optserve.wire import errors

logger = logging.getLogger("optserve.server")

SHUTDOWN = "shutdown"
"""The checkpoint that a stopping server leaves of each job."""

IMPORTED = "imported"
"""The checkpoint that a job was created from."""


class Archive:
    """The checkpoints of a server's jobs; a job's folder is its id. Thread safe."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints

    def save(self, job_id: str, name: str, document: dict[str, Any], tensors: StoreState, *, replace: bool = False) -> Info:
        """All or nothing. The same name at the same position gives what was saved; at another one CheckpointExistsError."""
        if not replace:
            if name in (SHUTDOWN, IMPORTED):
                raise errors.InvalidNameError(f"checkpoint name {name!r} is the server's own; choose another", name=name)
            try:
                found = self.checkpoints.info(job_id, name)
            except errors.CheckpointNotFoundError:
                found = None
            if found is not None and found.position == document["position"]:
                return found
            if found is not None:
                raise errors.CheckpointExistsError(
                    f"checkpoint {name!r} exists (version {found.position['version']}); delete it or choose another name",
                    name=name,
                )
        newest = max((info.time_seconds for info in self.checkpoints.list(job_id)), default=0.0)
        now = max(time.time(), newest + 1e-3)  # a clock that was set back must not make it look older than the others
        return self.checkpoints.save(job_id, name, Content(document, tensors.values, tensors.state), now, replace=replace)

    def restored(self, job_id: str, name: str, caller: Caller, lineage_id: str) -> Restored:
        """The record that puts a job where a checkpoint stands."""
        content = self.checkpoints.read(job_id, name)
        return Restored(caller, lineage_id, content.document, content.parameters, content.state)

    def load(self, job_id: str, checkpoint: str, name: str | None, backend: Backend, lineage_id: str) -> Job:
        """A job from a checkpoint in its folder. `name`: a new job's; None: the same job goes on under its own."""
        content = self.checkpoints.read(job_id, checkpoint)
        return Job.from_document(job_id, name, content.document, content.parameters, content.state, backend, lineage_id)

    def recover(self, backend: Backend) -> list[Job]:
        """Every job from its newest checkpoint that is whole. What cannot be read is said in the log, and left where it is."""
        jobs = []
        for job_id in self.checkpoints.folders():
            for info in reversed(self.checkpoints.list(job_id)):
                try:
                    job = self.load(job_id, info.name, None, backend, new_id())
                except errors.OptserveError as error:
                    logger.error("job %s: checkpoint %r was not used: %s", job_id, info.name, error)
                    continue
                if not job.name:  # its session ended with the server
                    self.checkpoints.delete_folder(job_id)
                    break
                logger.info("job %r continues from checkpoint %r at version %d", job.name, info.name, job.position.version)
                jobs.append(job)
                break
        return jobs

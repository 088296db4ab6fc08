"""A job and its folder of checkpoints, which end together."""

from __future__ import annotations

from optserve.server.durability.archive import Archive
from optserve.server.durability.checkpoints import Info
from optserve.server.rounds.host import JobHost
from optserve.server.rounds.registry import Registry
from optserve.wire import errors


class Folders:
    """Writes to jobs' folders, and deletes jobs everywhere. Thread safe: whatever crosses, no folder outlives its job."""

    def __init__(self, registry: Registry, archive: Archive) -> None:
        self._registry = registry
        self._archive = archive

    def save(self, host: JobHost, name: str, *, replace: bool = False) -> Info:
        """A checkpoint of the job as it stands. JobNotFoundError if the job is deleted meanwhile."""
        job_id = host.job.job_id
        document, tensors = host.capture()
        try:
            return self._archive.save(job_id, name, document, tensors, replace=replace)
        finally:
            if self._registry.get(job_id) is None:
                self._archive.checkpoints.delete_folder(job_id)
                raise errors.JobNotFoundError(f"job {host.job.name or job_id!r} was deleted", job=job_id)

    def delete(self, job_id: str) -> None:
        """Ends a job and frees its checkpoints; again changes nothing. JobNotFoundError if it never was."""
        self._registry.delete(job_id)
        self._archive.checkpoints.delete_folder(job_id)

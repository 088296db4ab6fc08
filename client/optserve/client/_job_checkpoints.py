"""A job's checkpoints."""

from __future__ import annotations

from pathlib import Path

from optserve.client import _checkpoint_files
from optserve.client._connection import BULK_SECONDS
from optserve.client._info import Checkpoint, Position
from optserve.client._job_calls import JobCalls
from optserve.v1 import checkpoints_pb2


class CheckpointCalls(JobCalls):
    """Saves, restores, verifies, lists, fetches and deletes checkpoints."""

    def save_checkpoint(self, name: str, *, overwrite: bool = False) -> Checkpoint:
        """Saves the job as it stands, all or nothing; again at the same version it is the same checkpoint.

        CheckpointExistsError if the name stands for another version, unless `overwrite`; InvalidNameError, StorageError.
        """
        request = checkpoints_pb2.SaveCheckpointRequest(
            job_id=self.job_id, name=name, seen=self._caller.session.seen, overwrite=overwrite
        )
        answer = self._caller.read(request, checkpoints_pb2.SaveCheckpointResponse, BULK_SECONDS)
        return Checkpoint.from_proto(answer.checkpoint)

    def restore_checkpoint(self, name: str) -> Position:
        """Puts the job where a checkpoint stands, in a new lineage: other clients that saw more get RolledBackError once.

        CheckpointNotFoundError, CheckpointCorruptError, CheckpointMismatchError: nothing changed.
        """
        answer = self._caller.mutate(
            lambda call: self._connection.call(
                checkpoints_pb2.RestoreCheckpointRequest(call=call, name=name),
                checkpoints_pb2.RestoreCheckpointResponse,
                BULK_SECONDS,
            )
        )
        self._restored.add(answer.position.lineage_id)
        return self._saw(answer.position)

    def verify_checkpoint(self, name: str) -> Checkpoint:
        """Reads a checkpoint whole and compares sizes and hashes. CheckpointCorruptError says what is wrong."""
        request = checkpoints_pb2.VerifyCheckpointRequest(job_id=self.job_id, name=name)
        return Checkpoint.from_proto(
            self._caller.read(request, checkpoints_pb2.VerifyCheckpointResponse, BULK_SECONDS).checkpoint
        )

    def delete_checkpoint(self, name: str) -> None:
        """CheckpointNotFoundError if there is none."""
        answer = self._caller.mutate(
            lambda call: self._connection.call(
                checkpoints_pb2.DeleteCheckpointRequest(call=call, name=name), checkpoints_pb2.DeleteCheckpointResponse
            )
        )
        self._saw(answer.position)

    def download_checkpoint(self, name: str, path: str | Path) -> Path:
        """Writes a checkpoint's files (safetensors and a JSON manifest) into the new folder `path`, whole or not at all."""
        folder = Path(path)
        _checkpoint_files.check_free(folder)
        request = checkpoints_pb2.DownloadCheckpointRequest(job_id=self.job_id, name=name)
        self._caller.download(request, lambda items: _checkpoint_files.read(items, folder))
        return folder

    def checkpoints(self) -> list[Checkpoint]:
        """The job's checkpoints, oldest first."""
        request = checkpoints_pb2.ListCheckpointsRequest(job_id=self.job_id)
        answer = self._caller.read(request, checkpoints_pb2.ListCheckpointsResponse)
        return [Checkpoint.from_proto(entry) for entry in answer.checkpoints]

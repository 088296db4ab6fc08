"""The training that one worker does: its shard of every batch, through the server, to the end of the schedule.

Everything follows from the step where the job stands: the batch, the learning rate, when to stop. So a worker that joins late,
or whose job was restored, goes on from there without being told more.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from optserve.cli.demo import model
from optserve.cli.demo.digits import Digits
from optserve.wire.errors import InternalError, RolledBackError

if TYPE_CHECKING:
    from optserve.client import Job, Server, Worker

HIDDEN_RATE, OUTPUT_RATE = 1e-2, 5e-3
GAMMA = 0.3
CHECKPOINT = "half-way"
_INITIAL_SECONDS = 60.0

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Plan:
    """How long. `rehearse`: rank 0 also saves a checkpoint half-way, goes on a little and restores it."""

    epochs: int
    workers: int
    steps_per_epoch: int
    rehearse: bool = False

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def save_at(self) -> int:
        return self.epochs // 2 * self.steps_per_epoch

    @property
    def restore_at(self) -> int:
        """A tenth of the epochs past the checkpoint."""
        return self.save_at + max(1, self.epochs // 10) * self.steps_per_epoch


def attach(server: Server, name: str, plan: Plan) -> Job:
    """The job: made, with the initial values, by whoever comes first."""
    weights = model.initial_weights()
    groups: list[dict[str, object]] = [
        {"params": {key: weights[key] for key in model.HIDDEN_LAYER}},
        {"params": {key: weights[key] for key in model.OUTPUT_LAYER}, "lr": OUTPUT_RATE},
    ]
    job = server.create_job(name, groups, optimizer="adam", lr=HIDDEN_RATE, workers=plan.workers, exist_ok=True)
    job.wait_for_version(1, timeout_seconds=_INITIAL_SECONDS)  # whoever made it has uploaded the initial values
    if job.lr_schedule is None:
        # Two workers may both come here: a new job waits for all of them, so the second setting only repeats the first.
        job.set_lr_schedule("StepLR", step_size=max(1, plan.epochs // 3), gamma=GAMMA)
    return job


def fingerprint(weights: model.Weights) -> str:
    """Equal for equal bits."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(np.ascontiguousarray(weights[name]).tobytes())
    return digest.hexdigest()


class Trainer:
    """One worker's training. `report` gets dicts whose "kind" is joined, step, saved, restored or done."""

    def __init__(self, job: Job, worker: Worker, plan: Plan, digits: Digits, report: Report) -> None:
        self._job, self._worker, self._plan, self._digits, self._report = job, worker, plan, digits, report
        self._rehearses = plan.rehearse and worker.rank == 0
        self._epoch = 0
        """torch's last_epoch of the job's schedule."""
        self._steps, self._seconds, self._bytes = 0, 0.0, 0

    def run(self) -> model.Weights:
        """Trains to the end of the plan and returns the final weights."""
        kind = "joined"
        while True:
            try:
                weights = self._train(*self._stand(kind))
                break
            except RolledBackError:
                kind = "restored"
        self._tell("done", steps=self._steps, seconds=self._seconds, bytes=self._bytes)
        return weights

    def _stand(self, kind: str) -> tuple[int, model.Weights]:
        """Where the job stands, and its weights. No step comes between: it would need this worker."""
        weights = self._worker.pull()
        step, schedule = self._job.info().position.step, self._job.lr_schedule
        self._epoch = schedule.last_epoch if schedule else self._plan.epochs
        self._tell_stand(kind, step, weights)
        return step, weights

    def _train(self, step: int, weights: model.Weights) -> model.Weights:
        while step < self._plan.steps:
            self._keep_schedule(step)
            if self._rehearse(step, weights):
                step, weights = self._stand("restored")
                continue
            began = time.perf_counter()
            step, weights = self._step(step, weights)
            self._seconds += time.perf_counter() - began
        return weights

    def _step(self, step: int, weights: model.Weights) -> tuple[int, model.Weights]:
        images, labels = self._digits.shard(step, self._worker.rank, self._plan.workers)
        if not len(labels):
            updated = self._worker.skip_round()
        else:
            loss, gradients = model.loss_and_gradients(weights, images, labels)
            updated = self._worker.push_pull(gradients, weight=len(labels), metrics={"loss": loss}, out=weights)
        done = self._worker.last_step
        if done is None:
            raise InternalError("a push returned, but nothing is known of its step")
        if len(labels):
            self._steps += 1
            self._bytes += sum(gradients[name].nbytes + updated[name].nbytes for name in gradients)
            self._tell("step", step=step, loss=loss, size=len(labels), lr=done.lr)
        return done.step, updated

    def _keep_schedule(self, step: int) -> None:
        """Steps the schedule until it stands where the epoch does. Every worker does so; together they step it once."""
        while self._epoch < step // self._plan.steps_per_epoch:
            schedule = self._worker.step_schedule()
            self._epoch = self._plan.epochs if schedule is None else schedule.last_epoch  # None: removed meanwhile

    def _rehearse(self, step: int, weights: model.Weights) -> bool:
        """Rank 0 only: the checkpoint, and later the restore (True), of which the others hear as RolledBackError."""
        if not self._rehearses:
            return False
        if step == self._plan.save_at:
            self._job.save_checkpoint(CHECKPOINT)
            self._tell_stand("saved", step, weights)
        elif step == self._plan.restore_at:
            self._rehearses = False
            self._job.restore_checkpoint(CHECKPOINT)
            return True
        return False

    def _tell_stand(self, kind: str, step: int, weights: model.Weights) -> None:
        test_loss, _ = model.evaluate(weights, self._digits.test_images, self._digits.test_labels)
        self._tell(kind, step=step, test_loss=test_loss, fingerprint=fingerprint(weights))

    def _tell(self, kind: str, **facts: object) -> None:
        self._report({"kind": kind, "rank": self._worker.rank, **facts})

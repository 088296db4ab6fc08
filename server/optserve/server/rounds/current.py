"""The round that gathers: begun, watched, failed, decided and applied. Everything here is guarded by the host's lock."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from optserve.server.jobs.sessions import Member
from optserve.server.records import Changes, Decision, RoundApplied
from optserve.server.rounds.decide import Vote, decide
from optserve.server.rounds.gather import Contribution, Gather
from optserve.server.rounds.host import JobHost
from optserve.server.rounds.membership import describe
from optserve.v1 import jobs_pb2
from optserve.wire import errors
from optserve.wire.values import Value

logger = logging.getLogger("optserve.server")


class CurrentRound:
    """At most one gathering round of a job, and the policy by which it ends."""

    def __init__(self, host: JobHost) -> None:
        self._host = host
        self._accumulators: dict[int, npt.NDArray[np.generic]] = {}
        self._dropped: set[str] = set()
        self.gather: Gather | None = None
        self.last_rank: int | None = None
        """Which rank completed the last applied round."""
        host.on_membership = self._membership_changed
        host.on_reset = self._reset

    @property
    def skips_nonfinite(self) -> bool:
        return self._host.job.plan.spec.on_nonfinite == jobs_pb2.ON_NONFINITE_SKIP

    @property
    def busy(self) -> bool:
        """A push is in it."""
        return self.gather is not None and not self.gather.void and bool(self.gather.contributions)

    @property
    def number(self) -> int:
        """The step that it would apply."""
        return self._host.job.position.step + 1

    # Taking part --------------------------------------------------------------------------------------------------------------

    def current(self) -> Gather:
        """The round that gathers, begun if there is none."""
        now = self._host.clock()
        if self.gather is None or self.gather.void or not (self._host.sync or self.gather.contributions):
            self._detach()
            self.gather = Gather(self._host.changed, self._host.job.store.backend, self.skips_nonfinite, now)
        if not self.gather.contributions:
            self.gather.started_at = now
        return self.gather

    def add(self, gather: Gather, contribution: Contribution) -> None:
        layout = self._host.job.store.layout
        gather.add(contribution, layout, self._all_accumulators())
        self._dropped.discard(contribution.member.session_id)
        if self._host.sync:
            self._expect()
        else:
            gather.expect((contribution.member.rank,))
        if gather.void:
            self._detach()
            self._host.changed.notify_all()

    def remove(self, gather: Gather, contribution: Contribution) -> None:
        """Takes a push out of its round; the round is void if anything depends on it."""
        gather.remove(contribution)
        if gather is self.gather and gather.void:
            self._detach()
        self._host.changed.notify_all()

    def fail(self, gather: Gather, error: errors.OptserveError) -> None:
        """Ends a round with an error for all who take part; nothing is applied."""
        for contribution in gather.contributions.values():
            contribution.error = contribution.error or error
        gather.void = True
        if gather is self.gather:
            self._detach()
        self._host.changed.notify_all()

    def _detach(self) -> None:
        if self.gather is not None and not self.gather.idle:
            self._accumulators = {}  # a thread still writes into them
        self.gather = None

    def _all_accumulators(self) -> Mapping[int, npt.NDArray[np.generic]]:
        if len(self._accumulators) < len(self._host.job.store.layout.arrays):
            self._accumulators = {**self._accumulators, **self._host.job.store.accumulators(self._accumulators)}
        return self._accumulators

    # Policy -------------------------------------------------------------------------------------------------------------------

    def watch(self, gather: Gather) -> None:
        """Looks for leases that ended and for the round's deadline."""
        if gather is not self.gather or gather.void:
            return
        now, spec = self._host.clock(), self._host.job.plan.spec
        if now >= gather.started_at + spec.round_timeout_seconds:
            names = ", ".join(describe(*fact) for fact in self.missing(gather))
            text = f"round {self.number}: {names} did not push within {spec.round_timeout_seconds:g} s"
            self.fail(gather, errors.RoundTimeoutError(text))
            return
        for rank, member, alive in self.missing(gather):
            if alive or member is None or member.left:
                continue
            if spec.on_missing == jobs_pb2.ON_MISSING_FAIL:
                text = f"round {self.number}: {describe(rank, member, False)} was lost and on_missing is 'fail'"
                self.fail(gather, errors.RoundFailedError(text, rank=rank))
                return
            if spec.on_missing == jobs_pb2.ON_MISSING_DROP:
                self._drop(gather, member)
        if self._host.sync:
            self._expect()

    def missing(self, gather: Gather) -> list[tuple[int, Member | None, bool]]:
        """Rank, member and whether it lives, of each rank that is waited for."""
        members = [(rank, self._host.job.sessions.member_at(rank)) for rank in gather.missing()]
        return [(rank, member, member is not None and self._host.alive(member)) for rank, member in members]

    def seconds_to_watch(self, gather: Gather) -> float:
        """How long `watch` may sleep: until a lease or the round ends."""
        now = self._host.clock()
        times = [gather.started_at + self._host.job.plan.spec.round_timeout_seconds]
        for _, member, alive in self.missing(gather):
            deadline = self._host.leases.deadline(member.session_id) if member is not None and alive else None
            if deadline is not None:
                times.append(deadline)
        return max(0.01, min(times) - now)

    def _drop(self, gather: Gather, member: Member) -> None:
        self._dropped.add(member.session_id)
        self._host.release(member.session_id)
        text = f"round {self.number} goes on without rank {member.rank} {member.name!r}: its lease ended"
        logger.warning("job %s: %s", self._host.job.name, text)
        self._host.publish("dropped", text, rank=member.rank, name=member.name)
        contribution = gather.contributions.get(member.rank)
        if contribution is not None and not contribution.ended:
            self.remove(gather, contribution)

    def _expect(self) -> None:
        """Waits for every rank but those that left, and those that the policy has dropped and that are still silent."""
        if self.gather is None:
            return
        ranks = []
        for rank in range(self._host.job.plan.spec.workers):
            member = self._host.job.sessions.member_at(rank)
            if member is None or not (member.left or (member.session_id in self._dropped and not self._host.alive(member))):
                ranks.append(rank)
        self.gather.expect(tuple(ranks))

    def _membership_changed(self) -> None:
        """A member came, left or was replaced: what a former one had begun is forgotten, and of one that left half a push."""
        gather = self.gather
        if gather is None or gather.void:
            return
        for contribution in list(gather.contributions.values()):
            member = self._host.job.sessions.member_of(contribution.member.session_id)
            if member is None or (member.left and not contribution.ended):
                self.remove(gather, contribution)
        if self._host.sync:
            self._expect()

    def _reset(self, error: errors.OptserveError) -> None:
        if self.gather is not None:
            self.fail(self.gather, error)

    # Decide and apply ---------------------------------------------------------------------------------------------------------

    def run(self, gather: Gather, last_rank: int) -> None:
        """Decides and applies a complete round in the thread that completed it."""
        pushes = [gather.contributions[rank] for rank in sorted(gather.contributions)]
        number = self.number
        try:
            record = self._decided(gather, pushes)
            result = self._host.record(record)
        except errors.OptserveError as error:
            self.fail(gather, error)
            return
        except Exception as defect:
            logger.exception("a defect while round %d was applied", number)
            self.fail(gather, errors.InternalError(f"round {number} could not be applied: {defect!r}"))
            return
        self._publish(record.decision, number)
        self.last_rank = last_rank
        self.gather = None
        for push in pushes:
            push.result = result

    def _decided(self, gather: Gather, pushes: list[Contribution]) -> RoundApplied:
        """What the round does, with the kernels and slots that it needs. Typed errors if it is not to be applied."""
        job = self._host.job
        votes = [contribution.vote() for contribution in pushes]
        decision = decide(votes, gather.base_weight(), gather.sum_of_squares(), len(job.store.layout.places))
        refusal = self._refusal(votes, decision.skip_reason)
        if refusal is not None:
            raise refusal
        if decision.changes:
            job.store.prepare(self._edited(decision.changes))
        return RoundApplied(tuple(push.caller for push in pushes), decision, gather.accumulators)

    def _edited(self, changes: Changes) -> list[dict[str, Value]]:
        """The groups after the ranks' changes, each of which was allowed when its push began."""
        try:
            return self._host.job.edited(changes)
        except errors.InputError as error:
            raise type(error)(
                f"round {self.number}: what its ranks changed does not go together, or not with the groups as they are now "
                f"({error}); nothing was applied, push again without these changes",
                **error.metadata,
            ) from error

    def _publish(self, decision: Decision, number: int) -> None:
        self._host.publish_edits(decision.changes)
        text = f"round skipped: {decision.skip_reason}" if decision.skipped else f"step {number}"
        self._host.publish("round", text, grad_norm=decision.grad_norm, ranks=list(decision.ranks), **decision.metrics)

    def _refusal(self, votes: list[Vote], skip_reason: str) -> errors.RoundFailedError | None:
        contributed = sum(vote.contributes for vote in votes)
        quorum = self._host.job.plan.spec.quorum if self._host.sync else 1
        if 0 < contributed < quorum:
            return errors.RoundFailedError(f"round {self.number}: {contributed} ranks contributed; the quorum is {quorum}")
        if skip_reason == "nonfinite" and not self.skips_nonfinite:
            return errors.RoundFailedError(f"round {self.number}: the sum of the ranks' finite gradients overflowed")
        return None

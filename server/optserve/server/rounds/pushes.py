"""A push: it begins, its chunks are gathered, and it is finished when its round was applied.

`sync`: one round takes a push of every rank that is waited for. `async`: each push is a round of its own; they are staged one
at a time, in the order in which they began.
"""

from __future__ import annotations

from collections import deque

from optserve.server.formulas import Searching
from optserve.server.jobs.sessions import Member
from optserve.server.rounds.contributions import Contribution, Push, Trial, contribution_of
from optserve.server.rounds.current import CurrentRound
from optserve.server.rounds.gather import Gather, nonfinite
from optserve.server.rounds.host import POLL_SECONDS, Alive, JobHost
from optserve.server.rounds.tickets import Done, Resend, Ticket, Waiting
from optserve.v1 import data_pb2
from optserve.wire import errors
from optserve.wire.chunks import Chunk

NOTICE_SECONDS = 30.0
"""How often a waiting worker is told whom it waits for."""

STALL_SECONDS = 5.0
"""An `async` push that brings nothing for so long gives way to the next."""


class Pushes:
    """The pushes of one job. Everything here is guarded by the host's lock."""

    def __init__(self, host: JobHost) -> None:
        self._host = host
        self._round = CurrentRound(host)
        self._queue: deque[Ticket] = deque()

    def begin(self, push: Push, alive: Alive) -> Ticket:
        """Takes a push into a round (in `async` waits for its turn). Typed errors if it may not."""
        host = self._host
        with host.changed:
            ticket = Ticket(push, host.clock())
            member, ticket.answer = self._admit(push)
            if ticket.answer is not None:
                return ticket
            host.leases.renew(member.session_id, ticket.began_at)
            host.release(member.session_id)  # of a stream that broke off unnoticed: no step waits for who has pushed
            self._check_kind(push, member)
            ticket.answer = self._round.answered(member, push)
            if ticket.answer is not None:
                return ticket
            if not host.sync:
                self._await_turn(ticket, alive)
                member, ticket.answer = self._admit(push)  # from an earlier stream it may have been applied meanwhile
                if ticket.answer is not None:
                    return ticket
            gather = self._enter(ticket, member)
        gather.pump()
        return ticket

    def offer(self, ticket: Ticket, chunk: Chunk, alive: Alive) -> None:
        """Takes one chunk of the gradient; waits while the staging budget is spent. Raises what ended the push."""
        contribution, gather = ticket.contribution, ticket.gather
        if contribution is None or gather is None or ticket.attached or gather.void:
            return
        if contribution.error is not None:
            raise contribution.error
        gather.offer(contribution, chunk, self._host.clock(), lambda: self._wait_for_room(ticket, alive))

    def finish(self, ticket: Ticket, alive: Alive) -> Done | Trial | Resend | Waiting:
        """The push is whole: waits until its round is applied, NOTICE_SECONDS at most. Call again after Waiting."""
        if ticket.answer is not None:
            return ticket.answer
        host = self._host
        notice_at = host.clock() + NOTICE_SECONDS
        while True:
            gather, contribution = ticket.gather, ticket.contribution
            if gather is None or contribution is None:
                raise errors.InternalError("a push was finished that had not begun")
            with host.changed:
                self._end(ticket, gather, contribution)
                outcome = self._outcome(ticket, gather, contribution)
                if isinstance(outcome, Trial) and ticket.push.kind == data_pb2.CONTRIBUTION_SKIP:
                    outcome = self._sit_out(ticket)
                    if outcome is None:
                        continue
                if outcome is not None:
                    return outcome
                if not alive():
                    raise errors.ServerUnavailableError("the stream of a waiting push ended")
                self._round.watch(gather)
                if gather.complete and gather.idle and not gather.void:
                    self._round.run(gather, contribution.member.rank)
                    continue
                if host.clock() >= notice_at:
                    return Waiting(self._round.number, self._round.missing(gather), host.clock() - ticket.began_at)
                if not (gather.stale or gather.void):
                    seconds = min(notice_at - host.clock(), self._round.seconds_to_watch(gather), POLL_SECONDS)
                    host.changed.wait(max(0.0, seconds))
            gather.pump()

    def abandon(self, ticket: Ticket) -> None:
        """The push's stream broke off before it was whole, or it was refused: the round forgets it, or is void."""
        with self._host.changed:
            contribution, gather = ticket.contribution, ticket.gather
            if contribution is not None and gather is not None and not ticket.attached and not contribution.ended:
                self._round.remove(gather, contribution)

    def _admit(self, push: Push) -> tuple[Member, Done | None]:
        """Whose push it is, and its result if it was applied before. Typed errors if it may not be applied now."""
        member = self._check(push)
        stored = self._host.job.sessions.repeated(push.caller)
        if stored is None:
            self._host.job.check_seen(*push.seen)
        return member, None if stored is None else Done(stored, None, 0.0)

    def _check(self, push: Push) -> Member:
        self._host.check_initialized()
        return self._host.job.sessions.check_member(push.caller.session_id, push.caller.epoch)

    def _check_kind(self, push: Push, member: Member) -> None:
        """Refuses a push that its sender alone is to blame for."""
        job = self._host.job
        skips = self._round.skips_nonfinite or push.loss_scale is not None or not push.nonfinite
        if push.kind == data_pb2.CONTRIBUTION_NONFINITE and not skips:
            names = [repr(place.name) for place in job.store.layout.places if place.index in push.nonfinite]
            raise nonfinite(member, names)
        searches = isinstance(job.plan.optimizer, Searching)
        if searches and push.kind == data_pb2.CONTRIBUTION_GRADIENT and push.loss is None:
            raise errors.InvalidArgumentError(f"{job.plan.optimizer.name} needs a closure: call worker.step(closure)")

    def _enter(self, ticket: Ticket, member: Member) -> Gather:
        push, job, gather = ticket.push, self._host.job, self._round.gather
        earlier = None if gather is None or gather.void else gather.contributions.get(member.rank)
        if gather is not None and earlier is not None and earlier.ended and earlier.push.is_repeated_by(push):
            ticket.gather, ticket.contribution, ticket.attached = gather, earlier, True
            return gather
        groups = job.edited(push.changes)  # what is wrong with a push is its sender's error, and not the round's
        now = self._host.clock()
        contribution = contribution_of(push, member, job.store.layout, job.plan.optimizer, groups, now)
        if gather is not None and earlier is not None:
            self._round.remove(gather, earlier)
        gather = self._round.current()
        self._round.add(gather, contribution)
        ticket.gather, ticket.contribution = gather, contribution
        return gather

    def _sit_out(self, ticket: Ticket) -> Done | Trial | Resend | None:
        """A rank that sits the step out has no closure: it sits out the next evaluation too, unless the step is done."""
        member, stored = self._admit(ticket.push)
        answer = stored or self._round.answered(member, ticket.push)
        if answer is None:
            self._enter(ticket, member)
        return answer

    def _await_turn(self, ticket: Ticket, alive: Alive) -> None:
        """`async`: waits until every push that began before is applied or has stalled."""
        host = self._host
        deadline = ticket.began_at + host.job.plan.spec.round_timeout_seconds
        self._queue.append(ticket)
        try:
            while self._queue[0] is not ticket or self._round.busy:
                host.check_open()
                if host.clock() >= deadline or not alive():
                    waited = host.clock() - ticket.began_at
                    raise errors.RoundTimeoutError(f"the push waited {waited:.0f} s for the pushes before it")
                self._drop_stalled()
                if self._queue[0] is not ticket or self._round.busy:
                    host.changed.wait(0.5)
        finally:
            self._queue.remove(ticket)
            host.changed.notify_all()

    def _drop_stalled(self) -> None:
        gather = self._round.gather
        if gather is None:
            return
        for contribution in list(gather.contributions.values()):
            if contribution.ended and gather.complete and gather.idle and not gather.void:
                self._round.run(gather, contribution.member.rank)  # its stream ended before its own thread could
                return
            if not contribution.ended and self._host.clock() - contribution.progress_at > STALL_SECONDS:
                contribution.error = errors.RoundTimeoutError(
                    f"the push of rank {contribution.member.rank} {contribution.member.name!r} brought nothing for "
                    f"{STALL_SECONDS:.0f} s and was dropped; send it again",
                    rank=contribution.member.rank,
                )
                self._round.remove(gather, contribution)

    def _wait_for_room(self, ticket: Ticket, alive: Alive) -> None:
        self._check(ticket.push)
        if not alive():
            raise errors.ServerUnavailableError("the stream of a push ended")
        if ticket.gather is not None:
            self._round.watch(ticket.gather)
        self._host.changed.wait(1.0)

    def _end(self, ticket: Ticket, gather: Gather, contribution: Contribution) -> None:
        ticket.ended_at = ticket.ended_at or self._host.clock()
        if contribution.ended or gather.void or contribution.error is not None:
            return
        missing = contribution.missing
        if missing:
            self._round.remove(gather, contribution)
            raise errors.IncompleteStreamError(f"the push ended with {missing} of {contribution.chunk_count} chunks missing")
        contribution.ended = True

    def _outcome(self, ticket: Ticket, gather: Gather, contribution: Contribution) -> Done | Trial | Resend | None:
        if contribution.trial is not None:
            return contribution.trial
        if contribution.result is not None:
            last = self._round.last_rank
            waited = self._host.clock() - ticket.ended_at
            return Done(contribution.result, None if last == contribution.member.rank else last, waited)
        if contribution.error is not None:
            raise contribution.error
        self._check(ticket.push)
        if gather.void or gather.contributions.get(contribution.member.rank) is not contribution:
            return self._round.resend(ticket.push)
        return None

"""The round that gathers: begun, watched, failed, and applied. Everything here is guarded by the host's lock."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from optserve.server.jobs.sessions import Member
from optserve.server.records import Decision, RoundApplied
from optserve.server.rounds.contributions import Contribution, Push, Trial
from optserve.server.rounds.events import Round
from optserve.server.rounds.gather import Gather
from optserve.server.rounds.host import JobHost
from optserve.server.rounds.membership import describe
from optserve.server.rounds.search import Searches
from optserve.server.rounds.tickets import Resend
from optserve.server.rounds.verdict import Verdict
from optserve.v1 import data_pb2, jobs_pb2
from optserve.wire import errors

logger = logging.getLogger("optserve.server")


class CurrentRound:
    """At most one gathering round of a job, and the policy by which it ends."""

    def __init__(self, host: JobHost) -> None:
        self._host = host
        self._accumulators: dict[int, npt.NDArray[np.generic]] = {}
        self._dropped: set[str] = set()
        self.gather: Gather | None = None
        self._searches = Searches()
        self.last_rank: int | None = None
        """Which rank completed the last applied round."""
        host.on_membership = self._membership_changed
        host.on_reset = self._reset
        host.on_layout = self._layout_changed

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
        gather.add(contribution, layout, self._accumulators_for(contribution))
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
        """Ends a round, and the search that it is a part of, with an error for all who take part; nothing is applied."""
        for contribution in gather.contributions.values():
            contribution.error = contribution.error or error
        gather.void = True
        if gather is self.gather:
            self._searches.drop(error)
            self._detach()
        self._host.changed.notify_all()

    def _detach(self) -> None:
        if self.gather is not None and not self.gather.idle:
            self._accumulators = {}  # a thread still writes into them
        self.gather = None

    def _accumulators_for(self, contribution: Contribution) -> Mapping[int, npt.NDArray[np.generic]]:
        """Of the arrays that any push has had a dense gradient in: an embedding whose gradients are sparse needs none."""
        lacking = contribution.arrays - self._accumulators.keys() if contribution.folds else frozenset[int]()
        if lacking:
            self._accumulators = {**self._accumulators, **self._host.job.store.accumulators(lacking)}
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
        if self._searches.current is not None:
            self._begin_again()

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
        self._searches.forget(frozenset(member.session_id for member in self._host.job.sessions.members.values()))
        if self._searches.current is not None:
            self._begin_again()
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
        self._searches.drop(error)

    def _layout_changed(self) -> None:
        """What gathers is of other parameters, or of arrays of another length: it is sent again."""
        self._begin_again()
        self._accumulators = {}

    def _begin_again(self) -> None:
        """Gives up what gathers, and the search that it is a part of: who takes part sends again, or begins its step again."""
        self._searches.drop()
        if self.gather is not None:
            self.gather.void = True
            self._detach()
        self._host.changed.notify_all()

    # Searches -----------------------------------------------------------------------------------------------------------------

    def answered(self, member: Member, push: Push) -> Trial | Resend | None:
        """What a push is answered with that no round waits for; None: it enters the one that gathers.

        Raises what ended the search that it is a part of.
        """
        searches = self._searches
        searches.check_told(push)
        self._check_search()
        if push.kind == data_pb2.CONTRIBUTION_ABANDON:
            raise self._abandoned(member, push)
        if searches.expects(push):
            return None
        unheard = searches.unheard(push)
        if unheard is not None:
            return unheard
        if push.evaluation:
            return self.resend(push)
        if searches.current is not None:
            self._begin_again()
        return None

    def resend(self, push: Push) -> Resend:
        """What a push is told whose round was void."""
        return Resend(self.number, restart=push.evaluation > 0 and not self._searches.expects(push))

    def _check_search(self) -> bool:
        """Whether nothing has changed since the search began; else it is given up."""
        search = self._searches.current
        if search is None or search.version == self._host.job.position.version:
            return True
        self._begin_again()
        return False

    def _abandoned(self, member: Member, push: Push) -> errors.RoundFailedError:
        """A rank's closure failed: the search ends for all who take part in it."""
        rank = member.rank
        text = f"round {self.number}: the closure of {describe(rank, member, True)} failed; nothing was applied"
        error = errors.RoundFailedError(text, rank=rank)
        if push.evaluation and self._searches.expects(push):
            if self.gather is not None:
                self.fail(self.gather, error)
            self._searches.drop(error)
        return error

    # Apply --------------------------------------------------------------------------------------------------------------------

    def run(self, gather: Gather, last_rank: int) -> None:
        """Decides a complete round in the thread that completed it, and applies it, unless the optimizer searches on."""
        if not self._check_search():
            return
        pushes = [gather.contributions[rank] for rank in sorted(gather.contributions)]
        number = self.number
        try:
            found = Verdict(self._host, gather, self._searches.current).reached()
            result = self._host.record(found) if isinstance(found, RoundApplied) else None
        except errors.OptserveError as error:
            self.fail(gather, error)
            return
        except Exception as defect:
            logger.exception("a defect while round %d was applied", number)
            self.fail(gather, errors.InternalError(f"round {number} could not be applied: {defect!r}"))
            return
        self.gather = None
        for push in pushes:  # first of all, lest what follows have the round applied again
            push.result = result
            push.trial = None if isinstance(found, RoundApplied) else found.trial
        if isinstance(found, RoundApplied):
            self._searches.drop()
            self.last_rank = last_rank
            self._publish(found.decision, number, pushes)
        else:
            self._searches.current = found
            self._host.changed.notify_all()

    # What others see ----------------------------------------------------------------------------------------------------------

    def _publish(self, decision: Decision, number: int, pushes: Sequence[Contribution]) -> None:
        self._host.publish_edits(decision.changes)
        fields: dict[str, object] = {"grad_norm": decision.grad_norm, "ranks": list(decision.ranks)}
        scale = next((push.push.loss_scale for push in pushes if push.push.loss_scale is not None), None)
        if decision.skipped:
            text = f"round skipped: {decision.skip_reason}" + (f"; the loss scale is {scale:g}" if scale is not None else "")
            fields["skip_reason"] = decision.skip_reason
        elif decision.accumulated:
            text = f"step {number}: {decision.accumulated} of {self._host.job.rules.accumulation} rounds are summed up"
        else:
            text = f"step {number}"
        if scale is not None:
            fields["loss_scale"] = scale
        if decision.clip_factor != 1.0:
            fields["clip_factor"] = decision.clip_factor
        if decision.evaluations:
            fields["evaluations"] = decision.evaluations
        numbers = Round(
            learning_rates=tuple(self._host.job.learning_rates),
            grad_norm=decision.grad_norm,
            clip_factor=decision.clip_factor,
            skip_reason=decision.skip_reason,
            accumulated=decision.accumulated,
        )
        self._host.publish("round", text, decision.metrics, numbers, **fields)

"""The verdict on a complete round: weigh, measure, decide, and with an optimizer that searches one evaluation more.

Nothing of the job changes here: what comes out is the record, or the search that goes on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from optserve.server.formulas import Searching
from optserve.server.jobs.rules import clipping
from optserve.server.records import Changes, Decision, RoundApplied
from optserve.server.rounds.contributions import Trial
from optserve.server.rounds.decide import Vote, Weighed, decide, skipped, weigh
from optserve.server.rounds.gather import Gather
from optserve.server.rounds.host import JobHost
from optserve.server.rounds.search import CurrentSearch
from optserve.v1 import jobs_pb2
from optserve.wire import errors
from optserve.wire.rows import Sums
from optserve.wire.values import Value


class Verdict:
    """On one round, with the job's lock held. `search`: the round is an evaluation of it."""

    def __init__(self, host: JobHost, gather: Gather, search: CurrentSearch | None) -> None:
        self._job = host.job
        self._quorum = host.job.plan.spec.quorum if host.sync else 1
        self._gather = gather
        self._search = search
        self._pushes = [gather.contributions[rank] for rank in sorted(gather.contributions)]

    def reached(self) -> RoundApplied | CurrentSearch:
        """With the kernels and slots that the record needs. Typed errors if the round is not to be applied."""
        votes = [push.vote() for push in self._pushes]
        if self._search is not None:  # the step's changes came with its first evaluation
            votes = [replace(vote, changes={}) for vote in votes]
        weighed = weigh(votes, self._gather.base_weight(), self._job.rules, self._name)
        self._check_quorum(votes)
        groups = self._edited(weighed.changes)
        if weighed.changes:
            self._job.store.prepare(clipping(groups, weighed.clip_grad_value))
        if weighed.skip_reason:
            return self._skipped(weighed, weighed.skip_reason)
        sums, present, norm = self._measured(weighed)
        if not math.isfinite(norm):
            if not (self._job.plan.spec.on_nonfinite == jobs_pb2.ON_NONFINITE_SKIP or weighed.skips_nonfinite):
                raise errors.RoundFailedError(f"{self._round}: the sum of the ranks' finite gradients overflowed")
            return self._skipped(weighed, "nonfinite")
        absent = frozenset(range(len(self._job.store.layout.places))) - present
        decision = decide(weighed, absent, norm, self._job.rules, self._job.store.window.rounds)
        decision = replace(decision, evaluations=self._evaluations)
        if decision.clip_value is not None:
            self._check_real(present)
        if isinstance(self._job.plan.optimizer, Searching):
            return self._searched(decision, weighed.loss, groups, sums)
        taken = clipping(groups, decision.clip_value)
        if sums.sparse:  # an edit may have come since the pushes began
            self._job.store.check_kinds(taken, absent, sums.sparse)
        if decision.clip_value is not None:
            self._job.store.prepare(taken)
        return self._applied(decision, sums)

    @property
    def _round(self) -> str:
        return f"round {self._job.position.step + 1}"

    @property
    def _evaluations(self) -> int:
        """How often the ranks have evaluated a closure for the step."""
        if self._search is not None:
            return self._search.trial.evaluation + 1
        return int(any(push.push.loss is not None for push in self._pushes))

    def _applied(self, decision: Decision, sums: Sums) -> RoundApplied:
        return RoundApplied(tuple(push.push.caller for push in self._pushes), decision, sums)

    def _skipped(self, weighed: Weighed, reason: str) -> RoundApplied:
        decision = skipped(weighed, reason, self._evaluations)
        if self._search is not None:
            first = self._search.first
            decision = replace(decision, ranks=first.ranks, metrics=first.metrics, changes=first.changes)
        return self._applied(decision, Sums({}, {}))

    def _check_quorum(self, votes: Sequence[Vote]) -> None:
        """A rank whose gradient is not finite took part all the same: it skips the step."""
        contributed = sum(vote.contributes or (vote.found_inf and vote.weight > 0) for vote in votes)
        if 0 < contributed < self._quorum:
            raise errors.RoundFailedError(f"{self._round}: {contributed} ranks contributed; the quorum is {self._quorum}")

    def _name(self, index: int) -> str:
        return self._job.store.layout.places[index].name

    def _check_real(self, present: frozenset[int]) -> None:
        """clip_grad_value knows no order of complex numbers, in torch as here."""
        for place in self._job.store.layout.places:
            if place.is_complex and place.index in present:
                raise errors.UnsupportedGradientError(
                    f"gradient {place.name!r}: clamp is not supported for complex types; clip it with clip_grad_norm",
                    parameter=place.name,
                )

    def _edited(self, changes: Changes) -> list[dict[str, Value]]:
        """The groups after the ranks' changes, each of which was allowed when its push began."""
        try:
            return self._job.edited(changes)
        except errors.InputError as error:
            raise type(error)(
                f"{self._round}: what its ranks changed does not go together, or not with the groups as they are now "
                f"({error}); nothing was applied, push again without these changes",
                **error.metadata,
            ) from error

    def _measured(self, weighed: Weighed) -> tuple[Sums, frozenset[int], float]:
        """The sum that the round comes to, with what the window holds; which parameters are in it; and the norm of its mean.

        While the window is filled, the norm is that of this round alone; Inf or NaN if anything overflowed.
        """
        store = self._job.store
        sums, norm = self._gather.sums(), math.sqrt(self._gather.sum_of_squares()) * weighed.scale
        if weighed.scale > self._largest:
            return sums, weighed.present, math.inf
        if self._job.rules.accumulation == 1 or not math.isfinite(norm):
            return sums, weighed.present, norm
        rounds = store.window.rounds + 1
        sums, present = store.window.added(sums, weighed.present, weighed.scale)
        total = math.sqrt(store.sum_of_squares(sums, present)) / rounds
        return sums, present, total if rounds == self._job.rules.accumulation or not math.isfinite(total) else norm

    @property
    def _largest(self) -> float:
        """What a gradient can be multiplied with: a loss scale near 0 goes beyond."""
        in_double = all(array.state_dtype == np.float64 for array in self._job.store.layout.arrays)
        return float(np.finfo(np.float64 if in_double else np.float32).max)

    def _searched(
        self, decision: Decision, loss: float | None, groups: list[dict[str, Value]], sums: Sums
    ) -> RoundApplied | CurrentSearch:
        """The step's outcome, or the search at its next point."""
        if loss is None or math.isnan(loss):
            raise errors.RoundFailedError(f"{self._round}: the mean of the ranks' losses is {loss}; nothing was applied")
        current = self._search
        search = self._job.store.search(groups) if current is None else current.search
        first = decision if current is None else current.first
        if search.evaluated(loss, sums, decision.scale, decision.absent, decision.clip_value):
            done = replace(first, evaluations=decision.evaluations)
            return replace(self._applied(done, Sums({}, {})), outcome=search.outcome)
        callers = frozenset(push.push.caller for push in self._pushes)
        trial = Trial(decision.evaluations, search.trial)
        return CurrentSearch(search, first, callers, self._job.position.version, trial)

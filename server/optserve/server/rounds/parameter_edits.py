"""Parameters of a running job: renamed, replaced, removed, each exactly once."""

from __future__ import annotations

from optserve.server.jobs import parameters
from optserve.server.records import Caller, ParameterRenamed, Result
from optserve.server.rounds.administration import Administration
from optserve.server.rounds.host import JobHost


class ParameterEdits:
    """What edits the parameters of one job. Each call checks, then commits one record, under the host's lock."""

    def __init__(self, host: JobHost, administration: Administration) -> None:
        self._host = host
        self._administration = administration

    def edit(self, caller: Caller, seen: tuple[str, int], record: parameters.Edit) -> Result:
        """Waits for workers that read in place. A round that gathers is void: its gradients are of the parameters before.

        UnknownParameterError, InvalidArgumentError, OutOfMemoryError and others: nothing has changed.
        """
        host = self._host
        with host.changed:
            host.await_readers()
            repeated = self._administration.admit(caller, seen)
            if repeated:
                return repeated
            layout = parameters.checked(host.job, record)
            if not isinstance(record, ParameterRenamed):
                host.job.store.prepare_reshape(layout, host.job.groups, (record.name,))
            result = host.commit(record, "parameter", parameters.described(record))
            host.on_layout()
            return result

"""Parameters of a running job: what renaming, replacing and removing one comes to, and what is refused."""

from __future__ import annotations

from dataclasses import replace

from optserve.server.formulas import Searching
from optserve.server.jobs import spec as specs
from optserve.server.jobs.state import JobState
from optserve.server.records import ParameterRemoved, ParameterRenamed, ParameterReplaced
from optserve.server.store import reshaping
from optserve.wire import dtypes, errors
from optserve.wire.layout import Layout

_NAME_SHOWN = 200
"""Characters of a name that an event shows."""

Edit = ParameterRenamed | ParameterReplaced | ParameterRemoved


def checked(job: JobState, record: Edit) -> Layout:
    """The layout that the edit leads to. Typed errors if it may not be made."""
    _check_window(job, record.name)
    match record:
        case ParameterRenamed():
            return _renamed(job, record)
        case ParameterReplaced():
            _check_unsearched(job, "replaced")
            return _replaced(job, record)
        case ParameterRemoved():
            _check_unsearched(job, "removed")
            return reshaping.removed(job.store.layout, record.name)


def apply(job: JobState, record: Edit) -> int:
    """Makes an edit that was checked; the group that has another parameter now."""
    store = job.store
    group = store.layout.arrays[store.layout.place(record.name).array_id].group
    match record:
        case ParameterRenamed():
            store.rename(record.name, record.new_name)
        case ParameterReplaced():
            layout = reshaping.replaced(store.layout, record.name, record.value)
            store.reshape(layout, job.groups, {record.name: record.value}, record.keep_state)
        case ParameterRemoved():
            store.reshape(reshaping.removed(store.layout, record.name), job.groups, {})
    return group


def described(record: Edit) -> str:
    """For the event."""
    shown = repr(record.name[:_NAME_SHOWN])
    match record:
        case ParameterRenamed():
            return f"parameter {shown} is called {record.new_name[:_NAME_SHOWN]!r} now"
        case ParameterReplaced():
            state = "its state stays" if record.keep_state else "its state begins again"
            return f"parameter {shown} replaced by {record.value.shape} of {record.value.dtype}; {state}"
        case ParameterRemoved():
            return f"parameter {shown} removed"


def as_now(job: JobState) -> specs.Plan:
    """The job's plan with the parameters that its groups have by now; groups that were added are not in it."""
    groups = range(len(job.plan.groups))
    layout = job.store.layout
    found = [
        [(name, layout.place(name).shape, layout.place(name).dtype) for name in job.group_names(group)] for group in groups
    ]
    return replace(job.plan, parameters=found)


def _check_window(job: JobState, name: str) -> None:
    job.store.layout.place(name)
    rounds = job.store.window.rounds
    if rounds:
        raise errors.InvalidArgumentError(
            f"parameter {name!r} cannot be edited in the middle of a window: {rounds} of {job.rules.accumulation} rounds are "
            "summed up; edit it right after a step",
            parameter=name,
        )


def _check_unsearched(job: JobState, what: str) -> None:
    if isinstance(job.plan.optimizer, Searching):
        raise errors.InvalidArgumentError(
            f"no parameter of a job with {job.plan.optimizer.name} can be {what}: its state is of all of them as one vector"
        )


def _renamed(job: JobState, record: ParameterRenamed) -> Layout:
    layout, new_name = job.store.layout, record.new_name
    if not new_name:
        raise errors.InvalidArgumentError(f"parameter {record.name!r} cannot have an empty name", parameter=record.name)
    specs.check_parameter_name(new_name)
    if new_name in layout.by_name:
        raise errors.DuplicateParameterError(f"the job has a parameter {new_name!r} already", parameter=new_name)
    found = reshaping.renamed(layout, record.name, new_name)
    specs.check_table([place.name for place in found.places], len(job.groups))
    return found


def _replaced(job: JobState, record: ParameterReplaced) -> Layout:
    value, place = record.value, job.store.layout.place(record.name)
    dtypes.to_wire(value.dtype, f"the value of parameter {record.name!r}")
    if record.keep_state and value.shape != place.shape:
        raise errors.ShapeMismatchError(
            f"the value of {record.name!r} has shape {value.shape}, the parameter {place.shape}; its state can only be kept "
            "with the same shape",
            parameter=record.name,
        )
    if record.keep_state and value.dtype != place.dtype:
        raise errors.DtypeMismatchError(
            f"the value of {record.name!r} has dtype {value.dtype}, the parameter {place.dtype}; its state can only be kept "
            "with the same dtype",
            parameter=record.name,
        )
    specs.check_parameters(job.plan.optimizer, [(record.name, value.shape, value.dtype)])
    return reshaping.replaced(job.store.layout, record.name, value)

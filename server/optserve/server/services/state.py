"""StateService."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy.typing as npt

from optserve.server.formulas import Optimizer, Searching
from optserve.server.jobs import Job
from optserve.server.records import StateLoaded
from optserve.server.rounds.host import JobHost
from optserve.server.rounds.registry import Registry
from optserve.server.services import decode, encode
from optserve.server.services.context import CallContext
from optserve.server.store import StoreState
from optserve.v1 import state_pb2, state_pb2_grpc, types_pb2
from optserve.wire import bundle, errors
from optserve.wire.chunks import Chunk
from optserve.wire.values import Value, from_hyperparameters

LoadItem = bytes | state_pb2.LoadStateRequest | Chunk


class StateService(state_pb2_grpc.StateServiceServicer):
    """The optimizer's state in torch's terms."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def GetState(
        self, request: state_pb2.GetStateRequest, context: CallContext
    ) -> Iterator[state_pb2.GetStateResponse | Chunk]:
        host = self._registry.find(request.job_id).host
        with host.changed:
            host.check_initialized()
            exported = host.job.store.export()
            position, groups = host.job.position.to_proto(), encode.groups(host)
            optimizer = host.job.plan.optimizer
        tensors = _in_torchs_order(optimizer, exported.state)
        tensors += [(groups[0].parameters[0], key, array) for key, array in exported.extras.items()]
        entries, nbytes = bundle.table(tensors)
        begin = state_pb2.StateBegin(
            position=position,
            groups=groups,
            steps={name: float(step) for name, step in exported.steps.items()},
            entries=entries,
            bundle_bytes=nbytes,
            has_step=optimizer.counts_steps,
            integer_steps=optimizer.integer_steps,
        )
        yield state_pb2.GetStateResponse(begin=begin)
        yield from bundle.chunks(tensors)
        yield state_pb2.GetStateResponse(end=types_pb2.StreamEnd())

    def LoadState(self, requests: Iterable[LoadItem], context: CallContext) -> state_pb2.LoadStateResponse:
        found = decode.items(state_pb2.LoadStateRequest, requests)
        begin = decode.first(state_pb2.LoadStateRequest, found, "begin").begin
        running = self._registry.find(begin.call.job_id)
        groups = _groups(running.host, begin.groups, begin.partial)
        limit = 4 * running.job.store.state_bytes + (1 << 20) + 64 * len(begin.entries) + running.job.store.most_extras(groups)
        tensors = decode.received(begin.entries, begin.bundle_bytes, limit, decode.chunks(found))
        caller, seen = decode.caller(begin.call, decode.fingerprint(begin, *(array.tobytes() for _, _, array in tensors)))
        steps = {name: _step(name, value) for name, value in begin.steps.items()}
        state = _content(running.job, tensors).tensors
        loaded = frozenset(begin.loaded) if begin.partial else None
        record = StateLoaded(caller, groups, steps, state, loaded)
        return state_pb2.LoadStateResponse(position=encode.position(running.administration.load_state(caller, seen, record)))


def _in_torchs_order(optimizer: Optimizer, state: Mapping[str, npt.NDArray[Any]]) -> list[bundle.Tensor]:
    """A store's state: each parameter's scalars, then its slots."""
    order = {key: place for place, key in enumerate((*optimizer.scalar_keys, *optimizer.slot_keys))}
    tensors: list[bundle.Tensor] = []
    for key, array in state.items():
        slot, _, name = key.partition("/")
        tensors.append((name, slot, array))
    return sorted(tensors, key=lambda tensor: order.get(tensor[1], len(order)))


def _content(job: Job, tensors: Iterable[bundle.Tensor]) -> StoreState:
    """A state as the store has it. What belongs to all parameters together comes under the first one's name."""
    optimizer, first, content = job.plan.optimizer, job.store.layout.places[0].name, StoreState()
    for name, slot, array in tensors:
        if isinstance(optimizer, Searching) and slot in optimizer.state_keys and name == first:
            content.extras[slot] = array
        else:
            content.state[f"{slot}/{name}"] = array
    return content


def _step(name: str, value: float) -> int:
    if not math.isfinite(value) or value < 0 or value != int(value):
        raise errors.InvalidStateDictError(f"the step of {name!r} is {value}; it must be a whole number of at least 0")
    return int(value)


def _groups(host: JobHost, given: Iterable[types_pb2.Group], partial: bool) -> list[dict[str, Value]]:
    """The job's groups with the given hyperparameters; as many groups, each of as many parameters.

    In a partial load a group for which nothing is given stays as it is.
    """
    entries = list(given)
    with host.changed:
        here = [len(host.job.group_names(index)) for index in range(len(host.job.groups))]
        if len(entries) != len(here):
            raise errors.InvalidStateDictError(
                f"loaded state dict has a different number of parameter groups: {len(entries)}, the job has {len(here)}"
            )
        if [len(entry.parameters) for entry in entries] != here:
            raise errors.InvalidStateDictError(
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
            )
        try:
            return [
                dict(host.job.groups[index])
                if partial and not entry.hyperparameters
                else host.job.checked_load(index, from_hyperparameters(entry.hyperparameters))
                for index, entry in enumerate(entries)
            ]
        except (errors.UnknownHyperparameterError, errors.InvalidHyperparameterError) as error:
            raise errors.InvalidStateDictError(f"the state_dict's groups do not fit the job: {error}") from error

"""A job's document in a checkpoint: all but the tensors, as JSON. It may come from anywhere, so it is checked whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf import json_format

from optserve.server import schedules
from optserve.server.formulas.definition import Optimizer
from optserve.server.jobs import rules
from optserve.server.jobs import spec as specs
from optserve.server.jobs.history import History
from optserve.server.jobs.sessions import Sessions
from optserve.server.records import Rules
from optserve.server.schedules import ScheduleState
from optserve.v1 import jobs_pb2
from optserve.wire import errors
from optserve.wire.values import Value, to_value

Part = TypeVar("Part")


@dataclass(frozen=True)
class Document:
    """What a checkpoint says of its job, in the rooms' own types."""

    spec: jobs_pb2.JobSpec
    optimizer: Optimizer
    lineage_id: str
    version: int
    step: int
    groups: list[dict[str, Value]]
    group_parameters: list[list[str]]
    schedule: ScheduleState | None
    schedule_steps: int
    steps: dict[str, int]
    metrics: dict[str, float]
    history: History
    sessions: Sessions
    rules: Rules
    window_rounds: int
    layout: tuple[int, int] | None
    """Version and base version; None in those that do not say."""

    @classmethod
    def parse(cls, raw: Mapping[str, Any], expected: Optimizer | None = None) -> Document:
        """CheckpointMismatchError names the part that is not as it must be, or the optimizer if it is not the expected one."""
        spec = _part("spec", lambda: json_format.ParseDict(raw["spec"], jobs_pb2.JobSpec()))
        optimizer = _part("spec", lambda: specs.find_optimizer(spec.optimizer))
        if expected is not None and optimizer is not expected:
            raise errors.CheckpointMismatchError(f"the checkpoint is of {optimizer.name}, the job of {expected.name}")
        schedule = _part("schedule", lambda: None if raw["schedule"] is None else schedules.from_document(raw["schedule"]))
        groups = _part("groups", lambda: [_group(optimizer, entry, schedule is not None) for entry in raw["groups"]])
        names = _part("group_parameters", lambda: [[_text(name) for name in entry] for entry in raw["group_parameters"]])
        if len(groups) != len(names):
            raise errors.CheckpointMismatchError(f"the checkpoint has {len(groups)} groups, and parameters of {len(names)}")
        if schedule is not None:
            _part("schedule", lambda: schedules.check_groups(schedule, len(groups)))
        position: dict[str, Any] = _part("position", lambda: dict(raw["position"]))
        found_rules = _part("rules", lambda: rules.edited(Rules(), dict(raw.get("rules", {})), optimizer))
        return cls(
            spec,
            optimizer,
            _part("position", lambda: _text(position["lineage_id"])),
            _part("position", lambda: _count(position["version"])),
            _part("position", lambda: _count(position["step"])),
            groups,
            names,
            schedule,
            _part("schedule_steps", lambda: _count(raw["schedule_steps"])),
            _part("steps", lambda: {_text(name): _count(count) for name, count in raw["steps"].items()}),
            _part("metrics", lambda: {_text(name): float(value) for name, value in raw["metrics"].items()}),
            _part("history", lambda: History.from_document(raw["history"])),
            _part("sessions", lambda: Sessions.from_document(raw["sessions"])),
            found_rules,
            _part("window_rounds", lambda: _waiting(raw.get("window_rounds", 0), found_rules)),
            _part("layout", lambda: _layout(raw.get("layout"))),
        )

    def check_fits(self, group_parameters: list[list[str]]) -> None:
        """CheckpointMismatchError unless it is of these parameters, group by group."""
        if self.group_parameters != group_parameters:
            theirs = [name for group in self.group_parameters for name in group]
            ours = [name for group in group_parameters for name in group]
            odd = sorted(set(theirs) ^ set(ours))[:4] or ["their order or grouping"]
            raise errors.CheckpointMismatchError(
                f"the checkpoint has {len(theirs)} parameters in {len(self.group_parameters)} groups, the job "
                f"{len(ours)} in {len(group_parameters)}; they differ in {', '.join(odd)}; a new job can be made of it "
                "(download it, then create_job(name, from_checkpoint=...))"
            )


def _part(name: str, read: Callable[[], Part]) -> Part:
    try:
        return read()
    except (KeyError, TypeError, ValueError, AttributeError, json_format.ParseError, errors.OptserveError) as error:
        raise errors.CheckpointMismatchError(f"the checkpoint's {name!r} is not as it must be: {error!r}") from error


def _group(optimizer: Optimizer, raw: Mapping[str, Any], scheduled: bool) -> dict[str, Value]:
    group = {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}
    for name, value in group.items():
        to_value(name, value)
    return specs.saved(optimizer, {**optimizer.defaults, **group, "lr": group["lr"]}, scheduled)


def _waiting(value: object, found: Rules) -> int:
    count = _count(value)
    if count >= found.accumulation:
        raise ValueError(f"{count} rounds are summed up; a window has {found.accumulation}")
    return count


def _layout(raw: Mapping[str, Any] | None) -> tuple[int, int] | None:
    if raw is None:
        return None
    version, base = _count(raw["version"]), _count(raw["base_version"])
    if base > version:
        raise ValueError(f"the base version {base} is beyond the version {version}")
    return version, base


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not a whole number of at least 0")
    return value

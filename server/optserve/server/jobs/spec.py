"""A job's spec: checked once, defaults filled in."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np

from optserve.server.formulas import OPTIMIZERS, Searching
from optserve.server.formulas.definition import Optimizer
from optserve.server.jobs import rules
from optserve.server.records import Rules
from optserve.server.schedules import GROUP_KEYS
from optserve.v1 import jobs_pb2, types_pb2
from optserve.wire import dtypes, errors
from optserve.wire.chunks import MAX_MESSAGE_BYTES
from optserve.wire.names import nearest
from optserve.wire.values import Value, from_hyperparameters

_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}")

_PARAMETER_BYTES = 48
"""What a parameter takes in a message beside its name, which is said twice."""

_GROUP_BYTES = 800
"""What a group's hyperparameters take: 400 each, as the spec gives them and as they are now."""

_MOST_WORKERS = 4096
"""A round keeps books on each of its ranks, present or not."""

Choice = TypeVar("Choice", bound=int)

Declared = list[tuple[str, tuple[int, ...], np.dtype[np.generic]]]
"""Name, shape and dtype of each parameter of a group."""


@dataclass(frozen=True)
class Plan:
    """What a checked spec comes to."""

    spec: jobs_pb2.JobSpec
    optimizer: Optimizer
    groups: list[dict[str, Value]]
    parameters: list[Declared]
    rules: Rules


def check_name(name: str, what: str = "job") -> None:
    """InvalidNameError unless the name is `part` or `user/part` of letters, digits, '.', '_' and '-'."""
    parts = name.split("/")
    if len(parts) > 2 or not all(_PART.fullmatch(part) for part in parts):
        raise errors.InvalidNameError(
            f"{what} name {name!r} is not allowed; use letters, digits, '.', '_' and '-' (not first a '.'), "
            "at most 128, optionally with 'user/' before",
            name=name,
        )


def check_worker_name(name: str) -> None:
    """InvalidNameError for one that a message or a command line could not show."""
    if not _PART.fullmatch(name):
        raise errors.InvalidNameError(
            f"worker name {name!r} is not allowed; use letters, digits, '.', '_' and '-' (not first a '.'), at most 128",
            name=name,
        )


def find_optimizer(name: str) -> Optimizer:
    """UnknownOptimizerError lists the known ones and the nearest name."""
    optimizer = OPTIMIZERS.get(name.lower())
    if optimizer is None:
        known = [entry.name for entry in OPTIMIZERS.values()]
        raise errors.UnknownOptimizerError(f"unknown optimizer {name!r}{nearest(name, known)}", name=name)
    return optimizer


def _finite(name: str, value: Value) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise errors.InvalidHyperparameterError(f"{name} is {value!r}; it must be a finite number")


def _finite_penalty(name: str, value: Value) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < math.inf:
        raise errors.InvalidHyperparameterError(f"{name} is {value!r}; it must be a finite number of at least 0")


EXTRAS: Mapping[str, Callable[[str, Value], None]] = {**dict.fromkeys(sorted(GROUP_KEYS), _finite), "l1": _finite_penalty}
"""What a group may hold beside torch's own keys, with its check: what schedules write, and every optimizer's l1 penalty λ."""


def hyperparameters(optimizer: Optimizer, *layers: Mapping[str, Value]) -> dict[str, Value]:
    """torch's keys in torch's order, the defaults overlaid by each layer in turn, and checked as torch checks them.

    EXTRAS may stand after torch's own keys. Unlike in torch lr is finite: schedules compute with it.
    """
    merged = dict(optimizer.defaults)
    for layer in layers:
        for name, value in layer.items():
            if name not in merged and name not in EXTRAS:
                known = [*optimizer.defaults, "l1"]
                raise errors.UnknownHyperparameterError(
                    f"{optimizer.name} has no hyperparameter {name!r}{nearest(name, known)}", name=name
                )
            merged[name] = value
    for name in EXTRAS.keys() & merged.keys():
        EXTRAS[name](name, merged[name])
    try:
        optimizer.check(merged)
    except (ValueError, TypeError, RuntimeError) as error:
        raise errors.InvalidHyperparameterError(str(error)) from error
    _finite("lr", merged["lr"])
    return optimizer.complete(merged)


def edited(optimizer: Optimizer, group: Mapping[str, Value], changes: Mapping[str, Value]) -> dict[str, Value]:
    """A group after an edit. An lr that is not edited was given by a schedule, which as torch's may leave any finite number."""
    lr = group["lr"]
    if "lr" not in changes:
        _finite("lr", lr)
    merged = hyperparameters(optimizer, group, {"lr": optimizer.defaults["lr"]}, changes)
    return merged if "lr" in changes else {**merged, "lr": lr}


def saved(optimizer: Optimizer, group: Mapping[str, Value], scheduled: bool) -> dict[str, Value]:
    """A group that a checkpoint or a state_dict holds. A schedule that is gone has left initial_lr there, and maybe its lr."""
    return edited(optimizer, group, {} if scheduled or "initial_lr" in group else {"lr": group["lr"]})


def check_table(names: Sequence[str], groups: int = 1) -> None:
    """InvalidArgumentError if a job's parameters and groups are so many that a message could not describe them."""
    if sum(2 * len(name.encode()) + _PARAMETER_BYTES for name in names) + groups * _GROUP_BYTES > MAX_MESSAGE_BYTES:
        raise errors.InvalidArgumentError(
            f"the job has {len(names)} parameters in {groups} groups, more than a message can describe; "
            "join small parameters into larger arrays, and groups of the same hyperparameters into one"
        )


def check_parameter_name(name: str) -> None:
    """InvalidNameError for the one name that a safetensors file cannot hold."""
    if name == "__metadata__":
        raise errors.InvalidNameError(f"a parameter may not be called {name!r}: safetensors files reserve that name", name=name)


def check_groups(optimizer: Optimizer, groups: int) -> None:
    """InvalidArgumentError, with torch's message, for an optimizer that takes no more than one param group."""
    if groups > 1 and optimizer.several_groups:
        raise errors.InvalidArgumentError(optimizer.several_groups)


def declared(optimizer: Optimizer, parameters: Sequence[types_pb2.Parameter]) -> Declared:
    """Errors of `check_parameter_name` and `check_parameters`."""
    for entry in parameters:
        check_parameter_name(entry.name)
    found = [(entry.name, tuple(entry.shape), dtypes.from_wire(entry.dtype, entry.name)) for entry in parameters]
    check_parameters(optimizer, found)
    return found


def check_parameters(optimizer: Optimizer, parameters: Declared) -> None:
    """UnsupportedParameterError, with torch's message, for a parameter that the optimizer cannot take."""
    for name, shape, dtype in parameters:
        try:
            optimizer.check_parameter(name, shape, dtypes.is_complex(dtype))
        except (ValueError, RuntimeError) as error:
            raise errors.UnsupportedParameterError(f"parameter {name!r}: {error}", parameter=name) from error


def _choice(value: Choice, names: Mapping[Choice, str], default: Choice, what: str) -> Choice:
    if value and value not in names:
        raise errors.InvalidArgumentError(f"{what} is {value}; allowed are {', '.join(names.values())}")
    return value or default


CONSISTENCIES = {jobs_pb2.CONSISTENCY_SYNC: "sync", jobs_pb2.CONSISTENCY_ASYNC: "async"}
ON_NONFINITE = {jobs_pb2.ON_NONFINITE_REJECT: "reject", jobs_pb2.ON_NONFINITE_SKIP: "skip"}
ON_MISSING = {jobs_pb2.ON_MISSING_DROP: "drop", jobs_pb2.ON_MISSING_WAIT: "wait", jobs_pb2.ON_MISSING_FAIL: "fail"}


def plan(spec: jobs_pb2.JobSpec) -> Plan:
    """Checks a spec whole and fills in what it leaves open. Typed errors name what is wrong."""
    if spec.name:
        check_name(spec.name)
    optimizer = find_optimizer(spec.optimizer)
    if not spec.groups:
        raise errors.InvalidArgumentError("optimizer got an empty parameter list")
    if spec.workers < 1:
        raise errors.InvalidArgumentError("a job has at least 1 worker; workers is 0")
    if spec.workers > _MOST_WORKERS:
        raise errors.InvalidArgumentError(f"a job has at most {_MOST_WORKERS} workers; workers is {spec.workers}")
    full = jobs_pb2.JobSpec()
    full.CopyFrom(spec)
    full.optimizer = optimizer.name
    full.consistency = _choice(spec.consistency, CONSISTENCIES, jobs_pb2.CONSISTENCY_SYNC, "consistency")
    full.on_nonfinite = _choice(spec.on_nonfinite, ON_NONFINITE, jobs_pb2.ON_NONFINITE_REJECT, "on_nonfinite")
    full.on_missing = _choice(spec.on_missing, ON_MISSING, jobs_pb2.ON_MISSING_DROP, "on_missing")
    full.quorum = spec.quorum or 1
    if full.quorum > full.workers:
        raise errors.InvalidArgumentError(f"quorum is {full.quorum}; the job has {full.workers} workers")
    for name, default in (("round_timeout_seconds", 1800.0), ("lease_seconds", 30.0)):
        seconds = getattr(spec, name) or default
        if not (math.isfinite(seconds) and seconds > 0):
            raise errors.InvalidArgumentError(f"{name} is {seconds}; it must be a finite number of seconds above 0")
        setattr(full, name, seconds)
    found_rules = rules.from_proto(spec.rules, optimizer)
    full.rules.CopyFrom(found_rules.to_proto())
    if isinstance(optimizer, Searching) and full.consistency == jobs_pb2.CONSISTENCY_ASYNC:
        raise errors.InvalidArgumentError(
            f"consistency is 'async'; {optimizer.name} evaluates a closure on all ranks at the same points, so it must be "
            "'sync'"
        )
    check_groups(optimizer, len(spec.groups))
    check_table([entry.name for group in spec.groups for entry in group.parameters], len(spec.groups))
    defaults = from_hyperparameters(spec.defaults)
    groups = [hyperparameters(optimizer, defaults, from_hyperparameters(group.hyperparameters)) for group in spec.groups]
    return Plan(full, optimizer, groups, [declared(optimizer, group.parameters) for group in spec.groups], found_rules)


def differences(found: Plan, wanted: Plan) -> list[str]:
    """What two specs differ in, in words; empty if they are the same job."""
    texts = [
        f"{field} is {getattr(found.spec, field)!r}, not {getattr(wanted.spec, field)!r}"
        for field in ("optimizer", "workers", "quorum", "round_timeout_seconds", "lease_seconds")
        if getattr(found.spec, field) != getattr(wanted.spec, field)
    ]
    for field, names in (("consistency", CONSISTENCIES), ("on_nonfinite", ON_NONFINITE), ("on_missing", ON_MISSING)):
        here, there = getattr(found.spec, field), getattr(wanted.spec, field)
        if here != there:
            texts.append(f"{field} is {names[here]!r}, not {names[there]!r}")
    for field in asdict(found.rules):
        here, there = getattr(found.rules, field), getattr(wanted.rules, field)
        if here != there:
            texts.append(f"{field} is {here!r}, not {there!r}")
    if len(found.groups) != len(wanted.groups):
        texts.append(f"it has {len(found.groups)} param groups, not {len(wanted.groups)}")
    groups = zip(found.groups, wanted.groups, strict=False) if found.optimizer is wanted.optimizer else ()
    for index, (here, there) in enumerate(groups):
        odd = [key for key in {**here, **there} if (key in here) != (key in there) or here[key] != there[key]]
        texts += [f"group {index} has {key}={_shown(here, key)}, not {_shown(there, key)}" for key in odd]
    for index, (mine, theirs) in enumerate(zip(found.parameters, wanted.parameters, strict=False)):
        if mine != theirs:
            texts.append(f"group {index} has other parameters: {_first_difference(mine, theirs)}")
    return texts


def _shown(group: Mapping[str, Value], key: str) -> str:
    return repr(group[key]) if key in group else "(none)"


def _first_difference(mine: Declared, theirs: Declared) -> str:
    for here, there in zip(mine, theirs, strict=False):
        if here != there:
            return f"{here[0]!r} {here[1]} {here[2]}, not {there[0]!r} {there[1]} {there[2]}"
    return f"{len(mine)} of them, not {len(theirs)}"

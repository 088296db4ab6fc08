"""A job's rules: which may be set, and what an edit leaves."""

from __future__ import annotations

import math
from typing import Any

import pytest

from optserve.server.formulas import OPTIMIZERS
from optserve.server.formulas.language import CLIP
from optserve.server.jobs import rules, spec
from optserve.server.records import Rules
from optserve.v1 import jobs_pb2, types_pb2
from optserve.wire import errors
from optserve.wire.values import to_hyperparameters

SGD, LBFGS = OPTIMIZERS["sgd"], OPTIMIZERS["lbfgs"]


def spec_of(optimizer: str, **fields: Any) -> jobs_pb2.JobSpec:
    parameter = types_pb2.Parameter(name="w", shape=[3], dtype=types_pb2.DATA_TYPE_FLOAT32)
    groups = [jobs_pb2.GroupSpec(parameters=[parameter])]
    return jobs_pb2.JobSpec(optimizer=optimizer, workers=1, groups=groups, defaults=to_hyperparameters({"lr": 1.0}), **fields)


def test_without_rules_nothing_is_clipped_and_every_round_steps() -> None:
    assert rules.from_proto(jobs_pb2.StepRules(), SGD) == Rules(None, None, 1)


@pytest.mark.parametrize("found", [Rules(2.0, None, 7), Rules(None, 0.5, 1), Rules(math.inf, None, 1 << 20)])
def test_rules_come_back_from_the_wire(found: Rules) -> None:
    assert rules.from_proto(found.to_proto(), SGD) == found
    plan = spec.plan(spec_of("sgd", rules=found.to_proto()))
    assert plan.rules == found
    assert spec.plan(plan.spec).rules == found


def test_an_edit_changes_what_it_names() -> None:
    before = Rules(2.0, None, 4)
    assert rules.edited(before, {}, SGD) == before
    assert rules.edited(before, {"accumulation": 1}, SGD) == Rules(2.0, None, 1)
    assert rules.edited(before, {"clip_grad_norm": None, "clip_grad_value": 3}, SGD) == Rules(None, 3.0, 4)
    with pytest.raises(errors.InvalidArgumentError, match="clip_grad_norm is 2 and clip_grad_value is 3"):
        rules.edited(before, {"clip_grad_value": 3.0}, SGD)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, -math.inf, True, "1.0", (1.0, 2.0)])
@pytest.mark.parametrize("name", ["clip_grad_norm", "clip_grad_value"])
def test_a_bound_is_a_number_above_0(name: str, value: Any) -> None:
    with pytest.raises(errors.InvalidArgumentError, match=f"^{name} is .*it must be a number above 0"):
        rules.edited(Rules(), {name: value}, SGD)


@pytest.mark.parametrize("value", [0, -1, (1 << 20) + 1, 1.5, None, True, "2"])
def test_a_window_is_a_whole_number_of_rounds(value: Any) -> None:
    with pytest.raises(errors.InvalidArgumentError, match=r"^accumulation is "):
        rules.edited(Rules(), {"accumulation": value}, SGD)


def test_an_optimizer_that_searches_neither_accumulates_nor_is_async() -> None:
    with pytest.raises(errors.InvalidArgumentError, match="accumulation is 2; LBFGS evaluates its closure within one round"):
        rules.edited(Rules(), {"accumulation": 2}, LBFGS)
    assert rules.edited(Rules(), {"clip_grad_norm": 2.0}, LBFGS) == Rules(2.0, None, 1)
    with pytest.raises(errors.InvalidArgumentError, match="accumulation is 3; LBFGS"):
        spec.plan(spec_of("lbfgs", rules=jobs_pb2.StepRules(accumulation=3)))
    with pytest.raises(errors.InvalidArgumentError, match="consistency is 'async'; LBFGS"):
        spec.plan(spec_of("lbfgs", consistency=jobs_pb2.CONSISTENCY_ASYNC))


def test_specs_that_differ_in_a_rule_differ() -> None:
    found = spec.plan(spec_of("sgd", rules=jobs_pb2.StepRules(clip_grad_norm=1.0)))
    wanted = spec.plan(spec_of("sgd", rules=jobs_pb2.StepRules(accumulation=2)))
    assert spec.differences(found, wanted) == ["clip_grad_norm is 1.0, not None", "accumulation is 1, not 2"]


def test_groups_carry_the_bound_to_the_kernels() -> None:
    groups: list[dict[str, Any]] = [{"lr": 1.0}, {"lr": 2.0}]
    assert rules.clipping(groups, None) == groups
    assert rules.clipping(groups, 0.5) == [{"lr": 1.0, CLIP: 0.5}, {"lr": 2.0, CLIP: 0.5}]
    assert groups == [{"lr": 1.0}, {"lr": 2.0}]

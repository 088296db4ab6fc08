"""state_dicts through torch both ways, and documents of checkpoints, which may come from strangers."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from schedule_pairs import CASES, Pair, hexes

from optserve.server import schedules
from optserve.wire.errors import InputError, InvalidStateDictError

IDS = [f"{name}{index}" for index, (name, _) in enumerate(CASES)]


def plain(value: Any) -> Any:
    """A state_dict of torch's as it travels."""
    if isinstance(value, Counter):
        return [list(pair) for pair in sorted(value.items())]
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list) else value


def torchs(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: Counter(dict(map(tuple, entry))) if key == "milestones" else torchs(entry) for key, entry in value.items()}
    return [torchs(entry) for entry in value] if isinstance(value, list) else value


def sent(value: Any) -> Any:
    return json.loads(json.dumps(value))


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=IDS)
class TestTorch:
    def test_a_state_dict_has_torchs_keys_and_values(self, name: str, arguments: dict[str, Any]) -> None:
        pair = Pair(name, arguments)
        for _ in range(12):
            pair.step(13)
            pair.edit(1, lr=0.3)
            ours, theirs = schedules.state_dict(pair.state), plain(pair.scheduler.state_dict())
            assert ours == theirs
            assert repr(ours).count("'") == repr(theirs).count("'")
            assert [*walk(ours)] == [*walk(theirs)]

    def test_torch_goes_on_from_ours_and_ours_from_torchs(self, name: str, arguments: dict[str, Any]) -> None:
        pair = Pair(name, arguments)
        pair.step(23)
        pair.edit(2, lr=0.7)
        pair.load_into_torch(torchs(sent(schedules.state_dict(pair.state))))
        pair.step(60)
        other = Pair(name, arguments)
        pair.state = schedules.load(other.state, sent(plain(pair.scheduler.state_dict())), pair.groups)
        pair.step(60)
        assert schedules.state_dict(pair.state) == plain(pair.scheduler.state_dict())

    def test_a_state_restored_from_json_goes_on_bitwise(self, name: str, arguments: dict[str, Any]) -> None:
        pair = Pair(name, arguments)
        for _ in range(20):
            pair.step(7)
            document = schedules.to_document(pair.state)
            assert sent(document) == document
            restored = schedules.from_document(sent(document))
            assert restored == pair.state
            schedules.check_groups(restored, 4)
            pair.state = restored

    def test_a_document_of_a_stranger_is_refused_or_used(self, name: str, arguments: dict[str, Any]) -> None:
        """Whatever stands in the place of a value: a typed error, or a state that steps, or says with a typed error why not."""
        pair = Pair(name, arguments)
        pair.step(5)
        document = sent(schedules.to_document(pair.state))
        refused = 0
        for damaged in damages(document):
            try:
                state = schedules.from_document(damaged)
                schedules.check_groups(state, 4)
            except InvalidStateDictError:
                refused += 1
                continue
            assert sent(schedules.to_document(schedules.from_document(sent(schedules.to_document(state))))) == sent(
                schedules.to_document(state)
            )
            with contextlib.suppress(InputError):
                schedules.step(state, pair.groups, metric=0.5 if name == "ReduceLROnPlateau" else None)
        assert refused > 10


def walk(value: Any, path: str = "") -> Iterator[str]:
    """The keys in their order."""
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield f"{path}/{key}"
        yield from walk(entry, f"{path}/{key}")


JUNK = (None, True, -5, 2**70, 0.5, math.nan, math.inf, "x", [], [1e308, -1], {}, [["StepLR", {"step_size": 1}]], [[1, 10**12]])


def damages(document: Any) -> Iterator[Any]:
    """The document with one value replaced, one key gone, or one too many."""
    for path in [entry for entry in walk(document) if entry.count("/") < 7]:
        keys = [int(key) if key.isdigit() else key for key in path.split("/")[1:]]
        for junk in JUNK:
            damaged = copy.deepcopy(document)
            inner = damaged
            for key in keys[:-1]:
                inner = inner[key]
            inner[keys[-1]] = junk
            yield damaged
        damaged = copy.deepcopy(document)
        inner = damaged
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        yield damaged
    yield document | {"state": document["state"] | {"more": 1}}


DEEP: list[Any] = []
for _ in range(5000):
    DEEP = [DEEP]


def test_a_document_of_before_functions_says_what_it_lacks() -> None:
    before = {"name": "StepLR", "arguments": {"step_size": 3}, "last_epoch": 5, "base_lrs": [0.1], "own": {}}
    with pytest.raises(InvalidStateDictError, match="the state of the schedule cannot be used: it lacks 'setting'"):
        schedules.from_document(before)


@pytest.mark.parametrize("document", [None, [], "StepLR", {}, 3])
def test_a_document_of_another_kind_is_refused(document: object) -> None:
    with pytest.raises(InvalidStateDictError, match="the state of the schedule cannot be used"):
        schedules.from_document(document)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "Nothing"}, "'Nothing' is not known"),
        ({"name": ["StepLR"]}, "is not known"),
        ({"arguments": {"step_size": 0}}, "must be more than 0"),
        ({"arguments": {"unknown": 0}}, "no argument 'unknown'"),
        ({"arguments": []}, "another type"),
        ({"setting": "x" * 300}, "another type"),
        ({"state": None}, "must be a dict"),
        ({"arguments": {"step_size": DEEP}}, "recursion"),
    ],
)
def test_what_is_wrong_with_a_document_is_named(change: dict[str, Any], message: str) -> None:
    state, _ = schedules.create("StepLR", {"step_size": 3}, [{"lr": 0.1}])
    with pytest.raises(InvalidStateDictError, match=message):
        schedules.from_document(schedules.to_document(state) | change)


def pair_of(name: str) -> Pair:
    return Pair(*next(case for case in CASES if case[0] == name))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("StepLR", {"base_lrs": [0.7]}, None),
        ("StepLR", {"gamma": DEEP}, "recursion"),
        ("StepLR", {"base_lrs": []}, r"base_lrs is \[\]; it must be a list of numbers, one a param group"),
        ("StepLR", {"_last_lr": []}, r"_last_lr is \[\]"),
        ("StepLR", {"base_lrs": [0.1] * 5}, "is of 5 param groups; there are 4"),
        ("StepLR", {"_last_lr": [0.1] * 5}, "is of 5 param groups; there are 4"),
        ("StepLR", {"last_epoch": 1.5}, "last_epoch is 1.5"),
        ("StepLR", {"_step_count": -1}, "_step_count is -1"),
        ("StepLR", {"_is_initial": True}, "_is_initial is True, and here False"),
        ("StepLR", {"step_size": 0}, "must be more than 0"),
        ("StepLR", {"T_max": 3}, r"has \['T_max'\]"),
        ("OneCycleLR", {"total_steps": 77}, "total_steps is 77, and here 200"),
        ("OneCycleLR", {"use_beta1": True}, "use_beta1 is True, and here False"),
        ("OneCycleLR", {"_anneal_func_type": "linear"}, None),
        ("CyclicLR", {"total_size": 3.0}, "total_size is 3.0, and here 14.0"),
        ("CyclicLR", {"_scale_fn_custom": {}}, "_scale_fn_custom is {}, and here None"),
        ("CyclicLR", {"max_lrs": [1, 2, 3, 4]}, None),
        ("CyclicLR", {"max_lrs": [1, 2, 3]}, "same length as optimizer.param_groups. max_lr has 3 values"),
        ("ReduceLROnPlateau", {"best": math.nan}, "best is nan"),
        ("ReduceLROnPlateau", {"best": -math.inf}, None),
        ("ReduceLROnPlateau", {"mode_worse": 3.0}, "mode_worse is 3.0, and here inf"),
        ("ReduceLROnPlateau", {"min_lrs": [0] * 5}, "is of 5 param groups; there are 4"),
        ("LambdaLR", {"lr_lambdas": [None]}, "lr_lambdas is"),
        ("SequentialLR", {"_milestones": [1, 2]}, "1 milestones"),
        ("SequentialLR", {"_schedulers": []}, "the states of 2 schedules"),
        ("SequentialLR", {"_schedulers": [1, 2]}, "it must be dicts"),
        ("MultiStepLR", {"milestones": [[5, 2], [3, 1]]}, "milestones"),
        ("MultiStepLR", {"milestones": [[3, 1], [5, 10**12]]}, "counts, from 1 to 8192"),
        ("MultiStepLR", {"milestones": [[3, 8192], [5, 1]]}, "of at most 8192 milestones"),
        ("MultiStepLR", {"milestones": 3}, "a Counter of whole numbers"),
        ("CosineAnnealingWarmRestarts", {"T_i": 0}, "T_i is 0"),
    ],
)
def test_a_state_dict_is_checked_whole(name: str, change: dict[str, Any], message: str | None) -> None:
    pair = pair_of(name)
    document = schedules.state_dict(pair.state) | change
    before = json.dumps(schedules.to_document(pair.state))
    if message is None:
        loaded = schedules.load(pair.state, document, pair.groups)
        assert loaded != pair.state
    else:
        with pytest.raises(InvalidStateDictError, match=message):
            schedules.load(pair.state, document, pair.groups)
    assert json.dumps(schedules.to_document(pair.state)) == before


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=IDS)
def test_a_state_dict_of_another_schedule_is_refused(name: str, arguments: dict[str, Any]) -> None:
    pair = Pair(name, arguments)
    for other in {case for case, _ in CASES} - {name, {"LambdaLR": "MultiplicativeLR"}.get(name, name)}:
        if {name, other} != {"LambdaLR", "MultiplicativeLR"}:  # whose state_dicts are the same
            with pytest.raises(InvalidStateDictError, match=f"the state_dict is not one of (this )?{name}"):
                schedules.load(pair.state, schedules.state_dict(pair_of(other).state), pair.groups)


def test_flags_that_only_some_torchs_have_do_not_matter() -> None:
    pair = pair_of("StepLR")
    document = schedules.state_dict(pair.state) | {"verbose": False}
    del document["_is_initial"], document["_get_lr_called_within_step"]
    assert schedules.load(pair.state, document, pair.groups) == pair.state


def test_groups_that_torch_knows_nothing_of_are_added_to_its_state_dict() -> None:
    pair = Pair("LinearLR", {"total_iters": 40})
    pair.step(3)
    pair.add_group(0.25)
    pair.step(3)
    theirs = pair.scheduler.state_dict()
    assert len(theirs["base_lrs"]) == 4
    pair.state = schedules.load(pair.state, plain(theirs), pair.groups)
    assert pair.state.base_lrs[-1] == pair.groups[-1]["lr"]
    pair.step(40)
    cyclic = Pair("CyclicLR", {"base_lr": [0.1] * 4, "max_lr": 0.2})
    document = schedules.state_dict(cyclic.state)
    cyclic.groups.append({"lr": 0.1, "momentum": 0.5})
    with pytest.raises(InvalidStateDictError, match="base_lr has one value for each of 4 param groups"):
        schedules.load(cyclic.state, document, cyclic.groups)


def test_a_loaded_state_dict_changes_no_group() -> None:
    pair = pair_of("OneCycleLR")
    before = hexes(pair.groups)
    schedules.load(pair.state, schedules.state_dict(pair.state) | {"last_epoch": 44}, pair.groups)
    assert hexes(pair.groups) == before


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("CosineAnnealingLR", {"_step_count": 0}),
        ("SWALR", {"_step_count": 3}),
        ("StepLR", {"last_epoch": -2, "gamma": 0.9}),
        ("CosineAnnealingWarmRestarts", {"last_epoch": -2}),
        ("CosineAnnealingWarmRestarts", {"T_cur": 1.5, "T_i": 21}),
        ("ReduceLROnPlateau", {"best": math.inf, "cooldown_counter": 2, "num_bad_epochs": 7, "min_lrs": [0.2] * 4}),
        ("CyclicLR", {"max_lrs": [0.5, 0.6, 0.7, 0.8], "base_momentums": [0.1] * 4, "mode": "exp_range", "gamma": 0.9}),
    ],
)
def test_a_state_that_somebody_edited_goes_on_as_in_torch(name: str, change: dict[str, Any]) -> None:
    pair = pair_of(name)
    pair.step(5)
    edited = schedules.state_dict(pair.state) | change
    pair.load_into_torch(torchs(sent(edited)))
    if "mode" in change:
        edited["scale_mode"] = "iterations"
    if "min_lrs" in change:
        edited["default_min_lr"] = pair.scheduler.default_min_lr = None
    pair.state = schedules.load(pair.state, edited, pair.groups)
    pair.step(40)

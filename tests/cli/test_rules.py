"""job set, and what job show and job events say of rules, windows and metrics."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from optserve.cli import exits
from optserve.client import Job

Command = Callable[..., Result]
GRADIENT = {"w": np.full((3, 4), 3.0, np.float32), "b": np.full(4, 4.0, np.float32)}


def ok(result: Result) -> str:
    assert result.exit_code == exits.OK, result.stderr
    return result.stdout


def lines(text: str) -> dict[str, str]:
    """Facts by their names."""
    return {key: value for key, _, value in (line.partition("  ") for line in text.splitlines()) if value.strip()}


def fact(optserve: Command, name: str) -> str | None:
    found = lines(ok(optserve("job", "show", "j"))).get(name)
    return None if found is None else found.strip()


def shown(optserve: Command) -> dict[str, Any]:
    names = ("clip_grad_norm", "clip_grad_value", "accumulation", "accumulated")
    document = json.loads(ok(optserve("job", "show", "j", "--json")))
    return {name: document[name] for name in names}


def test_set_edits_rules_and_show_tells_them(optserve: Command, job: Job) -> None:
    assert (fact(optserve, "rules"), fact(optserve, "window")) == ("none", None)
    assert ok(optserve("job", "set", "j", "clip_grad_norm=1.5", "accumulation=4")) == (
        "rules: clip_grad_norm=1.5 accumulation=4\n"
    )
    assert fact(optserve, "rules") == "clip_grad_norm=1.5 accumulation=4"
    assert fact(optserve, "window") == "0 of 4 rounds summed up"
    changed = json.loads(ok(optserve("job", "set", "j", "clip_grad_norm=none", "clip_grad_value=0.5", "--json")))
    assert changed == {"clip_grad_norm": None, "clip_grad_value": 0.5, "accumulation": 4}
    assert shown(optserve) == {**changed, "accumulated": 0}
    assert (job.info().clip_grad_value, job.info().accumulation) == (0.5, 4)
    assert ok(optserve("job", "set", "j", "clip_grad_value=none", "accumulation=1")) == "rules: none\n"


def test_show_tells_how_far_a_window_is(optserve: Command, job: Job) -> None:
    ok(optserve("job", "set", "j", "accumulation=4"))
    with job.join() as worker:
        for _ in range(2):
            worker.push(GRADIENT, metrics={"loss": 0.25})
    assert fact(optserve, "window") == "2 of 4 rounds summed up"
    assert fact(optserve, "metrics") == "loss=0.25"
    assert shown(optserve)["accumulated"] == 2
    result = optserve("job", "set", "j", "accumulation=2")
    assert result.exit_code == exits.code_of(_refused(job))
    assert "2 of 4 rounds are summed up" in result.stderr
    assert shown(optserve)["accumulation"] == 4


def _refused(job: Job) -> Exception:
    with pytest.raises(ValueError, match="middle of a window") as caught:
        job.update_rules(accumulation=2)
    return caught.value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["clip_grad_nrm=1"], "clip_grad_norm"),
        (["clip_grad_norm=0"], "must be a number above 0"),
        (["clip_grad_norm=1", "clip_grad_value=1"], "give one of them"),
        (["accumulation=1.5"], "whole number"),
        (["accumulation=none"], "whole number"),
    ],
)
def test_what_is_no_rule_is_said_and_changes_nothing(optserve: Command, job: Job, arguments: list[str], message: str) -> None:
    before = job.position()
    result = optserve("job", "set", "j", *arguments)
    assert result.exit_code != exits.OK
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert job.position() == before


def test_events_show_metrics_and_the_norm_of_rounds(optserve: Command, job: Job) -> None:
    names = {"kind": 1.0, "ranks": 2.0, "message": 3.0, "grad": float("nan")}
    with job.join() as worker:
        worker.push(GRADIENT, metrics=names)
    (line,) = [entry for entry in ok(optserve("job", "events", "j")).splitlines() if "step 2" in entry and " round " in entry]
    assert line.endswith("grad=nan kind=1 message=3 ranks=2 grad_norm=13.11")
    events = [json.loads(entry) for entry in ok(optserve("job", "events", "j", "--json")).splitlines()]
    (found,) = [event for event in events if event["kind"] == "round" and event["step"] == 2]
    assert found["metrics"] == {"grad": None, "kind": 1.0, "message": 3.0, "ranks": 2.0}
    assert (found["fields"]["ranks"], found["message"]) == ("[0]", "step 2")
    (joined,) = [event for event in events if event["kind"] == "joined" and event["index"] > 3]
    assert joined["metrics"] == {}


def test_events_show_no_norm_of_a_skipped_round_and_only_the_first_of_many_metrics(optserve: Command, job: Job) -> None:
    with job.join() as worker:
        worker.skip_round(metrics={f"m{index:02}": float(index) for index in range(12)})
    line = ok(optserve("job", "events", "j")).splitlines()[-2]
    assert line.endswith("round skipped: no weight  m00=0 m01=1 m02=2 m03=3 m04=4 m05=5 m06=6 m07=7 and 4 more")


def test_events_show_what_a_gradient_was_clipped_by_and_how_often_closures_were_called(optserve: Command, job: Job) -> None:
    with job.join() as worker:
        worker.push(GRADIENT, clip_grad_norm=1.311)
        worker.step(lambda _: (0.5, GRADIENT))
    clipped, called = [entry for entry in ok(optserve("job", "events", "j")).splitlines() if " round " in entry][1:]
    assert clipped.endswith("step 2  grad_norm=13.11 clip_factor=0.09996")
    assert called.endswith("step 3  loss=0.5 grad_norm=13.11 evaluations=1")

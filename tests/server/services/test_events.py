"""Events in an answer: what does not fit is left out, the largest part last."""

from __future__ import annotations

from optserve.server.records import Position
from optserve.server.rounds.events import Event
from optserve.server.services import jobs


def event(fields: dict[str, str], metrics: dict[str, float]) -> Event:
    return Event(1, 1.0, "round", Position("a", 1, 1), "step 1", fields, metrics)


def test_fields_go_first_then_metrics() -> None:
    few, many = {"loss": 1.0}, {f"{index:0128}": 1.0 for index in range(1000)}
    short, long = {"ranks": "[0]"}, {"ranks": "x" * (64 << 10)}
    (whole, no_fields, no_metrics, bare) = jobs._page(
        event(fields, metrics) for fields, metrics in ((short, few), (long, few), (short, many), (long, many))
    )
    assert (dict(whole.fields), dict(whole.metrics)) == (short, few)
    assert (dict(no_fields.fields), dict(no_fields.metrics)) == ({}, few)
    assert (dict(no_metrics.fields), dict(no_metrics.metrics)) == ({}, {})
    assert (dict(bare.fields), dict(bare.metrics)) == ({}, {})
    assert {entry.message for entry in (whole, no_fields, no_metrics, bare)} == {"step 1"}

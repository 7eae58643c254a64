"""Events as plain data and back: what snapshots, servers and JSON lines rest on."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fastloop import events
from fastloop.events import TYPES, Event, from_dict

EXAMPLES: list[Event] = [
    events.Decision(seq=0, epoch=0, t=0.4, chunk=0, decision="silent", p_respond=0.25),
    events.ResponseStart(seq=1, epoch=0, t=0.8, emotion=None),
    events.ResponseStart(seq=2, epoch=1, t=0.8, emotion="urgent"),
    events.ResponseText(seq=3, epoch=1, t=0.8, text="é\n"),
    events.ResponseEnd(seq=4, epoch=1, t=0.8, text="é\n", reason="end"),
    events.Stalled(seq=5, epoch=1, t=1.2, message="waits"),
    events.Rejected(seq=-1, epoch=0, t=0.0, message="no"),
    events.Failed(seq=6, epoch=1, t=1.2, message="NaN"),
    events.Closed(seq=7, epoch=1, t=1.2),
]


@pytest.mark.parametrize("event", EXAMPLES)
def test_there_and_back(event: Event) -> None:
    values = event.to_dict()
    assert next(iter(values)) == "type" and values["type"] == event.type
    assert from_dict(json.loads(json.dumps(values))) == event


def test_every_type_has_an_example_and_a_name_of_its_own() -> None:
    assert {type(event) for event in EXAMPLES} == set(TYPES.values())
    assert len({kind.type for kind in TYPES.values()}) == len(TYPES)


def test_events_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EXAMPLES[0].seq = 9  # type: ignore[misc]

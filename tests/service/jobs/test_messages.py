from __future__ import annotations

import io
import json
import struct

import numpy as np
import pytest

from bitquota.canonical import canonical_json
from bitquota.errors import BudgetTooSmall, MeasurementFailed, ServiceError, Unauthorized
from bitquota.progress import Progress
from bitquota.sensitivity.cache import ledger_key
from bitquota.sensitivity.tasks import Task
from bitquota.service import wire
from bitquota.service.jobs.messages import (
    MAX_DETAIL,
    MAX_KEYS,
    Ahead,
    Ended,
    Failed,
    Idle,
    LedgerGet,
    LedgerPut,
    LedgerSize,
    Piece,
    Progressed,
    Whole,
    decode,
    encode,
)

KEY = ledger_key("a")


def travelled(message):
    """Return a message after it was written to a stream and read again."""
    stream = io.BytesIO()
    wire.send(stream, *encode(message))
    stream.seek(0)
    return decode(*wire.receive(stream))


class TestEncode:
    @pytest.mark.parametrize(
        "message",
        [
            LedgerGet(keys=(KEY, ledger_key("b"))),
            LedgerSize(),
            Ahead(tasks=(Task(measure="pairs", chunk=3, point=(0, 1), choices=((1, 1),)),)),
            Idle(),
            Idle(done=7),
            Progressed(progress=Progress(stage="pairs", done=2, total=9, reused=1)),
            Piece(data=b"\0bytes"),
            Piece(data=b"", checkpoint=True),
            Whole(name="plans"),
            Whole(name="learn.safetensors", checkpoint=True),
            Ended(peak_bytes=2**40),
        ],
        ids=lambda message: type(message).__name__,
    )
    def test_arrives_as_it_was(self, message):
        assert travelled(message) == message

    def test_measurements_arrive_to_the_last_bit(self):
        values = np.array([[1 / 3, 5e-324], [-0.0, 1e308]])
        (kept,) = travelled(LedgerPut(entries={KEY: values})).entries.items()
        assert (kept[0], kept[1].tobytes()) == (KEY, values.tobytes())

    def test_error_arrives_as_itself(self):
        error = travelled(Failed(error=BudgetTooSmall("too small", smallest=12))).error
        assert (type(error), error.message, error.details) == (
            BudgetTooSmall, "too small", {"smallest": 12},
        )  # fmt: skip

    def test_error_with_values_that_are_no_json(self):
        assert travelled(Failed(error=MeasurementFailed("x", what=b"y"))).error.details == {
            "what": "b'y'"
        }


def entries(key=KEY, shape=(1,), part=None):
    part = np.ones(1).tobytes() if part is None else part
    return {"type": "ledger_put", "entries": [[key, list(shape)]]}, [part]


def error(**changes):
    return {"slug": "invalid-input", "message": "no", "details": {}} | changes


HOSTILE = {
    "no type": ({}, []),
    "unknown type": ({"type": "shutdown"}, []),
    "type that is no text": ({"type": ["end"]}, []),
    "member too many": ({"type": "end", "status": "succeeded"}, []),
    "member missing": ({"type": "result"}, []),
    "parts where there are none": ({"type": "end"}, [b"x"]),
    "two parts of a piece": ({"type": "piece"}, [b"x", b"y"]),
    "piece without bytes": ({"type": "piece"}, []),
    "keys that are no list": ({"type": "ledger_get", "keys": {"a": 1}}, []),
    "keys that are no keys": ({"type": "ledger_get", "keys": ["../x"]}, []),
    "keys with a suffix": ({"type": "ledger_get", "keys": [KEY + "\n"]}, []),
    "too many keys": ({"type": "ledger_get", "keys": [KEY] * (MAX_KEYS + 1)}, []),
    "measurement that is not finite": entries(part=np.array([np.nan]).tobytes()),
    "measurement under no key": entries(key="other"),
    "measurement of another shape": entries(shape=(3,)),
    "measurement of an impossible shape": entries(shape=(2**70,)),
    "measurement cut": entries(part=b"1234"),
    "two measurements under one key": (
        {"type": "ledger_put", "entries": [[KEY, [1]]] * 2}, [np.ones(1).tobytes()] * 2,
    ),
    "tasks that are no list": ({"type": "ahead", "tasks": "all"}, []),
    "task of an unknown measure": (
        {"type": "ahead", "tasks": [{"measure": "x", "chunk": 0, "point": None, "choices": []}]},
        [],
    ),
    "task done that is no number": ({"type": "idle", "done": "1"}, []),
    "task done below zero": ({"type": "idle", "done": -1}, []),
    "progress that is not whole": ({"type": "progress", "progress": {"stage": "x"}}, []),
    "progress beyond its end": (
        {"type": "progress", "progress": {"stage": "x", "done": 2, "total": 1, "reused": 0}}, [],
    ),
    "progress of thousands of digits": (
        {"type": "progress", "progress": {"stage": "x", "done": 0, "total": 10**4000, "reused": 0}},
        [],
    ),
    "stage that controls a terminal": (
        {"type": "progress", "progress": {"stage": "\x1b[2J", "done": 0, "total": 1, "reused": 0}},
        [],
    ),
    "result with a long name": ({"type": "result", "name": "x" * 1000}, []),
    "error that is no object": ({"type": "error", "error": "no"}, []),
    "error without a text": ({"type": "error", "error": error(message=None)}, []),
    "error whose values collide": ({"type": "error", "error": error(details={"self": 1})}, []),
}  # fmt: skip


class TestDecode:
    @pytest.mark.parametrize("name", HOSTILE)
    def test_hostile_message_is_refused_with_a_short_verdict(self, name):
        with pytest.raises(MeasurementFailed, match="a worker must") as caught:
            decode(*HOSTILE[name])
        assert len(caught.value.message) < 1000

    def test_error_of_a_class_that_work_never_raises(self):
        """An evaluator cannot tell a client that its key is wrong."""
        said = decode({"type": "error", "error": error(slug=Unauthorized.slug)}, [])
        assert type(said.error) is MeasurementFailed

    def test_error_is_bounded(self):
        told = error(message="x" * 10**6, details={"x": "y" * 10**6})
        said = decode({"type": "error", "error": told}, [])
        assert len(said.error.message) == MAX_DETAIL
        assert said.error.details == {}


def framed(head, parts=b""):
    return io.BytesIO(struct.pack(">I", len(head)) + head + parts)


class TestReceive:
    @pytest.mark.parametrize(
        "head",
        [
            b"nothing",
            b"[]",
            b'{"type":"end"}',
            b'{"type":"end","parts":[-1]}',
            b'{"type":"end","parts":[true]}',
            b'{"type":"end","parts":[1.5]}',
            b'{"type":"end","parts":[2147483647]}',
            b'{"type":"idle","done":NaN,"parts":[]}',
            b'{"type":"idle","done":Infinity,"parts":[]}',
            b'{"type":' + b"[" * 100_000 + b"]" * 100_000 + b',"parts":[]}',
            b'{"type":[' + b"[]," * 3_000_000 + b'1],"parts":[]}',
            b'{"type":"end","parts":[' + b"9" * 5000 + b"]}",
            b"\xff\xfe",
        ],
        ids=range(13),
    )
    def test_what_is_no_message_is_refused(self, head):
        with pytest.raises(MeasurementFailed, match="whole messages"):
            wire.receive(framed(head))

    def test_head_of_gigabytes_is_not_read(self):
        with pytest.raises(MeasurementFailed, match="a head of"):
            wire.receive(io.BytesIO(struct.pack(">I", 2**32 - 1)))

    @pytest.mark.parametrize("cut", [1, 10, -1])
    def test_end_inside_a_message_is_a_death(self, cut):
        """The driver tries again; it was killed, and said nothing wrong."""
        head = json.loads(canonical_json({"type": "piece"}))
        stream = io.BytesIO()
        wire.send(stream, head, [b"12345"])
        with pytest.raises(ServiceError, match="it ended"):
            wire.receive(io.BytesIO(stream.getvalue()[:cut]))

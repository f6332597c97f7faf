"""Passes and adapters of both clients, against a daemon whose blocks double what they get."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

import corolla
from corolla.protocol.control import Call, Return
from corolla.protocol.errors import Code, CorollaError, Exit, error
from corolla.protocol.messages import from_plain, to_plain
from corolla.protocol.passes import AdapterName, AdapterView, BackwardPass, ForwardPass, Passed, PassGradients
from corolla.protocol.training import Dropout, Sequence
from corolla.protocol.views import TrainingView
from corolla.sdk.cli import main
from corolla.sdk.training import Trip

from .fake import HIDDEN, Connection, FakeDaemon

VIEW = AdapterView("mine", 2, 300, ("aa", "bb"))
PART = b"p" * 32


class Doubling(FakeDaemon):
    """kept: passes that wait for their backward, by handle."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.kept: dict[int, ForwardPass] = {}
        self.asked: list[ForwardPass] = []
        self.parts: dict[str, bytes] = {}
        self.handlers |= {
            "model.forward": self.go,
            "model.backward": self.back,
            "model.release": lambda c, call: self.kept.pop(call.arguments["handle"]) and None,
            "adapter.put": self.put,
            "adapter.list": lambda c, call: [VIEW],
            "adapter.show": self.show,
            "adapter.remove": self.show,
        }

    def go(self, connection: Connection, call: Call) -> Return:
        asked = from_plain(ForwardPass, call.arguments)
        self.asked.append(asked)
        handle = len(self.asked) if asked.keep else 0
        if handle:
            self.kept[handle] = asked
        return Return(call.id, to_plain(Passed(handle, HIDDEN, 2)), doubled(call.payload))

    def back(self, connection: Connection, call: Call) -> Return:
        asked = from_plain(BackwardPass, call.arguments)
        if asked.handle not in self.kept:
            raise error(Code.UNKNOWN_SESSION, f"no pass {asked.handle}")
        sizes = (3, 0) if self.kept.pop(asked.handle).parts else ()
        payload = doubled(call.payload) + b"abc" * bool(sizes)
        return Return(call.id, to_plain(PassGradients(sizes)), payload)

    def put(self, connection: Connection, call: Call) -> None:
        self.parts[call.arguments["part"]] = call.payload

    def show(self, connection: Connection, call: Call) -> AdapterView:
        if from_plain(AdapterName, call.arguments).adapter != "mine":
            raise error(Code.BAD_REQUEST, "no adapter of this name")
        return VIEW


def doubled(payload: bytes) -> bytes:
    return (np.frombuffer(payload, "<f4") * 2).tobytes()


def states(*shape: int) -> Any:
    return np.arange(np.prod(shape), dtype="f4").reshape(shape)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Doubling]:
    with Doubling(tmp_path / "control.sock") as daemon:
        yield daemon


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


TRIP = Trip((1, 3), parts=(PART, b""), dropout=Dropout(5, 6, 7))
RUNS = (Sequence(0, 2), Sequence(0, 1))


def test_a_pass_goes_there_and_back(fake: Doubling) -> None:
    hidden = states(3, HIDDEN)
    with corolla.connect(fake.path) as daemon:
        model = daemon.model("tiny")
        with model.passing(hidden, TRIP, RUNS) as passed:
            assert np.array_equal(passed.output, 2 * hidden)
            back = model.backward(passed, hidden)
            assert np.array_equal(back.inputs, 2 * hidden)
            assert back.parts == (b"abc", b"")
        assert np.array_equal(model.forward(states(2, 3, HIDDEN)), 2 * states(2, 3, HIDDEN))
    first, second = fake.asked
    assert (first.start, first.end, first.sequences) == (1, 3, RUNS)
    assert (first.parts, first.dropout, first.keep) == (TRIP.parts, TRIP.dropout, True)
    assert (second.sequences, second.keep) == ((Sequence(0, 3),) * 2, False)


@pytest.mark.anyio
async def test_so_it_does_for_asynchronous_code(fake: Doubling) -> None:
    hidden = states(3, HIDDEN)
    async with await corolla.aconnect(fake.path) as daemon:
        model = daemon.model("tiny")
        async with await model.passing(hidden, TRIP, RUNS) as passed:
            assert np.array_equal(passed.output, 2 * hidden)
            back = await model.backward(passed, hidden)
            assert np.array_equal(back.inputs, 2 * hidden)
            assert back.parts == (b"abc", b"")
            with pytest.raises(CorollaError, match="no pass 0"):
                await passed.backward(hidden)
            with pytest.raises(CorollaError, match=r"shape \(2, 8\), the output is \(3, 8\)"):
                await passed.backward(hidden[:2])
        assert np.array_equal(await model.forward(states(2, 3, HIDDEN)), 2 * states(2, 3, HIDDEN))
        await model.put_part(PART, b"data")
    assert list(fake.parts.values()) == [b"data"]


@pytest.mark.anyio
async def test_a_pass_that_is_left_is_released(fake: Doubling) -> None:
    async with await corolla.aconnect(fake.path) as daemon:
        model = daemon.model("tiny")
        async with await model.passing(states(1, 2, HIDDEN)):
            assert len(fake.kept) == 1
        assert not fake.kept
        with anyio.CancelScope() as scope:
            async with await model.passing(states(1, 2, HIDDEN)):
                scope.cancel()
                await anyio.sleep_forever()
        assert await anyio.to_thread.run_sync(fake.wait_for, lambda: fake.calls[-1].method == "model.release")


@pytest.mark.anyio
async def test_adapters_are_listed_shown_and_removed(fake: Doubling) -> None:
    async with await corolla.aconnect(fake.path) as later:
        assert await later.adapters() == (VIEW,)
        assert await later.adapter("mine") == VIEW
        await later.remove_adapter("mine")
        with pytest.raises(CorollaError, match="no adapter"):
            await later.remove_adapter("other")
    with corolla.connect(fake.path) as daemon:
        assert daemon.adapters() == (VIEW,)
        assert daemon.adapter("mine") == VIEW
        daemon.remove_adapter("mine")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def test_daemonctl_lists_shows_and_removes_adapters(
    fake: Doubling, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COROLLA_SOCKET", str(fake.path))
    code, out, _ = run(capsys, "adapter", "list")
    assert code == Exit.OK
    assert out.splitlines()[1].split()[:2] == ["mine", "2"]
    listed = json.loads(run(capsys, "adapter", "list", "--json")[1])["adapters"]
    assert listed == [{"adapter": "mine", "num_parts": 2, "size_bytes": 300, "parts": ["aa", "bb"]}]
    assert run(capsys, "adapter", "show", "mine")[1].splitlines()[1:] == ["aa", "bb"]
    assert json.loads(run(capsys, "adapter", "show", "mine", "--json")[1])["adapter"]["num_parts"] == 2
    assert run(capsys, "adapter", "remove", "mine") == (Exit.OK, "", "removed mine\n")
    code, out, err = run(capsys, "adapter", "remove", "other")
    assert (code, out) == (Exit.USAGE, "")
    assert "no adapter" in err


def test_status_shows_what_trains(
    fake: Doubling, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COROLLA_SOCKET", str(fake.path))
    view = TrainingView("tiny", 2.5, 12_800, ("a", "b"))
    fake.handlers["status"] = lambda connection, call: replace(fake.status(), training=(view,))
    assert "training tiny: 2.5 micro-batches/s, 12,800 tokens so far, 2 peers" in run(capsys, "status")[1]
    told = json.loads(run(capsys, "status", "--json")[1])["status"]["training"]
    assert told == [{"model": "tiny", "micro_batches_per_s": 2.5, "num_tokens": 12_800, "peers": ["a", "b"]}]

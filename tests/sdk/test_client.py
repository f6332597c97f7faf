"""Connecting, asking, generating: against a daemon in miniature over a real socket."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import corolla
from corolla.protocol.control import Call, Item, Piece
from corolla.protocol.errors import Code, CorollaError, error
from corolla.protocol.messages import to_plain
from corolla.sdk import generation
from corolla.sdk.client import Daemon

from .fake import Connection, FakeDaemon


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path / "control.sock") as daemon:
        yield daemon


@pytest.fixture
def daemon(fake: FakeDaemon) -> Iterator[Daemon]:
    with corolla.connect(fake.path) as daemon:
        yield daemon


def test_status_models_and_peers_come_typed(daemon: Daemon) -> None:
    assert daemon.status().swarm == "home"
    assert [model.name for model in daemon.models()] == ["tiny"]
    assert daemon.peers()[0].rtt_s == 0.01
    assert daemon.swarm().models[0].replicas == (1, 1, 2, 1)
    assert daemon.join("abc").token == "abc"


def test_generate_gives_text_and_tokens(daemon: Daemon) -> None:
    answer = daemon.model("tiny").generate("one", max_new_tokens=3)
    assert answer.text == " 0 1 2"
    assert answer.tokens == ((0, 1, 2),)
    assert answer.finishes == ("length",)
    assert answer.num_prompt_tokens == 5
    assert answer.num_repairs == 1


def test_streaming_gives_pieces_and_keeps_events_apart(daemon: Daemon) -> None:
    seen: list[Piece] = []
    pieces = list(daemon.model("tiny").generate("one", max_new_tokens=3, stream=True, on_event=seen.append))
    assert [(piece.row, piece.token, piece.text) for piece in pieces] == [
        (0, 0, " 0"),
        (0, 1, " 1"),
        (0, 2, " 2"),
    ]
    assert pieces[-1].finish == "length"
    assert [piece.event for piece in seen] == ["repairing"]


def test_streaming_gives_events_when_asked(daemon: Daemon) -> None:
    pieces = daemon.model("tiny").generate("one", max_new_tokens=2, stream=True, events=True)
    assert [piece.event or piece.text for piece in pieces] == [" 0", "repairing", " 1"]


def test_several_prompts_are_several_rows(daemon: Daemon) -> None:
    answer = daemon.model("tiny").generate(["one", "two"], max_new_tokens=2)
    assert answer.texts == (" 0 1", " 0 1")


def test_options_reach_the_daemon(daemon: Daemon, fake: FakeDaemon) -> None:
    messages = [{"role": "user", "content": "hi"}]
    daemon.model("tiny").generate(
        messages=messages, max_new_tokens=1, temperature=0.5, seed=7, stop="\n", encoding="bfloat16"
    )
    sent = fake.calls[-1].arguments
    assert sent["messages"] == messages
    assert sent["sampling"] == {"temperature": 0.5, "seed": 7, "stop": ["\n"]}
    assert sent["encoding"] == "bfloat16"


def test_biases_that_are_none_are_refused(daemon: Daemon) -> None:
    with pytest.raises(CorollaError, match="logit_bias"):
        daemon.model("tiny").generate("a", logit_bias={5: "much"})  # type: ignore[dict-item]


def test_sampling_without_a_seed_draws_one(daemon: Daemon, fake: FakeDaemon) -> None:
    for _ in range(2):
        daemon.model("tiny").generate("one", max_new_tokens=1, temperature=1.0)
    first, second = (call.arguments["sampling"]["seed"] for call in fake.calls[-2:])
    assert first != second


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "nothing given"),
        ({"prompt": "a", "tokens": [1]}, "prompt and tokens given"),
        ({"prompt": []}, "empty prompt"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens 0"),
        ({"prompt": "a", "temperature": -1.0}, "temperature -1.0"),
        ({"prompt": "a", "encoding": "int3"}, "encoding 'int3'"),
        ({"messages": [{"text": "hi"}]}, "a message"),
    ],
)
def test_a_wrong_request_is_refused_before_it_is_sent(
    daemon: Daemon, fake: FakeDaemon, arguments: dict[str, object], words: str
) -> None:
    with pytest.raises(CorollaError, match=words) as caught:
        daemon.model("tiny").generate(**arguments)  # type: ignore[call-overload]
    assert caught.value.code is Code.BAD_REQUEST
    assert not fake.calls


def test_an_unknown_option_is_named(daemon: Daemon) -> None:
    with pytest.raises(TypeError, match="'temprature'"):
        daemon.model("tiny").generate("a", temprature=1.0)  # type: ignore[call-overload]


def test_leaving_a_stream_early_cancels_it_and_the_connection_goes_on(
    daemon: Daemon, fake: FakeDaemon
) -> None:
    def never_ending(connection: Connection, call: Call) -> None:
        connection.send(Item(call.id, to_plain(Piece(0, 1, "once"))))
        fake.hold.wait(20)

    fake.handlers["generate"] = never_ending
    with daemon.model("tiny").generate("one", max_new_tokens=1000, stream=True) as pieces:
        next(pieces)
    assert fake.wait_for(lambda: bool(fake.cancelled))
    assert daemon.status().state == "online"


def test_calls_of_several_threads_do_not_wait_for_each_other(daemon: Daemon, fake: FakeDaemon) -> None:
    waiting = threading.Thread(target=lambda: daemon._call("slow"))
    waiting.start()
    assert fake.wait_for(lambda: bool(fake.calls))
    assert daemon.status().state == "online"  # answered while `slow` is not
    fake.hold.set()
    waiting.join(20)
    assert not waiting.is_alive()


def test_many_threads_share_one_connection(daemon: Daemon) -> None:
    answers: list[str] = []
    threads = [
        threading.Thread(
            target=lambda: answers.append(daemon.model("tiny").generate("a", max_new_tokens=20).text)
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == ["".join(f" {k}" for k in range(20))] * 8


def test_closing_wakes_a_waiting_thread(daemon: Daemon, fake: FakeDaemon) -> None:
    caught: list[CorollaError] = []

    def wait() -> None:
        try:
            daemon._call("slow")
        except CorollaError as problem:
            caught.append(problem)

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert fake.wait_for(lambda: bool(fake.calls))
    daemon.close()
    waiting.join(20)
    assert [problem.code for problem in caught] == [Code.CANCELLED]


def test_an_error_of_the_daemon_arrives_as_its_own_type(daemon: Daemon, fake: FakeDaemon) -> None:
    def refuse(connection: object, call: object) -> None:
        raise error(Code.NO_SWARM, "not in a swarm", "daemonctl join TOKEN")

    fake.handlers["models"] = refuse
    with pytest.raises(CorollaError, match="not in a swarm") as caught:
        daemon.models()
    assert caught.value.code is Code.NO_SWARM
    assert caught.value.remedy == "daemonctl join TOKEN"


def test_a_model_is_found_by_name_prefix_or_hub_id(daemon: Daemon) -> None:
    for name in ("tiny", "tiny@abcd", "someone/tiny"):
        assert daemon.model(name).view().num_blocks == 4
    with pytest.raises(CorollaError, match="served: tiny"):
        daemon.model("tiny@ffff").view()


# daemons that go away


def test_generation_goes_on_once_after_the_daemon_restarts(daemon: Daemon, fake: FakeDaemon) -> None:
    fake.die_after_tokens = 2
    seen: list[str | None] = []

    def revive(piece: Piece) -> None:
        seen.append(piece.event)
        if piece.event == "reconnecting":
            fake.die_after_tokens = None

    answer = daemon.model("tiny").generate("one", max_new_tokens=5, on_event=revive)
    assert answer.text == " 0 1 2 3 4"
    assert answer.tokens == ((0, 1, 2, 3, 4),)
    assert "reconnecting" in seen
    assert fake.calls[-1].arguments["generated"] == [{"ids": [0, 1]}]


def test_a_second_restart_ends_the_generation_with_what_was_generated(
    daemon: Daemon, fake: FakeDaemon
) -> None:
    fake.die_after_tokens = 2
    with pytest.raises(CorollaError) as caught:
        daemon.model("tiny").generate("one", max_new_tokens=6)
    assert caught.value.code is Code.NO_DAEMON
    assert caught.value.details["generated"] == [[0, 1, 2, 3]]


def test_a_daemon_that_comes_back_slowly_is_waited_for() -> None:
    progress = generation.Progress(generation.request("tiny", "one", None, None, {}))
    lost = error(Code.NO_DAEMON, "closed")
    not_yet = error(Code.UNKNOWN_MODEL, "no model")
    assert not progress.may_resume(not_yet, 100.0)
    assert progress.may_resume(lost, 100.0)
    progress.resumed()
    assert progress.may_resume(not_yet, 110.0)
    assert not progress.may_resume(not_yet, 100.0 + generation.RECONNECT_WITHIN_S)


def test_calls_work_again_after_the_daemon_restarted(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with FakeDaemon(path) as first:
        daemon = corolla.connect(first.path)
        daemon.status()
    with pytest.raises(CorollaError) as caught:
        daemon.status()
    assert caught.value.code is Code.NO_DAEMON
    with FakeDaemon(path), daemon:
        assert daemon.status().state == "online"


def test_no_daemon_says_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COROLLA_SOCKET", str(tmp_path / "none.sock"))
    with pytest.raises(CorollaError, match="no such socket") as caught:
        corolla.connect()
    assert caught.value.code is Code.NO_DAEMON
    assert str(tmp_path / "none.sock") in caught.value.message
    assert "corollad" in caught.value.remedy


def test_a_socket_that_nobody_listens_on_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with pytest.raises(CorollaError, match="nobody listens"):
        corolla.connect(path)


def test_the_users_socket_is_found_without_being_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COROLLA_SOCKET", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "corolla").mkdir(mode=0o700)
    with FakeDaemon(tmp_path / "corolla" / "control.sock") as fake, corolla.connect() as daemon:
        assert daemon.socket == fake.path


def test_a_folder_open_to_others_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COROLLA_SOCKET", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "corolla").mkdir()
    os.chmod(tmp_path / "corolla", 0o777)
    with (
        FakeDaemon(tmp_path / "corolla" / "control.sock"),
        pytest.raises(CorollaError, match="0700") as caught,
    ):
        corolla.connect()
    assert caught.value.code is Code.PERMISSION_DENIED

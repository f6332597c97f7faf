"""The control socket: who may what, calls side by side, backpressure, and whose socket it is."""

from __future__ import annotations

import grp
import os
import pwd
import socket
import struct
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from corolla.daemon import control as module
from corolla.daemon.answers.methods import handlers
from corolla.daemon.control import (
    MAX_UNSENT_BYTES,
    Ask,
    Caller,
    ControlServer,
    Handler,
    Reply,
    listen,
    uids_of,
)
from corolla.protocol.control import (
    FROM_DAEMON,
    METHODS,
    Call,
    Cancel,
    Item,
    Refused,
    Return,
    Right,
)
from corolla.protocol.errors import Code, CorollaError, error
from corolla.protocol.framing import FrameParser
from corolla.protocol.limits import MAX_CALLS_PER_CONNECTION, MAX_LOCAL_HEADER_BYTES, MAX_LOCAL_PAYLOAD_BYTES
from corolla.protocol.messages import Message, encode

pytestmark = pytest.mark.anyio


@pytest.fixture
def path() -> Iterator[Path]:
    """Of a socket: short, as these have to be."""
    with tempfile.TemporaryDirectory(prefix="cor-") as folder:
        yield Path(folder) / "s"


class Program:
    """A program on this machine that speaks with the daemon."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._parser = FrameParser(max_payload_bytes=MAX_LOCAL_PAYLOAD_BYTES)
        self._heard: list[Message] = []

    async def say(self, *messages: Message) -> None:
        await self.stream.send_all(b"".join(map(encode, messages)))

    async def hear(self) -> Message:
        while not self._heard:
            data = await self.stream.receive_some()
            if not data:
                raise EOFError
            self._parser.feed(bytes(data))
            self._heard = [FROM_DAEMON.decode(frame) for frame in self._parser.frames()]
        return self._heard.pop(0)

    async def ask(self, method: str, arguments: Any = None, payload: bytes = b"") -> Message:
        await self.say(Call(1, method, arguments, payload))
        return await self.hear()

    async def refusal(self, method: str, arguments: Any = None) -> CorollaError:
        answer = await self.ask(method, arguments)
        if not isinstance(answer, Refused):
            raise AssertionError(f"not refused: {answer}")
        return answer.problem()


Connect = Callable[[], Awaitable[Program]]


@asynccontextmanager
async def serving(
    path: Path, table: Mapping[str, Handler], right: Right | None = None
) -> AsyncIterator[Connect]:
    """A server with these handlers. right: what everybody may, instead of what the kernel says."""
    server = ControlServer(table)
    if right is not None:
        server.caller_of = lambda connection: Caller(65534, right)  # type: ignore[method-assign]

    programs: list[Program] = []

    async def connect() -> Program:
        programs.append(Program(await trio.open_unix_socket(str(path))))
        return programs[-1]

    with listen(path) as listener:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, listener)
            yield connect
            for program in programs:
                await program.stream.aclose()
            nursery.cancel_scope.cancel()


async def say_nothing(ask: Ask) -> Reply:
    await trio.lowlevel.checkpoint()
    return Reply()


# rights


def test_every_method_has_a_handler_and_every_handler_a_method() -> None:
    assert handlers(None).keys() == METHODS.keys()  # type: ignore[arg-type]


@pytest.mark.parametrize("right", Right)
async def test_each_right_includes_the_ones_before_it(path: Path, right: Right) -> None:
    order = list(Right)
    arguments: dict[str, Any] = {"status": None, "session.close": {"handle": 1}, "stop": None}
    async with serving(path, dict.fromkeys(arguments, say_nothing), right) as connect:
        program = await connect()
        for method, given in arguments.items():
            answer = await program.ask(method, given)
            if order.index(METHODS[method].right) <= order.index(right):
                assert answer == Return(1)
            else:
                assert isinstance(answer, Refused)
                problem = answer.problem()
                assert problem.code is Code.PERMISSION_DENIED
                assert "uid 65534" in problem.message
                assert problem.remedy


async def test_the_daemons_own_user_may_manage(path: Path) -> None:
    seen: list[Caller] = []

    async def look(ask: Ask) -> Reply:
        seen.append(ask.caller)
        return await say_nothing(ask)

    async with serving(path, {"status": look}) as connect:
        await (await connect()).ask("status")
    assert seen == [Caller(os.getuid(), Right.MANAGE)]


class Peer:
    """A socket whose other end the kernel says to be somebody."""

    def __init__(self, uid: int, gid: int) -> None:
        self._credentials = struct.pack("iii", 1, uid, gid)

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        assert (level, option) == (socket.SOL_SOCKET, socket.SO_PEERCRED)
        return self._credentials[:size]


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> int:
    """A group `corolla` 700, in which the user 501 is supplementary."""

    def users(uid: int) -> pwd.struct_passwd:
        if uid != 501:
            raise KeyError(uid)
        return pwd.struct_passwd(("ada", "x", 501, 501, "", "/", "/bin/sh"))

    monkeypatch.setattr(grp, "getgrnam", lambda name: grp.struct_group((name, "x", 700, [])))
    monkeypatch.setattr(pwd, "getpwuid", users)
    monkeypatch.setattr(os, "getgrouplist", lambda name, gid: [gid, 700] if name == "ada" else [gid])
    monkeypatch.setattr(os, "getuid", lambda: 400)
    return 700


@pytest.mark.parametrize(
    ("uid", "gid", "right"),
    [
        (0, 0, Right.MANAGE),
        (400, 400, Right.MANAGE),  # the daemon's own
        (600, 600, Right.MANAGE),  # an operator
        (501, 501, Right.USE),  # by a supplementary group
        (502, 700, Right.USE),  # by the group that it runs with
        (502, 502, Right.SEE),  # a user without an entry
    ],
)
def test_rights_follow_the_kernels_word(group: int, uid: int, gid: int, right: Right) -> None:
    server = ControlServer({}, operators={600})
    assert server.caller_of(Peer(uid, gid)) == Caller(uid, right)  # type: ignore[arg-type]


def test_operators_are_named_or_numbered() -> None:
    assert uids_of(["root", "1234"]) == {0, 1234}
    with pytest.raises(CorollaError) as caught:
        uids_of(["nobody-is-called-so"])
    assert caught.value.code is Code.BAD_CONFIG
    assert "nobody-is-called-so" in caught.value.message


async def test_who_may_only_see_cannot_make_the_daemon_keep_much(path: Path) -> None:
    async with serving(path, {"status": say_nothing}, Right.SEE) as connect:
        program = await connect()
        await program.say(Call(1, "status", None, b"x"))
        answer = await program.hear()
        assert isinstance(answer, Refused)
        assert answer.id == 0
        assert answer.problem().code is Code.LIMIT_EXCEEDED
        with pytest.raises(EOFError):
            await program.hear()


# calls


async def test_calls_run_side_by_side_and_items_carry_their_call(path: Path) -> None:
    go = trio.Event()

    async def slow(ask: Ask) -> Reply:
        await ask.item("began", b"12")
        await go.wait()
        return Reply("ended", b"34")

    async with serving(path, {"status": slow, "swarm": say_nothing}) as connect:
        program = await connect()
        await program.say(Call(7, "status"))
        assert await program.hear() == Item(7, "began", b"12")
        await program.say(Call(8, "swarm"))
        assert await program.hear() == Return(8)
        go.set()
        assert await program.hear() == Return(7, "ended", b"34")


async def test_a_cancelled_call_is_answered_and_the_others_go_on(path: Path) -> None:
    cancelled: list[str] = []
    go = trio.Event()

    async def wait(ask: Ask) -> Reply:
        try:
            await go.wait()
        except trio.Cancelled:
            cancelled.append("once")
            raise
        return Reply("done")

    async with serving(path, {"status": wait}) as connect:
        program = await connect()
        await program.say(Call(1, "status"), Call(2, "status"), Cancel(1), Cancel(3))
        answer = await program.hear()
        assert isinstance(answer, Refused)
        assert (answer.id, answer.problem().code) == (1, Code.CANCELLED)
        go.set()
        assert await program.hear() == Return(2, "done")
    assert cancelled == ["once"]


async def test_hanging_up_ends_the_calls_and_what_they_opened(path: Path) -> None:
    ended = trio.Event()

    async def hold() -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async def open_(ask: Ask) -> Reply:
        ask.connection.nursery.start_soon(hold)
        return await say_nothing(ask)

    async with serving(path, {"status": open_}) as connect:
        program = await connect()
        await program.ask("status")
        await program.stream.aclose()
        await ended.wait()
        assert await (await connect()).ask("status") == Return(1)  # the daemon serves on


@pytest.mark.parametrize(
    ("method", "arguments", "code", "named"),
    [
        ("fly", None, Code.UNSUPPORTED, "'fly'"),
        ("swarm.join", {"token": 5}, Code.BAD_REQUEST, "swarm.join"),
        ("swarm.join", {}, Code.BAD_REQUEST, "token"),
        ("swarm.join", [1], Code.BAD_REQUEST, "swarm.join"),
    ],
)
async def test_a_call_that_makes_no_sense_is_refused_alone(
    path: Path, method: str, arguments: Any, code: Code, named: str
) -> None:
    async with serving(path, {"swarm.join": say_nothing, "status": say_nothing}) as connect:
        program = await connect()
        problem = await program.refusal(method, arguments)
        assert problem.code is code
        assert named in problem.message
        assert await program.ask("status") == Return(1)


async def test_a_handlers_error_is_the_answer_with_all_it_says(path: Path) -> None:
    async def refuse(ask: Ask) -> Reply:
        await trio.lowlevel.checkpoint()
        raise error(Code.TOO_LONG, "12 tokens", "say less", tokens=12)

    async with serving(path, {"status": refuse}) as connect:
        problem = await (await connect()).refusal("status")
    assert (problem.code, problem.message, problem.remedy) == (Code.TOO_LONG, "12 tokens", "say less")
    assert problem.details == {"tokens": 12}


async def test_a_defect_in_a_handler_harms_its_call_alone(path: Path) -> None:
    async def stumble(ask: Ask) -> Reply:
        await trio.lowlevel.checkpoint()
        raise ZeroDivisionError("one by none")

    async with serving(path, {"status": stumble, "swarm": say_nothing}) as connect:
        program = await connect()
        problem = await program.refusal("status")
        assert problem.code is Code.INTERNAL
        assert "one by none" in problem.message
        assert await program.ask("swarm") == Return(1)


async def test_so_many_calls_at_once_and_no_more(path: Path) -> None:
    async def wait(ask: Ask) -> Reply:
        await trio.sleep_forever()
        return Reply()

    async with serving(path, {"status": wait}) as connect:
        program = await connect()
        await program.say(*(Call(index, "status") for index in range(1, MAX_CALLS_PER_CONNECTION + 2)))
        answer = await program.hear()
        assert isinstance(answer, Refused)
        assert answer.id == MAX_CALLS_PER_CONNECTION + 1
        assert answer.problem().code is Code.LIMIT_EXCEEDED


@pytest.mark.parametrize(
    "noise",
    [
        b"POST / HTTP/1.1\r\n\r\n",
        encode(Return(1)),
        b"\x00\x00\x00\x01\x00\x00\x00\x00\xff",
        struct.pack(">II", MAX_LOCAL_HEADER_BYTES + 1, 0),
        struct.pack(">II", 8, MAX_LOCAL_PAYLOAD_BYTES + 1),
    ],
)
async def test_noise_ends_the_connection_with_the_reason(path: Path, noise: bytes) -> None:
    async with serving(path, {"status": say_nothing}) as connect:
        program = await connect()
        await program.stream.send_all(noise)
        answer = await program.hear()
        assert isinstance(answer, Refused)
        assert answer.id == 0
        with pytest.raises(EOFError):
            await program.hear()
        assert await (await connect()).ask("status") == Return(1)


async def test_a_slow_reader_holds_up_its_own_answers_and_gets_them_all(path: Path) -> None:
    size = MAX_UNSENT_BYTES // 4
    num_items, given = 20, {1: 0, 2: 0}

    async def pour(ask: Ask) -> Reply:
        for _ in range(num_items):
            await ask.item(None, bytes(size))
            given[ask.arguments.follow + 1] += 1
        return Reply()

    async with serving(path, {"events": pour, "status": say_nothing}) as connect:
        program = await connect()
        await program.say(Call(1, "events", {"follow": False}), Call(2, "events", {"follow": True}))
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert sum(given.values()) < num_items  # both wait for the reader
        assert await (await connect()).ask("status") == Return(1)
        heard = [await program.hear() for _ in range(2 * num_items + 2)]
    assert sum(isinstance(message, Item) for message in heard) == 2 * num_items
    assert {message.id for message in heard if isinstance(message, Return)} == {1, 2}


async def test_too_many_programs_are_told_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PROGRAMS", 1)
    async with serving(path, {"status": say_nothing}) as connect:
        first = await connect()
        assert await first.ask("status") == Return(1)
        answer = await (await connect()).hear()
        assert isinstance(answer, Refused)
        assert answer.problem().code is Code.BUSY
        assert await first.ask("status") == Return(1)


async def test_one_user_who_may_only_see_leaves_room_for_others(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PROGRAMS_PER_GUEST", 2)
    server = ControlServer({"status": say_nothing})
    uids = [7, 7, 7, 8]
    server.caller_of = lambda connection: Caller(uids.pop(0) if uids else 7, Right.SEE)  # type: ignore[method-assign]
    with listen(path) as listener:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, listener)

            async with AsyncExitStack() as programs:

                async def answer() -> tuple[Program, Message]:
                    program = Program(await trio.open_unix_socket(str(path)))
                    await programs.enter_async_context(program.stream)
                    return program, await program.ask("status")

                first, said = await answer()
                assert said == Return(1)
                assert (await answer())[1] == Return(1)
                refused = (await answer())[1]
                assert isinstance(refused, Refused)
                assert refused.problem().code is Code.BUSY
                assert "uid 7" in refused.problem().message
                assert (await answer())[1] == Return(1)
                await first.stream.aclose()
                while (await answer())[1] != Return(1):  # until the server has heard of the end
                    await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()


# whose socket it is


def mode_of(path: Path) -> int | None:
    """None if nothing is there."""
    return path.stat().st_mode & 0o777 if path.exists() else None


async def test_a_socket_left_by_the_dead_is_replaced_and_ours_is_cleared_away(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with serving(path, {"status": say_nothing}) as connect:
        assert await (await connect()).ask("status") == Return(1)
        assert mode_of(path) == 0o666
    assert mode_of(path) is None


async def test_a_live_daemons_socket_is_refused_and_left(path: Path) -> None:
    async with serving(path, {"status": say_nothing}) as connect:
        with pytest.raises(CorollaError) as caught, listen(path):
            pass
        assert caught.value.code is Code.STATE_IN_USE
        assert str(path) in caught.value.message
        assert await (await connect()).ask("status") == Return(1)


def test_a_live_daemon_with_a_full_backlog_is_refused_too(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as caller:
        busy.bind(str(path))
        busy.listen(0)
        caller.connect(str(path))
        with pytest.raises(CorollaError) as caught, listen(path):
            pass
    assert caught.value.code is Code.STATE_IN_USE


def test_a_file_in_its_place_is_named_and_left(path: Path) -> None:
    path.write_text("a thesis")
    with pytest.raises(CorollaError) as caught, listen(path):
        pass
    assert caught.value.code is Code.BAD_CONFIG
    assert str(path) in caught.value.message
    assert path.read_text() == "a thesis"


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorollaError) as caught, listen(tmp_path / ("x" * 120)):
        pass
    assert caught.value.code is Code.BAD_CONFIG
    assert "107" in caught.value.message


async def test_a_folder_for_the_socket_is_made_private(path: Path) -> None:
    inner = path.parent / "runtime" / "s"
    async with serving(inner, {"status": say_nothing}):
        assert mode_of(inner.parent) == 0o700


def test_a_users_folder_that_others_may_enter_is_refused(path: Path) -> None:
    folder = path.parent / f"corolla-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(CorollaError) as caught, listen(folder / "s"):
        pass
    assert caught.value.code is Code.PERMISSION_DENIED
    assert "0755" in caught.value.message

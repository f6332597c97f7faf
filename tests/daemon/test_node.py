"""The daemon as a whole: it starts, idles, enters and leaves swarms, and stops in order."""

from __future__ import annotations

import os
import re
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

import corolla
from corolla.daemon import place as module
from corolla.daemon.answers.methods import handlers, pages
from corolla.daemon.config import Config
from corolla.daemon.network.members.roll import Standing
from corolla.daemon.node import Node
from corolla.daemon.place import HINT
from corolla.daemon.store import open_store
from corolla.protocol.control import PRIVACY, PRIVACY_INVITED
from corolla.protocol.errors import Code, CorollaError, Exit, error
from corolla.protocol.invitations import decode_token, encode_token
from corolla.protocol.settings import Applied

from ..processes import DaemonProcess
from .members import FACTS, until

LOOPBACK = "/ip4/127.0.0.1/tcp/0"


@pytest.fixture
def folder() -> Iterator[Path]:
    """For states and sockets: short, as paths of sockets have to be."""
    with tempfile.TemporaryDirectory(prefix="cor-") as path:
        yield Path(path)


@asynccontextmanager
async def node(folder: Path, **settings: Any) -> AsyncIterator[Node]:
    """A daemon in this process, started; it is stopped at the end."""
    config = Config(**{"blocks": "none", "listen": (LOOPBACK,), **settings})
    with open_store(folder / "state") as store:
        daemon = Node(config, store, folder / "s", folder / "cache", handlers, pages)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(daemon.run)
            await heard(daemon, "started")
            yield daemon
            daemon.stop(0.0)


async def heard(daemon: Node, kind: str) -> str:
    """Wait until something happened; what it says."""
    with trio.fail_after(60):
        async with aclosing(daemon.events.read(follow=True)) as events:
            async for event in events:
                if event.kind == kind:
                    return event.text
    raise AssertionError("events ended")


def ask(daemon: Node) -> Any:
    """A program that is connected with a daemon."""
    return corolla.aconnect(daemon.status().socket)


@asynccontextmanager
async def pair(folder: Path) -> AsyncIterator[tuple[Node, Node, Any, Any]]:
    """Two daemons, and a program connected with each."""
    async with (
        node(folder / "a") as first,
        node(folder / "b") as second,
        await ask(first) as one,
        await ask(second) as other,
    ):
        yield first, second, one, other


async def refused(awaitable: Any) -> CorollaError:
    with pytest.raises(CorollaError) as caught:
        await awaitable
    return caught.value


# swarms


@pytest.mark.anyio
async def test_a_fresh_daemon_idles_and_says_what_to_do(folder: Path) -> None:
    async with node(folder) as daemon, await ask(daemon) as program:
        status = await program.status()
        assert (status.state, status.hint, status.swarm, status.join_command) == ("idle", HINT, None, None)
        assert status.pid == os.getpid()
        assert not await program.models()
        problem = await refused(program.model("x").generate("hello"))
        assert problem.code is Code.NO_SWARM
        assert "daemonctl join" in problem.remedy


@pytest.mark.anyio
async def test_a_swarm_is_created_joined_remembered_and_left(folder: Path) -> None:
    async with node(folder / "a") as first, node(folder / "b") as second:
        async with await ask(first) as program:
            founded = await program.create_swarm("roses")
            assert founded.notice == PRIVACY
            status = await program.status()
            assert (status.state, status.swarm, status.hint) == ("online", "roses", None)
            assert status.join_command == f"daemonctl join {founded.token}"
            assert decode_token(founded.token).addresses
        async with await ask(second) as program:
            joined = await program.join(founded.token)
            assert (joined.swarm_id, joined.name, joined.notice) == (founded.swarm_id, "roses", PRIVACY)
            (peer,) = await program.peers()
            assert (peer.peer, peer.connected) == (first.status().peer, True)
            # The way in by the first leads in by the second too, should the first be gone.
            assert set(decode_token(founded.token).addresses) & set(decode_token(joined.token).addresses)
        remembered = second.store.state
        assert (remembered.swarm, remembered.swarm_id) == ("roses", founded.swarm_id)
        assert remembered.bootstrap
    async with node(folder / "b") as again:
        await heard(again, "joined")
        async with await ask(again) as program:
            assert (await program.status()).swarm == "roses"
            await program.leave()
            assert ((await program.status()).state, again.store.state.swarm_id) == ("idle", "")
            assert (await program.create_swarm("thorns")).name == "thorns"
    async with node(folder / "b") as again:
        await heard(again, "joined")
        assert again.status().swarm == "thorns"


@pytest.mark.anyio
async def test_a_members_address_is_enough_to_join(folder: Path) -> None:
    async with node(folder / "a") as first, node(folder / "b") as second:
        await first.place.create("roses")
        address = first.status().addresses[0]
        await second.place.join(address)
        assert second.status().swarm == "roses"
        assert second.status().num_peers == 1


@pytest.mark.anyio
async def test_the_configured_swarm_is_entered_at_start_and_not_twice(folder: Path) -> None:
    async with node(folder / "a") as first:
        token = await first.place.create("roses")
        for _ in range(2):
            async with node(folder / "b", join=token) as second:
                await heard(second, "joined")
                await second.the_belonging().membership.wait_joined(timeout_s=30)
                assert second.status().swarm == "roses"


@pytest.mark.anyio
async def test_the_configured_swarm_is_tried_again_while_nobody_answers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "JOIN_TIMEOUT_S", 0.3)
    monkeypatch.setattr(module, "JOIN_AGAIN_S", (0.1,))
    async with node(folder / "a") as first:
        token = await first.place.create("roses")
        (address, *_) = first.status().addresses
    async with node(folder / "b", join=token) as second:
        assert "trying again" in await heard(second, "join_failed")
        monkeypatch.setattr(module, "JOIN_TIMEOUT_S", 30.0)
        async with node(folder / "a", listen=(address.partition("/p2p/")[0],)):
            await until(lambda: second.store.state.swarm == "roses")


@pytest.mark.anyio
async def test_the_configured_swarm_is_not_tried_again_once_told_to_leave(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "JOIN_TIMEOUT_S", 0.3)
    async with node(folder / "a") as first:
        token = await first.place.create("roses")
    async with node(folder / "b") as second, trio.open_nursery() as nursery:
        nursery.start_soon(second.place.join_configured, token)
        await heard(second, "join_failed")
        await second.place.leave()  # the nursery ends with the attempts


@pytest.mark.anyio
async def test_a_second_swarm_has_to_wait_until_the_first_is_left(folder: Path) -> None:
    async with node(folder) as daemon:
        await daemon.place.create("roses")
        problem = await refused(daemon.place.create("thorns"))
        assert problem.code is Code.BAD_REQUEST
        assert "roses" in problem.message
        assert "daemonctl leave" in problem.remedy
        assert daemon.status().swarm == "roses"


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["", "   ", "x" * 65])
async def test_a_swarm_needs_a_name(folder: Path, name: str) -> None:
    async with node(folder) as daemon:
        assert (await refused(daemon.place.create(name))).code is Code.BAD_REQUEST
        assert daemon.status().state == "idle"


@pytest.mark.anyio
@pytest.mark.parametrize("token", ["corolla:nonsense", "roses", "", "/ip4/127.0.0.1"])
async def test_a_bad_token_is_refused_and_the_daemon_idles_on(folder: Path, token: str) -> None:
    async with node(folder) as daemon:
        problem = await refused(daemon.place.join(token))
        assert problem.code in (Code.BAD_TOKEN, Code.PEER_LOST)
        assert daemon.status().state == "idle"


@pytest.mark.anyio
async def test_a_swarm_in_which_nobody_answers_is_not_entered(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "JOIN_TIMEOUT_S", 0.3)
    async with node(folder / "a") as first:
        token = decode_token(await first.place.create("roses"))
    async with node(folder / "b") as daemon:
        problem = await refused(daemon.place.join(encode_token(token)))
        assert problem.code is Code.NO_PEERS
        assert token.addresses[0] in problem.message
        assert (daemon.status().state, daemon.store.state.swarm_id) == ("idle", "")


@pytest.mark.anyio
async def test_a_port_that_is_taken_meanwhile_is_named_to_whoever_joins(folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with node(folder, listen=(f"/ip4/127.0.0.1/tcp/{port}",)) as daemon:
        with socket.socket() as other:
            other.bind(("127.0.0.1", port))
            other.listen()
            problem = await refused(daemon.place.create("roses"))
            assert problem.code is Code.PORT_TAKEN
            assert str(port) in problem.message
            assert daemon.status().state == "idle"
        await daemon.place.create("roses")
        assert daemon.status().state == "online"


@pytest.mark.anyio
async def test_a_remembered_swarm_that_cannot_be_entered_shows_why(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def fail(terms: Any, entry: Any) -> AsyncIterator[None]:
        await trio.lowlevel.checkpoint()
        raise error(Code.PORT_TAKEN, "port 4517 is taken", "choose another")
        yield

    with open_store(folder / "state") as store:
        store.update(swarm_id="ab" * 16, swarm="roses")
    monkeypatch.setattr(module, "belong", fail)
    async with node(folder) as daemon:
        await heard(daemon, "swarm_failed")
        status = daemon.status()
        assert (status.state, status.hint) == ("idle", "port 4517 is taken (choose another)")
        assert daemon.store.state.swarm == "roses"  # for the next start


# what calls do


@pytest.mark.anyio
async def test_settings_are_kept_for_the_next_start(folder: Path) -> None:
    async with node(folder) as daemon, await ask(daemon) as program:
        assert (await program.config())["blocks"] == "none"
        applied = await program.set_config("threads", 3)
        assert applied == Applied(workers=("threads",))
        assert daemon.store.state.settings == {"threads": 3}
        for key, value in (("thread", 3), ("threads", -1), ("blocks", "9:1"), ("state_dir", "/x")):
            assert (await refused(program.set_config(key, value))).code is Code.BAD_CONFIG
        assert daemon.store.state.settings == {"threads": 3}


@pytest.mark.anyio
async def test_privacy_is_told_with_the_first_text_of_a_swarm_alone(folder: Path) -> None:
    async with node(folder) as daemon:
        await daemon.place.create("roses")
        assert daemon.first_text_words() == PRIVACY
        assert daemon.first_text_words() is None
    async with node(folder) as daemon:
        await heard(daemon, "joined")
        assert daemon.first_text_words() is None
        await daemon.place.leave()
        await daemon.place.create("thorns")
        assert daemon.first_text_words() == PRIVACY


# invited swarms


@pytest.mark.anyio
async def test_an_invited_swarm_is_founded_entered_by_invitation_and_remembered(folder: Path) -> None:
    async with node(folder / "a") as first, await ask(first) as owner:
        founded = await owner.create_swarm("roses", invited=True)
        assert (founded.token, founded.notice) == ("", PRIVACY_INVITED)
        status = await owner.status()
        assert (status.invited, status.owner, status.join_command) == (True, True, None)
        async with node(folder / "b") as second, await ask(second) as guest:
            problem = await refused(guest.join(first.status().addresses[0]))
            assert problem.code is Code.NOT_INVITED
            assert "daemonctl invite" in problem.remedy
            invited = await owner.invite()
            joined = await guest.join(invited.token)
            assert (joined.name, joined.token, joined.notice) == ("roses", "", PRIVACY_INVITED)
            (given,) = await owner.invites()
            assert (given.invite, given.peers) == (invited.invite, (second.status().peer,))
            assert (await refused(guest.invite())).code is Code.BAD_REQUEST
            await guest.join(first.status().addresses[0])  # a member needs no invitation
            async with node(folder / "c") as third, await ask(third) as late:
                problem = await refused(late.join(invited.token))
                assert problem.code is Code.NOT_INVITED
                assert "was for 1" in problem.message
                assert (third.status().state, third.inviting.standing) == ("idle", Standing())
        async with node(folder / "b") as second:
            await heard(second, "joined")
            await second.the_belonging().membership.wait_joined(timeout_s=30)
            assert second.first_text_words() == PRIVACY_INVITED
            await second.place.leave()
            assert second.inviting.standing == Standing()


@pytest.mark.anyio
@pytest.mark.parametrize("how", ["revoke", "revoke the invitation", "ban"])
async def test_one_put_out_hears_why_and_the_banned_may_come_back(folder: Path, how: str) -> None:
    async with pair(folder) as (first, second, owner, guest):
        await owner.create_swarm("roses", invited=True)
        invited = await owner.invite(lifetime_s=60.0)
        await guest.join(invited.token)
        peer = second.status().peer
        if how == "ban":
            await owner.ban(peer)
            assert await owner.bans() == (peer,)
        else:
            await owner.revoke(peer if how == "revoke" else invited.invite)
        assert first.status().num_peers == 0
        reason = await heard(second, "refused")
        assert ("banned" if how == "ban" else "revoked") in reason
        status = await guest.status()
        assert (status.num_peers, status.hint) == (0, reason)
        problem = await refused(guest.join(invited.token))
        assert problem.code is Code.NOT_INVITED
        assert second.status().state == "online"  # it is where it was, and says why nobody is there
        if how == "ban":
            await owner.unban(peer)
            assert await second.the_belonging().membership.wait_member(first.status().peer, timeout_s=60)
            assert second.status().hint is None
            assert (await refused(owner.unban(peer))).code is Code.BAD_REQUEST


@pytest.mark.anyio
async def test_names_that_are_none_are_refused(folder: Path) -> None:
    async with node(folder) as daemon, await ask(daemon) as program:
        assert (await refused(program.invite())).code is Code.NO_SWARM
        await program.create_swarm("roses", invited=True)
        for wrong in (program.ban("eve"), program.revoke("eve"), program.ban(daemon.status().peer)):
            assert (await refused(wrong)).code is Code.BAD_REQUEST
        assert (await refused(program.revoke(daemon.status().peer))).code is Code.BAD_REQUEST
        assert (await refused(program.invite(lifetime_s=0.0))).code is Code.BAD_REQUEST
        assert await program.invites() == ()
        assert await program.bans() == ()


@pytest.mark.anyio
async def test_a_ban_outside_a_swarm_holds_in_the_next(folder: Path) -> None:
    async with pair(folder) as (_, second, one, other):
        await one.ban(second.status().peer)
        founded = await one.create_swarm("roses")
        problem = await refused(other.join(founded.token))
        assert problem.code is Code.NOT_INVITED
        assert "is banned here" in problem.message


@pytest.mark.anyio
async def test_a_full_disk_keeps_nobody_from_hearing_what_is_offered(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pair(folder) as (first, _, one, other):
        await other.join((await one.create_swarm("roses")).token)
        assert first.belonging is not None
        monkeypatch.setattr(first.store, "_write", no_room)
        first.belonging.registry.announce_model(FACTS)
        with trio.fail_after(60):
            while not await other.models():  # noqa: ASYNC110 - nothing tells a program of it
                await trio.sleep(0.05)
        assert first.status().state == "online"
        assert "no room" in await heard(first, "store_failed")


def no_room(name: str, text: str) -> None:
    raise error(Code.DISK_FULL, f"no room on the disk for {name}")


# its end


@pytest.mark.anyio
async def test_stopping_waits_for_running_sessions_and_takes_no_new_ones(folder: Path) -> None:
    async with node(folder) as daemon:
        await daemon.place.create("roses")
        with daemon.session_open():
            daemon.stop(60.0)
            await heard(daemon, "stopping")
            assert daemon.status().state == "stopping"
            with pytest.raises(CorollaError) as caught, daemon.session_open():
                pass
            assert caught.value.code is Code.NOT_READY
            assert daemon.status().swarm == "roses"


@pytest.mark.anyio
async def test_a_model_that_is_none_keeps_the_daemon_from_starting(folder: Path) -> None:
    with open_store(folder / "state") as store:
        config = Config(model=str(folder / "nothing here"), blocks="0:2", listen=(LOOPBACK,))
        daemon = Node(config, store, folder / "s", folder / "cache", handlers, pages)
        problem = await refused(daemon.run())
    assert problem.code is Code.UNKNOWN_MODEL
    assert "nothing here" in problem.message
    assert "s" not in os.listdir(folder)


@pytest.fixture
def process(folder: Path) -> Iterator[DaemonProcess]:
    daemon = DaemonProcess("one", folder / "one", ("--blocks", "none"))
    yield daemon
    daemon.end()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(process: DaemonProcess, number: signal.Signals) -> None:
    process.start()
    process.wait_ready()
    with process.connect() as daemon:
        daemon.create_swarm("roses")
    process.signal(number)
    assert process.wait() == Exit.OK
    assert not process.socket.exists()
    assert "Traceback" not in process.log()
    assert '"event": "stopped"' in process.log()


def test_stop_ends_it_cleanly(process: DaemonProcess) -> None:
    process.start()
    process.wait_ready()
    with process.connect() as daemon:
        daemon.stop()
    assert process.wait() == Exit.OK
    assert "Traceback" not in process.log()


def test_another_on_the_same_state_is_refused_in_one_line(process: DaemonProcess, folder: Path) -> None:
    process.start()
    process.wait_ready()
    second = DaemonProcess(
        "two", folder / "two", ("--blocks", "none", "--state-dir", str(folder / "one" / "state"))
    )
    second.start()
    assert second.wait() == Exit.ERROR
    (line,) = second.log().splitlines()
    assert re.match(rf"corollad: another daemon \(process {process.pid}\) uses the state folder ", line)
    assert process.status().state == "idle"


def test_a_taken_port_is_refused_in_one_line(folder: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"/ip4/127.0.0.1/tcp/{other.getsockname()[1]}"
        daemon = DaemonProcess("one", folder / "one", ("--blocks", "none", "--listen", address))
        daemon.start()
        assert daemon.wait() == Exit.ERROR
    (line,) = daemon.log().splitlines()
    assert line.startswith("corollad: ")
    assert address.rpartition("/")[2] in line

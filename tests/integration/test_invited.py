"""An invited swarm of real daemons: who gets in, who stays in, and what becomes of those who are put out.

Real processes, loopback libp2p, and where text is written real workers.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from corolla.daemon.identity import load_identity  # noqa: E402
from corolla.protocol.errors import Code, CorollaError, Exit  # noqa: E402
from corolla.protocol.guests import Invited  # noqa: E402
from corolla.protocol.invitations import decode_token, encode_token, invite  # noqa: E402

from ..model.tiny import NUM_BLOCKS, save_tiny  # noqa: E402
from ..processes import DaemonProcess, LocalSwarm, local_swarm, wait_until  # noqa: E402

pytestmark = pytest.mark.timeout(300)
OPTIONS = ("--device", "cpu", "--dtype", "float32", "--threads", "1")
PROMPT = [5, 17, 40, 8, 23]
NUM_TOKENS = 8000  # more than are written while one is put out


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(folder, "llama", seed=4, eos_token_id=None, max_position_embeddings=2 * NUM_TOKENS)
    return folder


@pytest.fixture
def swarm(model: Path, tmp_path: Path) -> Iterator[LocalSwarm]:
    with local_swarm(model, *OPTIONS, "--cache-dir", str(tmp_path)) as swarm:
        yield swarm


def start(swarm: LocalSwarm, name: str) -> DaemonProcess:
    """A daemon that serves nothing."""
    daemon = swarm.add(name, "--blocks", "none", "--model", str(swarm.model))
    daemon.wait_ready()
    return daemon


def found(swarm: LocalSwarm) -> DaemonProcess:
    """The owner's daemon, in an invited swarm that it founded."""
    owner = start(swarm, "owner")
    with owner.connect() as daemon:
        assert daemon.create_swarm("roses", invited=True).token == ""
    return owner


def invited_by(owner: DaemonProcess, **options: Any) -> Invited:
    with owner.connect() as daemon:
        given: Invited = daemon.invite(**options)
        return given


def join(guest: DaemonProcess, token: str) -> None:
    with guest.connect() as daemon:
        daemon.join(token)


def admit(swarm: LocalSwarm, owner: DaemonProcess, name: str) -> DaemonProcess:
    """A guest that joined by an invitation of its own."""
    guest = start(swarm, name)
    join(guest, invited_by(owner).token)
    return guest


def refused(guest: DaemonProcess, token: str) -> CorollaError:
    with pytest.raises(CorollaError) as caught:
        join(guest, token)
    assert guest.status().swarm is None
    return caught.value


def sees(one: DaemonProcess, other: DaemonProcess) -> bool:
    """Whether one daemon has the other as a connected member."""
    peer = other.status().peer
    with one.connect() as daemon:
        return any(member.peer == peer and member.connected for member in daemon.peers())


def remembers(one: DaemonProcess, other: DaemonProcess) -> None:
    """Wait until a daemon has on disk where another one is."""
    peer, state = other.status().peer, one.folder / "state" / "state.json"
    wait_until(lambda: peer in state.read_text(), f"{one.name} remembers {other.name}")


def events(daemon: DaemonProcess, kind: str) -> list[str]:
    with daemon.connect() as program:
        return [event.text for event in program.events() if event.kind == kind]


def restart(daemon: DaemonProcess) -> None:
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0, daemon.log()
    daemon.start()
    daemon.wait_ready()


def test_members_stay_members_over_restarts_and_without_the_owner(swarm: LocalSwarm) -> None:
    owner = found(swarm)
    ada, bob = admit(swarm, owner, "ada"), admit(swarm, owner, "bob")
    wait_until(lambda: sees(ada, bob) and sees(bob, ada), "members meet")
    remembers(owner, bob)
    owner.kill()
    restart(ada)  # on another port: it dials bob, who stayed where he was
    wait_until(lambda: sees(ada, bob) and sees(bob, ada), "members meet without the owner")
    owner.start()
    owner.wait_ready()
    wait_until(lambda: sees(owner, ada) and sees(owner, bob), "the owner is back")
    assert owner.status().owner
    assert not ada.status().owner
    with ada.connect() as daemon:  # whatever it remembers, it left
        daemon.leave()
    restart(ada)
    assert ada.status().swarm is None
    wait_until(lambda: not sees(owner, ada), "ada is gone")
    stat = (owner.folder / "state" / "membership").stat()
    assert stat.st_mode & 0o777 == 0o600


def test_an_invitation_lets_in_as_many_as_it_says(swarm: LocalSwarm) -> None:
    owner = found(swarm)
    ada, bob, cyd = start(swarm, "ada"), start(swarm, "bob"), start(swarm, "cyd")
    single, double = invited_by(owner), invited_by(owner, uses=2)
    join(ada, single.token)
    problem = refused(bob, single.token)
    assert problem.code is Code.NOT_INVITED
    assert f"invitation {single.invite} was for 1" in problem.message
    assert "daemonctl invite" in problem.remedy
    join(ada, single.token)  # the one who used it may use it again
    join(bob, double.token)
    join(cyd, double.token)
    with owner.connect() as daemon:
        used = {view.invite: set(view.peers) for view in daemon.invites()}
    assert used == {
        single.invite: {ada.status().peer},
        double.invite: {bob.status().peer, cyd.status().peer},
    }


@pytest.mark.long
def test_a_second_use_is_refused_by_members_too_while_the_owner_is_away(swarm: LocalSwarm) -> None:
    owner = found(swarm)
    ada = admit(swarm, owner, "ada")
    given = invited_by(owner)  # names ada, too
    bob = start(swarm, "bob")
    join(bob, given.token)
    wait_until(lambda: sees(ada, bob), "ada saw bob come")
    owner.kill()
    eve = start(swarm, "eve")
    assert "was for 1" in refused(eve, given.token).message


def test_tokens_that_invite_nobody_are_refused_and_say_why(swarm: LocalSwarm) -> None:
    owner = found(swarm)
    guest = start(swarm, "guest")
    token = decode_token(invited_by(owner).token)
    charter, key = token.charter, load_identity(owner.folder / "state").private_key
    assert charter is not None
    old, _ = invite(charter, key, now_unix_s=time.time() - 7200, lifetime_s=3600, uses=1)
    forged, _ = invite(charter, load_identity(guest.folder / "state").private_key, now_unix_s=time.time(),
                       lifetime_s=3600, uses=1)  # fmt: skip
    wrong = {
        "after it had expired": type(token)(token.swarm_id, token.name, token.addresses, charter, old),
        "signature of the grant": type(token)(token.swarm_id, token.name, token.addresses, charter, forged),
        "holds no invitation": type(token)(token.swarm_id, token.name, token.addresses, charter),
        "showed no membership": type(token)(token.swarm_id, token.name, token.addresses),
    }
    for reason, made in wrong.items():
        problem = refused(guest, encode_token(made))
        assert problem.code is Code.NOT_INVITED
        assert reason in problem.message
    problem = refused(guest, owner.status().addresses[0])
    assert problem.code is Code.NOT_INVITED
    assert "by invitation alone" in problem.message
    assert refused(guest, "corolla:nonsense").code is Code.BAD_TOKEN
    assert owner.status().num_peers == 0
    join(guest, encode_token(token))  # none of it spoilt the good one


@pytest.mark.long
def test_one_who_lies_about_the_time_is_not_let_in(swarm: LocalSwarm) -> None:
    owner = found(swarm)
    guest = start(swarm, "guest")
    token = decode_token(invited_by(owner).token)
    assert token.charter is not None
    key = load_identity(owner.folder / "state").private_key
    hour_ago = time.time() - 3600
    old, _ = invite(token.charter, key, now_unix_s=hour_ago, lifetime_s=1800, uses=1)
    guest.signal(signal.SIGTERM)
    guest.wait()
    given = type(token)(token.swarm_id, token.name, token.addresses, token.charter, old)
    # A daemon whose clock is an hour behind, by a program that turns back what `time.time` says.
    program = (
        "import time, sys; now = time.time; time.time = lambda: now() - 3300;"
        " from corolla.daemon.__main__ import main; main()"
    )
    command = [sys.executable, "-c", program, *guest.command()[3:]]
    with (guest.folder / "log").open("ab") as log:
        guest.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    guest.wait_ready()
    problem = refused(guest, encode_token(given))
    assert problem.code is Code.NOT_INVITED
    assert "has expired" in problem.message


def write(daemon: Any, tokens: list[int], disturb: Callable[[], None]) -> None:
    """A text into `tokens`; `disturb` is called after the third one."""
    for piece in daemon.model("tiny").generate(tokens=[PROMPT], max_new_tokens=NUM_TOKENS, stream=True):
        tokens.append(piece.token)
        if len(tokens) == 3:
            disturb()


@pytest.mark.parametrize("how", ["revoke", pytest.param("ban", marks=pytest.mark.long)])
def test_one_put_out_amid_a_text_is_told_and_leaves_nothing_behind(swarm: LocalSwarm, how: str) -> None:
    owner = found(swarm)
    guest = admit(swarm, owner, "guest")
    peer = guest.status().peer
    swarm.token = invited_by(owner).token
    server = swarm.serve("server", 0, NUM_BLOCKS)
    server.wait_online()
    for client in (owner, guest):
        swarm.wait_covered(client, [1] * NUM_BLOCKS)
    wait_until(lambda: sees(server, guest), "server and guest are connected")

    def put_out() -> None:
        for one in (owner,) if how == "revoke" else (owner, server):
            with one.connect() as daemon:
                daemon.revoke(peer) if how == "revoke" else daemon.ban(peer)

    tokens: list[int] = []
    with guest.connect() as daemon, pytest.raises(CorollaError) as caught:
        write(daemon, tokens, put_out)
    assert caught.value.code is Code.NOT_INVITED
    assert 3 <= len(tokens) < NUM_TOKENS
    wait_until(lambda: not sees(server, guest) and not sees(owner, guest), "all have parted with the guest")
    wait_until(lambda: not any(w.sessions for w in server.status().workers), "its session is gone")
    told = "revoked" if how == "revoke" else "banned"
    wait_until(lambda: told in (guest.status().hint or ""), "its status says why")
    assert guest.status().num_peers == 0
    assert all(told in text for text in events(guest, "refused"))
    with owner.connect() as daemon:
        assert daemon.model("tiny").generate(tokens=[PROMPT], max_new_tokens=4).tokens
    restart(guest)
    wait_until(lambda: told in (guest.status().hint or ""), "it is told again after a restart")
    assert owner.status().num_peers == 1
    with owner.connect() as daemon:  # and what one put out announced goes at once
        assert daemon.swarm().spans
        daemon.revoke(server.status().peer)
        assert daemon.swarm().spans == ()


def test_a_member_that_was_away_hears_who_was_revoked(swarm: LocalSwarm) -> None:
    owner = found(swarm)
    ada, bob = admit(swarm, owner, "ada"), admit(swarm, owner, "bob")
    wait_until(lambda: sees(ada, bob), "members meet")
    ada.signal(signal.SIGTERM)
    assert ada.wait() == 0
    with owner.connect() as daemon:
        daemon.revoke(bob.status().peer)
    wait_until(lambda: bob.status().num_peers == 0, "bob is out")
    ada.start()  # it missed the revocation
    ada.wait_ready()
    wait_until(lambda: sees(owner, ada), "ada is back")
    wait_until(lambda: not sees(ada, bob), "ada heard of it")
    restart(owner)
    wait_until(lambda: sees(owner, ada), "the owner is back")
    assert not sees(owner, bob)


def test_the_command_line_founds_invites_joins_and_revokes(swarm: LocalSwarm) -> None:
    owner, guest = start(swarm, "owner"), start(swarm, "guest")

    def ctl(daemon: DaemonProcess, *words: str, code: int = Exit.OK) -> str:
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "from corolla.sdk.cli import main; main()",
                *words,
                "--socket",
                str(daemon.socket),
            ],
            capture_output=True,
            text=True,
            env={**os.environ, "XDG_STATE_HOME": str(daemon.folder)},
            timeout=60,
        )
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    assert "daemonctl invite" in ctl(owner, "swarm", "create", "roses", "--invited")
    assert "daemonctl invite" in ctl(owner, "status")
    line = next(line for line in ctl(owner, "invite", "--for", "2h").splitlines() if "join" in line)
    token = line.split()[-1]
    assert "invited" in ctl(guest, "join", token)
    assert guest.status().peer in ctl(owner, "invite", "--list")
    assert "only the owner" in ctl(guest, "invite", code=Exit.USAGE)
    ctl(owner, "revoke", guest.status().peer)
    wait_until(lambda: "revoked" in ctl(guest, "status"), "the guest's status says why")
    ctl(guest, "leave")
    assert "revoked" in ctl(guest, "join", token, code=Exit.PERMISSION)

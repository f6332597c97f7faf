"""What users get wrong, and what machines lack: one line with the value and the remedy, the right exit code.

Real `corollad` and `daemonctl` processes. Whatever is refused, everything else goes on running.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")

import corolla  # noqa: E402
from corolla.protocol.control import PRIVACY  # noqa: E402
from corolla.protocol.errors import Code, CorollaError, Exit  # noqa: E402

from ..model.test_ends import save_tokenizer  # noqa: E402
from ..model.tiny import NUM_BLOCKS, save_tiny  # noqa: E402
from ..processes import DaemonProcess, LocalSwarm, local_swarm, wait_until  # noqa: E402

pytestmark = pytest.mark.timeout(300)
OPTIONS = ("--device", "cpu", "--dtype", "float32", "--threads", "1")
HIDDEN_SIZE = 64
CONTROL = (sys.executable, "-c", "from corolla.sdk.cli import main; main()")
NOBODY = "12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"
DEADLINE_S = 120  # only a program that hangs needs so long
is_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="takes rights away, or mounts a small disk: needs root"
)


class Answer(NamedTuple):
    """How a program ended. line: the one that tells what was wrong, without the program's name."""

    code: int
    line: str


def answer_of(command: list[str], environment: dict[str, str] | None = None) -> Answer:
    """Run a program that has to fail, and check the form of what it says."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env={**os.environ, **(environment or {})},
    )
    said = [line for line in done.stderr.splitlines() if line and line != PRIVACY]
    errors = [line for line in said if line.startswith(("corollad: ", "error: "))]
    assert "Traceback" not in done.stderr, done.stderr
    assert len(errors) == 1, done.stderr
    assert errors[0] == said[-1], done.stderr
    assert errors[0].endswith(")"), f"no remedy: {errors[0]}"
    return Answer(done.returncode, errors[0].partition(": ")[2])


def corollad(folder: Path, *arguments: str, before: tuple[str, ...] = ()) -> Answer:
    """A daemon that must not start."""
    daemon = DaemonProcess("refused", folder, arguments)
    return answer_of([*before, *daemon.command()])


def daemonctl(daemon: DaemonProcess | Path, *arguments: str) -> Answer:
    """A command that must fail."""
    where = daemon.socket if isinstance(daemon, DaemonProcess) else daemon
    home = str(where.parent / "home")  # where it remembers having spoken of privacy
    command = [*CONTROL, *arguments, "--socket", str(where)]
    return answer_of(command, {"XDG_STATE_HOME": home, "HOME": home})


def status_code(daemon: DaemonProcess) -> int:
    """The exit code of `daemonctl status`."""
    command = [*CONTROL, "status", "--socket", str(daemon.socket)]
    return subprocess.run(command, capture_output=True, timeout=DEADLINE_S).returncode


# the start of a daemon


def test_an_unknown_key_of_a_config_file_is_named_with_the_closest_one(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('modle = "x"\n')
    code, line = corollad(tmp_path, "--config", str(file))
    assert code == Exit.USAGE
    assert "'modle'" in line
    assert str(file) in line
    assert "did you mean model?" in line


def test_a_config_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    code, line = corollad(tmp_path, "--config", str(tmp_path / "none.toml"))
    assert code == Exit.PERMISSION
    assert line == f"no configuration file {tmp_path / 'none.toml'} (check its name)"


WEAK = (
    "setpriv",
    "--bounding-set=-dac_override,-dac_read_search",
    "--inh-caps=-dac_override,-dac_read_search",
)


@is_root
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv of util-linux")
@pytest.mark.parametrize("what", ["config", "state"])
def test_what_the_daemon_may_not_read_is_named(tmp_path: Path, what: str) -> None:
    file, state = tmp_path / "c.toml", tmp_path / "state"
    file.write_text("")
    state.mkdir()
    hidden = file if what == "config" else state
    hidden.chmod(0)
    code, line = corollad(tmp_path, "--config", str(file), before=WEAK)
    assert code == Exit.PERMISSION
    assert str(hidden) in line
    assert "Permission denied" in line


def test_a_model_that_is_no_folder_is_named(tmp_path: Path) -> None:
    code, line = corollad(tmp_path, "--model", str(tmp_path / "none"))
    assert code == Exit.USAGE
    assert f"{str(tmp_path / 'none')!r} is no folder" in line


@is_root
def test_a_full_disk_is_named_and_nothing_half_written_stays(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with small_disk(state):
        with (
            (state / "filler").open("wb", buffering=0) as filler,
            pytest.raises(OSError, match="No space left"),
        ):
            filler.writelines(itertools.repeat(bytes(4096)))
        code, line = corollad(tmp_path)
        assert code == Exit.ERROR
        assert "no room on the disk" in line
        assert str(state) in line
        assert not list(state.glob("*.new"))


@is_root
def test_a_disk_that_fills_up_under_a_running_daemon_is_told_and_nothing_is_lost(tmp_path: Path) -> None:
    daemon = DaemonProcess("full", tmp_path / "full", ("--blocks", "none", "--no-mdns", "--no-upnp"))
    daemon.folder.mkdir()
    filler = daemon.folder / "state" / "filler"
    with small_disk(filler.parent):
        daemon.start()
        try:
            daemon.wait_ready()
            with daemon.connect() as talk:
                talk.create_swarm("bees")
            with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
                file.writelines(itertools.repeat(bytes(4096)))
            code, line = daemonctl(daemon, "config", "set", "idle_minutes", "5.0")
            assert code == Exit.ERROR
            assert "no room on the disk" in line
            before = daemon.status()
            assert (before.state, before.swarm) == ("online", "bees")
            assert "no room on the disk" in before.health[0]
            with daemon.connect() as talk:
                assert talk.config()["idle_minutes"] == 0.0
            daemon.kill()
            daemon.start()
            daemon.wait_for(lambda status: status.swarm == "bees", "remembers its swarm")
            assert daemon.status().peer == before.peer
            daemon.wait_for(lambda status: "no room on the disk" in "".join(status.health), "says so again")
            filler.unlink()
            with daemon.connect() as talk:
                talk.set_config("idle_minutes", 5.0)
            assert daemon.status().health == ()
        finally:
            daemon.end()


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of 64 KiB; skips where this process may not mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "corolla-test", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_socket_nobody_listens_on_is_no_daemon(tmp_path: Path) -> None:
    code, line = daemonctl(tmp_path / "none", "status")
    assert code == Exit.NO_DAEMON
    assert str(tmp_path / "none") in line
    left = tmp_path / "left"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(left))
    code, line = daemonctl(left, "status")
    assert code == Exit.NO_DAEMON
    assert str(left) in line


def test_a_folder_for_sockets_that_is_open_to_others_is_no_place_for_one(tmp_path: Path) -> None:
    folder = tmp_path / f"corolla-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o755)
    code, line = corollad(tmp_path, "--socket", str(folder / "s"))
    assert code == Exit.PERMISSION
    assert f"{folder} belongs to uid {os.getuid()} with mode 0755" in line


@is_root
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv of util-linux")
def test_a_socket_that_one_may_not_reach_is_named(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(closed / "s"))
        listener.listen()
        closed.chmod(0)
        code, line = answer_of([*WEAK, *CONTROL, "status", "--socket", str(closed / "s")])
    assert code == Exit.PERMISSION
    assert line.startswith(f"{closed / 's'}: Permission denied")


# beside a running daemon


class Setting(NamedTuple):
    """A swarm whose daemon `server` serves blocks 0:2 of `tiny`, and nobody the others. lonely: in no swarm."""

    swarm: LocalSwarm
    client: DaemonProcess
    server: DaemonProcess
    lonely: DaemonProcess
    model: Path


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    model = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(model, "llama", seed=4, eos_token_id=None)
    save_tokenizer(model, None)
    cache = tmp_path_factory.mktemp("cache")
    with local_swarm(model, *OPTIONS, "--cache-dir", str(cache)) as swarm:
        client = swarm.found()
        server = swarm.serve("server", 0, 2)
        lonely = swarm.add("lonely", "--blocks", "none")
        lonely.wait_ready()
        server.wait_online()
        swarm.wait_covered(client, [1, 1, 0, 0])
        yield Setting(swarm, client, server, lonely, model)


def test_a_second_daemon_on_the_same_state_folder_names_the_first(setting: Setting) -> None:
    code, line = corollad(setting.lonely.folder, "--socket", str(setting.lonely.folder / "other"))
    assert code == Exit.ERROR
    assert f"process {setting.lonely.pid}" in line
    assert "--state-dir" in line
    assert setting.lonely.status().state == "idle"


def test_a_second_daemon_on_the_same_socket_leaves_the_first_alone(setting: Setting, tmp_path: Path) -> None:
    code, line = corollad(tmp_path, "--socket", str(setting.lonely.socket), "--blocks", "none")
    assert code == Exit.ERROR
    assert str(setting.lonely.socket) in line
    assert setting.lonely.status().state == "idle"


def test_a_taken_port_is_named(setting: Setting, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        daemon = DaemonProcess(
            "ported", tmp_path, ("--blocks", "none", "--listen", f"/ip4/127.0.0.1/tcp/{port}")
        )
        command = [*daemon.command(), "--join", setting.swarm.token]
        command.remove("/ip4/127.0.0.1/tcp/0")
        command.remove("--listen")
        code, line = answer_of(command)
    assert code == Exit.ERROR
    assert f"port {port} on 127.0.0.1 is taken" in line


def test_without_a_swarm_users_are_told_how_to_enter_one(setting: Setting) -> None:
    code, line = daemonctl(setting.lonely, "generate", "Hello")
    assert code == Exit.NOT_READY
    assert line == "not in a swarm (daemonctl join TOKEN, or daemonctl swarm create NAME)"


def test_joining_where_nobody_answers_names_the_address(setting: Setting) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"/ip4/127.0.0.1/tcp/{closed.getsockname()[1]}/p2p/{NOBODY}"
        code, line = daemonctl(setting.lonely, "join", address)
    assert code == Exit.NOT_READY
    assert address.partition("/p2p/")[0] in line
    assert "refused" in line
    assert setting.lonely.status().state == "idle"


def test_one_who_was_not_invited_is_told_so(setting: Setting) -> None:
    owner = setting.swarm.add("owner", "--blocks", "none")
    owner.wait_ready()
    with owner.connect() as daemon:
        daemon.create_swarm("closed", invited=True)
    code, line = daemonctl(setting.lonely, "join", owner.status().addresses[0])
    owner.kill()
    assert code == Exit.PERMISSION
    assert "closed, the swarm of the daemon at" in line
    assert setting.lonely.status().state == "idle"


def test_a_member_that_hangs_answers_no_ping_in_time(setting: Setting) -> None:
    peer = setting.server.status().peer
    setting.server.signal(signal.SIGSTOP)
    try:
        code, line = daemonctl(setting.client, "ping", peer, "--timeout", "0.5")
    finally:
        setting.server.signal(signal.SIGCONT)
    assert code == Exit.TIMEOUT
    assert peer in line
    assert "0.5 s" in line


def test_a_model_that_nobody_serves_is_named_beside_those_served(setting: Setting) -> None:
    code, line = daemonctl(setting.client, "generate", "Hello", "--model", "huge")
    assert code == Exit.ERROR
    assert "'huge'" in line
    assert "tiny" in line


def refused(problem: pytest.ExceptionInfo[CorollaError], code: Code, *values: str) -> None:
    """Check a refusal that programs see."""
    assert problem.value.code is code
    assert problem.value.remedy
    for value in values:
        assert value in str(problem.value)


def test_hidden_states_of_a_wrong_form_are_refused_and_the_session_goes_on(setting: Setting) -> None:
    good = np.full((1, 3, HIDDEN_SIZE), 0.1, np.float32)
    bad = good.copy()
    bad[0, 1, 5] = math.nan
    with (
        setting.client.connect() as daemon,
        daemon.model("tiny").session(max_length=4, blocks=(0, 2)) as session,
    ):
        with pytest.raises(CorollaError) as problem:
            session.step(good[..., :32])
        refused(problem, Code.BAD_SHAPE, "32", str(HIDDEN_SIZE))
        with pytest.raises(CorollaError) as problem:
            session.step(good.astype(np.int64))
        refused(problem, Code.BAD_DTYPE, "int64")
        with pytest.raises(CorollaError) as problem:
            session.step(bad)
        refused(problem, Code.NOT_FINITE, "1 of 192", "NaN")
        with pytest.raises(CorollaError) as problem:
            session.step(np.zeros((1, 5, HIDDEN_SIZE), np.float32))
        refused(problem, Code.TOO_LONG, "5", "4")
        assert session.step(good).shape == good.shape


def test_blocks_that_the_model_does_not_have_are_named(setting: Setting) -> None:
    with setting.client.connect() as daemon, pytest.raises(CorollaError) as problem:
        daemon.model("tiny").session(max_length=8, blocks=(2, 9))
    refused(problem, Code.BLOCKS_OUT_OF_RANGE, "2:9", str(NUM_BLOCKS))


def test_a_prompt_longer_than_the_model_can_hold_is_refused(setting: Setting) -> None:
    with setting.client.connect() as daemon, pytest.raises(CorollaError) as problem:
        daemon.model("tiny").generate(tokens=[[5] * 300], max_new_tokens=4)
    refused(problem, Code.TOO_LONG, "300", "256")


def test_a_text_that_lacks_blocks_is_not_ready_and_names_them(setting: Setting) -> None:
    code, line = daemonctl(setting.client, "generate", "hello world")
    assert code == Exit.NOT_READY
    assert "2:4" in line
    assert "--wait" in line
    code, line = daemonctl(setting.client, "generate", "hello " * 300)
    assert code == Exit.ERROR
    assert "300" in line
    assert "256" in line


def test_blocks_served_by_nobody_are_named_with_who_loads_them_and_waited_for(setting: Setting) -> None:
    hidden = np.full((1, 3, HIDDEN_SIZE), 0.1, np.float32)
    with setting.client.connect() as daemon:
        model = daemon.model("tiny")
        with pytest.raises(CorollaError) as problem:
            model.session(max_length=8, blocks=(1, NUM_BLOCKS))
        refused(problem, Code.BLOCKS_UNSERVED, "2:4")

        back = setting.swarm.serve("back", 2, NUM_BLOCKS)
        with model.session(max_length=8, blocks=(0, NUM_BLOCKS), wait_s=DEADLINE_S) as session:
            assert session.step(hidden).shape == hidden.shape

        lost = back.worker_pids()
        os.kill(lost[0], signal.SIGKILL)
        wait_until(lambda: bool(set(back.worker_pids()) - set(lost)), "a new worker")
        held = (set(back.worker_pids()) - set(lost)).pop()
        os.kill(held, signal.SIGSTOP)  # so that it goes on loading
        wait_until(lambda: "loading" in {span.state for span in daemon.swarm().spans}, "who loads is known")
        with pytest.raises(CorollaError) as problem:
            model.session(max_length=8, blocks=(1, NUM_BLOCKS))
        refused(problem, Code.BLOCKS_UNSERVED, "2:4", "loading", back.status().peer[-6:])
        os.kill(held, signal.SIGCONT)
        with model.session(max_length=8, blocks=(1, NUM_BLOCKS), wait_s=DEADLINE_S) as session:
            assert session.step(hidden).shape == hidden.shape
    back.kill()


# workers that fail for good


class _Hub(BaseHTTPRequestHandler):
    """The hub, as it answers someone without a token."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.send_header("X-Error-Code", "GatedRepo" if "gated" in self.path else "RepoNotFound")
        self.send_header("X-Error-Message", "Invalid username or password.")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815 - the names that the library calls

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


WHOLE = ("--blocks", f"0:{NUM_BLOCKS}")
FAILURES = {
    "unknown": (("--model", "someone/nothing", *WHOLE), Code.UNKNOWN_MODEL, "someone/nothing"),
    "family": (("--model", "MODELS/bert", *WHOLE), Code.UNSUPPORTED_FAMILY, "BertModel"),
    "gated": (("--model", "someone/gated", *WHOLE), Code.GATED_MODEL, "someone/gated"),
    "range": (("--model", "MODELS/tiny", "--blocks", "0:9"), Code.BLOCKS_OUT_OF_RANGE, "0:9"),
    "memory": (
        ("--model", "MODELS/tiny", *WHOLE, "--memory-bytes", "4096"),
        Code.DOES_NOT_FIT,
        "0:4",
    ),
    "truncated": (("--model", "MODELS/cut", *WHOLE), Code.DAMAGED_WEIGHTS, "model.safetensors"),
}
LIKE_OTHERS = ("family", "gated", "range")  # the same way; the worker's own tests have them too


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that cannot be served, and one that can."""
    models = tmp_path_factory.mktemp("models")
    save_tiny(models / "tiny", "llama", seed=4)
    shutil.copytree(models / "tiny", models / "cut")
    weights = models / "cut" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    (models / "bert").mkdir()
    (models / "bert" / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    return models


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long] if name in LIKE_OTHERS else [], id=name)
        for name in FAILURES
    ],
)
def test_a_worker_that_cannot_work_says_why_and_the_daemon_lives(models: Path, hub: str, name: str) -> None:
    arguments, code, value = FAILURES[name]
    variables = {"HF_ENDPOINT": hub, "HF_HOME": str(models / "hub"), "HF_TOKEN": "", "HF_HUB_OFFLINE": "0"}
    with local_swarm(None, *OPTIONS, "--cache-dir", str(models / "cache")) as swarm:
        asked = [argument.replace("MODELS", str(models)) for argument in arguments]
        daemon = DaemonProcess(name, swarm.folder / name, (*asked, *swarm.options), variables)
        swarm.daemons[name] = daemon
        daemon.start()
        daemon.wait_ready()
        with daemon.connect() as talk:
            talk.create_swarm(name)
        check_failed(daemon, code, value)


def check_failed(daemon: DaemonProcess, code: Code, value: str) -> None:
    """Wait until its worker is given up, and see what is told of that."""
    daemon.wait_for(
        lambda status: bool(status.workers) and status.workers[0].state == "failed", "gives its worker up"
    )
    told = daemon.status().workers[0].error
    assert isinstance(told, dict)
    assert told["code"] == code
    assert value in told["message"]
    assert told["remedy"]
    assert "\n" not in told["message"]
    assert status_code(daemon) == Exit.DEGRADED
    assert daemon.status().state == "online"
    assert "Traceback" not in daemon.log()


def test_a_daemon_without_failures_has_status_zero(setting: Setting) -> None:
    assert status_code(setting.client) == Exit.OK
    with corolla.connect(setting.server.socket) as daemon:
        assert daemon.status().state == "online"

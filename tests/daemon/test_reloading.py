"""Other settings for a daemon that runs: at once, by workers that start again, or told by name."""

from __future__ import annotations

import math
import os
import pwd
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from corolla.daemon import reloading as module
from corolla.daemon.answers.methods import handlers, pages
from corolla.daemon.config import KEYS, Config, load_config
from corolla.daemon.lending import ends as ends_module
from corolla.daemon.lending import lending as lending_module
from corolla.daemon.node import Node
from corolla.daemon.reloading import DAEMON_KEYS, NOW_KEYS, WORKER_KEYS, describe, differences
from corolla.daemon.serving.environment import Environment
from corolla.daemon.serving.workers import Worker
from corolla.daemon.store import open_store
from corolla.protocol.errors import Code
from corolla.protocol.settings import Applied
from corolla.protocol.work import ModelSource, SourceKind

from ..processes import DaemonProcess, wait_until
from .members import until
from .test_lending import fake_command
from .test_node import ask, heard, refused

pytestmark = pytest.mark.anyio


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cor-") as path:
        yield Path(path)


@pytest.fixture(autouse=True)
def _fake_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    def source(model: str) -> ModelSource:
        return ModelSource(SourceKind.HUB, model)

    monkeypatch.setattr(lending_module, "Worker", partial(Worker, backoff_s=(0.05,)))
    monkeypatch.setattr(ends_module, "Worker", partial(Worker, backoff_s=(0.05,)))
    monkeypatch.setattr(lending_module, "source_of", source)
    monkeypatch.setattr(ends_module, "source_of", source)
    monkeypatch.setattr(module, "source_of", source)
    monkeypatch.setattr(Environment, "command", lambda self, descriptor: fake_command(descriptor))


@asynccontextmanager
async def configured(
    folder: Path, text: str, environment: Mapping[str, str] | None = None
) -> AsyncIterator[Node]:
    """A daemon of a configuration file, `config.toml` in this folder."""
    write(folder, text)
    sources = partial(
        load_config, folder / "config.toml", environment or {}, {"listen": ["/ip4/127.0.0.1/tcp/0"]}
    )
    with open_store(folder / "state") as store:
        daemon = Node(sources({}), store, folder / "s", folder / "cache", handlers, pages, sources)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(daemon.run)
            await heard(daemon, "started")
            yield daemon
            daemon.stop(0.0)


def write(folder: Path, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text(text)


def pids(daemon: Node) -> list[int | None]:
    return [worker.process for worker, _ in daemon.lending.serving()]


async def test_every_key_takes_effect_somewhen() -> None:
    assert sorted(KEYS) == sorted([*NOW_KEYS, *WORKER_KEYS, *DAEMON_KEYS])


async def test_differences_are_told_by_when_they_count() -> None:
    applied = differences(Config(), Config(hours="1:00-2:00", threads=3, socket="/x", operators=("root",)))
    assert applied == Applied(("hours", "operators"), ("threads",), ("socket",))
    assert "socket when the daemon is started again" in describe(applied)
    assert describe(differences(Config(), Config())) == "nothing changed"


async def test_a_signal_puts_limits_in_force_and_workers_stay(folder: Path) -> None:
    async with configured(folder, 'model = "faithful"\nblocks = "0:4"\n') as daemon:
        await until(lambda: bool(daemon.lending.serving()))
        before = pids(daemon)
        assert daemon.traffic.limit_bytes_per_s == math.inf
        write(folder, 'model = "faithful"\nblocks = "0:4"\nupload_bytes_per_s = 5000\ndisk_bytes = 7\n')
        os.kill(os.getpid(), signal.SIGHUP)
        assert await heard(daemon, "reloaded") == "upload_bytes_per_s, disk_bytes in force"
        assert daemon.traffic.limit_bytes_per_s == 5000
        await until(lambda: not daemon.lending.is_changing)
        assert pids(daemon) == before


async def test_what_a_worker_was_started_with_starts_just_the_worker_again(folder: Path) -> None:
    async with configured(folder, 'model = "faithful"\nblocks = "0:4"\ndevice = ["cpu", "auto"]\n') as daemon:
        await until(lambda: len(daemon.lending.serving()) == 2)
        before = pids(daemon)
        write(folder, 'model = "faithful"\nblocks = "0:4"\ndevice = ["auto"]\n')
        daemon.reloading.reload()
        await until(lambda: len(daemon.lending.statuses()) == 1)
        assert pids(daemon) == before[1:]
        write(folder, 'model = "faithful"\nblocks = "0:4"\ndevice = ["auto"]\ncache_tokens = 64\n')
        daemon.reloading.reload()
        await until(lambda: bool(pids(daemon)) and pids(daemon) != before[1:])
        assert [worker.configure.cache_tokens for worker, _ in daemon.lending.serving()] == [64]
        write(folder, "")
        daemon.reloading.reload()
        await until(lambda: daemon.lending.statuses() == ())


async def test_a_daemon_without_a_model_serves_as_soon_as_it_has_one(folder: Path) -> None:
    async with configured(folder, "") as daemon, await ask(daemon) as program:
        assert (await program.set_config("model", "faithful")).workers == ("model",)
        await until(lambda: bool(daemon.lending.serving()))
        await program.set_config("models", ["llama"])
        await until(lambda: [status.state for status in daemon.lending.statuses()] == ["failed"])
        await program.set_config("models", ["fake"])
        await until(lambda: bool(daemon.lending.serving()))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("threads = -1\n", "threads is -1"),
        ("threads = \n", "config.toml"),
        ('hours = "soon"\n', "hours is 'soon'"),
        ('operators = ["nobody-is-called-so"]\n', "nobody-is-called-so"),
    ],
)
async def test_a_bad_file_changes_nothing_and_status_says_why(folder: Path, text: str, said: str) -> None:
    async with configured(folder, "threads = 2\nupload_bytes_per_s = 9\n") as daemon:
        write(folder, f"upload_bytes_per_s = 1\n{text}")
        daemon.reloading.reload()
        assert said in await heard(daemon, "reload_failed")
        assert daemon.config.threads == 2
        assert daemon.traffic.limit_bytes_per_s == 9
        assert said in str(daemon.status().hint)
        write(folder, "threads = 2\n")
        daemon.reloading.reload()
        assert said not in str(daemon.status().hint)


async def test_a_file_that_is_gone_changes_nothing(folder: Path) -> None:
    async with configured(folder, "threads = 2\n") as daemon:
        (folder / "config.toml").unlink()
        daemon.reloading.reload()
        assert "config.toml" in await heard(daemon, "reload_failed")
        assert daemon.config.threads == 2


async def test_what_needs_another_start_is_named_until_it_had_one(folder: Path) -> None:
    async with configured(folder, "") as daemon, await ask(daemon) as program:
        applied = await program.set_config("announce", ["/ip4/192.0.2.1/tcp/1"])
        assert applied.daemon == ("announce",)
        assert "announce will count when the daemon is started again" in (await program.status()).hint
        await program.set_config("announce", [])
        assert "announce" not in (await program.status()).hint


async def test_a_variable_wins_over_what_is_set_and_that_is_said(folder: Path) -> None:
    async with configured(folder, "", {"COROLLA_THREADS": "2"}) as daemon, await ask(daemon) as program:
        assert (await program.set_config("threads", 3)).overridden
        assert daemon.config.threads == 2
        assert daemon.store.state.settings == {"threads": 3}


async def test_hours_and_operators_count_at_once(folder: Path) -> None:
    user = pwd.getpwuid(os.getuid()).pw_name
    async with (
        configured(folder, 'model = "faithful"\nblocks = "0:4"\n') as daemon,
        await ask(daemon) as program,
    ):
        await until(lambda: bool(daemon.lending.serving()))
        minute = daemon.pausing.minute()
        start, end = (minute + 120) % 1440, (minute + 180) % 1440
        hours = f"{start // 60:02}:{start % 60:02}-{end // 60:02}:{end % 60:02}"
        assert (await program.set_config("hours", hours)).now == ("hours",)
        await until(lambda: daemon.lending.statuses() == ())
        assert (await program.status()).lending == "outside hours"
        await program.set_config("hours", "")
        await until(lambda: bool(daemon.lending.serving()))
        assert (await program.set_config("operators", [user])).now == ("operators",)
        assert (await refused(program.set_config("operators", ["nobody-so"]))).code is Code.BAD_CONFIG


async def test_a_token_that_is_set_is_taken_up(folder: Path) -> None:
    async with configured(folder / "a", "") as first, configured(folder / "b", "") as second:
        token = await first.place.create("roses")
        second.reloading.set("join", token)
        assert await heard(second, "joined") == "in swarm roses"


def test_a_real_daemon_reads_its_file_again_and_flags_still_win(folder: Path) -> None:
    write(folder, 'hours = "01:00-02:00"\nreplacement_wait_s = 5\n')
    options = ("--blocks", "none", "--replacement-wait-s", "7")
    daemon = DaemonProcess("d", folder / "d", ("--config", str(folder / "config.toml"), *options))
    daemon.start()
    try:
        daemon.wait_ready()
        write(folder, "idle_minutes = 3\nreplacement_wait_s = 6\n")
        daemon.signal(signal.SIGHUP)
        with daemon.connect() as program:
            wait_until(lambda: program.config()["idle_minutes"] == 3.0, "the new settings are in force")
            assert (program.config()["hours"], program.config()["replacement_wait_s"]) == ("", 7.0)
    finally:
        daemon.end()

"""The daemon in numbers: by method, by HTTP on the control socket, and on a port of this machine."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from corolla.daemon.pages import MAX_REQUEST_BYTES, Page, answer

from .test_node import ask, heard, node

REQUEST = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"

pytestmark = pytest.mark.anyio


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cor-") as path:
        yield Path(path)


def samples(text: str) -> dict[str, float]:
    """Name and values of labels, in the order of their names → value, of a text that Prometheus itself can read."""
    return {
        ",".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def page(stream: trio.SocketStream, request: bytes = REQUEST) -> bytes:
    async with stream:
        await stream.send_all(request)
        response = b""
        with trio.fail_after(30):
            while data := await stream.receive_some():
                response += data
        return response


async def test_what_happens_is_counted_and_prometheus_can_read_it(folder: Path) -> None:
    async with node(folder) as daemon, await ask(daemon) as program:
        alone = samples(await program.metrics())
        assert alone["corolla_in_swarm"] == 0
        assert alone["corolla_lending,yes"] == 1
        assert alone["corolla_lending,paused"] == 0
        await daemon.place.create("roses")
        daemon.tally.steps += 3
        daemon.tally.block_tokens += 12
        daemon.tally.session_events["repaired"] += 2
        daemon.traffic.relayed(70)
        daemon.events.emit("charged", "somebody: something")
        found = samples(await program.metrics())
        assert found["corolla_in_swarm"] == 1
        assert found["corolla_steps_total"] == 3
        assert found["corolla_block_tokens_total"] == 12
        assert found["corolla_contribution_block_tokens_total"] == 12
        assert found["corolla_repairs_total"] == 2
        assert found["corolla_charges_total"] == 1
        assert found["corolla_events_total,charged"] == 1
        assert found["corolla_relayed_bytes_total"] == 70
        assert found["process_resident_memory_bytes"] > 1e6
        wanted = {
            "peers",
            "user_sessions",
            "sent_bytes_total",
            "received_bytes_total",
            "generated_tokens_total",
        }
        wanted |= {"training_tokens_total", "steps_under_way", "history_bytes", "weights_disk_bytes"}
        assert {f"corolla_{name}" for name in wanted} <= set(found)


async def test_the_control_socket_answers_http_too(folder: Path) -> None:
    async with node(folder) as daemon:
        path = daemon.status().socket
        response = await page(await trio.open_unix_socket(path))
        head, _, body = response.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4")
        assert f"Content-Length: {len(body)}".encode() in head
        assert samples(body.decode())["corolla_in_swarm"] == 0
        async with await trio.open_unix_socket(path) as slow:  # in pieces, and its first one short
            for piece in (b"G", b"ET /metrics HT", b"TP/1.1\r\n\r"):
                await slow.send_all(piece)
            assert (await page(slow, b"\n")).startswith(b"HTTP/1.1 200 OK")
        async with await ask(daemon) as program:
            assert (await program.status()).state == "idle"


async def test_a_port_of_this_machine_is_opened_moved_and_closed_by_the_configuration(folder: Path) -> None:
    first, second = free_port(), free_port()
    async with node(folder, metrics_port=first) as daemon:
        assert await heard(daemon, "metrics") == f"http://127.0.0.1:{first}/metrics"
        assert b"corolla_in_swarm" in await page(await trio.open_tcp_stream("127.0.0.1", first))
        assert daemon.reloading.set("metrics_port", second).now == ("metrics_port",)
        await until_listening(second)
        with pytest.raises(OSError, match=str(first)):
            await trio.open_tcp_stream("127.0.0.1", first)
        daemon.reloading.set("metrics_port", 0)
        await until_closed(second)


async def until_listening(port: int) -> None:
    with trio.fail_after(30):
        while True:
            try:
                await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()
                return
            except OSError:
                await trio.sleep(0.01)


async def until_closed(port: int) -> None:
    with trio.fail_after(30):
        while True:
            try:
                await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()
            except OSError:
                return
            await trio.sleep(0.01)


async def test_a_port_that_is_taken_is_told_and_nothing_else_suffers(folder: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port: int = holder.getsockname()[1]
        async with node(folder, metrics_port=port) as daemon:
            assert str(port) in await heard(daemon, "metrics_failed")
            assert daemon.status().state == "idle"


async def test_lenders_tell_of_their_workers(folder: Path) -> None:
    async with node(folder, model=str(folder), blocks="0:1") as daemon:
        await heard(daemon, "worker_failed")
        found = samples(daemon.pages["/metrics"]()[1].decode())
        assert found[f"corolla_worker_state,auto,{folder},failed,0"] == 1
        assert found[f"corolla_worker_state,auto,{folder},online,0"] == 0
        assert found[f"corolla_worker_restarts_total,auto,{folder},0"] == 0


def hello() -> Page:
    return "text/plain", b"hello"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /metrics HTTP/1.1\r\n\r\n", b"200"),
        (b"GET /metrics?x=1 HTTP/1.0\n\n", b"200"),
        (b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:9100\r\n\r\n", b"200"),
        (b"GET /metrics HTTP/1.1\r\nA: b\r\nhost: LocalHost\r\n\r\n", b"200"),
        (b"GET /metrics HTTP/1.1\r\nHost: evil.example\r\n\r\n", b"403"),
        (b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1.evil.example\r\n\r\n", b"403"),
        (b"GET /other HTTP/1.1\r\n\r\n", b"404"),
        (b"GET \xff\xfe HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/2\r\n\r\n", b"400"),
        (b"GET " + b"x" * MAX_REQUEST_BYTES, b"400"),
    ],
)
async def test_pages_are_given_to_who_asks_properly(request_: bytes, status: bytes) -> None:
    response = answer(request_, {"/metrics": hello})
    assert response.split(b" ")[1] == status
    assert response.endswith(b"hello") is (status == b"200")

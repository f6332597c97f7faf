"""The line's speed, read from what the kernel tells of connections."""

from __future__ import annotations

import socket
import struct
import threading

import pytest

from corolla.daemon.network.line import (
    ENOUGH_BYTES,
    TCP_INFO_BYTES,
    Line,
    Meter,
    Reading,
    parse_tcp_info,
    up_rate,
)

START = Reading(1000, 0, 1.0, 0.1, is_app_limited=False)


def later(acked: int, busy_s: float, closed_s: float = 0.0, *, limited: bool = False) -> Reading:
    return Reading(START.acked_bytes + acked, 0, START.busy_s + busy_s, START.closed_s + closed_s, limited)


@pytest.mark.parametrize(
    ("now", "rate"),
    [
        (later(1_000_000, 0.5), 2_000_000),
        (later(1_000_000, 0.5, 0.1), 2_000_000),
        (later(1_000_000, 0.5, 0.3), None),  # the far end was slow
        (later(1_000_000, 0.5, limited=True), None),  # we had no more to say
        (later(ENOUGH_BYTES - 1, 0.5), None),  # slow start
        (later(50_000_000, 0.1), None),
        (later(0, 0.0), None),
    ],
)
def test_only_a_transfer_that_fills_the_line_measures_it(now: Reading, rate: float | None) -> None:
    assert up_rate(START, now) == rate


def info(acked: int, received: int = 0, busy_us: int = 0, limited: int = 0) -> bytes:
    data = bytearray(TCP_INFO_BYTES)
    data[7] = limited
    struct.pack_into("=QQ", data, 120, acked, received)
    struct.pack_into("=QQ", data, 168, busy_us, 0)
    return bytes(data)


def test_the_kernels_struct_is_read() -> None:
    assert parse_tcp_info(info(5, 6, 2_000_000, 1)) == Reading(5, 6, 2.0, 0.0, is_app_limited=True)
    assert parse_tcp_info(b"") is None
    assert parse_tcp_info(bytes(104)) is None  # of an old kernel


class Connection:
    """One that a test writes for."""

    def __init__(self) -> None:
        self.is_closed = False
        self.words = info(0)

    def tcp_info(self) -> bytes:
        return self.words

    def get_remote_address(self) -> tuple[str, int]:
        return ("9.9.9.9", 1)


def test_the_best_connection_counts_up_and_all_together_down() -> None:
    meter, one, two = Meter(), Connection(), Connection()
    meter.watch(one)
    meter.watch(two)
    assert meter.read(10.0) == Line()  # nothing to compare with yet
    one.words, two.words = info(400_000, 300_000, 500_000), info(900_000, 100_000, 500_000)
    assert meter.read(12.0) == Line(1_800_000, 200_000)
    assert meter.read(13.0) == Line()
    two.is_closed = True
    one.words = info(400_000, 900_000, 500_000)
    assert meter.read(14.0) == Line(0, 600_000)


def test_a_real_connection_tells_what_it_carried() -> None:
    size = 4 << 20
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        door.listen()
        with socket.create_connection(door.getsockname()) as near, door.accept()[0] as far:

            def drain() -> None:
                left = size
                while left:
                    left -= len(far.recv(1 << 20))
                far.sendall(b"all")

            reader = threading.Thread(target=drain)
            reader.start()
            near.sendall(bytes(size))
            assert near.recv(3) == b"all"
            reader.join()
            reading = parse_tcp_info(near.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256))
    assert reading is not None
    assert size <= reading.acked_bytes <= size + 1
    assert reading.received_bytes == 3

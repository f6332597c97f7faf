"""A link between two network namespaces, in user space: delay, rate and loss between two TAP devices.

    python link.py NAMESPACE NAME NAMESPACE NAME DELAY_S BYTES_PER_S LOSS

Prints "ready" when both devices are there; lives until killed.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

TUNSETIFF = 0x400454CA
IFF_TAP_NO_PI = 0x0002 | 0x1000
CLONE_NEWNET = 0x40000000
MAX_QUEUED_S = 0.5  # what a router's buffer holds, of the link's rate; more is dropped


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """What this thread opens in the block belongs to another namespace, and can be used from here afterwards."""
    libc = ctypes.CDLL(None, use_errno=True)
    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if libc.setns(there, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    try:
        yield
    finally:
        libc.setns(here, CLONE_NEWNET)
        os.close(here)
        os.close(there)


def open_tap(namespace: str, name: str) -> int:
    """A TAP device in another namespace."""
    with inside(namespace):
        tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP_NO_PI))
    return tap


def carry(taps: tuple[int, int], delay_s: float, bytes_per_s: float, loss: float) -> None:
    """Carry packets both ways for ever."""
    rng = random.Random(1)
    waiting: list[tuple[float, int, int, bytes]] = []  # when, order, to which, packet
    free_at = [0.0, 0.0]
    count = 0
    while True:
        timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        readable, _, _ = select.select(taps, [], [], timeout)
        now = time.monotonic()
        for tap in readable:
            side = taps.index(tap)
            for _ in range(64):
                try:
                    packet = os.read(tap, 65536)
                except BlockingIOError:
                    break
                if rng.random() < loss:
                    continue
                start = max(free_at[side], now)
                if bytes_per_s:
                    if start - now > MAX_QUEUED_S:
                        continue
                    free_at[side] = start + len(packet) / bytes_per_s
                count += 1
                heapq.heappush(waiting, (start + delay_s, count, 1 - side, packet))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, side, packet = heapq.heappop(waiting)
            try:
                os.write(taps[side], packet)
            except OSError:  # the device is down, or full: the packet is lost, as packets are
                continue


if __name__ == "__main__":
    ends = (open_tap(sys.argv[1], sys.argv[2]), open_tap(sys.argv[3], sys.argv[4]))
    print("ready", flush=True)
    carry(ends, *(float(value) for value in sys.argv[5:8]))

"""Thirty daemons on one machine: all find each other, and a third of them may vanish at once.

None serves anything: what is looked at is the swarm itself, and what an idle daemon costs.
"""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path

import pytest

from ..processes import DaemonProcess, LocalSwarm, local_swarm, wait_until

NUM_DAEMONS = 30
NUM_KILLED = 10
BATCH = 6  # started at once: all thirty would keep the machine from answering
NOTICED_S = 90.0
MEASURED_S = 30.0


def members_of(daemon: DaemonProcess) -> dict[str, bool]:
    """Whom a daemon knows, and whether it is connected with them."""
    with daemon.connect() as connection:
        return {view.peer: view.connected for view in connection.peers()}


def knows(daemon: DaemonProcess, others: set[str]) -> bool:
    """Whether it has found all of these."""
    return others <= members_of(daemon).keys()


def sees_who_is_left(daemon: DaemonProcess, living: set[str], killed: set[str]) -> bool:
    """Whether it knows all who live, is connected with some, and with none of the dead."""
    seen = members_of(daemon)
    connected = {peer for peer, is_connected in seen.items() if is_connected}
    return living <= seen.keys() and len(connected) > 1 and not connected & killed


def resident_mib(pid: int) -> float:
    """Memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024


def proportional_mib(pid: int) -> float:
    """The same, with what it shares with others divided among them."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) / 1024


def cpu_s(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start_all(swarm: LocalSwarm) -> dict[str, DaemonProcess]:
    """All daemons by peer id, the first of which founded the swarm."""
    founder = swarm.found()
    daemons = {founder.status().peer: founder}
    while len(daemons) < NUM_DAEMONS:
        numbers = range(len(daemons), min(NUM_DAEMONS, len(daemons) + BATCH))
        batch = [swarm.add(f"d{number}", "--blocks", "none", "--join", swarm.token) for number in numbers]
        for daemon in batch:
            daemon.wait_for(lambda status: status.state == "online", "has joined")
            daemons[daemon.status().peer] = daemon
    return daemons


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_thirty_daemons_find_each_other_and_ten_may_vanish() -> None:
    with local_swarm(None) as swarm:
        began = time.monotonic()
        daemons = start_all(swarm)
        joined_s = time.monotonic() - began
        for peer, daemon in daemons.items():
            others = daemons.keys() - {peer}
            wait_until(partial(knows, daemon, others), f"{daemon.name} found all")
        found_s = time.monotonic() - began

        before = {peer: cpu_s(daemon.pid) for peer, daemon in daemons.items()}
        began = time.monotonic()
        time.sleep(MEASURED_S)  # the span of a measurement: nothing is waited for
        elapsed_s = time.monotonic() - began
        shares = sorted((cpu_s(d.pid) - before[peer]) / elapsed_s for peer, d in daemons.items())
        memory = sorted(resident_mib(daemon.pid) for daemon in daemons.values())
        shared = sorted(proportional_mib(daemon.pid) for daemon in daemons.values())

        killed = set(list(daemons)[-NUM_KILLED:])
        for peer in killed:
            daemons[peer].kill()
        began = time.monotonic()
        living = daemons.keys() - killed

        for peer in living:
            daemon = daemons[peer]
            right = partial(sees_who_is_left, daemon, living - {peer}, killed)
            wait_until(right, f"{daemon.name} sees who is left", NOTICED_S)
        noticed_s = time.monotonic() - began
        middle = NUM_DAEMONS // 2
        print(
            f"\n{NUM_DAEMONS} daemons joined after {joined_s:.0f} s, all found from each after {found_s:.0f} s;"
            f" {NUM_KILLED} killed, noticed by all after {noticed_s:.1f} s"
            f"\nan idle daemon: {memory[middle]:.0f} MiB resident ({shared[middle]:.0f} with shared pages divided),"
            f" at most {memory[-1]:.0f}; {100 * shares[middle]:.2f} % of a core, at most {100 * shares[-1]:.2f} %"
        )
        assert noticed_s <= NOTICED_S

"""Real daemons, real kills: whatever dies while a text is written, its tokens are those of the whole model.

Float32 on every hop, so equality is exact. After each text only peers that were really killed or stopped may
have been charged.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from ..processes import DaemonProcess, wait_until  # noqa: E402
from .fleet import SPANS, Fleet, fleet_of, generate, peer_of, prompt_of, stop, wake  # noqa: E402

pytestmark = pytest.mark.timeout(600)
PROMPT = prompt_of(9)
LONG_PROMPT = prompt_of(900)


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with fleet_of(tmp_path_factory.mktemp("m") / "tiny", tmp_path_factory.mktemp("cache")) as fleet:
        fleet.restock()
        yield fleet


@pytest.fixture
def fleet(standing: Fleet) -> Fleet:
    standing.restock()
    return standing


class Killer:
    """Kills the daemon in use of some spans when so many tokens have come; knows whom."""

    def __init__(self, fleet: Fleet, spans: tuple[tuple[int, int], ...], at: int) -> None:
        self.fleet = fleet
        self.spans = spans
        self.at = at
        self.guilty: set[str] = set()

    def __call__(self, count: int) -> None:
        if count == self.at and count:
            self.strike()

    def strike(self) -> None:
        victims = [self.fleet.in_use(span) for span in self.spans]
        self.guilty = {peer_of(victim) for victim in victims}
        for victim in victims:
            os.kill(victim.pid, signal.SIGKILL)
        for victim in victims:
            victim.wait()


def test_undisturbed_tokens_equal_the_whole_models(fleet: Fleet) -> None:
    before = fleet.charged()
    outcome = generate(fleet, PROMPT)
    assert outcome.tokens == fleet.expected(PROMPT)
    assert set(outcome.events) <= {"notice"}  # the first text of a daemon comes with the words on privacy
    assert fleet.charged() == before


@pytest.mark.parametrize("spans", [(SPANS[0],), (SPANS[1],), (SPANS[2],), SPANS[:2]], ids=str)
def test_a_kill_amid_a_text_changes_no_token(fleet: Fleet, spans: tuple[tuple[int, int], ...]) -> None:
    before = fleet.charged()
    killer = Killer(fleet, spans, at=7)
    outcome = generate(fleet, PROMPT, killer)
    assert outcome.tokens == fleet.expected(PROMPT)
    assert "repaired" in outcome.events
    assert fleet.charged() - before <= killer.guilty


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_a_kill_during_prefill_changes_no_token(fleet: Fleet, span: tuple[int, int]) -> None:
    before = fleet.charged()
    killer = Killer(fleet, (span,), at=0)
    thread = threading.Thread(target=killer.strike)  # as soon as the session is open, before any token
    thread.start()
    outcome = generate(fleet, LONG_PROMPT, num_tokens=8)
    thread.join()
    assert outcome.tokens == fleet.expected(LONG_PROMPT, 8)
    assert fleet.charged() - before <= killer.guilty


def test_two_small_spans_replace_a_large_one(fleet: Fleet) -> None:
    spare, victim = fleet.serving[SPANS[1]]
    spare.kill()
    fleet.serving[SPANS[1]] = [victim]
    fleet.wait()

    def disturb(count: int) -> None:
        if count == 7:  # only now, so that the text began on the large span
            for span in ((2, 3), (3, 4)):
                fleet.add(span)
            victim.kill()
            fleet.serving[SPANS[1]] = []

    outcome = generate(fleet, PROMPT, disturb)
    assert outcome.tokens == fleet.expected(PROMPT)
    assert "waiting" in outcome.events
    assert "repaired" in outcome.events


def test_a_hop_that_hangs_is_replaced_and_harms_nobody_when_it_wakes(fleet: Fleet) -> None:
    before = fleet.charged()
    hung: list[DaemonProcess] = []
    peers: set[str] = set()

    def disturb(count: int) -> None:
        if count == 7:
            hung.append(fleet.in_use(SPANS[1]))
            peers.add(peer_of(hung[0]))
            stop(hung[0])
        elif count == 12 and hung:
            wake(hung[0])

    outcome = generate(fleet, PROMPT, disturb)
    assert outcome.tokens == fleet.expected(PROMPT)
    assert "repaired" in outcome.events
    assert fleet.charged() - before <= peers


def test_all_replicas_lost_and_one_back_later(fleet: Fleet) -> None:
    def disturb(count: int) -> None:
        if count == 7:
            for daemon in fleet.serving[SPANS[1]]:
                daemon.kill()
            fleet.serving[SPANS[1]] = []
            fleet.add(SPANS[1])  # takes seconds to load; the session waits for it

    outcome = generate(fleet, PROMPT, disturb)
    assert outcome.tokens == fleet.expected(PROMPT)
    assert outcome.events[-1] == "repaired"


def test_a_killed_worker_of_a_hop_changes_no_token(fleet: Fleet) -> None:
    def disturb(count: int) -> None:
        if count == 7:
            (pid,) = fleet.in_use(SPANS[1]).worker_pids()
            os.kill(pid, signal.SIGKILL)

    outcome = generate(fleet, PROMPT, disturb)
    assert outcome.tokens == fleet.expected(PROMPT)
    assert "repaired" in outcome.events
    wait_until(
        lambda: all(d.status().workers[0].state == "online" for d in fleet.serving[SPANS[1]]),
        "the worker is restarted",
    )


def test_the_clients_own_worker_is_restarted_and_the_text_goes_on(fleet: Fleet) -> None:
    before = fleet.charged()

    def disturb(count: int) -> None:
        if count == 7:
            (pid,) = fleet.client.worker_pids()
            os.kill(pid, signal.SIGKILL)

    outcome = generate(fleet, PROMPT, disturb)
    assert outcome.tokens == fleet.expected(PROMPT)
    assert "restarting" in outcome.events
    assert fleet.charged() == before


def test_a_sampled_text_is_the_same_after_a_kill(fleet: Fleet) -> None:
    sampling: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 11}
    unharmed = generate(fleet, PROMPT, **sampling)
    outcome = generate(fleet, PROMPT, Killer(fleet, (SPANS[0],), at=7), **sampling)
    assert outcome.tokens == unharmed.tokens
    assert "repaired" in outcome.events


def test_hidden_states_are_the_same_after_a_kill(fleet: Fleet) -> None:
    hidden = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(3))

    def run(kill: bool) -> Any:
        with fleet.client.connect() as daemon, daemon.model("tiny").session(rows=2, max_length=32) as session:
            first = session.step(hidden[:, :8])
            if kill:
                Killer(fleet, (SPANS[1],), at=0).strike()
            return torch.cat([first, session.step(hidden[:, 8:9]), session.step(hidden[:, 9:])], dim=1)

    assert torch.allclose(run(kill=True), run(kill=False), atol=1e-4)

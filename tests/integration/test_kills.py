"""Real daemons, real kills: whatever dies while a text is written, its tokens are those of the whole model.

Float32 on every hop, so equality is exact. After each text only peers that were really killed or stopped may
have been charged.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from ..processes import DaemonProcess, wait_until  # noqa: E402
from .fleet import (  # noqa: E402
    MOST_TOKENS,
    SPANS,
    Fleet,
    Liar,
    fleet_of,
    generate,
    generate_rows,
    peer_of,
    prompt_of,
    stop,
    wake,
)

pytestmark = pytest.mark.timeout(600)
PROMPT = prompt_of(9)
LONG_PROMPT = prompt_of(900)
SHARED_TOKENS = MOST_TOKENS // 4  # of each of several rows


def with_long(value: Any) -> Any:
    """A case that shows little beyond the others: of the long suite."""
    return pytest.param(value, marks=pytest.mark.long)


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with fleet_of(tmp_path_factory.mktemp("m") / "tiny", tmp_path_factory.mktemp("cache"), Liar) as fleet:
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
    before = len(fleet.charges())
    outcome = generate(fleet, PROMPT)
    assert outcome.tokens == fleet.expected(PROMPT)
    assert set(outcome.events) <= {"notice"}  # the first text of a daemon comes with the words on privacy
    assert not fleet.charged(before)


@pytest.mark.parametrize(
    "spans", [with_long((SPANS[0],)), (SPANS[1],), with_long((SPANS[2],)), SPANS[:2]], ids=str
)
def test_a_kill_amid_a_text_changes_no_token(fleet: Fleet, spans: tuple[tuple[int, int], ...]) -> None:
    before = len(fleet.charges())
    killer = Killer(fleet, spans, at=7)
    outcome = generate(fleet, PROMPT, killer, until="repaired")
    assert outcome.tokens == fleet.chosen(PROMPT, outcome.tokens)
    assert "repaired" in outcome.events
    assert fleet.charged(before) == killer.guilty


@pytest.mark.parametrize("span", [SPANS[0], with_long(SPANS[1]), with_long(SPANS[2])], ids=str)
def test_a_kill_during_prefill_changes_no_token(fleet: Fleet, span: tuple[int, int]) -> None:
    before = len(fleet.charges())
    hops = [hop for hop in fleet.serving[span] if isinstance(hop, Liar)]
    for hop in hops:
        hop.hold()

    def strike() -> str:
        wait_until(lambda: any(hop.holds() for hop in hops), "a part of the prompt to be held back")
        victim = next(hop for hop in hops if hop.holds())
        guilty = peer_of(victim)
        victim.kill()
        for hop in hops:
            hop.release()
        return guilty

    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(strike)
        outcome = generate(fleet, LONG_PROMPT, num_tokens=8)
        guilty = killed.result()
    assert outcome.tokens == fleet.expected(LONG_PROMPT, 8)
    assert "repaired" in outcome.events
    assert fleet.charged(before) == {guilty}


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

    outcome = generate(fleet, PROMPT, disturb, until="repaired")
    assert outcome.tokens == fleet.chosen(PROMPT, outcome.tokens)
    assert "waiting" in outcome.events
    assert "repaired" in outcome.events


def test_a_hop_that_hangs_is_replaced_and_harms_nobody_when_it_wakes(fleet: Fleet) -> None:
    before = len(fleet.charges())
    hung: list[DaemonProcess] = []
    peers: set[str] = set()

    def disturb(count: int) -> None:
        if count == 7:
            hung.append(fleet.in_use(SPANS[1]))
            peers.add(peer_of(hung[0]))
            stop(hung[0])

    def wake_up() -> None:
        wake(hung[0])
        hung[0].wait_ready()  # it answers again, amid the text

    outcome = generate(fleet, PROMPT, disturb, until="repaired", then=wake_up)
    assert outcome.tokens == fleet.chosen(PROMPT, outcome.tokens)
    assert "repaired" in outcome.events
    assert fleet.charged(before) == peers
    hung[0].kill()  # it would keep its session for a while


@pytest.mark.long  # the next one loses more
def test_all_replicas_lost_and_one_back_later(fleet: Fleet) -> None:
    before = len(fleet.charges())
    lost = {peer_of(daemon) for daemon in fleet.serving[SPANS[1]]}

    def disturb(count: int) -> None:
        if count == 7:
            for daemon in fleet.serving[SPANS[1]]:
                daemon.kill()
            fleet.serving[SPANS[1]] = []
            fleet.add(SPANS[1])  # takes seconds to load; the session waits for it

    outcome = generate(fleet, PROMPT, disturb, until="repaired")
    assert outcome.tokens == fleet.chosen(PROMPT, outcome.tokens)
    assert outcome.events[-1] == "repaired"
    assert fleet.charged(before) <= lost


def test_every_hop_lost_and_back_later(fleet: Fleet) -> None:
    before = len(fleet.charges())
    lost = {peer_of(daemon) for group in fleet.serving.values() for daemon in group}

    def disturb(count: int) -> None:
        if count == 7:
            for span in SPANS:
                for daemon in fleet.serving[span]:
                    daemon.kill()
                fleet.serving[span] = []
                fleet.add(span)

    outcome = generate(fleet, PROMPT, disturb, until="repaired")
    assert outcome.tokens == fleet.chosen(PROMPT, outcome.tokens)
    assert "waiting" in outcome.events
    assert outcome.events[-1] == "repaired"
    assert fleet.charged(before) <= lost


def test_a_killed_worker_of_a_hop_changes_no_token(fleet: Fleet) -> None:
    before = len(fleet.charges())
    hops: set[str] = set()

    def disturb(count: int) -> None:
        if count == 7:
            hop = fleet.in_use(SPANS[1])
            hops.add(peer_of(hop))
            (pid,) = hop.worker_pids()
            os.kill(pid, signal.SIGKILL)

    outcome = generate(fleet, PROMPT, disturb, until="repaired")
    assert outcome.tokens == fleet.chosen(PROMPT, outcome.tokens)
    assert "repaired" in outcome.events
    assert fleet.charged(before) <= hops
    wait_until(
        lambda: all(d.status().workers[0].state == "online" for d in fleet.serving[SPANS[1]]),
        "the worker is restarted",
    )


def test_a_worker_that_hangs_is_left_and_its_daemon_stays(fleet: Fleet) -> None:
    before = len(fleet.charges())
    hops: list[DaemonProcess] = []
    pids: list[int] = []

    def disturb(count: int) -> None:
        if count == 7:
            hops.append(fleet.in_use(SPANS[1]))
            pids.extend(hops[0].worker_pids())
            os.kill(pids[0], signal.SIGSTOP)

    try:
        outcome = generate(fleet, PROMPT, disturb, until="repaired")
    finally:
        os.kill(pids[0], signal.SIGCONT)
    assert outcome.tokens == fleet.chosen(PROMPT, outcome.tokens)
    assert "repaired" in outcome.events
    assert fleet.charged(before) == {peer_of(hops[0])}
    hops[0].kill()  # it would keep its session for a while


def test_several_rows_go_through_a_kill(fleet: Fleet) -> None:
    prompts = [PROMPT, prompt_of(3), prompt_of(21)]
    before = len(fleet.charges())
    killer = Killer(fleet, (SPANS[1],), at=20)
    rows, events = generate_rows(fleet.client, prompts, killer, SHARED_TOKENS, until="repaired")
    assert "repaired" in events
    assert rows == [fleet.chosen(prompt, row) for prompt, row in zip(prompts, rows, strict=True)]
    assert fleet.charged(before) == killer.guilty


def test_beams_go_through_a_kill(fleet: Fleet) -> None:
    from corolla.sdk.torch import DistributedModelForCausalLM

    before = len(fleet.charges())
    killer = Killer(fleet, (SPANS[0],), at=8)
    ids = torch.tensor([PROMPT])
    steps = 0

    def count_steps(scores_of: Any, scores: Any) -> Any:
        nonlocal steps
        steps += 1
        killer(steps)
        return scores

    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    with fleet.client.connect() as daemon:
        model = DistributedModelForCausalLM.from_pretrained(str(fleet.swarm.model), daemon=daemon)
        given = model.generate(ids, logits_processor=[count_steps], pad_token_id=0, **options)
        model.close()
    with torch.inference_mode():
        expected = fleet.whole.generate(ids, pad_token_id=0, **options)
    assert given.tolist() == expected.tolist()
    assert fleet.charged(before) == killer.guilty


def test_the_clients_own_worker_is_restarted_and_the_text_goes_on(fleet: Fleet) -> None:
    before = len(fleet.charges())

    def disturb(count: int) -> None:
        if count == 7:
            (pid,) = fleet.client.worker_pids()
            os.kill(pid, signal.SIGKILL)

    outcome = generate(fleet, PROMPT, disturb, until="restarting")
    assert outcome.tokens == fleet.chosen(PROMPT, outcome.tokens)
    assert "restarting" in outcome.events
    assert not fleet.charged(before)


def test_a_sampled_text_is_the_same_after_a_kill(fleet: Fleet) -> None:
    before = len(fleet.charges())
    killer = Killer(fleet, (SPANS[0],), at=7)
    sampling: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 11}
    outcome = generate(fleet, PROMPT, killer, until="repaired", **sampling)
    unharmed = generate(fleet, PROMPT, num_tokens=len(outcome.tokens), **sampling)
    assert outcome.tokens == unharmed.tokens
    assert "repaired" in outcome.events
    assert fleet.charged(before) == killer.guilty


@pytest.mark.parametrize("before_step", [0, 1], ids=["before the first token", "amid"])
def test_hidden_states_are_the_same_after_a_kill(fleet: Fleet, before_step: int) -> None:
    hidden = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(3))
    parts = [hidden[:, :8], hidden[:, 8:9], hidden[:, 9:]]
    killer = Killer(fleet, (SPANS[1],), at=0)

    def run(kill_before: int | None) -> Any:
        out = []
        with fleet.client.connect() as daemon, daemon.model("tiny").session(rows=2, max_length=32) as session:
            for number, part in enumerate(parts):
                if number == kill_before:
                    killer.strike()
                out.append(session.step(part))
        return torch.cat(out, dim=1)

    unharmed = run(None)
    before = len(fleet.charges())
    assert torch.allclose(run(before_step), unharmed, atol=1e-4)
    assert set(fleet.charges()[before:]) == killer.guilty

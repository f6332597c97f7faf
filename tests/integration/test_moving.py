"""Sessions leave hops that are given up in order: the tokens stay those of the whole model, nobody is charged.

Real daemons with a tiny model in float32. The longest pause between two tokens is printed beside that of an
undisturbed text; a busy machine fails nobody.
"""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable, Iterator

import pytest

torch = pytest.importorskip("torch")

from ..processes import DaemonProcess, wait_until  # noqa: E402
from .fleet import NUM_BLOCKS, SPANS, Fleet, Outcome, fleet_of, generate, prompt_of  # noqa: E402

pytestmark = pytest.mark.timeout(600)
PROMPT = prompt_of(9)
MIDDLE = SPANS[1]


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with fleet_of(tmp_path_factory.mktemp("m") / "tiny", tmp_path_factory.mktemp("cache")) as fleet:
        fleet.restock()
        yield fleet


@pytest.fixture
def fleet(standing: Fleet) -> Fleet:
    standing.restock()
    return standing


def timed(
    fleet: Fleet, disturb: Callable[[int], None] = lambda count: None, until: str = "repaired"
) -> tuple[Outcome, float]:
    """A text, and the longest pause between two of its tokens in seconds."""
    times: list[float] = []

    def note(count: int) -> None:
        times.append(time.perf_counter())
        disturb(count)

    outcome = generate(fleet, PROMPT, note, until=until)
    return outcome, max(later - sooner for sooner, later in itertools.pairwise(times))


def test_a_session_leaves_a_hop_that_drains_and_no_token_changes(
    fleet: Fleet, capsys: pytest.CaptureFixture[str]
) -> None:
    _, undisturbed_s = timed(fleet, until="")
    drained: list[DaemonProcess] = []

    def drain(count: int) -> None:
        if count == 20:
            drained.append(fleet.in_use(MIDDLE))
            with drained[0].connect() as daemon:
                daemon.drain()

    outcome, moved_s = timed(fleet, drain)
    assert outcome.tokens == fleet.chosen(PROMPT, outcome.tokens)
    assert "waiting" not in outcome.events
    assert outcome.events.count("repaired") == 1
    assert fleet.charged() == set()
    left = drained[0]
    wait_until(lambda: not any(w.sessions for w in left.status().workers), "the sessions to have left")
    with capsys.disabled():
        print(f"\nlongest gap between tokens: {moved_s:.3f} s moved, {undisturbed_s:.3f} s undisturbed")
    with left.connect() as daemon:
        daemon.resume()
    fleet.wait()


def test_a_daemon_that_is_told_to_end_lets_its_session_go_on_elsewhere(fleet: Fleet) -> None:
    ended: list[DaemonProcess] = []

    def end(count: int) -> None:
        if count == 20:
            ended.append(fleet.in_use(MIDDLE))
            ended[0].signal(signal.SIGTERM)

    outcome, _ = timed(fleet, end)
    assert outcome.tokens == fleet.chosen(PROMPT, outcome.tokens)
    assert "waiting" not in outcome.events
    assert fleet.charged() == set()
    assert ended[0].wait() == 0


def test_a_paused_daemon_keeps_no_worker_and_one_that_resumes_serves_again(fleet: Fleet) -> None:
    paused: list[DaemonProcess] = []

    def pause(count: int) -> None:
        if count == 20:
            paused.append(fleet.in_use(MIDDLE))
            with paused[0].connect() as daemon:
                daemon.pause()
                assert daemon.status().workers == ()

    outcome, _ = timed(fleet, pause)
    assert outcome.tokens == fleet.chosen(PROMPT, outcome.tokens)
    assert fleet.charged() == set()
    (daemon,) = paused
    with daemon.connect() as connection:
        connection.resume()
    daemon.wait_online()
    fleet.wait()


def test_a_span_that_is_moved_by_hand_serves_there_and_its_session_goes_on(fleet: Fleet) -> None:
    for daemon in fleet.serving[MIDDLE]:  # each judges by what it knows, also of those that have just ended
        fleet.swarm.wait_covered(daemon, [2] * NUM_BLOCKS)
    moved: list[DaemonProcess] = []

    def move(count: int) -> None:
        if count == 20:
            moved.append(fleet.in_use(MIDDLE))
            with moved[0].connect() as daemon:
                (told,) = daemon.rebalance(to=SPANS[2], dry_run=True)
                assert (told.moves, told.num_gaps, told.num_single) == (True, (0, 0), (0, 2))
                daemon.rebalance(to=SPANS[2])

    outcome, _ = timed(fleet, move)
    assert outcome.tokens == fleet.chosen(PROMPT, outcome.tokens)
    assert fleet.charged() == set()

    def spans() -> list[tuple[int, int]]:
        return [(w.start, w.end) for w in moved[0].status().workers if w.state == "online"]

    wait_until(lambda: spans() == [SPANS[2]], "the span to serve elsewhere")
    fleet.serving[MIDDLE].remove(moved[0])
    fleet.serving[SPANS[2]].append(moved[0])

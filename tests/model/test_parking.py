"""Who makes room: the decision, and sessions that share too few pages against lists of tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from corolla.model.parking import (
    EVICTION_PATIENCE_S,
    IDLE_S,
    PATIENCE_S,
    TURN_S,
    Expectation,
    Parked,
    Resident,
    View,
    make_room,
)
from corolla.model.pool import PAGE_TOKENS, Memory, PageMove
from corolla.model.sessions import Begun, Capacity, Sessions, undo
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.steps import NEW_ROW, Reply, Row
from corolla.protocol.tensors import Encoding
from corolla.protocol.work import Compute, OpenCache, Restore

NOW_S = 1000.0
ASKER = b"asker"

times = st.sampled_from((NOW_S, NOW_S - IDLE_S / 2, NOW_S - IDLE_S, NOW_S - TURN_S, NOW_S - 100))


@st.composite
def views(draw: st.DrawFn) -> View:
    names = iter([bytes([number]) for number in range(20)])
    residents = tuple(
        Resident(
            next(names),
            draw(st.integers(1, 6)),
            draw(times),
            draw(times),
            draw(st.booleans()),
            draw(st.booleans()),
        )
        for _ in range(draw(st.integers(0, 6)))
    )
    parked = tuple(
        Parked(next(names), draw(st.integers(1, 6)), draw(times), draw(st.booleans()))
        for _ in range(draw(st.integers(0, 4)))
    )
    return View(NOW_S, draw(st.integers(0, 6)), draw(st.integers(0, 10)), residents, parked)


waits = st.sampled_from((0.0, PATIENCE_S, EVICTION_PATIENCE_S))


@given(views(), st.integers(0, 20), waits)
@settings(max_examples=400, deadline=None)
def test_room_is_enough_possible_and_taken_from_nobody_in_vain(
    view: View, num_wanted: int, waited_s: float
) -> None:
    room = make_room(view, ASKER, num_wanted, waited_s)
    residents = {resident.session: resident for resident in view.residents}
    parked = {session.session: session for session in view.parked}
    if room is None:
        assert num_wanted > view.num_free
        return
    leaving = [residents[session] for session in (*room.evict, *room.park) if session in residents]
    missing = num_wanted - view.num_free
    assert sum(resident.num_pages for resident in leaving) >= missing
    for resident in leaving:
        assert not resident.is_amid
        assert sum(other.num_pages for other in leaving if other is not resident) < missing
    num_host = view.num_host_free + sum(parked[s].num_pages for s in room.evict if s in parked)
    assert sum(residents[session].num_pages for session in room.park) <= num_host
    assert not any(parked[session].has_work for session in room.evict if session in parked)
    assert len({*room.evict, *room.park}) == len(room.evict) + len(room.park)


@given(views(), st.integers(0, 20))
@settings(max_examples=200, deadline=None)
def test_the_busy_stay_until_somebody_has_waited_and_they_had_their_turn(view: View, num_wanted: int) -> None:
    residents = {resident.session: resident for resident in view.residents}
    for waited_s in (0.0, PATIENCE_S):
        room = make_room(view, ASKER, num_wanted, waited_s)
        for session in () if room is None else (*room.evict, *room.park):
            resident = residents.get(session)
            if resident is None:
                continue
            is_idle = not resident.has_work and NOW_S - resident.used_at >= IDLE_S
            had_turn = waited_s >= PATIENCE_S and NOW_S - resident.since >= TURN_S
            assert is_idle or (had_turn and session not in room.evict if room else False)


@given(views(), st.integers(0, 20))
@settings(max_examples=200, deadline=None)
def test_whoever_has_waited_long_enough_gets_what_all_the_others_have(view: View, num_wanted: int) -> None:
    residents = tuple(replace(r, is_amid=False, since=NOW_S - TURN_S) for r in view.residents)
    view = replace(view, residents=residents)
    total = view.num_free + sum(resident.num_pages for resident in residents)
    room = make_room(view, ASKER, num_wanted, EVICTION_PATIENCE_S)
    assert (room is not None) == (num_wanted <= total)


def test_the_most_idle_goes_first_and_into_host_memory_while_that_lasts() -> None:
    old, young = Resident(b"old", 4, 10.0, 0.0), Resident(b"young", 4, 20.0, 0.0)
    view = View(NOW_S, 0, 4, (young, old))
    assert make_room(view, ASKER, 3, 0.0) == ((), (b"old",))
    assert make_room(view, ASKER, 5, 0.0) == ((b"old",), (b"young",))
    older = replace(view, num_host_free=0, parked=(Parked(b"older", 5, 5.0),))
    assert make_room(older, ASKER, 3, 0.0) == ((b"older",), (b"old",))


def test_what_is_expected_follows_what_was_seen() -> None:
    expected = Expectation()
    assert expected.pages(64) == 16
    assert expected.pages(64, num_held=40) == 40
    for _ in range(200):
        expected = expected.after(1.0, 10.0)
    assert expected.pages(64) == 64
    assert expected.wait_s([4, 4], 4) == pytest.approx(5.0, rel=0.1)
    assert Expectation(share=0.0).pages(64) == 4
    assert expected.wait_s([], 4) == 0.0


class SessionsAgainstLists(RuleBasedStateMachine):
    """Every page is filled, moved and copied as the tables say, and every text read back."""

    NUM_PAGES, NUM_HOST_PAGES = 10, 6
    BEGIN_ALIKE = False  # the first two sessions, and the last two
    NAMES = (b"a", b"b", b"c", b"d")

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.next_token = self.num_steps = 0
        self.start()

    def start(self) -> None:
        """A worker without a past, and all sessions on it."""
        self.sessions = Sessions((0, 1), Capacity(self.NUM_PAGES, self.NUM_HOST_PAGES), self.carry)
        self.memories: dict[Memory, dict[int, dict[int, int]]] = {memory: {} for memory in Memory}
        self.device = self.memories[Memory.DEVICE]
        self.texts: dict[bytes, list[int]] = {}
        self.steps: dict[bytes, int] = {}
        self.waiting: dict[bytes, Compute] = {}
        for name in self.NAMES:
            self.open(name)

    def carry(self, moves: tuple[PageMove, ...]) -> None:
        for of, source, to, target in moves:
            self.memories[to][target] = dict(self.memories[of].get(source, {}))
            if of is not Memory.DEVICE:  # others may share what stays there
                del self.memories[of][source]

    def open(self, name: bytes) -> None:
        chain = name in self.NAMES[:2]
        names = tuple(bytes([chain, page]) * 8 for page in range(5 if self.BEGIN_ALIKE else 0))
        ask = OpenCache(0, name, 0, 1, Encoding.FLOAT32, 1, 8 * PAGE_TOKENS, prefix=names)
        known = sum(self.sessions.open(ask, self.now_s).pages.lengths)
        self.texts[name], self.steps[name] = [self.token(name, at) for at in range(known)], int(known > 0)
        self.waiting.pop(name, None)

    def token(self, name: bytes, at: int) -> int:
        """What is written at a place; never twice the same, unless sessions begin alike."""
        self.next_token += 1
        return 1000 * (name in self.NAMES[:2]) + at if self.BEGIN_ALIKE else self.next_token

    @rule(name=st.sampled_from(NAMES), num_pages=st.integers(0, 2), back=st.integers(0, 80))
    def step(self, name: bytes, num_pages: int, back: int) -> None:
        if name in self.waiting:
            return
        text = self.texts[name]
        position = max(0, len(text) - back)
        n = min(num_pages * PAGE_TOKENS + 7, 8 * PAGE_TOKENS - position)
        row = Row(0 if text else NEW_ROW, position, n)
        step = self.steps[name] + 1
        self.waiting[name] = Compute(0, name, step, step - 1, (row,), Reply.NONE)
        self.begin(name)

    @rule(seconds=st.sampled_from((0.1, IDLE_S, PATIENCE_S)))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        for name in tuple(self.waiting):
            self.begin(name)

    def begin(self, name: bytes) -> None:
        ask = self.waiting[name]
        try:
            begun = self.sessions.begin(ask, self.now_s, self.waiting.keys())
        except CorollaError as problem:
            if not problem.details.get("evicted"):
                raise
            del self.waiting[name]
            assert self.sessions.restore(Restore(0, name, ask.step_id - 1, (5,))) == (0,)
            self.texts[name] = []
            return
        if begun is None:
            return
        del self.waiting[name]
        self.write(begun, self.texts[name])

    def write(self, begun: Begun, text: list[int]) -> None:
        ask = begun.ask
        (row,), (segment,) = ask.rows, begun.applied.segments
        for source, target in begun.applied.copies:
            self.device[target] = dict(self.device.get(source, {}))
        read = [self.device[segment.pages[at // PAGE_TOKENS]][at % PAGE_TOKENS] for at in range(row.position)]
        assert read == text[: row.position]
        self.num_steps += 1
        if self.num_steps % 5 == 4:  # some fail
            undo(begun)
            held = begun.session.pages.lengths  # less, if the step had begun to write further back
            del text[held[0] if held else 0 :]
            return
        del text[row.position :]
        for at in range(row.position, row.position + row.n):
            text.append(self.token(ask.session, at))
            self.device.setdefault(segment.pages[at // PAGE_TOKENS], {})[at % PAGE_TOKENS] = text[at]
        self.steps[ask.session] = ask.step_id
        self.sessions.end(begun, self.now_s)

    @rule(name=st.sampled_from(NAMES))
    def reopen(self, name: bytes) -> None:
        try:
            self.open(name)
        except CorollaError as problem:
            if problem.code is not Code.BUSY:
                raise
            self.start()  # by what it has seen, all four may never fit again

    @invariant()
    def every_page_is_free_or_held(self) -> None:
        sessions = [self.sessions.get(name) for name in self.NAMES]
        on_device = sum(s.pages.num_pages for s in sessions if s.place is Memory.DEVICE)
        in_host = sum(s.pages.num_pages for s in sessions if s.place is Memory.HOST)
        num_used = self.NUM_PAGES - self.sessions.free_tokens // PAGE_TOKENS
        assert self.BEGIN_ALIKE or num_used == on_device
        assert in_host <= self.NUM_HOST_PAGES
        # Who made room for those that make room for it waits there, if they shared pages with others who stay.
        between = [s for s in sessions if s.place is Memory.BETWEEN]
        assert all(s.id in self.waiting for s in between)
        assert len(self.memories[Memory.BETWEEN]) == sum(s.pages.num_pages for s in between)

    def teardown(self) -> None:
        """Whoever waits now gets its turn, in the order in which they came."""
        for _ in range(100):
            self.time_passes(PATIENCE_S)
        assert not self.waiting


TestSessionsAgainstLists = SessionsAgainstLists.TestCase
TestSessionsAgainstLists.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


class SessionsThatBeginAlike(SessionsAgainstLists):
    """The same, while pages are shared by sessions, kept for later ones, and given back."""

    BEGIN_ALIKE = True


TestSessionsThatBeginAlike = SessionsThatBeginAlike.TestCase
TestSessionsThatBeginAlike.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)

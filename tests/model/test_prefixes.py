"""Pages of prefixes: kept by name, shared by reference, written by nobody, given back before anybody suffers."""

from __future__ import annotations

from corolla.model.parking import IDLE_S
from corolla.model.pool import PAGE_TOKENS, PagePool
from corolla.model.prefixes import Prefixes
from corolla.model.sessions import Capacity, Sessions
from corolla.protocol.steps import NEW_ROW, PREFIX_STEP, Chain, Row
from corolla.protocol.tensors import Encoding
from corolla.protocol.work import CloseCache, Compute, Done, NamePages, OpenCache, Restored

from .test_engine import NUM_PAGES, A, B, C, Desk

NAMES = tuple(bytes([number]) * 16 for number in range(6))
LENGTH = 4 * PAGE_TOKENS


def begin(
    desk: Desk, session: bytes, names: tuple[bytes, ...] = NAMES, tokens: int = LENGTH, rows: int = 1
) -> int:
    """Open a session with a prefix; the tokens that it begins with."""
    ask = OpenCache(1, session, 2, 6, Encoding.FLOAT32, rows, tokens, prefix=names)
    desk.engine.handle(ask)
    answer = desk.answers.pop()
    assert isinstance(answer, Done), answer
    return answer.held


def prompt(desk: Desk, session: bytes, first: int = 0, num: int = 150, value: float = 1.0) -> list[float]:
    """Write positions [first, num) of a row; the sums behind each of them."""
    row = (0, first, num - first) if first else (NEW_ROW, 0, num)
    return desk.step(2 if first else 1, [row], [value] * (num - first), session=session)


def num_computed(desk: Desk) -> int:
    return sum(num_tokens for _, num_tokens in desk.blocks.passes)


def test_a_second_session_with_the_same_prefix_computes_only_the_rest() -> None:
    desk = Desk()
    assert begin(desk, A) == 0
    whole = prompt(desk, A)
    before = num_computed(desk)
    assert begin(desk, B) == 128
    assert desk.restore(PREFIX_STEP, (128,), session=B).held == (128,)  # type: ignore[attr-defined]
    assert prompt(desk, B, first=128) == whole[128:]
    assert num_computed(desk) - before == 150 - 128
    assert desk.step(2, [(0, 150, 1)], [1]) == [151]


def test_the_prefix_outlives_the_session_that_computed_it() -> None:
    desk = Desk()
    begin(desk, A)
    prompt(desk, A)
    desk.engine.handle(CloseCache(A))
    assert begin(desk, B) == 128
    assert prompt(desk, B, first=128)[-1] == 150


def test_what_a_route_shares_less_of_is_cut() -> None:
    desk = Desk()
    begin(desk, A)
    prompt(desk, A)
    assert begin(desk, B) == 128
    assert desk.restore(PREFIX_STEP, (64,), session=B) == Restored(2, (64,))
    assert desk.step(2, [(0, 64, 86)], [1] * 86, session=B)[-1] == 150
    assert begin(desk, C) == 128
    assert desk.restore(0, (), session=C).held == ()  # type: ignore[attr-defined]
    assert desk.step(1, [(NEW_ROW, 0, 2)], [5, 5], session=C) == [5, 10]


def test_another_name_anywhere_ends_the_prefix_there() -> None:
    desk = Desk()
    begin(desk, A)
    prompt(desk, A)
    other = bytes([99]) * 16
    assert begin(desk, B, (other, *NAMES[1:])) == 0
    assert begin(desk, B, (NAMES[0], other)) == 64
    assert begin(desk, B, NAMES[:1]) == 64
    assert begin(desk, B, tokens=100) == 64
    assert begin(desk, B, rows=2) == 0


def test_a_row_set_back_into_a_shared_page_writes_into_a_copy() -> None:
    desk = Desk()
    begin(desk, A)
    prompt(desk, A)
    begin(desk, B)
    assert desk.step(2, [(0, 100, 1)], [1000], session=B) == [1100]
    assert desk.step(2, [(0, 90, 1)], [500]) == [590]  # neither may who computed it
    assert begin(desk, C) == 128
    assert prompt(desk, C, first=128)[-1] == 150


def test_pages_that_only_the_prefix_holds_are_given_back_before_any_session_has_to_move() -> None:
    desk = Desk(num_host_pages=NUM_PAGES)
    desk.engine.handle(CloseCache(A))
    begin(desk, A)
    prompt(desk, A, num=256)
    desk.engine.handle(CloseCache(A))
    assert desk.engine.beat().free_tokens == (NUM_PAGES - 4) * PAGE_TOKENS
    desk.open(B, tokens=16 * PAGE_TOKENS)
    desk.step(1, [(NEW_ROW, 0, 14 * PAGE_TOKENS)], [1] * 14 * PAGE_TOKENS, session=B)
    assert desk.blocks.num_moved == 0
    assert begin(desk, A) == 128  # the later pages of a prefix went first


def test_a_session_that_began_from_a_prefix_is_parked_and_comes_back() -> None:
    desk = Desk(num_host_pages=2 * NUM_PAGES)
    begin(desk, A)
    prompt(desk, A)
    begin(desk, B)
    prompt(desk, B, first=128)
    desk.now_s += IDLE_S
    desk.open(C, tokens=16 * PAGE_TOKENS)
    full = NUM_PAGES * PAGE_TOKENS
    desk.step(1, [(NEW_ROW, 0, full)], [1] * full, session=C)
    assert begin(desk, b"e" * 16) == 0  # nothing is left of it
    desk.now_s += IDLE_S
    assert desk.step(3, [(0, 150, 1)], [1], session=B) == [151]
    assert desk.step(2, [(0, 150, 1)], [1]) == [151]


def test_where_positions_are_turned_by_the_length_only_sessions_of_the_same_length_share() -> None:
    sessions = Sessions((0, 1), Capacity(16, depends_on_length=True))

    def opened(session: bytes, length: int) -> tuple[int, ...]:
        ask = OpenCache(1, session, 0, 1, Encoding.FLOAT32, 1, length, prefix=NAMES)
        return sessions.open(ask, 0.0).pages.lengths

    opened(A, 256)
    begun = sessions.begin(Compute(2, A, 1, 0, (Row(NEW_ROW, 0, 70),)), 0.0)
    assert begun is not None
    sessions.end(begun, 0.0)
    assert opened(B, 300) == ()
    assert opened(C, 256) == (64,)


def test_used_longest_ago_goes_first_and_the_end_of_a_chain_before_its_beginning() -> None:
    pool = PagePool(8, 4)
    prefixes = Prefixes(pool)
    for chain in (NAMES[:2], NAMES[3:5]):
        pages = {name: pool.take(1) for name in chain}
        prefixes.keep(chain, pages)
        for held in pages.values():
            pool.release(held)
    assert pool.num_free == 4
    assert len(prefixes.longest(NAMES, most=9)[0]) == 2
    prefixes.give_back(2)
    assert [name in prefixes for name in (*NAMES[:2], *NAMES[3:5])] == [True, True, False, False]
    prefixes.give_back(1)
    assert [name in prefixes for name in NAMES[:2]] == [True, False]
    assert pool.num_free == 7
    prefixes.give_back(100)
    assert len(prefixes) == 0
    assert pool.num_free == 8


def test_several_rows_begin_each_with_its_own_prefix() -> None:
    desk = Desk()
    begin(desk, A, NAMES[:2])
    prompt(desk, A)

    def both(session: bytes) -> tuple[int, ...]:
        ask = OpenCache(1, session, 2, 6, Encoding.FLOAT32, 2, LENGTH, prefix=NAMES[:3], prefix_rows=(2, 1))
        desk.engine.handle(ask)
        answer = desk.answers.pop()
        assert isinstance(answer, Done), answer
        return answer.rows

    assert both(B) == (128, 0)
    steps = [(0, 128, 1), (1, 0, 70)]
    assert desk.step(2, steps, [1] + [3] * 70, session=B)[::70] == [129, 210]
    assert both(C) == (128, 64)
    assert desk.step(2, [(0, 100, 1), (1, 64, 1)], [1, 1], session=C) == [101, 193]


def test_rows_are_kept_by_the_names_that_they_get_in_the_end() -> None:
    desk = Desk()
    begin(desk, A, names=(), rows=2)
    desk.step(1, [(NEW_ROW, 0, 130), (NEW_ROW, 0, 70)], [1] * 130 + [2] * 70)
    chains = (Chain(NAMES[:2]), Chain(NAMES[3:5]))
    desk.engine.handle(NamePages(A, 9, chains))  # not the step that they stand after
    assert begin(desk, B) == 0
    desk.engine.handle(NamePages(A, 1, chains))
    desk.engine.handle(NamePages(C, 1, chains))  # a session that is not open
    assert begin(desk, B) == 128
    assert desk.step(2, [(0, 128, 1)], [1], session=B) == [129]
    assert begin(desk, C, NAMES[3:]) == 64
    assert desk.step(2, [(0, 64, 1)], [1], session=C) == [129]
    assert desk.step(2, [(0, 130, 1), (1, 60, 1)], [1, 2]) == [131, 122]  # beside what others share


def test_sums_tell_a_wrong_page() -> None:
    """The check of the checks: a prefix that is not what it is named shows."""
    desk = Desk()
    begin(desk, A)
    prompt(desk, A, value=2.0)
    assert begin(desk, B) == 128
    assert prompt(desk, B, first=128)[-1] != 150

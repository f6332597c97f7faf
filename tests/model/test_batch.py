"""The scheduler: what runs next, in which company, in parts of which size."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from corolla.model.batch import Job, Pass, Policy, Scheduler

POLICY = Policy(decode_tokens=8, prefill_tokens=32, mixed_tokens=8, patience=3)
BLOCKS = (0, 4)


def decode(request: int, session: str, num_rows: int = 1, blocks: tuple[int, int] = BLOCKS) -> Job:
    return Job(request, session.encode(), blocks, num_rows, is_decode=True)


def prefill(request: int, session: str, num_tokens: int, blocks: tuple[int, int] = BLOCKS) -> Job:
    return Job(request, session.encode(), blocks, num_tokens, is_decode=False)


def scheduler(*jobs: Job) -> Scheduler:
    queue = Scheduler(POLICY)
    for job in jobs:
        queue.add(job)
    return queue


def shape(chosen: Pass | None) -> list[tuple[int, int, int]]:
    """(request, first, num) of each part."""
    assert chosen is not None
    return [(part.job.request, part.first, part.num) for part in chosen.parts]


def test_nothing_runs_when_nothing_waits() -> None:
    assert scheduler().next() is None


def test_decodes_of_different_sessions_run_in_one_pass() -> None:
    queue = scheduler(decode(1, "a"), decode(2, "b"), decode(3, "c"))
    assert shape(queue.next()) == [(1, 0, 1), (2, 0, 1), (3, 0, 1)]
    assert queue.next() is None


def test_steps_of_one_session_run_one_after_the_other() -> None:
    queue = scheduler(decode(1, "a"), decode(2, "a"), decode(3, "b"))
    assert shape(queue.next()) == [(1, 0, 1), (3, 0, 1)]
    assert shape(queue.next()) == [(2, 0, 1)]


def test_a_long_prefill_runs_in_parts() -> None:
    queue = scheduler(prefill(1, "a", 70))
    assert [shape(queue.next()) for _ in range(3)] == [[(1, 0, 32)], [(1, 32, 32)], [(1, 64, 6)]]
    assert queue.next() is None


def test_a_prefill_stays_small_while_the_next_decode_of_another_session_is_expected() -> None:
    queue = scheduler(decode(1, "a"), prefill(2, "b", 200))
    assert shape(queue.next()) == [(1, 0, 1), (2, 0, 8)]
    sizes = [shape(queue.next())[0][2] for _ in range(POLICY.memory + 2)]
    assert sizes == [8] * POLICY.memory + [32] * 2


def test_nothing_is_expected_of_a_session_that_is_gone_or_prefills_itself() -> None:
    queue = scheduler(decode(1, "a"), prefill(2, "a", 200), prefill(3, "b", 20))
    assert shape(queue.next()) == [(1, 0, 1), (3, 0, 8)]
    assert shape(queue.next()) == [(2, 0, 32)]
    queue = scheduler(decode(1, "a"), prefill(2, "b", 200))
    queue.next()
    queue.drop(b"a")
    assert shape(queue.next()) == [(2, 8, 32)]


def test_prefills_beside_decodes_are_as_long_as_the_device_is_fast() -> None:
    assert Policy.of(25.0, 500.0).mixed_tokens == 20
    assert Policy.of(100.0, 300.0).mixed_tokens == 8
    assert Policy.of(50.0, 1e6).mixed_tokens == Policy().mixed_tokens
    assert Policy.of(0.0, 0.0) == Policy()


def test_the_last_part_of_a_job_knows_that_it_is() -> None:
    queue = scheduler(prefill(1, "a", 40))
    passes = [queue.next(), queue.next()]
    assert [[part.is_last for part in chosen.parts] for chosen in passes if chosen] == [[False], [True]]


def test_decodes_go_first_and_a_prefill_beside_them_in_small_parts() -> None:
    queue = scheduler(prefill(1, "a", 20), decode(2, "b"))
    assert shape(queue.next()) == [(2, 0, 1), (1, 0, 8)]
    queue.add(decode(3, "b"))
    assert shape(queue.next()) == [(3, 0, 1), (1, 8, 8)]
    assert shape(queue.next()) == [(1, 16, 4)]


def test_prefills_share_a_pass_in_the_order_in_which_they_came() -> None:
    queue = scheduler(prefill(1, "a", 20), prefill(2, "b", 20))
    assert shape(queue.next()) == [(1, 0, 20), (2, 0, 12)]
    assert shape(queue.next()) == [(2, 12, 8)]


def test_decodes_of_many_rows_are_cut_to_the_budget_too() -> None:
    queue = scheduler(decode(1, "a", 6), decode(2, "b", 6))
    assert shape(queue.next()) == [(1, 0, 6), (2, 0, 2)]
    assert shape(queue.next()) == [(2, 2, 4)]


def test_a_step_without_tokens_runs_and_is_over() -> None:
    queue = scheduler(decode(1, "a", 0))
    assert shape(queue.next()) == [(1, 0, 0)]
    assert queue.num_waiting == 0


def test_sessions_on_other_blocks_run_in_a_pass_of_their_own() -> None:
    queue = scheduler(decode(1, "a"), decode(2, "b", blocks=(0, 2)), decode(3, "c"))
    assert shape(queue.next()) == [(1, 0, 1), (3, 0, 1)]
    chosen = queue.next()
    assert chosen is not None
    assert (chosen.blocks, shape(chosen)) == ((0, 2), [(2, 0, 1)])


def test_a_prefill_on_other_blocks_gets_its_turn_in_a_stream_of_decodes() -> None:
    queue = scheduler(prefill(0, "slow", 64, blocks=(0, 2)))
    turns = []
    for request in range(1, 12):
        queue.add(decode(request, "fast"))
        turns.append(shape(queue.next())[0][0])
    # Passed over three times, then it leads a pass; the decode that it kept waiting runs in the next.
    assert turns == [1, 2, 3, 0, 4, 5, 6, 0, 7, 8, 9]


def test_a_dropped_session_leaves_nothing_behind() -> None:
    queue = scheduler(prefill(1, "a", 64), decode(2, "a"), decode(3, "b"))
    queue.next()
    assert [job.request for job in queue.drop(b"a")] == [1, 2]
    assert queue.drop(b"a") == ()
    assert queue.next() is None


def test_a_cancelled_job_is_not_continued_but_its_session_is() -> None:
    first = prefill(1, "a", 64)
    queue = scheduler(first, decode(2, "a"))
    queue.next()
    queue.cancel(first)
    queue.cancel(first)
    assert shape(queue.next()) == [(2, 0, 1)]


JOBS = st.lists(
    st.tuples(
        st.integers(0, 4), st.integers(0, 100), st.booleans(), st.sampled_from([(0, 4), (0, 2), (2, 4)])
    ),
    max_size=20,
)


@settings(max_examples=200, deadline=None)
@given(JOBS, st.integers(0, 3))
def test_every_token_runs_once_in_order_within_the_budgets(
    drawn: list[tuple[int, int, bool, tuple[int, int]]], late: int
) -> None:
    blocks_of = {session: blocks for session, _, _, blocks in reversed(drawn)}  # a session keeps its blocks
    jobs = [
        Job(request, bytes([session]), blocks_of[session], min(num, 9) if is_decode else num, is_decode)
        for request, (session, num, is_decode, _) in enumerate(drawn)
    ]
    queue = scheduler(*jobs[late:])
    for job in jobs[:late]:
        queue.add(job)
    done: dict[int, int] = {}
    finished: list[Job] = []
    while (chosen := queue.next()) is not None:
        assert chosen.parts
        assert len({part.job.session for part in chosen.parts}) == len(chosen.parts)
        assert sum(part.num for part in chosen.parts if part.job.is_decode) <= POLICY.decode_tokens
        assert sum(part.num for part in chosen.parts if not part.job.is_decode) <= POLICY.prefill_tokens
        for part in chosen.parts:
            assert part.job.blocks == chosen.blocks
            assert part.first == done.get(part.job.request, 0)
            done[part.job.request] = part.first + part.num
            if part.is_last:
                finished.append(part.job)
    assert sorted(job.request for job in finished) == sorted(job.request for job in jobs)
    for session in {job.session for job in jobs}:
        order = [job.request for job in (*jobs[late:], *jobs[:late]) if job.session == session]
        assert [job.request for job in finished if job.session == session] == order

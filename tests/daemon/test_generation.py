"""Text from a swarm in memory: the whole model's tokens, whatever dies on the way."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from corolla.daemon.generation import MAX_RESTARTS, Generation
from corolla.daemon.serving.twin import not_finite
from corolla.daemon.training.parts import Adapter
from corolla.protocol.control import Generate, Generated, Piece
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.work import ChatMessage, Sampling, TokenRow

from .members import FACTS, NUM_BLOCKS, TOKEN_BYTES, EndsTwin, Meadow, Member, meadow, whole_text

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Time passes as soon as everybody waits for it."""
    return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}


class User:
    """Someone who generates. after: called with the number of tokens that came, after each."""

    def __init__(self, swarm: Meadow, client: Member) -> None:
        self.swarm = swarm
        self.client = client
        self.ends = EndsTwin()
        self.pieces: list[Piece] = []
        self.secret = b"a user's"
        self.adapter = Adapter()
        self.after: Callable[[int], None] = lambda count: None

    async def generate(self, *prompts: str, **options: Any) -> Generated:
        options = {"max_new_tokens": 6, "model": "twin", **options}
        generation = Generation(
            self.client.belonging,
            self.ends,
            Generate(prompts=prompts, **options),
            self._take,
            self.pieces.append,
            self.adapter,
            replacement_wait_s=20.0,
            secret=self.secret,
        )
        return await generation.run()

    async def refused(self, *prompts: str, **options: Any) -> CorollaError:
        with pytest.raises(CorollaError) as caught:
            await self.generate(*prompts, **options)
        return caught.value

    async def _take(self, piece: Piece) -> None:
        await trio.lowlevel.checkpoint()
        self.pieces.append(piece)
        self.after(len(self.tokens()))

    def tokens(self, row: int = 0) -> tuple[int, ...]:
        return tuple(piece.token for piece in self.pieces if piece.event is None and piece.row == row)

    def events(self) -> list[str | None]:
        return [piece.event for piece in self.pieces if piece.event is not None]

    def at(self, count: int, act: Callable[[], None]) -> None:
        """Do something once, after so many tokens."""
        self.after = lambda num_tokens: act() if num_tokens == count else None

    async def released(self) -> None:
        """Everything is free again, once grace has ended."""
        await trio.sleep(300.0)
        assert self.ends.worker.statistics().num_generations == 0
        assert self.ends.worker.statistics().num_pending == 0
        for member in self.swarm.members:
            assert member.belonging.hops.statistics().num_sessions == 0
            if member.worker is not None:
                assert member.worker.statistics().num_caches == 0


@asynccontextmanager
async def user(*spans: tuple[int, int]) -> AsyncIterator[User]:
    """A user in a swarm whose members serve these spans; at the end everything has to be released."""
    async with meadow() as swarm:
        client = await swarm.client()
        someone = User(swarm, client)
        swarm.nursery.start_soon(someone.ends.worker.run)
        for start, end in spans:
            await swarm.serve(start, end)
        yield someone
        await someone.released()


async def test_the_tokens_are_the_whole_models_and_come_one_by_one() -> None:
    async with user((0, 2), (2, NUM_BLOCKS)) as someone:
        answer = await someone.generate("hello")
        assert answer.tokens == (TokenRow(whole_text(b"hello", 6)),)
        assert someone.tokens() == whole_text(b"hello", 6)
        assert [piece.finish for piece in someone.pieces] == [None] * 5 + ["length"]
        assert answer.texts == ("".join(piece.text for piece in someone.pieces),)
        assert answer.num_prompt_tokens == 5
        assert answer.num_repairs == 0


async def test_a_chat_and_given_tokens_are_prompts_too() -> None:
    async with user((0, NUM_BLOCKS)) as someone:
        spoken = await someone.generate(messages=(ChatMessage("user", "hello"),))
        given = await someone.generate(tokens=(TokenRow(tuple(b"hello")),))
        assert spoken.tokens == given.tokens == (TokenRow(whole_text(b"hello", 6)),)


async def test_rows_end_on_their_own_and_the_others_go_on() -> None:
    prompts = (b"one", b"three", b"fourteen")
    whole = [whole_text(prompt, 6) for prompt in prompts]
    async with user((0, 1), (1, NUM_BLOCKS)) as someone:
        stop = Sampling(stop_token_ids=(whole[0][1], whole[2][3]))
        answer = await someone.generate(*(prompt.decode() for prompt in prompts), sampling=stop)
    assert answer.tokens == (TokenRow(whole[0][:2]), TokenRow(whole[1]), TokenRow(whole[2][:4]))
    ends = {piece.row: piece.finish for piece in someone.pieces if piece.finish is not None}
    assert ends == {0: "stop", 1: "length", 2: "stop"}


async def test_a_seed_decides_what_is_drawn() -> None:
    async with user((0, NUM_BLOCKS)) as someone:

        async def drawn(seed: int) -> tuple[TokenRow, ...]:
            return (await someone.generate("dice", sampling=Sampling(temperature=1.0, seed=seed))).tokens

        assert await drawn(1) == await drawn(1) != await drawn(2)


# what dies on the way


async def test_a_lost_hop_is_repaired_and_told_and_no_token_differs() -> None:
    async with user((0, 2), (2, NUM_BLOCKS), (2, NUM_BLOCKS)) as someone:

        def kill() -> None:
            used = [m for m in someone.swarm.members[2:] if m.belonging.hops.statistics().num_sessions]
            someone.swarm.kill(used[0])

        someone.at(3, kill)
        answer = await someone.generate("hello", max_new_tokens=8)
        assert someone.tokens() == whole_text(b"hello", 8)
        assert answer.num_repairs == 1
        assert "repairing" in someone.events()
        assert "repaired" in someone.events()
        assert all(isinstance(p.detail["text"], str) for p in someone.pieces if p.event is not None)


async def test_a_session_that_had_to_make_room_is_replayed_and_charges_nobody() -> None:
    async with user((0, 2), (2, NUM_BLOCKS)) as someone:
        first, second = (member.worker for member in someone.swarm.members[1:])
        assert first is not None
        assert second is not None
        someone.after = lambda count: {3: first.evict, 5: second.evict}.get(count, lambda: None)()
        answer = await someone.generate("hello", max_new_tokens=8)
        assert someone.tokens() == whole_text(b"hello", 8)
        assert answer.num_repairs == 2
        assert not someone.client.belonging.ledger.charged(trio.current_time())


async def test_nobody_left_ends_it_with_what_was_generated() -> None:
    async with user((0, NUM_BLOCKS)) as someone:
        someone.at(3, lambda: someone.swarm.kill(someone.swarm.members[1]))
        problem = await someone.refused("hello")
        assert problem.code in (Code.SESSION_LOST, Code.BLOCKS_UNSERVED, Code.NO_PEERS)
        assert problem.details["tokens"] == [list(whole_text(b"hello", 3))]
        assert problem.details["texts"] == ["".join(f"{token} " for token in whole_text(b"hello", 3))]
        assert "waiting" in someone.events()


@pytest.mark.parametrize("at", [1, 4, 7])
async def test_the_ends_worker_may_die_between_tokens(at: int) -> None:
    async with user((0, 2), (2, NUM_BLOCKS)) as someone:
        someone.at(at, lambda: someone.ends.worker.crash())
        answer = await someone.generate("hello", "you", max_new_tokens=8)
        assert answer.tokens == tuple(TokenRow(whole_text(prompt, 8)) for prompt in (b"hello", b"you"))
        assert (someone.tokens(0), someone.tokens(1)) == tuple(row.ids for row in answer.tokens)
        assert someone.events() == ["restarting"]
        assert answer.num_repairs == 0


async def test_the_ends_worker_may_die_while_it_begins() -> None:
    async with user((0, NUM_BLOCKS)) as someone:
        begin = someone.ends.ends_of

        async def dies_once(facts: Any) -> Any:
            worker = await begin(facts)
            if someone.ends.num_asked == 1:
                worker.hang()
                someone.swarm.nursery.start_soon(crash_soon)
            return worker

        async def crash_soon() -> None:
            await trio.sleep(1.0)
            someone.ends.worker.crash()

        someone.ends.ends_of = dies_once  # type: ignore[method-assign]
        assert (await someone.generate("hello")).tokens == (TokenRow(whole_text(b"hello", 6)),)
        assert someone.events() == ["restarting"]


async def test_an_ends_worker_that_always_dies_is_given_up() -> None:
    async with user((0, NUM_BLOCKS)) as someone:
        someone.after = lambda count: someone.ends.worker.crash()
        problem = await someone.refused("hello", max_new_tokens=50)
        assert problem.code is Code.WORKER_LOST
        assert problem.details["tokens"] == [list(whole_text(b"hello", MAX_RESTARTS + 1))]
        assert someone.events() == ["restarting"] * MAX_RESTARTS


async def test_an_answer_that_is_no_number_is_computed_elsewhere() -> None:
    async with user((0, NUM_BLOCKS), (0, NUM_BLOCKS)) as someone:

        def spoil() -> None:
            for member in someone.swarm.members[1:]:
                if member.worker is not None and member.belonging.hops.statistics().num_sessions:
                    member.worker.spoil = lambda output: not_finite(TOKEN_BYTES)

        someone.at(2, spoil)
        await someone.generate("hello")
        assert someone.tokens() == whole_text(b"hello", 6)


async def test_leaving_the_swarm_ends_it_with_what_was_generated() -> None:
    async with user((0, NUM_BLOCKS)) as someone:
        someone.at(2, lambda: someone.client.belonging.over.set())
        problem = await someone.refused("hello")
        assert problem.code is Code.SESSION_LOST
        assert "left swarm meadow" in problem.message
        assert problem.details["tokens"] == [list(whole_text(b"hello", 2))]


async def test_a_user_who_goes_leaves_nothing_behind() -> None:
    async with user((0, NUM_BLOCKS)) as someone:
        with trio.CancelScope() as scope:
            someone.at(2, scope.cancel)
            await someone.generate("hello", max_new_tokens=500)
        assert scope.cancelled_caught
        assert len(someone.tokens()) == 2


# going on after a restart of the daemon


async def test_a_resumed_text_goes_on_where_it_was() -> None:
    whole = [whole_text(prompt, 6) for prompt in (b"hello", b"you")]
    async with user((0, NUM_BLOCKS)) as someone:
        answer = await someone.generate("hello", "you", generated=(TokenRow(whole[0][:2]), TokenRow(())))
        assert (someone.tokens(0), someone.tokens(1)) == (whole[0][2:], whole[1])
        assert answer.tokens == tuple(map(TokenRow, whole))
        assert answer.num_prompt_tokens == 8


async def test_rows_that_were_complete_stay_so_when_resumed() -> None:
    whole = [whole_text(prompt, 6) for prompt in (b"hello", b"you")]
    async with user((0, NUM_BLOCKS)) as someone:
        given = (TokenRow(whole[0]), TokenRow(whole[1][:5]))
        answer = await someone.generate("hello", "you", generated=given)
        assert (someone.tokens(0), someone.tokens(1)) == ((), whole[1][5:])
        assert answer.tokens == tuple(map(TokenRow, whole))
        done = await someone.generate("hello", "you", generated=tuple(map(TokenRow, whole)))
        assert done.tokens == answer.tokens


# bad requests


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        ({"model": "rose"}, Code.UNKNOWN_MODEL, "rose"),
        ({"max_new_tokens": 0}, Code.BAD_REQUEST, "max_new_tokens 0"),
        ({"max_length": 5}, Code.TOO_LONG, "5 tokens"),
        ({"max_length": FACTS.max_position + 9, "max_new_tokens": FACTS.max_position}, Code.TOO_LONG, "twin"),
        ({"generated": (TokenRow((1,)), TokenRow((1,)))}, Code.BAD_REQUEST, "2 rows"),
    ],
)
async def test_a_bad_request_is_refused_by_name(options: dict[str, Any], code: Code, named: str) -> None:
    async with user((0, NUM_BLOCKS)) as someone:
        problem = await someone.refused("hello", **options)
        assert problem.code is code
        assert named in problem.message


async def test_max_length_bounds_prompt_and_text_together() -> None:
    async with user((0, NUM_BLOCKS)) as someone:
        answer = await someone.generate("hello", max_length=8)
        assert answer.tokens == (TokenRow(whole_text(b"hello", 3)),)


async def test_blocks_that_nobody_serves_are_named() -> None:
    async with user((0, 2)) as someone:
        problem = await someone.refused("hello")
        assert problem.code is Code.BLOCKS_UNSERVED
        assert "2:4" in problem.message


async def test_waiting_helps_when_somebody_comes() -> None:
    async with user() as someone:

        async def come() -> None:
            await trio.sleep(5.0)
            await someone.swarm.serve(0, 2)
            await trio.sleep(5.0)
            await someone.swarm.serve(2, NUM_BLOCKS)

        someone.swarm.nursery.start_soon(come)
        answer = await someone.generate("hello", wait_s=60.0)
        assert answer.tokens == (TokenRow(whole_text(b"hello", 6)),)

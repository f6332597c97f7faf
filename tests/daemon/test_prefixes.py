"""Texts that begin alike: what the swarm knows already is not computed again, and nobody but the user gains by it."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import pytest
import trio.testing

from corolla.daemon.training.parts import Adapter
from corolla.protocol.work import Sampling, TokenRow

from .members import NUM_BLOCKS, whole_text
from .test_generation import User, user

pytestmark = pytest.mark.anyio
PREFIX = "Once upon a time there was a corolla of seven petals. " * 4  # 216 tokens: three pages, and some
KNOWN = 192
FIRST, SECOND = PREFIX + "It grew", PREFIX + "They met at dawn"


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Time passes as soon as everybody waits for it."""
    return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}


def computed(someone: User) -> int:
    """Tokens times blocks that all members computed so far."""
    return sum(member.belonging.hops.statistics().block_tokens for member in someone.swarm.members)


async def text_of(someone: User, prompt: str, known: int, **options: Any) -> None:
    """Write on after a prompt, of which so many tokens are known, and check all of it."""
    someone.pieces.clear()
    before = computed(someone)
    answer = await someone.generate(prompt, **options)
    assert someone.tokens() == whole_text(prompt.encode(), 6)
    assert answer.num_prefix_tokens == known
    assert computed(someone) - before == (len(prompt) - known + 5) * NUM_BLOCKS


async def test_a_second_text_with_the_same_beginning_computes_only_the_rest() -> None:
    async with user((0, 2), (2, NUM_BLOCKS)) as someone:
        await text_of(someone, FIRST, known=0)
        await text_of(someone, SECOND, known=KNOWN)
        await text_of(someone, FIRST, known=KNOWN)
        await text_of(someone, "short", known=0)


async def test_at_least_one_token_is_computed() -> None:
    prompt = PREFIX[:192]
    async with user((0, NUM_BLOCKS)) as someone:
        await text_of(someone, prompt, known=0)
        await text_of(someone, prompt, known=128)


async def test_what_differs_anywhere_before_is_not_known() -> None:
    async with user((0, 2), (2, NUM_BLOCKS)) as someone:
        await text_of(someone, FIRST, known=0)
        await text_of(someone, FIRST[:100] + "X" + FIRST[101:], known=64)
        await text_of(someone, "X" + FIRST[1:], known=0)


async def test_another_user_another_client_and_an_adapter_share_nothing() -> None:
    async with user((0, 2), (2, NUM_BLOCKS)) as someone:
        await text_of(someone, FIRST, known=0)
        someone.secret = b"another user's"
        await text_of(someone, FIRST, known=0)
        someone.secret = b""
        await text_of(someone, FIRST, known=0)
        someone.secret = b"a user's"
        first = someone.client
        someone.client = await someone.swarm.client()
        await text_of(someone, FIRST, known=0)
        someone.client = first
        await text_of(someone, FIRST, known=KNOWN)
        name = sha256(b"weights").digest()
        someone.adapter = Adapter((name,) * NUM_BLOCKS, {name: b"weights"})
        assert (await someone.generate(FIRST)).num_prefix_tokens == 0
        assert (await someone.generate(FIRST)).num_prefix_tokens == KNOWN


async def test_a_hop_that_knows_nothing_of_it_brings_it_to_nothing() -> None:
    async with user((0, 2), (2, NUM_BLOCKS)) as someone:
        await text_of(someone, FIRST, known=0)
        worker = someone.swarm.members[2].worker
        assert worker is not None
        worker.crash()
        await trio.sleep(5.0)  # it is restarted
        await text_of(someone, SECOND, known=0)
        await text_of(someone, FIRST, known=KNOWN)


@pytest.mark.parametrize("killed", [(0,), (1,), (0, 1)], ids=str)
async def test_kills_amid_a_text_that_began_from_a_prefix_change_no_token(killed: tuple[int, ...]) -> None:
    spans = ((0, 2), (2, NUM_BLOCKS))
    async with user(*spans, *spans) as someone:
        swarm, spares = someone.swarm, someone.swarm.members[3:]
        for spare in spares:
            spare.belonging.hops.drain(0)
        await someone.generate(FIRST)

        def kill() -> None:
            """Each is replaced by one that knows nothing; the hop above, or the client, sends the prefix too."""
            for which in killed:
                swarm.kill(swarm.members[1 + which])
                spares[which].belonging.hops.undrain(0)

        someone.pieces.clear()
        someone.at(3, kill)
        answer = await someone.generate(SECOND)
        assert someone.tokens() == whole_text(SECOND.encode(), 6)
        assert answer.num_repairs >= 1
        assert answer.num_prefix_tokens == KNOWN


async def test_the_next_turn_of_a_chat_begins_with_what_the_swarm_wrote() -> None:
    async with user((0, 1), (1, 2), (2, NUM_BLOCKS)) as someone:
        first = (await someone.generate(FIRST, max_new_tokens=60)).tokens[0].ids
        turn = (*FIRST.encode(), *first, *b"And then?")
        answer = await someone.generate(tokens=(TokenRow(turn),))
        held = len(FIRST) + 60 - 1  # the last token was never sent
        assert answer.num_prefix_tokens == held // 64 * 64 > KNOWN
        assert answer.tokens[0].ids == whole_text(turn, 6)
        other = (*FIRST.encode(), *first[:40], 1, *first[41:], *b"And then?")
        answer = await someone.generate(tokens=(TokenRow(other),))
        assert answer.num_prefix_tokens == (len(FIRST) + 40) // 64 * 64
        assert answer.tokens[0].ids == whole_text(other, 6)


async def test_each_of_several_texts_is_known_again_though_they_ended_one_after_the_other() -> None:
    prompts = (FIRST, "X" + SECOND, "Y" + FIRST)
    whole = [whole_text(prompt.encode(), 60) for prompt in prompts]
    stop = Sampling(stop_token_ids=(whole[1][50],))
    async with user((0, 2), (2, NUM_BLOCKS)) as someone:
        told = (await someone.generate(*prompts, max_new_tokens=60, sampling=stop)).tokens
        assert len({len(row.ids) for row in told}) > 1
        for prompt, row in zip(prompts, told, strict=True):
            turn = (*prompt.encode(), *row.ids, 7)
            answer = await someone.generate(tokens=(TokenRow(turn),))
            assert answer.num_prefix_tokens == (len(turn) - 2) // 64 * 64
            assert answer.tokens[0].ids == whole_text(turn, 6)


async def test_several_texts_at_once_begin_each_with_what_is_known_of_it() -> None:
    prompts = (FIRST, "short", "X" + SECOND)
    async with user((0, 2), (2, NUM_BLOCKS)) as someone:
        await text_of(someone, SECOND, known=0)
        for known in (KNOWN, KNOWN + len("X" + SECOND) // 64 * 64, KNOWN + len("X" + SECOND) // 64 * 64):
            before = computed(someone)
            someone.pieces.clear()
            answer = await someone.generate(*prompts)
            assert [row.ids for row in answer.tokens] == [
                whole_text(prompt.encode(), 6) for prompt in prompts
            ]
            assert answer.num_prefix_tokens == known
            num_tokens = sum(map(len, prompts)) - known + 5 * len(prompts)
            assert computed(someone) - before == num_tokens * NUM_BLOCKS

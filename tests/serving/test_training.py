"""Training requests on a hop: how many it takes, of one client and of all, and of how many bytes."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from corolla.daemon.network.conversation import Conversation
from corolla.daemon.network.memory import MemoryNetwork, memory_hub
from corolla.daemon.serving import training
from corolla.daemon.serving.port import ANSWERS, Pending
from corolla.daemon.serving.training import TrainingService, send_chunks
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.tensors import Encoding
from corolla.protocol.training import TRAINING, TRAINING_PROTOCOL, Declined, Sequence, SpanForward

pytestmark = pytest.mark.anyio
SIZE = 24


class Busy:
    """A worker that is never done."""

    queue = 0

    def submit(self, request: Any) -> Pending:
        return Pending(1, ANSWERS[type(request)])

    def abandon(self, pending: Pending) -> None:
        pending.fail(CorollaError(Code.CANCELLED, "nobody wants it"))


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Time jumps to whatever is awaited next."""
    return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}


async def refusal(client: MemoryNetwork) -> Code | None:
    """Why a request is declined; None when it is under way."""
    stream = await client.open("hop", TRAINING_PROTOCOL, timeout_s=5)
    talk = Conversation(stream, TRAINING)
    await talk.say(SpanForward("model", 0, 0, 2, Encoding.FLOAT32, (Sequence(0, 3),), SIZE))
    await send_chunks(talk, bytes(SIZE))
    answer = await talk.hear()
    return answer.problem().code if isinstance(answer, Declined) else None


@pytest.mark.parametrize(
    ("limit", "value", "clients"),
    [
        ("MAX_TRAINING_REQUESTS", 2, ("ada", "bob", "cyd")),
        ("MAX_TRAINING_REQUESTS_PER_CLIENT", 2, ("ada", "ada", "ada")),
        ("MAX_TRAINING_REQUEST_BYTES", 3 * SIZE - 1, ("ada", "bob", "cyd")),
    ],
)
async def test_a_hop_takes_so_much_and_declines_what_goes_beyond(
    monkeypatch: pytest.MonkeyPatch, limit: str, value: int, clients: tuple[str, ...]
) -> None:
    monkeypatch.setattr(training, limit, value)
    async with memory_hub() as hub:
        service = TrainingService(hub.network("hop"), lambda client, asked: Busy())  # type: ignore[arg-type,return-value]
        networks = {client: hub.network(client) for client in dict.fromkeys(clients)}
        assert [await refusal(networks[client]) for client in clients] == [None, None, Code.BUSY]
        assert service.num_requests == 2

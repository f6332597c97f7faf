"""One session on one hop: its place in the wiring, its fences, and the history of what it sent. Pure.

It decides which steps count and what becomes of their outputs. It neither computes nor sends: `peers.py` does
the waiting. The rules are those of `protocol/steps.py` (DESIGN, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, auto
from typing import Final

from ...protocol.errors import Code, CorollaError, error
from ...protocol.limits import MAX_STEPS_IN_FLIGHT
from ...protocol.messages import Message
from ...protocol.steps import (
    At,
    Hop,
    Linked,
    LinkHop,
    OpenSession,
    Replay,
    Replayed,
    Reply,
    Result,
    Stage,
    Step,
    Where,
)
from ..session.history import History
from ..session.parts import max_part_tokens

_MAX_STAGES: Final = 4 * MAX_STEPS_IN_FLIGHT  # of the latest steps; nobody asks about older ones


class Verdict(Enum):
    """What to do with a step that came."""

    TAKE = auto()
    REPEAT = auto()  # its answer was lost on the way: send it again
    STALE = auto()  # of an older wiring, or from somebody who is not upstream: it changes nothing
    DROP = auto()  # done long ago


class HopSession:
    """What this hop knows of a session that `client` opened on it.

    token_bytes: of one hidden state on the wire. history_bytes: budget of what it keeps to send again.
    """

    def __init__(self, client: str, opened: OpenSession, token_bytes: int, history_bytes: int) -> None:
        self.client: Final = client
        self.opened: Final = opened
        self.epoch = 0
        self.upstream: Hop | None = None
        self.downstream: Hop | None = None
        self.history: Final = History(token_bytes, history_bytes)
        self._token_bytes = token_bytes
        self._last_step = 0
        self._last_sent: Message | None = None
        self._stages: dict[int, Stage] = {}  # of the latest steps, latest last

    @property
    def is_last(self) -> bool:
        """Whether its outputs go to the client."""
        return self.downstream is None

    def link(self, message: LinkHop) -> None:
        """Take a new place in the wiring, with the rows as they stood after `base_step`.

        Raises `STALE_EPOCH` for a wiring that is not newer than ours.
        """
        if message.epoch <= self.epoch:
            raise error(
                Code.STALE_EPOCH,
                f"link of epoch {message.epoch}, this hop is at {self.epoch}",
                epoch=self.epoch,
            )
        self.epoch = message.epoch
        self.upstream, self.downstream = message.upstream, message.downstream
        self._last_step = message.base_step
        self._last_sent = None
        self._stages = {message.base_step: Stage.SENT}
        self.history.restore(message.base_step, message.lengths)

    def linked(self, held: tuple[int, ...]) -> Linked:
        """The answer to a link, once it is known how many tokens of each row the worker holds."""
        lengths, firsts = self.history.lengths, self.history.first_positions()
        history_from = tuple(
            firsts[row] if row < len(lengths) and lengths[row] >= kept else kept
            for row, kept in enumerate(held)
        )
        return Linked(self.opened.session, self.epoch, held, history_from)

    def expects(self, epoch: int, sender: Hop) -> bool:
        """Whether a push stream of this epoch comes from our upstream."""
        return epoch == self.epoch and self.upstream == sender

    def judge(self, step: Step, sender: Hop | None) -> Verdict:
        """Whether a step counts; one that does is under way from now on. sender: None is the client."""
        if step.epoch != self.epoch or sender != self.upstream:
            return Verdict.STALE
        if not step.replay_hops:
            if step.step_id == self._last_step and self._last_sent is not None:
                return Verdict.REPEAT
            if step.step_id <= self._last_step:
                return Verdict.DROP
            self._last_step = step.step_id
        self._note(step.step_id, Stage.RECEIVED)
        return Verdict.TAKE

    def working(self, step: Step) -> None:
        """The worker has shown progress while it had this step."""
        self._note(step.step_id, Stage.WORKING)

    def computed(self, step: Step, output: bytes) -> Message | None:
        """What to send of a step's output, if anything; a `Step` goes downstream, all else to the client."""
        if self.downstream is not None or step.replay_hops:
            self.history.apply(step.step_id, step.committed, step.rows, output)
        if step.replay_hops == 1:
            return Replayed(step.session, step.epoch) if step.final else None
        if step.replay_hops:
            return self._onward(step, output, step.replay_hops - 1)
        message = (
            Result(step.session, step.epoch, step.step_id, output)
            if self.downstream is None
            else self._onward(step, output, 0)
        )
        if step.step_id == self._last_step:
            self._last_sent = message
        return message

    def sent(self, step: Step) -> None:
        """The step's output has left."""
        self._note(step.step_id, Stage.SENT)

    @property
    def last_sent(self) -> Message | None:
        """What became of the last step, for `Verdict.REPEAT`."""
        return self._last_sent

    def wanted(self, step: Step) -> Reply:
        """Which tokens' outputs the worker should give."""
        return step.reply if self.downstream is None and not step.replay_hops else Reply.ALL

    def where(self, message: Where) -> At:
        """How far a step is; of a wiring that is not ours, nothing is known."""
        stage = (
            self._stages.get(message.step_id, Stage.UNKNOWN) if message.epoch == self.epoch else Stage.UNKNOWN
        )
        return At(message.session, message.epoch, message.step_id, stage)

    def replayed(self, message: Replay) -> Iterator[Step]:
        """The steps of a replay. Raises `HISTORY_GONE`, `STALE_EPOCH`, and `BAD_REQUEST` for other rows."""
        if message.epoch != self.epoch or self.downstream is None:
            raise error(
                Code.STALE_EPOCH,
                f"replay of epoch {message.epoch}, this hop is at {self.epoch}",
                epoch=self.epoch,
            )
        parts = self.history.read(message.starts, message.lengths, max_part_tokens(self._token_bytes))
        return (
            Step(
                message.session,
                message.epoch,
                message.base_step,
                part.rows,
                committed=message.base_step,
                replay_hops=message.num_hops,
                final=part.final,
                payload=part.payload,
            )
            for part in parts
        )

    def accused(self, problem: CorollaError) -> Hop | None:
        """Whom a failed computation speaks against: whoever sent the values that it could not use."""
        return self.upstream if problem.code in (Code.NOT_FINITE, Code.BAD_SHAPE, Code.HISTORY_GAP) else None

    def _onward(self, step: Step, output: bytes, replay_hops: int) -> Step:
        return Step(
            step.session,
            step.epoch,
            step.step_id,
            step.rows,
            step.committed,
            step.reply,
            replay_hops,
            step.final,
            output,
        )

    def _note(self, step_id: int, stage: Stage) -> None:
        self._stages.pop(step_id, None)
        self._stages[step_id] = stage
        while len(self._stages) > _MAX_STAGES:
            del self._stages[next(iter(self._stages))]

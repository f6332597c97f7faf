"""One session on one hop: its place in the wiring, its fences, and the history of what it sent. Pure.

It decides which steps count and what becomes of their outputs. It neither computes nor sends, and knows no
clock but its arguments: `served.py` does the waiting. The rules are those of `protocol/steps.py` (DESIGN,
section 3). A step that fails breaks the link: what came after it stands on rows that never were, so nothing
counts any more until the client links anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from ...protocol.errors import Code, CorollaError, error
from ...protocol.limits import MAX_STEPS_IN_FLIGHT, WORKING_EVERY_S
from ...protocol.messages import Message
from ...protocol.steps import (
    NEW_ROW,
    PREFIX_STEP,
    At,
    Hop,
    Linked,
    LinkHop,
    OpenSession,
    Receipt,
    Replay,
    Replayed,
    Reply,
    Result,
    Row,
    Stage,
    Step,
    Where,
    check_payload,
)
from ..session.history import History
from ..session.parts import max_part_tokens, reply_tokens

RECEIPT_AFTER_S: Final = 0.1  # a step that is done sooner needs no receipt: its result says it all
_MAX_STAGES: Final = 4 * MAX_STEPS_IN_FLIGHT  # of the latest steps; nobody asks about older ones
_VALUES: Final = frozenset((Code.NOT_FINITE, Code.BAD_SHAPE, Code.HISTORY_GAP))  # told by who got them


class Verdict(Enum):
    """What to do with a step that came."""

    TAKE = auto()
    REPEAT = auto()  # its answer was lost on the way: send it again
    STALE = auto()  # of an older wiring, or from somebody who is not upstream: it changes nothing
    DROP = auto()  # done long ago, or of a link that is broken


@dataclass(slots=True)
class _UnderWay:
    """A step that the worker has. said_at: when its last receipt was given."""

    step: Step
    since: float
    said_at: float | None = None


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
        self.relays_from = False  # steps from upstream come through the client
        self.is_broken = True  # nothing counts before the first link
        self.history: Final = History(token_bytes, history_bytes)
        self.last_sent: Message | None = None  # of the last step, for `Verdict.REPEAT`
        self._token_bytes = token_bytes
        self._base_step = 0
        self._last_step = 0
        self._stages: dict[int, Stage] = {}  # of the latest steps, latest last
        self._under_way: deque[_UnderWay] = deque()
        self._progress = 0  # of the worker, when it was last seen to change
        self._progressed_at = 0.0

    @property
    def promised_bytes(self) -> int:
        """Hidden states of all tokens that the session may hold."""
        return self.opened.max_rows * self.opened.max_tokens * self._token_bytes

    def stands_after(self, epoch: int, step_id: int) -> bool:
        """Whether the rows are those after a step of this wiring, and nothing has come since."""
        return epoch == self.epoch and step_id == self._last_step and not self._under_way

    # the wiring

    def adopt(self, lengths: tuple[int, ...], sent: bytes) -> None:
        """Begin with rows that the worker holds. sent: their hidden states, or nothing where none are kept."""
        if sent:
            self.history.apply(PREFIX_STEP, 0, tuple(Row(NEW_ROW, 0, num) for num in lengths), sent)

    def link(self, message: LinkHop) -> int:
        """Take a new place in the wiring, with the rows as they stood after `base_step`.

        Returns the step whose rows the worker shall go back to: `base_step`, or 0 if our history does not
        reach back to it, since a history has to cover all that the cache holds. The last hop sends nothing
        on and keeps none. Raises `STALE_EPOCH` for a wiring that is not newer than ours, and `BAD_REQUEST`.
        """
        if message.epoch <= self.epoch:
            raise error(
                Code.STALE_EPOCH,
                f"link of epoch {message.epoch}, this hop is at {self.epoch}",
                epoch=self.epoch,
            )
        if len(message.lengths) > self.opened.max_rows:
            raise error(
                Code.BAD_REQUEST, f"{len(message.lengths)} rows, opened for {self.opened.max_rows} at most"
            )
        base = message.base_step
        if message.downstream is None:
            self.history.clear()
        else:
            self.history.restore(base, message.lengths)
            base = base if self.history.lengths else 0
        self.epoch = message.epoch
        self.upstream, self.downstream = message.upstream, message.downstream
        self.relays_from = message.relays_from
        self.is_broken = False
        self.last_sent = None
        self._base_step = self._last_step = message.base_step
        self._stages.clear()
        self._under_way.clear()
        return base

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
        return epoch == self.epoch and self.upstream == sender and not self.relays_from

    def break_link(self) -> None:
        """Something failed, and the client was told: nothing counts until it links anew."""
        self.is_broken = True
        self._under_way.clear()

    # steps

    def judge(self, step: Step, sender: Hop | None, now_s: float) -> Verdict:
        """Whether a step counts; one that does is under way from now on. sender: None is the client.

        Raises `BAD_SHAPE`, also for rows that the session was not opened for, and `HISTORY_GAP` for a step
        that leaves one out: the sender's fault.
        """
        if step.epoch != self.epoch or sender != (None if self.relays_from else self.upstream):
            return Verdict.STALE
        if self.is_broken:
            return Verdict.DROP
        if step.replay_hops:
            if not step.step_id == self._base_step == self._last_step:
                return Verdict.DROP
        elif step.step_id <= self._last_step:
            again = step.step_id == self._last_step and self.last_sent is not None
            return Verdict.REPEAT if again else Verdict.DROP
        elif step.step_id > self._last_step + 1:
            raise error(Code.HISTORY_GAP, f"step {step.step_id} came after step {self._last_step}")
        self._check_size(step.rows)
        check_payload(step.rows, step.payload, self._token_bytes)
        self._last_step = step.step_id
        self.last_sent = None
        self._note(step.step_id, Stage.RECEIVED)
        self._under_way.append(_UnderWay(step, now_s))
        return Verdict.TAKE

    def wanted(self, step: Step) -> Reply:
        """Which tokens' outputs the worker should give: all, if they are to be sent on and kept."""
        return step.reply if self.downstream is None else Reply.ALL

    def computed(self, step: Step, output: bytes) -> Message | None:
        """What to send of a step's output, if anything; a `Step` goes downstream, all else to the client.

        Raises `INTERNAL` if it has not the size that was asked for: our own worker's fault.
        """
        expected = reply_tokens(step.rows, self.wanted(step)) * self._token_bytes
        if len(output) != expected:
            raise error(Code.INTERNAL, f"the worker gave {len(output)} bytes, expected {expected}")
        if self.downstream is not None:
            self.history.apply(step.step_id, step.committed, step.rows, output)
        if step.replay_hops:
            if step.replay_hops > 1:
                return self._onward(step, output)
            return Replayed(step.session, step.epoch) if step.final else None
        message = (
            Result(step.session, step.epoch, step.step_id, output)
            if self.downstream is None
            else self._onward(step, output)
        )
        if step.step_id == self._last_step:
            self.last_sent = message
        return message

    def sending(self, step: Step) -> None:
        """The worker is done with a step, and its output is on its way.

        It counts as sent before the stream has taken it: a stream that does not is the link's trouble.
        """
        if not step.replay_hops or step.final:
            self._note(step.step_id, Stage.SENT)

    def sent(self, step: Step) -> Receipt | None:
        """The oldest step under way has left; what the client is told, if it took long."""
        if not self._under_way or self._under_way[0].step is not step:
            return None  # the link has broken, or is another by now
        done = self._under_way.popleft()
        if done.said_at is None or self.downstream is None:
            return None
        return Receipt(step.session, step.epoch, step.step_id, Stage.SENT)

    def receipts(self, now_s: float, progress: int) -> list[Receipt]:
        """What the client is to be told of steps that take long. progress: grows while the worker computes."""
        if progress != self._progress:
            self._progress, self._progressed_at = progress, now_s
        stages: list[tuple[Step, Stage]] = []
        for place, item in enumerate(self._under_way):
            if item.said_at is None:
                if now_s - item.since >= RECEIPT_AFTER_S:
                    item.said_at = now_s
                    stages.append((item.step, Stage.RECEIVED))
            elif place == 0 and now_s - item.said_at >= WORKING_EVERY_S:
                is_computed = self._stages.get(item.step.step_id) is Stage.SENT
                if self._progressed_at > item.said_at and not is_computed:
                    item.said_at = now_s
                    self._note(item.step.step_id, Stage.WORKING)
                    stages.append((item.step, Stage.WORKING))
        return [Receipt(step.session, step.epoch, step.step_id, stage) for step, stage in stages]

    def where(self, message: Where) -> At:
        """How far a step is; of a wiring that is not ours, nothing is known."""
        stage = (
            self._stages.get(message.step_id, Stage.UNKNOWN) if message.epoch == self.epoch else Stage.UNKNOWN
        )
        return At(message.session, message.epoch, message.step_id, stage)

    def replayed(self, message: Replay) -> Iterator[Step]:
        """The steps of a replay. Raises `HISTORY_GONE`, `STALE_EPOCH`, and `BAD_REQUEST` for other rows."""
        if message.epoch != self.epoch or self.downstream is None or self.is_broken:
            raise error(
                Code.STALE_EPOCH,
                f"replay of epoch {message.epoch}, this hop is at {self.epoch}",
                epoch=self.epoch,
            )
        if not message.base_step == self._base_step == self._last_step:
            raise error(
                Code.BAD_REQUEST,
                f"replay of the rows after step {message.base_step}, this hop is at {self._last_step}",
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
        """Whom a failed computation speaks against: whoever sent the values that it could not use.

        Nobody, if it was our worker that let go of what came before them.
        """
        is_ours = "evicted" in problem.details or "window" in problem.details
        return self.upstream if problem.code in _VALUES and not is_ours else None

    def _check_size(self, rows: tuple[Row, ...]) -> None:
        """A step holds no more than its session was promised: what waits for the worker is bounded by it."""
        opened = self.opened
        longest = max(row.position + row.n for row in rows)
        if len(rows) > opened.max_rows or longest > opened.max_tokens:
            raise error(
                Code.BAD_SHAPE,
                f"{len(rows)} rows of at most {longest} tokens, opened for {opened.max_rows} rows"
                f" of {opened.max_tokens}",
            )

    def _onward(self, step: Step, output: bytes) -> Step:
        return Step(
            step.session,
            step.epoch,
            step.step_id,
            step.rows,
            step.committed,
            step.reply,
            max(0, step.replay_hops - 1),
            step.final,
            output,
        )

    def _note(self, step_id: int, stage: Stage) -> None:
        self._stages.pop(step_id, None)
        self._stages[step_id] = stage
        while len(self._stages) > _MAX_STAGES:
            del self._stages[next(iter(self._stages))]

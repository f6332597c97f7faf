"""The push stream to the next hop: opened for one link, attached to its epoch, then used for its steps.

It lives as long as the link. It knows no session but by id.
"""

from __future__ import annotations

from typing import Final

import trio

from ...protocol.errors import Code, CorollaError, error
from ...protocol.limits import OPEN_TIMEOUT_S
from ...protocol.messages import encode
from ...protocol.steps import PUSH, PUSH_PROTOCOL, Attach, Attached, Failure, Hop, Step
from ..network.conversation import Conversation
from ..network.seam import Network

# To open and attach, together. The client gives a link `OPEN_TIMEOUT_S`; it should hear which one failed before.
ATTACH_TIMEOUT_S: Final = 0.8 * OPEN_TIMEOUT_S


class Push:
    """One attached stream to the downstream hop `target`. Made by `attach`; the maker resets it."""

    def __init__(self, talk: Conversation, target: Hop) -> None:
        self.target: Final = target
        self._talk = talk

    @classmethod
    async def attach(cls, network: Network, target: Hop, attach: Attach) -> Push:
        """A stream that the far side takes this epoch's steps from. Raises `LINK_FAILED` with the reason."""
        try:
            with trio.fail_after(ATTACH_TIMEOUT_S):
                stream = await network.open(target.peer, PUSH_PROTOCOL, timeout_s=ATTACH_TIMEOUT_S)
                try:
                    talk = Conversation(stream, PUSH)
                    await talk.say(attach)
                    answer = await talk.hear()
                    if isinstance(answer, Attached) and answer.epoch == attach.epoch:
                        return cls(talk, target)
                    raise answer.problem() if isinstance(answer, Failure) else _ended(target)
                except BaseException:
                    stream.reset()
                    raise
        except trio.TooSlowError as problem:
            late = f"it did not answer in {ATTACH_TIMEOUT_S:g} s"
            raise error(Code.LINK_FAILED, f"no link to {target.peer}: {late}") from problem
        except CorollaError as problem:
            raise error(Code.LINK_FAILED, f"no link to {target.peer}: {problem.message}") from problem

    async def say(self, step: Step) -> None:
        """Send a step, from one task at a time. Raises `PEER_LOST`."""
        await self._talk.stream.send(encode(step))

    async def wait_end(self) -> CorollaError:
        """Listen until the stream can no longer be used; gives the reason, as `LINK_FAILED`."""
        try:
            answer = await self._talk.hear()
            reason = answer.problem() if isinstance(answer, Failure) else _ended(self.target)
        except CorollaError as problem:
            reason = problem
        return error(Code.LINK_FAILED, f"the link to {self.target.peer} failed: {reason.message}")

    def reset(self) -> None:
        """Drop the stream."""
        self._talk.stream.reset()


def _ended(target: Hop) -> CorollaError:
    return error(Code.PEER_LOST, f"{target.peer} ended the push stream")

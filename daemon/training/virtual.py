"""Virtual tokens before each row of a session: a soft prompt, of which whoever steps the session does not know. Pure.

Rows come as the caller counts them and go on as the hops do, with the prompt before their first token; answers come
back without it. A row that is set back to its beginning meets its prompt again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...protocol.steps import Reply, Row


@dataclass(frozen=True, slots=True)
class Virtual:
    """hidden: of the prompt's tokens before the first block, in the session's encoding, token_bytes each."""

    hidden: bytes = b""
    token_bytes: int = 1

    @property
    def num(self) -> int:
        """Virtual tokens before each row."""
        return len(self.hidden) // self.token_bytes

    def sent(self, rows: Sequence[Row], payload: bytes) -> tuple[tuple[Row, ...], bytes]:
        """What the hops are to compute."""
        if not self.hidden:
            return tuple(rows), payload
        sent, pieces, at = [], [], 0
        for row in rows:
            end = at + row.n * self.token_bytes
            if _begins(row):
                sent.append(row._replace(n=self.num + row.n))
                pieces.append(self.hidden)
            else:
                sent.append(row._replace(position=self.num + row.position if row.position else 0))
            pieces.append(payload[at:end])
            at = end
        return tuple(sent), b"".join(pieces)

    def heard(self, rows: Sequence[Row], answer: bytes, reply: Reply) -> bytes:
        """What they answered, of the caller's own tokens. rows: as the caller counts them."""
        if not self.hidden or reply is not Reply.ALL:
            return answer
        pieces, at = [], 0
        for row in rows:
            at += len(self.hidden) if _begins(row) else 0
            end = at + row.n * self.token_bytes
            pieces.append(answer[at:end])
            at = end
        return b"".join(pieces)


def _begins(row: Row) -> bool:
    return row.position == 0 and row.n > 0

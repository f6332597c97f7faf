"""What a hop sent of prefixes, kept for as long as its worker may keep their pages. Pure.

A session that begins with pages that were computed for another has not sent their hidden states, yet a hop behind it
may die and need them. So they are kept under the names of the pages, made the client's own: no two clients can
name the same page, whatever they say. Where either side has given a page up, the prefix ends before it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

from ...protocol.limits import MIB, PREFIX_NAME_BYTES, PREFIX_PAGE_TOKENS
from ...protocol.steps import NEW_ROW, OpenSession, Row, prefixes_of
from ..session.history import History

PREFIX_BYTES: Final = 256 * MIB  # of all clients: 4,096 tokens of hidden size 8192 in float32 are half of it


class SentPrefixes:
    """Hidden states by the names of their pages; those used longest ago go first."""

    def __init__(self, budget_bytes: int = PREFIX_BYTES) -> None:
        self._budget_bytes = budget_bytes
        self._pages: OrderedDict[bytes, bytes] = OrderedDict()
        self.size_bytes = 0

    def keep(self, name: bytes, data: bytes) -> None:
        """Remember what was sent of a page."""
        self.size_bytes += len(data) - len(self._pages.pop(name, b""))
        self._pages[name] = data
        while self.size_bytes > self._budget_bytes:
            _, gone = self._pages.popitem(last=False)
            self.size_bytes -= len(gone)

    def longest(self, names: Sequence[bytes]) -> list[bytes]:
        """What was sent of the first of these pages, as far as it is here. They count as used."""
        found: list[bytes] = []
        for name in names:
            if name not in self._pages:
                break
            found.append(self._pages[name])
        for name in reversed(names[: len(found)]):
            self._pages.move_to_end(name)
        return found


class SessionPrefix:
    """What a session's rows begin with on this hop. rows: names of the pages of each, this client's own.

    keeps: whether what is sent has to be kept; the last hop of all sends nothing on.
    """

    def __init__(self, sent: SentPrefixes, client: str, opened: OpenSession, *, keeps: bool) -> None:
        self._key = _key(client, opened)
        self._sent = sent
        chains = prefixes_of(opened.prefix, opened.prefix_rows, opened.max_rows)
        self.rows = tuple(self.own(names) for names in chains)
        self._keeps = keeps
        self._num_kept = [0] * len(self.rows)  # pages of this session
        self._is_ordered = True

    def own(self, names: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """Names that the client says, made its own."""
        return tuple(blake2b(name, digest_size=PREFIX_NAME_BYTES, key=self._key).digest() for name in names)

    def keep(self, history: History, rows: Sequence[Sequence[bytes]]) -> None:
        """Keep what was sent of pages of any rows. rows: their own names, of each row's first pages."""
        if self._keeps and len(rows) <= len(history.lengths):
            for row, names in enumerate(rows):
                self._keep(history, row, names, 0)

    def beginning(self, held: tuple[int, ...]) -> tuple[tuple[int, ...], bytes]:
        """With how many tokens each row may begin, and what was sent of all. held: tokens of each, by the worker."""
        if len(held) != len(self.rows):
            return (0,) * len(self.rows), b""
        counts = [
            min(tokens // PREFIX_PAGE_TOKENS, len(row)) for tokens, row in zip(held, self.rows, strict=True)
        ]
        sent = b""
        if self._keeps:
            found = [self._sent.longest(row[:count]) for row, count in zip(self.rows, counts, strict=True)]
            counts = [len(pages) for pages in found]
            self._num_kept = list(counts)
            sent = b"".join(page for pages in found for page in pages)
        return tuple(count * PREFIX_PAGE_TOKENS for count in counts), sent

    def note(self, history: History, rows: Sequence[Row]) -> None:
        """Keep what was sent of pages that are full now. rows: of the step that was computed."""
        if len(rows) != len(self.rows) or any(row.parent not in (NEW_ROW, i) for i, row in enumerate(rows)):
            self._is_ordered = False
        if not self._keeps or not self._is_ordered or len(history.lengths) != len(self.rows):
            return
        for index, names in enumerate(self.rows):
            if self._num_kept[index] < len(names):
                self._num_kept[index] += self._keep(history, index, names, self._num_kept[index])

    def _keep(self, history: History, row: int, names: Sequence[bytes], first_page: int) -> int:
        """Keep pages of a row from one on; how many there were in a row."""
        lengths, oldest = history.lengths, history.first_positions()[row]
        num_kept = 0
        for place in range(first_page, len(names)):
            start, end = place * PREFIX_PAGE_TOKENS, (place + 1) * PREFIX_PAGE_TOKENS
            if end > lengths[row] or start < oldest:
                break
            starts = tuple(start if index == row else length for index, length in enumerate(lengths))
            ends = tuple(end if index == row else length for index, length in enumerate(lengths))
            parts = history.read(starts, ends, PREFIX_PAGE_TOKENS)
            self._sent.keep(names[place], b"".join(part.payload for part in parts))
            num_kept += 1
        return num_kept


def _key(client: str, opened: OpenSession) -> bytes:
    """Makes names that no other client can say, for pages of just these blocks, computed and sent just so."""
    scope = [
        client,
        opened.fingerprint,
        opened.encoding.value,
        str((opened.worker, opened.start, opened.end)),
    ]
    scope += [part.hex() for part in opened.parts]
    return blake2b("\n".join(scope).encode()).digest()

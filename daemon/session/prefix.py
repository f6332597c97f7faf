"""How a client names what a session begins with, so that hops may know it again. Pure.

A prefix is cut into pages, and each page's name is a hash of its tokens and of the name before: it stands for all
of the text up to its end. The first name of the chain stands for whatever else decides what a hop computes, and a
secret of the user keys every hash: nobody can ask for a text that he has not got, and two users who begin alike share
nothing.

Source: the chain of hashes is that of vLLM's automatic prefix caching.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate

from ...protocol.limits import MAX_PREFIX_PAGES, PREFIX_NAME_BYTES, PREFIX_PAGE_TOKENS
from ...protocol.tensors import Encoding


@dataclass(frozen=True, slots=True)
class Prefix:
    """What a session's rows begin with.

    names: of the pages, in order, one row's after the other's. inputs: of the first block, for all tokens of these
    pages, in wire encoding. rows: pages of each row; nothing where there is but one.
    """

    names: tuple[bytes, ...] = ()
    inputs: bytes = b""
    rows: tuple[int, ...] = ()

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that each row begins with."""
        return tuple(count * PREFIX_PAGE_TOKENS for count in self.rows or (len(self.names),))

    def shared(self, held: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
        """Tokens of each row that everybody holds, in full pages. held: by each hop, of each row."""
        lengths = self.lengths
        for tokens in held:
            known = tokens if len(tokens) == len(lengths) else (0,) * len(lengths)
            lengths = tuple(map(min, lengths, known))
        return tuple(max(0, length - length % PREFIX_PAGE_TOKENS) for length in lengths)

    def inputs_of(self, lengths: tuple[int, ...], token_bytes: int) -> bytes:
        """The inputs of so many of each row's tokens."""
        ends = accumulate(length * token_bytes for length in self.lengths)
        starts = (end - length * token_bytes for end, length in zip(ends, self.lengths, strict=True))
        return b"".join(
            self.inputs[start : start + length * token_bytes]
            for start, length in zip(starts, lengths, strict=True)
        )

    @classmethod
    def of_rows(cls, rows: Sequence[Prefix]) -> Prefix:
        """Of several rows, each with its own; those that are beyond what can be said together have none."""
        sums = accumulate(len(row.names) for row in rows)
        kept = [row if total <= MAX_PREFIX_PAGES else cls() for row, total in zip(rows, sums, strict=True)]
        names = tuple(name for row in kept for name in row.names)
        inputs = b"".join(row.inputs for row in kept)
        return cls(names, inputs, tuple(len(row.names) for row in kept) if len(rows) > 1 else ())


def root(secret: bytes, fingerprint: str, encoding: Encoding, parts: Sequence[bytes]) -> bytes:
    """The name before the first page. secret: of the user, 64 bytes at most; parts: names of an adapter's."""
    said = "\n".join((fingerprint, encoding.value, *(part.hex() for part in parts)))
    return blake2b(said.encode(), digest_size=PREFIX_NAME_BYTES, key=secret).digest()


def names_of(secret: bytes, start: bytes, tokens: Sequence[int], num_pages: int) -> tuple[bytes, ...]:
    """The names of a text's first pages, for which it has tokens enough. start: from `root`."""
    names = []
    name = start
    for page in range(min(num_pages, MAX_PREFIX_PAGES)):
        first = page * PREFIX_PAGE_TOKENS
        text = b"".join(token.to_bytes(8) for token in tokens[first : first + PREFIX_PAGE_TOKENS])
        name = blake2b(name + text, digest_size=PREFIX_NAME_BYTES, key=secret).digest()
        names.append(name)
    return tuple(names)


def prefix_of(secret: bytes, start: bytes, tokens: Sequence[int], inputs: bytes, token_bytes: int) -> Prefix:
    """The full pages of a prompt, of which at least the last token is left to compute.

    start: from `root`. inputs: hidden states of all tokens, of token_bytes each.
    """
    names = names_of(secret, start, tokens, (len(tokens) - 1) // PREFIX_PAGE_TOKENS)
    return Prefix(names, inputs[: len(names) * PREFIX_PAGE_TOKENS * token_bytes])

"""Tokens to text that may be given out: incremental decoding, and stop strings.

Owns the few tokens and characters of a row that are not given out yet. It knows a tokenizer's `decode` and
nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

# How far back in the prompt the decoder looks for something readable before the first new token.
_CONTEXT_TOKENS: Final = 16
_BROKEN: Final = "\ufffd"  # what decoders write for bytes that are no whole character


class Reader(Protocol):
    """Turns one row's tokens into text that may be given out."""

    def push(self, token: int) -> tuple[str, bool]:
        """What became readable by this token, and whether a stop string ended the row."""

    def finish(self) -> str:
        """What was still held back; the row ends."""


class BlindReader:
    """For models without a tokenizer: tokens in, no text out."""

    def push(self, token: int) -> tuple[str, bool]:
        return "", False

    def finish(self) -> str:
        return ""


class TextReader:
    """Text of a row, piece by piece, with stop strings cut off."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: tuple[str, ...]) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._stops = Stops(stop)

    def push(self, token: int) -> tuple[str, bool]:
        return self._stops.push(self._detokenizer.push(token))

    def finish(self) -> str:
        text, is_stopped = self._stops.push(self._detokenizer.finish())
        return text if is_stopped else text + self._stops.finish()


class Detokenizer:
    """Incremental decoding: the pieces, joined, are just what decoding all tokens at once gives.

    A token may be a part of a character, and its text may depend on the token before it (a leading space).
    So a short window is decoded twice, with and without the new tokens, and the difference given out, as
    soon as it ends on a whole character. The window starts at readable text, since decoders treat the first
    thing that they write differently. The last prompt tokens are the first window, so that a continuation
    keeps the space before its first word.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []  # tokens whose text was given out; decoded to start the difference
        self._pending: list[int] = []
        self._given = ""  # the window's text
        for length in range(1, min(len(prompt), _CONTEXT_TOKENS) + 1):
            text = self._decode(prompt[-length:])
            if _is_readable(text):
                self._window, self._given = list(prompt[-length:]), text
                break

    def push(self, token: int) -> str:
        """What became readable by this token."""
        self._pending.append(token)
        text = self._decode(self._window + self._pending)
        if len(text) <= len(self._given) or text.endswith(_BROKEN):
            return ""
        return self._give(text)

    def finish(self) -> str:
        """What no further token can complete."""
        if not self._pending:
            return ""
        return self._give(self._decode(self._window + self._pending))

    def _give(self, text: str) -> str:
        piece = text[len(self._given) :]
        alone = self._decode(self._pending)
        if _is_readable(alone):
            self._window, self._given = self._pending, alone
        else:
            self._window, self._given = self._window + self._pending, text
        self._pending = []
        return piece

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def _is_readable(text: str) -> bool:
    """Whether a window of this text decodes alike with anything behind it."""
    return bool(text.strip()) and not text.startswith(_BROKEN) and not text.endswith(_BROKEN)


class Stops:
    """Holds back text that may still become a stop string, so that no part of one is ever given out."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Text that is safe to give out, and whether a stop string was met; the earliest one counts."""
        text = self._held + piece
        found = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        num_held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], False

    def finish(self) -> str:
        """What was held back in vain."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0

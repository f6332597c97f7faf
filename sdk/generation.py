"""Text in, text out: what is asked for, what has come so far, and going on after the daemon restarted.

`request` turns the caller's words into `protocol.control.Generate`; `Progress` holds what came. Both are
pure. When the daemon goes away in mid-sentence the program connects again and asks it, once, to continue
after the tokens held here.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypedDict

from ..protocol.control import Generate, Generated, Item, Piece, Return
from ..protocol.errors import Code, CorollaError, error
from ..protocol.limits import MAX_TEXT_CHARS
from ..protocol.messages import from_plain
from ..protocol.tensors import Encoding
from ..protocol.work import ChatMessage, Logprob, Sampling, TokenBias, TokenRow
from .parts import Adapter, AdapterLike

RECONNECT_WITHIN_S: Final = 30.0  # a daemon is back in about a second; its worker in a few more
RETRY_EVERY_S: Final = 0.25
OnEvent = Callable[[Piece], object]
RECONNECTING: Final = Piece(0, -1, "", event="reconnecting", detail="the daemon closed the connection")


_NOT_YET: Final = (
    Code.NO_DAEMON, Code.NO_SWARM, Code.NO_PEERS, Code.NOT_READY, Code.BLOCKS_UNSERVED, Code.UNKNOWN_MODEL,
    Code.WORKER_LOST,
)  # fmt: skip


class GenerateOptions(TypedDict, total=False):
    """What `Model.generate` takes by name.

    max_new_tokens: of each row (256). max_length: prompt and new tokens of a row together; 0 is no bound but
    the model's. wait_s: how long to wait for blocks that nobody serves yet. encoding: of hidden states
    between the hops ("float32", "bfloat16", "float16"); None leaves it to the daemon.
    adapter: LoRA or prompts: a folder that PEFT or `corolla.sdk.torch` wrote, or a `parts.Adapter`.
    temperature: 0 (the default) is greedy. seed: None draws one. stop: a text, or several, that end a row
    and are not given out. logit_bias: token id → what is added to its logit. top_logprobs: how many of the
    likeliest tokens each `Piece.top` names. The others as in `protocol.work.Sampling`.
    """

    max_new_tokens: int
    max_length: int
    wait_s: float
    encoding: Encoding | str | None
    adapter: AdapterLike | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    seed: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    top_logprobs: int
    logit_bias: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer. texts, tokens, finishes and logprobs have one entry a row; tokens are the new ones alone.

    finishes: "stop" or "length". logprobs: the logarithm of each token's probability, as the model itself saw
    it; top_logprobs: those of the likeliest ones, if they were asked for. num_repairs, repair_s: hops that were
    lost on the way, and the time until the next token each cost, together. num_prefix_tokens: of the prompt, that
    the swarm still knew from an earlier one of yours, and did not compute again.
    """

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    finishes: tuple[str | None, ...]
    num_prompt_tokens: int
    seconds: float
    num_repairs: int
    repair_s: float
    logprobs: tuple[tuple[float | None, ...], ...] = ()
    top_logprobs: tuple[tuple[tuple[Logprob, ...], ...], ...] = ()
    num_prefix_tokens: int = 0

    @property
    def text(self) -> str:
        """The first row's text."""
        return self.texts[0] if self.texts else ""


def request(
    model: str,
    prompt: str | Sequence[str] | None,
    messages: Iterable[Mapping[str, str] | ChatMessage] | None,
    tokens: Any,
    options: GenerateOptions,
    adapter: Adapter | None = None,
) -> Generate:
    """The call for what the caller said. Raises `BAD_REQUEST` naming what is wrong.

    tokens: one list of token ids, or one a row; arrays and tensors work too. adapter: as read from the options.
    """
    if unknown := options.keys() - GenerateOptions.__annotations__.keys():
        raise TypeError(f"generate() got an unexpected keyword argument {min(unknown)!r}")
    inputs = {"prompt": prompt, "messages": messages, "tokens": tokens}
    given = [name for name, value in inputs.items() if value is not None]
    if len(given) != 1:
        raise error(
            Code.BAD_REQUEST,
            f"{' and '.join(given) or 'nothing'} given to generate from",
            "give one of: a prompt, messages=…, tokens=…",
        )
    prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt or ())
    chat = tuple(_message(message) for message in messages or ())
    rows = _token_rows(tokens)
    if not (prompts or chat or rows):
        raise error(Code.BAD_REQUEST, f"empty {given[0]}", "give at least one")
    num_chars = sum(len(text) for text in prompts) + sum(len(turn.content) for turn in chat)
    if num_chars > MAX_TEXT_CHARS:
        raise error(Code.TOO_LONG, f"a prompt of {num_chars} characters, at most {MAX_TEXT_CHARS} fit")
    max_new_tokens = options.get("max_new_tokens", 256)
    if max_new_tokens < 1:
        raise error(Code.BAD_REQUEST, f"max_new_tokens {max_new_tokens}, expected 1 or more")
    return Generate(
        model=model,
        prompts=prompts,
        messages=chat,
        tokens=rows,
        max_new_tokens=max_new_tokens,
        max_length=options.get("max_length", 0),
        sampling=_sampling(options),
        encoding=as_encoding(options.get("encoding")),
        wait_s=options.get("wait_s", 0.0),
        parts=adapter.names if adapter is not None else (),
        soft=adapter.soft.name if adapter is not None else b"",
    )


def as_encoding(name: Encoding | str | None) -> Encoding | None:
    """The encoding of this name. Raises `BAD_REQUEST`."""
    try:
        return None if name is None else Encoding(name)
    except ValueError:
        known = ", ".join(Encoding)
        raise error(Code.BAD_REQUEST, f"encoding {name!r}", f"one of: {known}") from None


class Progress:
    """What has come of one generation. `take` each part; `resumed` asks for the rest."""

    def __init__(self, asked: Generate) -> None:
        self._asked = asked
        num_rows = max(len(asked.prompts), len(asked.tokens), 1)
        self._texts = [""] * num_rows
        self._tokens: list[list[int]] = [[] for _ in range(num_rows)]
        self._finishes: list[str | None] = [None] * num_rows
        self._pieces: list[list[Piece]] = [[] for _ in range(num_rows)]
        self._resume_until_s: float | None = None
        self._waits_for_daemon = False
        self._answer: Generated | None = None

    def take(self, message: Item | Return) -> Piece | None:
        """The piece that a part of the answer holds; None for the end, and for what is known already."""
        if isinstance(message, Return):
            self._answer = from_plain(Generated, message.value)
            return None
        piece = from_plain(Piece, message.value)
        if piece.event is not None:
            return piece
        if not 0 <= piece.row < len(self._texts):
            raise error(
                Code.BAD_ANSWER, f"a token of row {piece.row}, {len(self._texts)} rows were asked for"
            )
        if self._finishes[piece.row] is not None:
            return None  # asked again for all rows, a resumed generation may go on with a finished one
        self._waits_for_daemon = False
        self._tokens[piece.row].append(piece.token)
        self._pieces[piece.row].append(piece)
        self._texts[piece.row] += piece.text
        self._finishes[piece.row] = piece.finish
        return piece

    def may_resume(self, problem: CorollaError, now_s: float) -> bool:
        """Whether to connect again after this error and ask for `resumed`: once a generation.

        A daemon that is just back does not know its swarm yet, so that it may be asked several times.
        """
        if problem.code is Code.NO_DAEMON and self._resume_until_s is None:
            self._resume_until_s = now_s + RECONNECT_WITHIN_S
            return True
        return self._waits_for_daemon and problem.code in _NOT_YET and now_s < (self._resume_until_s or 0)

    def resumed(self) -> Generate:
        """The call for what is missing."""
        self._waits_for_daemon = True
        held = tuple(TokenRow(tuple(row)) for row in self._tokens)
        wait_s = max(self._asked.wait_s, RECONNECT_WITHIN_S)
        return replace(self._asked, wait_s=wait_s, generated=held if any(row.ids for row in held) else ())

    def note_interruption(self, problem: CorollaError) -> None:
        """Put what was generated into the details of the error that ends it."""
        problem.details.setdefault("generated", [list(row) for row in self._tokens])
        problem.details.setdefault("texts", list(self._texts))

    def result(self) -> Generation:
        """The whole answer, once the last part was taken."""
        answer = self._answer or Generated((), (), 0, 0.0)
        return Generation(
            texts=tuple(self._texts),
            tokens=tuple(tuple(row) for row in self._tokens),
            finishes=tuple(self._finishes),
            num_prompt_tokens=answer.num_prompt_tokens,
            seconds=answer.seconds,
            num_repairs=answer.num_repairs,
            repair_s=answer.repair_s,
            logprobs=tuple(tuple(piece.logprob for piece in row) for row in self._pieces),
            top_logprobs=tuple(tuple(piece.top for piece in row) for row in self._pieces)
            if self._asked.sampling.top_logprobs
            else (),
            num_prefix_tokens=answer.num_prefix_tokens,
        )


def _message(message: Mapping[str, str] | ChatMessage) -> ChatMessage:
    if isinstance(message, ChatMessage):
        return message
    try:
        return ChatMessage(str(message["role"]), str(message["content"]))
    except (KeyError, TypeError):
        raise error(
            Code.BAD_REQUEST, f"a message {str(message)[:80]!r}", 'expected {"role": …, "content": …}'
        ) from None


def _token_rows(tokens: Any) -> tuple[TokenRow, ...]:
    if tokens is None:
        return ()
    rows = tokens.tolist() if hasattr(tokens, "tolist") else tokens
    rows = list(rows)
    if rows and all(isinstance(token, int) for token in rows):
        rows = [rows]
    try:
        return tuple(TokenRow(tuple(int(token) for token in row)) for row in rows)
    except (TypeError, ValueError):
        raise error(
            Code.BAD_REQUEST, f"tokens {str(tokens)[:80]}", "expected lists of token ids, one a row"
        ) from None


def _sampling(options: GenerateOptions) -> Sampling:
    temperature = options.get("temperature", 0.0)
    if temperature < 0:
        raise error(Code.BAD_REQUEST, f"temperature {temperature}, expected 0 (greedy) or more")
    seed = options.get("seed")
    if seed is None:
        seed = secrets.randbits(31) if temperature > 0 else 0
    stop = options.get("stop", ())
    return Sampling(
        temperature=temperature,
        top_k=options.get("top_k", 0),
        top_p=options.get("top_p", 1.0),
        min_p=options.get("min_p", 0.0),
        repetition_penalty=options.get("repetition_penalty", 1.0),
        presence_penalty=options.get("presence_penalty", 0.0),
        seed=seed,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=tuple(options.get("stop_token_ids", ())),
        ignore_eos=options.get("ignore_eos", False),
        top_logprobs=options.get("top_logprobs", 0),
        logit_bias=_biases(options.get("logit_bias", {})),
    )


def _biases(given: Mapping[int, float]) -> tuple[TokenBias, ...]:
    try:
        return tuple(TokenBias(int(token), float(bias)) for token, bias in given.items())
    except (TypeError, ValueError, AttributeError):
        raise error(
            Code.BAD_REQUEST, f"logit_bias {str(given)[:80]}", "expected {token id: number, …}"
        ) from None

"""A user's text: prompts to tokens, tokens to samples, samples to text that may be given out.

Owns what is remembered of each generation under way: its rows' tokens, the text not yet given out, and
when a row ends. It knows neither blocks nor sessions: hidden states come in as they left the last block,
and embeddings go out. `Ends` computes, `sampling` chooses.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..protocol.errors import Code, CorollaError, error
from ..protocol.limits import MAX_LOCAL_PAYLOAD_BYTES, MAX_ROWS
from ..protocol.tensors import Encoding
from ..protocol.work import (
    BeginGeneration,
    Begun,
    Chosen,
    Done,
    EmbedPrompt,
    Sample,
    Sampled,
    Sampling,
    TokenRow,
)
from .adapters import read_soft
from .encodings import decode, encode
from .failures import explain
from .sampling import Summary, check, choose, noise_of, summaries
from .text import BlindReader, Reader, TextReader

logger = logging.getLogger(__name__)


class EndsOfModel(Protocol):
    """What a generation needs of `ends.Ends`."""

    hidden_size: int
    vocab_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def tokenizer(self) -> Any:
        """Raises `UNREADABLE` if the model came without one."""

    def chat_tokens(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a chat, ready for the answer."""

    def embed(self, ids: Tensor) -> Tensor:
        """(num_tokens,) → (num_tokens, hidden_size)."""

    def embed_prompt(self, prompt: Tensor) -> Tensor:
        """(num, hidden_size) of virtual tokens → the same, as the first block gets them."""

    def head(self, hidden: Tensor) -> Tensor:
        """(num_rows, hidden_size) → (num_rows, vocab_size), float32."""


class Generations:
    """All generations under way in one worker."""

    def __init__(self, ends: EndsOfModel, end_tokens: Iterable[int]) -> None:
        """end_tokens: those that end a text, as the model's generation config says."""
        self._ends = ends
        self._end_tokens = frozenset(end_tokens)
        self._under_way: dict[int, _Generation] = {}

    def begin(self, ask: BeginGeneration) -> Begun:
        """Tokenize and remember; a generation of the same number is forgotten.

        Raises `BAD_REQUEST`, `TOO_LONG` for a prompt that leaves no room for a token, `UNREADABLE` without a
        tokenizer.
        """
        check(ask.sampling, self._ends.vocab_size)
        prompts = self._prompts(ask)
        generated = [row.ids for row in ask.generated] or [()] * len(prompts)
        if len(generated) != len(prompts):
            raise error(
                Code.BAD_REQUEST, f"generated tokens of {len(generated)} rows for {len(prompts)} prompts"
            )
        rows = []
        for index, (prompt, tokens) in enumerate(zip(prompts, generated, strict=True)):
            _check_length(index, len(prompt), ask.max_tokens)
            reader = self._reader(prompt, ask.sampling.stop, bool(ask.prompts or ask.messages))
            rows.append(_RowText(tuple(prompt), list(tokens), reader, _limit(len(prompt), ask)))
            for token in tokens:  # their text was given out before; what was held back still is
                reader.push(token)
            rows[-1].is_finished = len(prompt) + len(tokens) >= rows[-1].max_tokens
        everything = [TokenRow((*row.prompt, *row.generated)) for row in rows]
        ids = [token for row in everything for token in row.ids]
        size = len(ids) * ask.encoding.token_bytes(self._ends.hidden_size)
        if size > MAX_LOCAL_PAYLOAD_BYTES:
            raise error(
                Code.TOO_LONG,
                f"the embeddings of {len(ids)} tokens take {size} bytes, limit {MAX_LOCAL_PAYLOAD_BYTES}",
                "shorten the prompts, or ask for fewer rows",
            )
        payload = self._embedded(ids, ask.encoding)
        self._under_way[ask.generation] = _Generation(ask.sampling, ask.encoding, rows)
        return Begun(ask.request, tuple(everything), payload)

    def embed_prompt(self, ask: EmbedPrompt) -> Done:
        """Hidden states of virtual tokens. Raises `BAD_REQUEST`, `BAD_SHAPE`, `NOT_FINITE`."""
        return Done(ask.request, encode(self._ends.embed_prompt(read_soft(ask.payload)), ask.encoding))

    def sample(self, asks: Sequence[Sample]) -> list[Sampled | CorollaError]:
        """Next tokens for several requests, with one product by the head; an answer for each, in order.

        An answer may be `BAD_REQUEST`, `BAD_SHAPE`, `NOT_FINITE`, `INTERNAL` if the logits are not finite, or
        `OUT_OF_MEMORY`: where the device has no memory for all requests together, each is tried alone.
        """
        problems: list[CorollaError | None] = []
        hidden: list[Tensor] = []
        for ask in asks:
            try:
                hidden.append(self._hidden_of(ask))
                problems.append(None)
            except CorollaError as problem:
                problems.append(problem)
        if not hidden:
            return [problem for problem in problems if problem is not None]
        scores = iter(self._scores(hidden))
        chosen = [
            self._chosen(ask, next(scores)) if problem is None else problem
            for ask, problem in zip(asks, problems, strict=True)
        ]
        return self._with_embeddings(asks, chosen)

    def _scores(self, hidden: list[Tensor]) -> list[_Scores | CorollaError]:
        """Of each request."""
        try:
            together = self._ends.head(torch.cat(hidden)).cpu()
            known = iter(summaries(together))
        except Exception as problem:
            if len(hidden) == 1:
                return [explain(problem)]
            logger.warning("the head failed for %d requests, each is tried alone: %s", len(hidden), problem)
            return [scores for part in hidden for scores in self._scores([part])]
        each = torch.split(together, [len(part) for part in hidden])
        return [_Scores(logits, list(islice(known, len(logits)))) for logits in each]

    def _chosen(self, ask: Sample, scores: _Scores | CorollaError) -> list[Chosen] | CorollaError:
        """What each row of a request chose; one that fails half way ends its generation, whose rows disagree then."""
        if isinstance(scores, CorollaError):
            return scores
        try:
            return self._advanced(ask, scores)
        except Exception as problem:
            self.end(ask.generation)
            return explain(problem)

    def _with_embeddings(
        self, asks: Sequence[Sample], chosen: Sequence[list[Chosen] | CorollaError]
    ) -> list[Sampled | CorollaError]:
        """The answers: with what was chosen, embedded in one go where that works."""
        going_on = [
            [choice.token for choice in choices if choice.finish is None] if isinstance(choices, list) else []
            for choices in chosen
        ]
        tokens = torch.tensor([token for ids in going_on for token in ids], dtype=torch.int64)
        try:
            together = self._ends.embed(tokens) if len(tokens) else tokens
            embedded = torch.split(together, [len(ids) for ids in going_on])
        except Exception as problem:
            if len(asks) == 1:
                self.end(asks[0].generation)
                return [explain(problem)]
            logger.warning("embedding failed for %d requests, each is tried alone: %s", len(asks), problem)
            return [
                answer
                for ask, choices in zip(asks, chosen, strict=True)
                for answer in self._with_embeddings([ask], [choices])
            ]
        return [
            self._answered(ask, choices, states)
            for ask, choices, states in zip(asks, chosen, embedded, strict=True)
        ]

    def _answered(
        self, ask: Sample, choices: list[Chosen] | CorollaError, embedded: Tensor
    ) -> Sampled | CorollaError:
        if isinstance(choices, CorollaError):
            return choices
        try:
            payload = encode(embedded, self._under_way[ask.generation].encoding) if len(embedded) else b""
        except Exception as problem:
            self.end(ask.generation)
            return explain(problem)
        return Sampled(ask.request, tuple(choices), payload)

    def end(self, generation: int) -> None:
        """Forget a generation; one that is unknown is forgotten already."""
        self._under_way.pop(generation, None)

    def _prompts(self, ask: BeginGeneration) -> list[list[int]]:
        if sum(map(bool, (ask.prompts, ask.messages, ask.tokens))) != 1:
            raise error(Code.BAD_REQUEST, "give exactly one of prompts, messages and tokens")
        num_rows = max(len(ask.prompts), len(ask.tokens), 1)
        if num_rows > MAX_ROWS:
            raise error(Code.BAD_REQUEST, f"{num_rows} prompts at once, at most {MAX_ROWS} work")
        if ask.messages:
            turns = [{"role": turn.role, "content": turn.content} for turn in ask.messages]
            prompts = [self._ends.chat_tokens(turns)]
        elif ask.prompts:
            prompts = [self._tokenize(text) for text in ask.prompts]
        else:
            prompts = [list(row.ids) for row in ask.tokens]
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise error(Code.BAD_REQUEST, f"prompt {index} has no tokens", "give at least one word")
        return prompts

    def _tokenize(self, text: str) -> list[int]:
        tokenizer = self._ends.tokenizer
        ids = [int(token) for token in tokenizer(text)["input_ids"]]
        if not ids and tokenizer.bos_token_id is not None:
            return [int(tokenizer.bos_token_id)]
        return ids

    def _reader(self, prompt: Sequence[int], stop: tuple[str, ...], is_text: bool) -> Reader:
        """What reads a row. Given tokens need no tokenizer, unless a stop string has to be read."""
        if is_text or stop:
            return TextReader(self._ends.tokenizer, prompt, stop)
        try:
            return TextReader(self._ends.tokenizer, prompt, stop)
        except CorollaError:
            return BlindReader()

    def _hidden_of(self, ask: Sample) -> Tensor:
        """(len(rows), hidden_size), checked."""
        generation = self._under_way.get(ask.generation)
        if generation is None:
            raise error(
                Code.UNKNOWN_SESSION,
                f"this worker has no generation {ask.generation}",
                "begin it again with the tokens generated so far",
            )
        generation.check_rows(ask.rows)
        ends = self._ends
        hidden = decode(ask.payload, generation.encoding, ends.hidden_size, ends.dtype, ends.device)
        if len(hidden) != len(ask.rows):
            raise error(
                Code.BAD_SHAPE, f"{len(hidden)} hidden states to sample from for {len(ask.rows)} rows"
            )
        return hidden

    def _advanced(self, ask: Sample, scores: _Scores) -> list[Chosen]:
        """The next token of each row. Raises `INTERNAL`."""
        if not all(summary.is_finite for summary in scores.summaries):
            raise error(Code.INTERNAL, "the head made logits that are not finite", not_finite="output")
        generation = self._under_way[ask.generation]
        each = zip(ask.rows, scores.logits, scores.summaries, strict=True)
        return [self._advance(generation, row, logits, summary) for row, logits, summary in each]

    def _advance(self, generation: _Generation, index: int, logits: Tensor, summary: Summary) -> Chosen:
        """One row's next token. logits: (vocab_size,)."""
        row, sampling = generation.rows[index], generation.sampling
        noise = noise_of(sampling.seed, index, len(row.prompt) + len(row.generated))
        choice = choose(logits, sampling, row.prompt, row.generated, noise, summary)
        row.generated.append(choice.token)
        finish: str | None = None
        if choice.token in sampling.stop_token_ids or (
            choice.token in self._end_tokens and not sampling.ignore_eos
        ):
            text, finish = row.reader.finish(), "stop"
        else:
            text, is_stopped = row.reader.push(choice.token)
            if is_stopped:
                finish = "stop"
            elif len(row.prompt) + len(row.generated) >= row.max_tokens:
                text, finish = text + row.reader.finish(), "length"
        row.is_finished = finish is not None
        return Chosen(index, choice.token, text, finish, choice.logprob, choice.top)

    def _embedded(self, ids: Sequence[int], encoding: Encoding) -> bytes:
        if not ids:
            return b""
        return encode(self._ends.embed(torch.tensor(ids, dtype=torch.int64)), encoding)


class _Scores(NamedTuple):
    """Of one request: logits (num_rows, vocab_size) on the CPU, and what is known of each row of them."""

    logits: Tensor
    summaries: list[Summary]


@dataclass(slots=True)
class _RowText:
    """One row: its tokens, what reads them, and how many it may have at most."""

    prompt: tuple[int, ...]
    generated: list[int]
    reader: Reader
    max_tokens: int
    is_finished: bool = False


@dataclass(slots=True)
class _Generation:
    sampling: Sampling
    encoding: Encoding
    rows: list[_RowText] = field(default_factory=list)

    def check_rows(self, rows: tuple[int, ...]) -> None:
        """Raise `BAD_REQUEST` unless these are different rows that have not ended."""
        if len(set(rows)) != len(rows):
            raise error(Code.BAD_REQUEST, f"rows {rows} to sample, one of them twice")
        for row in rows:
            if not 0 <= row < len(self.rows):
                raise error(
                    Code.BAD_REQUEST, f"row {row} to sample of a generation with {len(self.rows)} rows"
                )
            if self.rows[row].is_finished:
                raise error(Code.BAD_REQUEST, f"row {row} has ended already")


def _limit(num_prompt_tokens: int, ask: BeginGeneration) -> int:
    if not ask.max_new_tokens:
        return ask.max_tokens
    return min(ask.max_tokens, num_prompt_tokens + ask.max_new_tokens)


def _check_length(index: int, num_tokens: int, max_tokens: int) -> None:
    if num_tokens >= max_tokens:
        raise error(
            Code.TOO_LONG,
            f"prompt {index} has {num_tokens} tokens, which leaves no room below a length of {max_tokens}",
            "shorten the prompt, or ask for a larger max_length",
        )


def end_tokens(folder: Path, config: Any) -> frozenset[int]:
    """The tokens that end a text: of the generation config, else of the model's configuration.

    Raises `UNREADABLE` if there is a generation config that cannot be read.
    """
    path = folder / "generation_config.json"
    named: Any = None
    if path.exists():
        try:
            named = json.loads(path.read_text("utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as problem:
            raise error(
                Code.UNREADABLE, f"{path} is unreadable: {problem}", "fetch the model again"
            ) from problem
    if named is None:
        named = getattr(config, "eos_token_id", None)
    return frozenset(named if isinstance(named, list) else () if named is None else (named,))

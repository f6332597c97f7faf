"""Text in, tokens out, text out: prompts, pieces of text, stop strings, finishing, resuming."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from corolla.model.generation import Generations, end_tokens
from corolla.model.text import Detokenizer, Stops, TextReader
from corolla.protocol.errors import Code, CorollaError, error
from corolla.protocol.tensors import Encoding
from corolla.protocol.work import (
    BeginGeneration,
    Begun,
    ChatMessage,
    Chosen,
    Sample,
    Sampled,
    Sampling,
    TokenRow,
)

HIDDEN_SIZE = 4
BOS, EOS = 0, 1


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, as the byte-level BPE of GPT-2 and its heirs without merges."""
    vocab = {"<s>": BOS, "</s>": EOS}
    vocab.update(
        {letter: index + 2 for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    )
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $0", special_tokens=[("<s>", BOS)])
    return fast(tokenizer)


def sentence_tokenizer() -> PreTrainedTokenizerFast:
    """Words that carry their leading space, which the decoder strips at the start; other bytes one by one."""
    words = ["<s>", "</s>", "▁", "▁Hi", "▁there", "you", "!", "▁▁"]
    vocab = {word: index for index, word in enumerate(words)}
    vocab.update({f"<0x{byte:02X}>": len(words) + byte for byte in range(256)})
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast(tokenizer)


BYTES = byte_tokenizer()
SENTENCES = sentence_tokenizer()


def ids_of(text: str) -> list[int]:
    return [int(token) for token in BYTES(text, add_special_tokens=False)["input_ids"]]


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


# incremental decoding


def pieces(tokenizer: Any, ids: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish()]


def test_a_character_of_several_tokens_comes_out_whole() -> None:
    assert pieces(BYTES, ids_of("a€🌸")) == ["a", "", "", "€", "", "", "", "🌸", ""]


def test_a_character_that_stays_unfinished_comes_out_at_the_end() -> None:
    assert pieces(BYTES, ids_of("a€")[:-1]) == ["a", "", "", "\ufffd"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 257), max_size=40))
def test_pieces_join_to_the_decoding_of_all_tokens_whatever_the_bytes(ids: list[int]) -> None:
    assert "".join(pieces(BYTES, ids)) == decoded(BYTES, ids)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20), st.text(max_size=20))
def test_pieces_behind_a_prompt_join_to_what_follows_it(prompt: str, text: str) -> None:
    start, rest = ids_of(prompt), ids_of(text)
    assert "".join(pieces(BYTES, rest, start)) == text


WORD = st.sampled_from([[0], [1], [2], [3], [4], [5], [6], [7], [8 + 0xE2, 8 + 0x82, 8 + 0xAC], [8 + 0x41]])


@settings(max_examples=300, deadline=None)
@given(st.lists(WORD, max_size=12))
def test_leading_spaces_are_stripped_just_where_decoding_at_once_does(words: list[list[int]]) -> None:
    ids = [token for word in words for token in word]
    assert "".join(pieces(SENTENCES, ids)) == decoded(SENTENCES, ids)


def test_a_continuation_keeps_the_space_before_its_first_word() -> None:
    assert pieces(SENTENCES, [4, 5], prompt=[0, 3]) == [" there", "you", ""]


# stop strings


def given_out(stops: tuple[str, ...], text: Sequence[str]) -> tuple[list[str], bool]:
    machine = Stops(stops)
    out = []
    for piece in text:
        safe, is_stopped = machine.push(piece)
        out.append(safe)
        if is_stopped:
            return out, True
    return [*out, machine.finish()], False


def test_what_may_become_a_stop_string_is_held_back_and_never_given_out() -> None:
    assert given_out(("END",), ["ab E", "N", "D c"]) == (["ab ", "", ""], True)


def test_what_was_held_back_in_vain_is_given_out() -> None:
    assert given_out(("END",), ["E", "NE", "x", "EN"]) == (["", "EN", "Ex", "", "EN"], False)


def test_the_earliest_stop_string_counts() -> None:
    assert given_out(("cd", "bcde"), ["abcde"]) == (["a"], True)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=3),
    st.lists(st.text("ab", max_size=3), max_size=10),
)
def test_text_is_cut_at_the_first_stop_string_however_it_arrives(stops: list[str], text: list[str]) -> None:
    whole = "".join(text)
    out, is_stopped = given_out(tuple(stops), text)
    ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
    assert is_stopped == bool(ends)
    assert whole.startswith("".join(out))
    assert not any(stop in "".join(out) for stop in stops)
    if not ends:
        assert "".join(out) == whole


def test_a_stop_string_across_characters_of_many_tokens_is_met() -> None:
    reader = TextReader(BYTES, [], ("€!",))
    results = [reader.push(token) for token in ids_of("a€!")]
    assert "".join(text for text, _ in results) == "a"
    assert [is_stopped for _, is_stopped in results] == [False] * 4 + [True]


# generations


class FakeEnds:
    """Embeds token t as (t, 0, …); the head of a hidden state (t, …) puts all weight on token t.

    With `spread`, the logits are random numbers instead that depend on the hidden state alone.
    """

    def __init__(self, tokenizer: Any = BYTES, spread: bool = False) -> None:
        self.hidden_size = HIDDEN_SIZE
        self.vocab_size = 258
        self.dtype = torch.float32
        self.device = torch.device("cpu")
        self.num_products = 0
        self._tokenizer = tokenizer
        self._spread = spread

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            raise error(Code.UNREADABLE, "this model has no tokenizer files")
        return self._tokenizer

    def chat_tokens(self, messages: list[dict[str, str]]) -> list[int]:
        return ids_of("".join(f"{turn['role']}: {turn['content']}\n" for turn in messages))

    def embed_prompt(self, prompt: torch.Tensor) -> torch.Tensor:
        return prompt

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        if int(ids.max()) >= self.vocab_size:
            raise error(Code.BAD_REQUEST, f"token id {int(ids.max())}")
        embedded = torch.zeros(len(ids), HIDDEN_SIZE)
        embedded[:, 0] = ids
        return embedded

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        self.num_products += 1
        logits = torch.zeros(len(hidden), self.vocab_size)
        for row, state in zip(logits, hidden, strict=True):
            if self._spread:
                row.copy_(
                    torch.randn(self.vocab_size, generator=torch.Generator().manual_seed(int(state[0])))
                )
            else:
                row[int(state[0])] = 100.0
        return logits


def generations(**options: Any) -> Generations:
    return Generations(FakeEnds(**options), [EOS])


def begin(
    machine: Generations, max_tokens: int = 50, sampling: Sampling | None = None, **source: Any
) -> Begun:
    return machine.begin(
        BeginGeneration(3, 1, sampling or Sampling(), Encoding.FLOAT32, max_tokens, **source)
    )


def states(*tokens: float) -> bytes:
    hidden = torch.zeros(len(tokens), HIDDEN_SIZE)
    hidden[:, 0] = torch.tensor(tokens)
    return hidden.numpy().tobytes()


def sample(machine: Generations, tokens: Sequence[float], rows: Sequence[int] = (0,)) -> Sampled:
    """Make each row choose its token."""
    (answer,) = machine.sample([Sample(4, 1, tuple(rows), states(*tokens))])
    if isinstance(answer, CorollaError):
        raise answer
    return answer


def write(machine: Generations, text: str) -> list[Chosen]:
    """Make row 0 choose the tokens of a text until it finishes."""
    chosen: list[Chosen] = []
    for token in ids_of(text):
        chosen += sample(machine, [token]).chosen
        if chosen[-1].finish:
            break
    return chosen


def test_prompts_are_tokenized_with_the_tokenizers_own_special_tokens_and_embedded() -> None:
    begun = begin(generations(), prompts=("hi", "you"))
    assert [row.ids for row in begun.tokens] == [(BOS, *ids_of("hi")), (BOS, *ids_of("you"))]
    assert begun.request == 3
    assert begun.payload == states(BOS, *ids_of("hi"), BOS, *ids_of("you"))


def test_tokens_are_taken_as_given_and_a_chat_through_its_template() -> None:
    assert begin(generations(), tokens=(TokenRow((5, 6)),)).tokens == (TokenRow((5, 6)),)
    chat = begin(generations(), messages=(ChatMessage("user", "hi"),))
    assert chat.tokens == (TokenRow(tuple(ids_of("user: hi\n"))),)


def test_an_empty_prompt_is_the_token_that_begins_texts() -> None:
    assert begin(generations(), prompts=("",)).tokens == (TokenRow((BOS,)),)


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ({}, Code.BAD_REQUEST),
        ({"prompts": ("a",), "tokens": (TokenRow((1,)),)}, Code.BAD_REQUEST),
        ({"tokens": (TokenRow(()),)}, Code.BAD_REQUEST),
        ({"tokens": (TokenRow((258,)),)}, Code.BAD_REQUEST),
        ({"tokens": (TokenRow((5,)),) * 257}, Code.BAD_REQUEST),
        ({"prompts": ("a",), "generated": (TokenRow((1,)), TokenRow((1,)))}, Code.BAD_REQUEST),
        ({"prompts": ("x" * 50,)}, Code.TOO_LONG),
        ({"prompts": ("a",), "sampling": Sampling(top_p=0)}, Code.BAD_REQUEST),
    ],
)
def test_what_cannot_be_begun_is_refused(source: dict[str, Any], code: Code) -> None:
    with pytest.raises(CorollaError) as caught:
        begin(generations(), **source)
    assert caught.value.code is code


def test_rows_are_sampled_by_their_original_numbers() -> None:
    machine = generations()
    begin(machine, prompts=("a", "b", "c"))
    first = sample(machine, [*ids_of("xy"), EOS], rows=(0, 1, 2))
    assert [(choice.row, choice.text, choice.finish) for choice in first.chosen] == [
        (0, "x", None), (1, "y", None), (2, "", "stop"),
    ]  # fmt: skip
    assert first.payload == states(*ids_of("xy"))
    second = sample(machine, ids_of("zw"), rows=(1, 0))
    assert [(choice.row, choice.text) for choice in second.chosen] == [(1, "z"), (0, "w")]


def test_several_generations_share_one_product_by_the_head() -> None:
    ends = FakeEnds()
    machine = Generations(ends, [EOS])
    for number in (1, 2):
        machine.begin(BeginGeneration(3, number, Sampling(), Encoding.FLOAT32, 50, prompts=("a",)))
    asks = [
        Sample(10, 1, (0,), states(7)),
        Sample(11, 9, (0,), states(7)),
        Sample(12, 2, (0,), states(8)),
        Sample(13, 2, (0,), states(8, 9)),
        Sample(14, 1, (0,), states(float("nan"))),
    ]
    answers = machine.sample(asks)
    assert [a.code if isinstance(a, CorollaError) else a.chosen[0].token for a in answers] == [
        7, Code.UNKNOWN_SESSION, 8, Code.BAD_SHAPE, Code.NOT_FINITE,
    ]  # fmt: skip
    assert ends.num_products == 1


def test_logits_that_are_not_finite_are_not_the_senders_fault() -> None:
    ends = FakeEnds()
    machine = Generations(ends, [EOS])
    begin(machine, prompts=("a",))
    ends.head = lambda hidden: torch.full((1, 258), float("nan"))  # type: ignore[method-assign]
    (answer,) = machine.sample([Sample(4, 1, (0,), states(7))])
    assert isinstance(answer, CorollaError)
    assert (answer.code, answer.details) == (Code.INTERNAL, {"not_finite": "output"})


@pytest.mark.parametrize("rows", [(0, 0), (2,), (-1,), (1,)])
def test_rows_that_cannot_be_sampled_are_refused(rows: tuple[int, ...]) -> None:
    machine = generations()
    begin(machine, prompts=("a", "b"))
    sample(machine, [EOS], rows=(1,))
    with pytest.raises(CorollaError) as caught:
        sample(machine, [5] * len(rows), rows)
    assert caught.value.code is Code.BAD_REQUEST


def test_a_row_ends_at_its_length() -> None:
    machine = generations()
    begin(machine, 9, Sampling(stop=("xyz",)), prompts=("hello",))
    chosen = write(machine, "axy")
    assert [(choice.text, choice.finish) for choice in chosen] == [
        ("a", None), ("", None), ("xy", "length"),
    ]  # fmt: skip


def test_a_row_ends_at_its_limit_of_new_tokens_also_when_it_is_resumed() -> None:
    machine = generations()
    ask = BeginGeneration(3, 1, Sampling(), Encoding.FLOAT32, 50, max_new_tokens=2, prompts=("hello", "a"))
    machine.begin(ask)
    assert [choice.finish for choice in write(machine, "xyz")] == [None, "length"]
    machine.begin(replace(ask, generated=(TokenRow(tuple(ids_of("x"))), TokenRow(tuple(ids_of("xy"))))))
    assert [choice.finish for choice in write(machine, "yz")] == ["length"]
    with pytest.raises(CorollaError, match="ended already"):
        sample(machine, [5], rows=(1,))


def test_a_row_ends_at_an_end_token_unless_told_to_go_on() -> None:
    machine = generations()
    begin(machine, prompts=("a",), sampling=Sampling(stop=("xyz",)))
    write(machine, "x")
    assert [(c.text, c.finish) for c in sample(machine, [EOS]).chosen] == [("x", "stop")]
    begin(machine, prompts=("a",), sampling=Sampling(ignore_eos=True))
    assert sample(machine, [EOS]).chosen[0].finish is None


def test_a_row_ends_at_a_stop_token_whose_text_is_not_given_out() -> None:
    machine = generations()
    (stop,) = ids_of(".")
    begin(machine, prompts=("a",), sampling=Sampling(stop_token_ids=(stop,), ignore_eos=True))
    assert [(choice.text, choice.finish) for choice in write(machine, "b.c")] == [("b", None), ("", "stop")]


def test_a_row_ends_at_a_stop_string() -> None:
    machine = generations()
    begin(machine, prompts=("a",), sampling=Sampling(stop=("END",)))
    chosen = write(machine, "some ENEND more")
    assert "".join(choice.text for choice in chosen) == "some EN"
    assert chosen[-1].finish == "stop"
    assert [choice.token for choice in chosen] == ids_of("some ENEND")


def test_a_generation_without_a_tokenizer_gives_tokens_but_no_text() -> None:
    machine = generations(tokenizer=None)
    begin(machine, tokens=(TokenRow((5,)),))
    assert sample(machine, [7]).chosen == (Chosen(0, 7, "", None, sample_logprob(7)),)
    with pytest.raises(CorollaError) as caught:
        begin(machine, tokens=(TokenRow((5,)),), sampling=Sampling(stop=("x",)))
    assert caught.value.code is Code.UNREADABLE


def sample_logprob(token: int) -> float:
    logits = FakeEnds().head(torch.tensor([[float(token), 0, 0, 0]]))[0]
    return float(logits[token]) - float(torch.logsumexp(logits, dim=0))


SAMPLED = Sampling(
    temperature=1.5,
    top_p=0.95,
    seed=11,
    repetition_penalty=1.2,
    presence_penalty=0.4,
    stop=("zz",),
    ignore_eos=True,
)


def run(machine: Generations, num_tokens: int) -> list[tuple[Chosen, ...]]:
    """Sampled tokens of two rows; hidden states depend on the position alone."""
    return [sample(machine, [place, place], rows=(0, 1)).chosen for place in range(num_tokens)]


def test_a_resumed_generation_goes_on_as_it_would_have() -> None:
    machine = generations(spread=True)
    begin(machine, prompts=("one", "two"), sampling=SAMPLED)
    whole = run(machine, 12)
    for cut in (0, 1, 5, 11):
        resumed = generations(spread=True)
        generated = tuple(TokenRow(tuple(step[row].token for step in whole[:cut])) for row in (0, 1))
        begun = begin(resumed, prompts=("one", "two"), sampling=SAMPLED, generated=generated)
        assert [row.ids[-cut:] for row in begun.tokens if cut] == [row.ids for row in generated if cut]
        rest = [sample(resumed, [place, place], rows=(0, 1)).chosen for place in range(cut, 12)]
        assert rest == whole[cut:]


def test_rows_and_seeds_draw_their_own_noise() -> None:
    texts = set()
    for seed in (1, 2):
        machine = generations(spread=True)
        begin(
            machine, prompts=("same", "same"), sampling=Sampling(temperature=1.0, seed=seed, ignore_eos=True)
        )
        steps = run(machine, 6)
        texts |= {tuple(step[row].token for step in steps) for row in (0, 1)}
    assert len(texts) == 4


def test_an_ended_generation_is_forgotten() -> None:
    machine = generations()
    begin(machine, prompts=("a",))
    machine.end(1)
    machine.end(1)
    with pytest.raises(CorollaError) as caught:
        sample(machine, [5])
    assert caught.value.code is Code.UNKNOWN_SESSION


@pytest.mark.parametrize(
    ("generation_config", "config", "expected"),
    [
        (None, 2, {2}),
        ({"eos_token_id": [3, 4]}, 2, {3, 4}),
        ({"eos_token_id": 5}, 2, {5}),
        ({}, [6, 7], {6, 7}),
        (None, None, set()),
    ],
)
def test_end_tokens_are_those_of_the_generation_config_first(
    tmp_path: Path, generation_config: Any, config: Any, expected: set[int]
) -> None:
    if generation_config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation_config))
    assert end_tokens(tmp_path, SimpleNamespace(eos_token_id=config)) == expected


def test_a_damaged_generation_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(CorollaError) as caught:
        end_tokens(tmp_path, SimpleNamespace(eos_token_id=1))
    assert caught.value.code is Code.UNREADABLE


# memory that runs out


def sample_of(machine: Generations, generations: dict[int, int]) -> list[Sample]:
    """Requests for generation → its last token, whose hidden state the fake's head turns into that token."""
    return [
        Sample(number, number, (0,), struct.pack("<4f", token, 0, 0, 0))
        for number, token in generations.items()
    ]


@pytest.mark.parametrize("raised", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_head_without_memory_for_all_costs_one_request(
    raised: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = FakeEnds()
    machine = Generations(ends, [EOS])
    for number in (1, 2, 3):
        machine.begin(BeginGeneration(9, number, Sampling(), Encoding.FLOAT32, 50, tokens=(TokenRow((5,)),)))
    whole_head = ends.head

    def small_head(hidden: torch.Tensor) -> torch.Tensor:
        if (hidden[:, 0] == 66).any():
            raise raised
        return whole_head(hidden)

    monkeypatch.setattr(ends, "head", small_head)
    first, second, third = machine.sample(sample_of(machine, {1: 65, 2: 66, 3: 67}))
    assert isinstance(second, CorollaError)
    assert second.code is Code.OUT_OF_MEMORY
    assert [answer.chosen[0].token for answer in (first, third) if isinstance(answer, Sampled)] == [65, 67]
    monkeypatch.setattr(ends, "head", whole_head)
    (again,) = machine.sample(sample_of(machine, {2: 68}))
    assert isinstance(again, Sampled)
    assert again.chosen[0].token == 68

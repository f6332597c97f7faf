"""The worker as a process: what the daemon sees of it through the socket."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from corolla.protocol.errors import Code
from corolla.protocol.framing import FrameParser
from corolla.protocol.messages import Message, encode
from corolla.protocol.steps import NEW_ROW, Reply, Row
from corolla.protocol.tensors import DType, Encoding
from corolla.protocol.work import (
    FROM_WORKER,
    Beat,
    BeginGeneration,
    Begun,
    CloseCache,
    Compute,
    Configure,
    Done,
    EndGeneration,
    Failed,
    Loading,
    ModelSource,
    OpenCache,
    Ready,
    Restore,
    Restored,
    Sample,
    Sampled,
    Sampling,
    SourceKind,
    TokenRow,
)

from .tiny import NUM_BLOCKS, save_tiny

M = TypeVar("M", bound=Message)
PATIENCE_S = 120.0
SESSION = b"s" * 16
HIDDEN_SIZE = 64


class Worker:
    """A worker process, from the daemon's side of the socket."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "corolla.model", "--fd", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self.socket = ours
        self.socket.settimeout(PATIENCE_S)
        self.ready: Ready | None = None
        self._parser = FrameParser(max_payload_bytes=1 << 28)
        self._read: list[Message] = []

    def say(self, message: Message) -> None:
        self.socket.sendall(encode(message))

    def hear(self) -> Message:
        """The next message of any kind."""
        while not self._read:
            data = self.socket.recv(1 << 16)
            if not data:
                raise EOFError("the worker closed its socket")
            self._parser.feed(data)
            self._read.extend(FROM_WORKER.decode(frame) for frame in self._parser.frames())
        return self._read.pop(0)

    def expect(self, kind: type[M]) -> M:
        """The next message that is neither a beat nor progress, of this kind."""
        while True:
            message = self.hear()
            if not isinstance(message, (Beat, Loading)):
                assert isinstance(message, kind), message
                return message

    def ask(self, message: Message, kind: type[M]) -> M:
        self.say(message)
        return self.expect(kind)

    def wait(self) -> int:
        return self.process.wait(PATIENCE_S)

    def close(self) -> None:
        self.socket.close()
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.communicate()


def configure(folder: Path, **changes: Any) -> Configure:
    settings: dict[str, Any] = {
        "source": ModelSource(SourceKind.FOLDER, str(folder)),
        "cache_folder": str(folder.parent / "cache"),
        "end": NUM_BLOCKS,
        "ends": True,
        "device": "cpu",
        "dtype": DType.FLOAT32,
        "threads": 1,
        "memory_bytes": 1 << 28,
        "cache_tokens": 1024,
        **changes,
    }
    return Configure(**settings)


def save_byte_tokenizer(folder: Path) -> None:
    """A tokenizer of bytes for the tiny models: three special tokens, then the printable bytes."""
    letters = [chr(code) for code in range(0x21, 0x7F)][:91]
    vocab = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "Ġ", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    whole = save_tiny(folder)
    save_byte_tokenizer(folder)
    return folder, whole


@pytest.fixture(scope="module")
def worker(model: tuple[Path, PreTrainedModel]) -> Iterator[Worker]:
    """One worker that all tests share which leave it in working order."""
    worker = Worker()
    try:
        worker.ready = worker.ask(configure(model[0]), Ready)
        yield worker
    finally:
        worker.close()


@pytest.fixture
def fresh() -> Iterator[Worker]:
    worker = Worker()
    try:
        yield worker
    finally:
        worker.close()


def states(payload: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(payload), dtype=torch.float32).view(-1, HIDDEN_SIZE)


def test_a_session_is_prefilled_in_two_steps_decoded_restored_and_closed(
    worker: Worker, model: tuple[Path, PreTrainedModel]
) -> None:
    tokens = list(range(5, 25))
    begun = worker.ask(
        BeginGeneration(1, 7, Sampling(), Encoding.FLOAT32, 64, tokens=(TokenRow(tuple(tokens)),)), Begun
    )
    embedded = states(begun.payload)
    with torch.inference_mode():
        whole = model[1](torch.tensor([tokens]), output_hidden_states=True)
    assert torch.equal(embedded, whole.hidden_states[0][0])

    def compute(request: int, step: int, first: int, last: int) -> torch.Tensor:
        row = Row(NEW_ROW if first == 0 else 0, first, last - first)
        payload = embedded[first:last].numpy().tobytes()
        return states(
            worker.ask(Compute(request, SESSION, step, step - 1, (row,), Reply.LAST, payload), Done).payload
        )

    worker.ask(OpenCache(2, SESSION, 0, NUM_BLOCKS, Encoding.FLOAT32, 1, 64), Done)
    compute(3, 1, 0, 9)
    compute(4, 2, 9, 19)
    last = compute(5, 3, 19, 20)
    assert worker.ask(Restore(6, SESSION, 2, (15,)), Restored).held == (15,)
    assert torch.allclose(compute(7, 3, 15, 20), last, atol=1e-5)
    sampled = worker.ask(Sample(8, 7, (0,), last.numpy().tobytes()), Sampled)
    assert sampled.chosen[0].token == int(whole.logits[0, -1].argmax())
    worker.say(EndGeneration(7))
    worker.say(CloseCache(SESSION))
    failed = worker.ask(Compute(9, SESSION, 4, 3, (Row(0, 20, 1),), payload=bytes(256)), Failed)
    assert failed.problem().code is Code.UNKNOWN_SESSION


def generate(worker: Worker, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    """Greedy tokens of one row, through the worker's blocks and ends."""
    length = len(prompt) + num_tokens
    begun = worker.ask(
        BeginGeneration(
            1, 1, Sampling(ignore_eos=True), Encoding.FLOAT32, length, tokens=(TokenRow(prompt),)
        ),
        Begun,
    )
    worker.ask(OpenCache(2, SESSION, 0, NUM_BLOCKS, Encoding.FLOAT32, 1, length), Done)
    row, payload = Row(NEW_ROW, 0, len(prompt)), begun.payload
    tokens: list[int] = []
    while True:
        step = len(tokens) + 1
        done = worker.ask(Compute(3, SESSION, step, step - 1, (row,), Reply.LAST, payload), Done)
        sampled = worker.ask(Sample(4, 1, (0,), done.payload), Sampled)
        tokens.append(sampled.chosen[0].token)
        if sampled.chosen[0].finish == "length":
            break
        row, payload = Row(0, row.position + row.n, 1), sampled.payload
    worker.say(CloseCache(SESSION))
    worker.say(EndGeneration(1))
    return tokens


def test_greedy_generation_equals_that_of_transformers(
    worker: Worker, model: tuple[Path, PreTrainedModel]
) -> None:
    prompt = (11, 42, 7, 30, 55)
    expected = model[1].generate(  # type: ignore[operator]
        torch.tensor([prompt]), attention_mask=torch.ones(1, 5), do_sample=False, max_new_tokens=24,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert generate(worker, prompt, 24) == expected[0, 5:].tolist()


def test_a_worker_tells_what_it_serves_and_how_fast(
    worker: Worker, model: tuple[Path, PreTrainedModel]
) -> None:
    ready = worker.ready
    assert ready is not None
    assert (ready.start, ready.end, ready.dtype, ready.device) == (0, NUM_BLOCKS, DType.FLOAT32, "cpu")
    assert ready.cache_tokens == 1024
    assert ready.weight_bytes > 0
    assert ready.decode_tokens_per_s > 0
    assert ready.prefill_tokens_per_s > 0
    assert ready.loaded_tokens_per_s > 0
    assert ready.launches_per_s > 0
    assert ready.facts.num_blocks == NUM_BLOCKS
    assert ready.facts.hidden_size == HIDDEN_SIZE


def test_beats_go_on_and_progress_grows_while_the_worker_is_idle(worker: Worker) -> None:
    first = next(beat for beat in iter(worker.hear, None) if isinstance(beat, Beat))
    second = next(beat for beat in iter(worker.hear, None) if isinstance(beat, Beat))
    assert second.progress > first.progress
    assert second.free_tokens == 1024
    assert second.queue == 0


def test_ctrl_c_is_left_to_the_daemon(worker: Worker) -> None:
    worker.process.send_signal(signal.SIGINT)
    worker.ask(OpenCache(1, SESSION, 0, NUM_BLOCKS, Encoding.FLOAT32, 1, 64), Done)
    worker.say(CloseCache(SESSION))


def test_nothing_is_written_to_stdout(worker: Worker) -> None:
    assert worker.process.stdout is not None
    assert not select.select([worker.process.stdout], [], [], 0)[0]


def test_a_worker_exits_while_it_is_loading(fresh: Worker, model: tuple[Path, PreTrainedModel]) -> None:
    fresh.say(configure(model[0]))
    fresh.socket.close()
    assert fresh.wait() == 0


def test_a_worker_exits_in_the_middle_of_computing(
    fresh: Worker, model: tuple[Path, PreTrainedModel]
) -> None:
    fresh.ask(configure(model[0], cache_tokens=1 << 15), Ready)
    fresh.ask(OpenCache(1, SESSION, 0, NUM_BLOCKS, Encoding.FLOAT32, 1, 1 << 15), Done)
    payload = torch.full((1 << 15, HIDDEN_SIZE), 0.1).numpy().tobytes()
    fresh.say(Compute(2, SESSION, 1, 0, (Row(NEW_ROW, 0, 1 << 15),), Reply.ALL, payload))
    # Answered between two parts of the prefill, of which there are 64.
    assert fresh.ask(Restore(3, b"x" * 16, 0), Failed).request == 3
    fresh.socket.close()
    assert fresh.wait() == 0


def test_a_model_that_cannot_be_loaded_is_reported_and_the_worker_exits(
    fresh: Worker, tmp_path: Path
) -> None:
    failed = fresh.ask(configure(tmp_path / "nowhere"), Failed)
    assert failed.request == 0
    assert failed.problem().code is Code.UNKNOWN_MODEL
    assert fresh.wait() == 1
    stdout, stderr = fresh.process.communicate()
    assert stdout == b""
    assert b"nowhere" in stderr

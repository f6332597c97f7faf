"""What the daemon and a worker say to each other, over a socket that the worker inherits.

The daemon asks, the worker answers each request once, in any order, by `request` number. Hidden states are
payloads in the session's wire encoding; the worker alone decodes them. The worker's life is the socket's:
when it closes, the worker exits.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Final

from .errors import CorollaError, error_from_wire
from .limits import MAX_BLOCKS, MAX_POSITION, MAX_ROWS
from .messages import Message, Plain, Vocabulary, check_range
from .steps import Chain, Reply, Row, check_chains, check_prefix, check_rows
from .tensors import DType, Encoding
from .training import Dropout, Sequence, check_micro_batch


class SourceKind(StrEnum):
    """Where weights come from."""

    FOLDER = "folder"  # of a Hugging Face model
    HUB = "hub"  # `owner/name`, through huggingface_hub
    GGUF = "gguf"  # one file, converted once


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model's weights as a worker finds them."""

    kind: SourceKind
    location: str  # absolute path, or hub id
    revision: str | None = None  # of a hub model; None is its main branch


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What everyone who runs a part of a model has to agree on.

    fingerprint: see `checkpoint.fingerprint`; hex. files: weight file name → sha256, hex.
    """

    name: str
    fingerprint: str
    architecture: str
    num_blocks: int
    hidden_size: int
    vocab_size: int
    max_position: int
    files: dict[str, str]
    hub_id: str | None = None
    revision: str | None = None
    licence: str | None = None


# daemon → worker


@dataclass(frozen=True, slots=True)
class Configure(Message):
    """First message: what to load. Answered by `Loading`…, then `Ready` or `Failed(request=0)`.

    start, end: the span; both 0 loads no blocks. ends: also embeddings, final norm, head and tokenizer.
    start = 0 and end = -1 mean: as many blocks from the first as memory_bytes allows (the answer tells).
    threads: of computing; 0 leaves it to the worker. memory_bytes: for weights and caches together; 0 is
    80 % of what the device has free. cache_folder: for converted weights; it belongs to this daemon.
    """

    KIND: ClassVar[str] = "configure"
    source: ModelSource
    cache_folder: str
    start: int = 0
    end: int = 0
    ends: bool = False
    device: str = "auto"
    dtype: DType | None = None  # None: the device's best (bfloat16 on GPUs, float32 on CPUs)
    quantization: str | None = None
    threads: int = 0
    memory_bytes: int = 0
    cache_tokens: int = 0  # KV slots of the pool; 0: what memory allows, within reason
    parked_tokens: int = (
        -1
    )  # KV slots in host memory for idle sessions; -1: what memory allows, within reason
    disk_bytes: int = 0  # that weights may take in the cache; 0: what the disk has

    def __post_init__(self) -> None:
        check_range("start", self.start, 0, MAX_BLOCKS)
        check_range("end", self.end, -1, MAX_BLOCKS)


@dataclass(frozen=True, slots=True)
class OpenCache(Message):
    """Admit a session on blocks [start, end) of the span. Answered by `Done`, or `Failed`.

    `BUSY`, with `free_tokens`, `wanted_tokens` and an estimate `wait_s` in its details, if what sessions are
    expected to come to hold leaves too little for it; `TOO_LONG` if max_tokens for each of max_rows could never
    be had; `ADAPTER_MISSING` with the hex names in `missing`. A session of this id that is open is closed first.

    prefix: names of the pages that its one row begins with, as in `steps.OpenSession`, made the daemon's own. Those
    that the worker holds are the session's rows after step `PREFIX_STEP`; `Done.held` tells how many tokens these are,
    and `Done.rows` of each row. prefix_rows: as there.
    It keeps the others under their names once they are computed.
    """

    KIND: ClassVar[str] = "open"
    request: int
    session: bytes
    start: int
    end: int
    encoding: Encoding
    max_rows: int
    max_tokens: int
    parts: tuple[bytes, ...] = ()  # of an adapter, one name for each block, or nothing
    prefix: tuple[bytes, ...] = ()
    prefix_rows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_prefix(self.prefix, self.prefix_rows)
        check_range("max_rows", self.max_rows, 1, MAX_ROWS)
        check_range("max_tokens", self.max_tokens, 1, MAX_POSITION)


@dataclass(frozen=True, slots=True)
class Compute(Message):
    """One step of a session. Answered by `Done` with the span's output for the tokens that `reply` names.

    A hop that keeps history or sends on asks for all tokens; the payload of `LAST` holds just the last new
    token of each row that has any, in the order of the rows, and that of `NONE` is empty. Steps of one
    session run in the order in which they were asked. committed, rows: as in `steps.Step`.

    It may have to wait for cache pages. Fails alone, and leaves the rows as they were before it:
    `UNKNOWN_SESSION`; `BAD_SHAPE` and `NOT_FINITE` if the payload is wrong (its sender's fault); `HISTORY_GAP`,
    with the detail `evicted` if the session had to make room for others; `TOO_LONG`, `BAD_REQUEST`, `BUSY` of its rows;
    `OUT_OF_MEMORY`; `INTERNAL` with the detail `not_finite="output"` if the blocks themselves made numbers
    that are not finite or too large for the encoding.
    """

    KIND: ClassVar[str] = "compute"
    request: int
    session: bytes
    step_id: int
    committed: int
    rows: tuple[Row, ...]
    reply: Reply = Reply.ALL
    payload: bytes = b""

    def __post_init__(self) -> None:
        check_rows(self.rows)


@dataclass(frozen=True, slots=True)
class Restore(Message):
    """Set a session's rows back as `steps.LinkHop` says. Answered by `Restored`.

    Steps of the session that are still queued are dropped unanswered: the daemon forgot them already.
    """

    KIND: ClassVar[str] = "restore"
    request: int
    session: bytes
    base_step: int
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class NamePages(Message):
    """Keep full pages of a session under these names, as `steps.KeepPages` says. Not answered."""

    KIND: ClassVar[str] = "name"
    session: bytes
    step_id: int
    rows: tuple[Chain, ...]

    def __post_init__(self) -> None:
        check_chains(self.rows)


@dataclass(frozen=True, slots=True)
class CloseCache(Message):
    """Free a session. Not answered; steps of it that are still queued are dropped, as in `Restore`."""

    KIND: ClassVar[str] = "close"
    session: bytes


# training: whole sequences, of which nothing is kept (see `training`)


@dataclass(frozen=True, slots=True)
class Forward(Message):
    """Hidden states after blocks [start, end) of the span. payload: the inputs. Answered by `Done`.

    Fails with `ADAPTER_MISSING` (hex names in `missing`), `BAD_SHAPE`, `NOT_FINITE`, `BLOCKS_OUT_OF_RANGE`,
    `OUT_OF_MEMORY`; and as `Compute` does for what the blocks themselves made.
    """

    KIND: ClassVar[str] = "forward"
    request: int
    start: int
    end: int
    encoding: Encoding
    sequences: tuple[Sequence, ...]
    parts: tuple[bytes, ...] = ()
    dropout: Dropout | None = None
    payload: bytes = b""

    def __post_init__(self) -> None:
        check_micro_batch(self.start, self.end, self.sequences, self.parts)


@dataclass(frozen=True, slots=True)
class Backward(Message):
    """Gradients of the inputs and of the parts. payload: the inputs, then the gradients of the outputs.

    Answered by `Gradients`. Fails as `Forward` does.
    """

    KIND: ClassVar[str] = "backward"
    request: int
    start: int
    end: int
    encoding: Encoding
    sequences: tuple[Sequence, ...]
    parts: tuple[bytes, ...] = ()
    dropout: Dropout | None = None
    payload: bytes = b""

    def __post_init__(self) -> None:
        check_micro_batch(self.start, self.end, self.sequences, self.parts)


@dataclass(frozen=True, slots=True)
class HoldPart(Message):
    """Keep an adapter part of this block, least recently used parts making room. Answered by `Done`.

    payload: the safetensors file. Fails with `BAD_SHAPE`, `BAD_REQUEST`, `NOT_FINITE`, `OUT_OF_MEMORY`.
    """

    KIND: ClassVar[str] = "hold"
    request: int
    block: int
    part: bytes
    payload: bytes = b""


@dataclass(frozen=True, slots=True)
class Gradients(Message):
    """payload: the inputs' gradients in the request's encoding, then each part's as a safetensors file."""

    KIND: ClassVar[str] = "gradients"
    request: int
    part_bytes: tuple[int, ...] = ()
    payload: bytes = b""


# ends: a user's text, tokens and samples


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a chat, for the model's own chat template."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class TokenBias:
    """What is added to a token's logit: a large negative number forbids it, a large positive one forces it."""

    token: int
    bias: float


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen from logits. Noise is a function of (seed, row, position) alone.

    temperature: 0 is greedy. repetition_penalty counts tokens of prompt and text, presence_penalty of the
    text alone. stop: texts that end a row; they are not given out. logit_bias comes before all else.
    top_logprobs: how many alternatives to report.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int = 0
    logit_bias: tuple[TokenBias, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One row's token ids."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BeginGeneration(Message):
    """Tokenize prompts and remember them under `generation`. Answered by `Begun` with all rows' embeddings.

    Exactly one of prompts (texts), messages (one chat) and tokens is given. generated: tokens that each row
    already gave out, when a generation is resumed on a new worker; they count as input, and stop strings
    and penalties see them.
    """

    KIND: ClassVar[str] = "begin"
    request: int
    generation: int
    sampling: Sampling
    encoding: Encoding
    max_tokens: int  # prompt and new tokens of one row; longer prompts are `TOO_LONG`
    max_new_tokens: int = 0  # of one row, those in `generated` included; 0 is no limit of its own
    prompts: tuple[str, ...] = ()
    messages: tuple[ChatMessage, ...] = ()
    tokens: tuple[TokenRow, ...] = ()
    generated: tuple[TokenRow, ...] = ()


@dataclass(frozen=True, slots=True)
class EmbedPrompt(Message):
    """Hidden states of an adapter's virtual tokens, as the first block gets them. Answered by `Done`.

    payload: the part that holds them (see `training`). Fails with `BAD_REQUEST`, `BAD_SHAPE`, `NOT_FINITE`.
    """

    KIND: ClassVar[str] = "embed_prompt"
    request: int
    encoding: Encoding
    payload: bytes = b""


@dataclass(frozen=True, slots=True)
class Begun(Message):
    """payload: embeddings of all rows' tokens, row after row, in the wire encoding."""

    KIND: ClassVar[str] = "begun"
    request: int
    tokens: tuple[TokenRow, ...]  # prompt and already generated
    payload: bytes = b""


@dataclass(frozen=True, slots=True)
class Sample(Message):
    """Choose the next token of the rows listed. payload: their last hidden states `(len(rows), hidden_size)`.

    Raises through `Failed` `NOT_FINITE` if the hidden states are not. Answered by `Sampled`.
    """

    KIND: ClassVar[str] = "sample"
    request: int
    generation: int
    rows: tuple[int, ...]
    payload: bytes = b""


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token and the natural logarithm of its probability."""

    token: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Chosen:
    """One row's next token.

    row: its number among the prompts, whichever rows ended before. text: what became readable by it, without
    stop strings and what may become one; a row that ends gives out all that was held back. finish: "stop",
    "length" or None. logprob, top: of the model itself, before penalties, temperature and filters.
    """

    row: int
    token: int
    text: str
    finish: str | None = None
    logprob: float = 0.0
    top: tuple[Logprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Sampled(Message):
    """payload: embeddings of the chosen tokens of unfinished rows, in the order given."""

    KIND: ClassVar[str] = "sampled"
    request: int
    chosen: tuple[Chosen, ...]
    payload: bytes = b""


@dataclass(frozen=True, slots=True)
class EndGeneration(Message):
    """Forget a generation. Not answered."""

    KIND: ClassVar[str] = "end"
    generation: int


# worker → daemon


@dataclass(frozen=True, slots=True)
class Loading(Message):
    """Progress of loading; stage is `fetching`, `converting`, `hashing` or `loading`."""

    KIND: ClassVar[str] = "loading"
    stage: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Ready(Message):
    """The worker serves. tokens_per_s: measured on its own blocks: decode of one row, prefill, and (loaded)
    decode of several rows at once. launches_per_s: operations that its host can give the device.

    Said again when what it computes turns out to be faster or slower than that by much.
    folder: where the weights lie on this machine, as a Hugging Face folder.
    """

    KIND: ClassVar[str] = "ready"
    facts: ModelFacts
    start: int
    end: int
    dtype: DType
    quantization: str | None
    device: str
    weight_bytes: int
    cache_tokens: int
    decode_tokens_per_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    folder: str = ""
    loaded_tokens_per_s: float = 0.0
    launches_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Beat(Message):
    """Every second once the worker is ready. progress: grows with each block computed and while the worker
    is idle, so that one that hangs shows. tokens_per_s: since the beat before."""

    KIND: ClassVar[str] = "beat"
    progress: int
    queue: int
    free_tokens: int
    tokens_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Done(Message):
    """A request succeeded. held: tokens that a session begins with (`OpenCache`); rows: each of its rows."""

    KIND: ClassVar[str] = "done"
    request: int
    payload: bytes = b""
    held: int = 0
    rows: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Restored(Message):
    """held: tokens that each row of the base still has; zeros if the base is gone."""

    KIND: ClassVar[str] = "restored"
    request: int
    held: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Failed(Message):
    """A request failed; the worker goes on. request 0: loading failed, and the worker exits."""

    KIND: ClassVar[str] = "failed"
    request: int
    error: Plain  # CorollaError.to_wire

    @classmethod
    def of(cls, request: int, problem: CorollaError) -> Failed:
        """The message that reports an error."""
        return cls(request, problem.to_wire())

    def problem(self) -> CorollaError:
        """The error reported."""
        return error_from_wire(self.error)


TO_WORKER: Final = Vocabulary(
    Configure, OpenCache, Compute, Restore, NamePages, CloseCache, Forward, Backward, HoldPart, BeginGeneration, Sample,
    EndGeneration, EmbedPrompt,
)  # fmt: skip
FROM_WORKER: Final = Vocabulary(Loading, Ready, Beat, Done, Restored, Gradients, Begun, Sampled, Failed)

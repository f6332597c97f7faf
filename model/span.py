"""Blocks [start, end) of a model on one device: hidden states in, hidden states out.

Owns the blocks' weights and their KV cache. It knows neither sessions nor where a batch came from, and runs
in the thread that calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..protocol.errors import Code, error
from .adapters import Overlay, prompted, worn
from .attention import Batch, Placement
from .cache import Cache, CacheShape
from .checkpoint import Checkpoint
from .classic import Classic, Turns, classic
from .device import Ways, elementwise_of, ways_of
from .families import Rotary, Skeleton
from .graphs import Graphs
from .groups import Grouping
from .pool import PAGE_TOKENS, PageCopy, PageMove
from .quantization import Shelf
from .weights import fetch_parts, load_part

if TYPE_CHECKING:
    from .compiled.decoder import Decoder


class Span:
    """A run of a model's blocks.

    cache: None until `allocate`. num_blocks_computed: grows with every block of every forward pass, so that
    another thread can see that this one is alive.
    """

    def __init__(
        self, blocks: dict[int, nn.Module], shapes: dict[int, CacheShape], rotary: Rotary | None
    ) -> None:
        """For `load`, and for tests that bring their own blocks; `blocks` are consecutive."""
        self.start = min(blocks, default=0)
        self.end = self.start + len(blocks)
        self.cache_shapes = shapes
        self.windows: dict[int, int | None] = dict.fromkeys(blocks)
        self.cache: Cache | None = None
        self.num_blocks_computed = 0
        self.bytes = 0
        self.hidden_size = 0
        self.dtype = torch.float32
        self.device = torch.device("cpu")
        self._blocks = blocks
        self._rotary = rotary
        self._graphs: Graphs | None = None
        self._classics: dict[int, Classic] = {}
        self._decoder: Decoder | None = None

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        start: int,
        end: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        shelf: Shelf | None = None,
        memory_bytes: int = 0,
        report: Callable[[int, int], None] | None = None,
    ) -> Span:
        """Load just these blocks' tensors, block by block.

        shelf: linear layers are quantized in its scheme, and kept there.
        memory_bytes: limit for the weights; 0 is none. report: called with bytes done and in total.
        Raises `BLOCKS_OUT_OF_RANGE`, `DOES_NOT_FIT`, `DAMAGED_WEIGHTS`, `UNREADABLE`, and what fetching from
        the hub may raise.
        """
        skeleton = Skeleton(checkpoint.config)
        if not 0 <= start < end <= skeleton.num_blocks:
            raise error(
                Code.BLOCKS_OUT_OF_RANGE,
                f"blocks {start}:{end} of a model with {skeleton.num_blocks}",
                f"choose a range within 0:{skeleton.num_blocks}",
            )
        sizes = [
            skeleton.block_bytes(block, dtype, shelf.scheme if shelf else None) for block in range(start, end)
        ]
        _check_fits(start, sizes, memory_bytes)
        fetch_parts(checkpoint, skeleton, [skeleton.block_prefix(block) for block in range(start, end)])
        blocks: dict[int, nn.Module] = {}
        shapes: dict[int, CacheShape] = {}
        windows: dict[int, int | None] = {}
        for block in range(start, end):
            module = skeleton.take_block(block)
            shapes[block] = skeleton.cache_shape(module)
            windows[block] = skeleton.window(module)
            prefix = skeleton.block_prefix(block)
            blocks[block] = load_part(checkpoint, skeleton, prefix, module, dtype, device, shelf)
            if report is not None:
                report(sum(sizes[: len(blocks)]), sum(sizes))
        rotary = skeleton.rotary()
        span = cls(blocks, shapes, rotary.to(device) if rotary is not None else None)
        span.windows = windows
        span.bytes = sum(sizes)
        span.hidden_size = skeleton.hidden_size
        span.dtype = dtype
        span.device = device
        span.recognise()
        return span

    def recognise(self) -> None:
        """Find the blocks that are classic ones, which are then computed as such."""
        pieces = elementwise_of(self.device)
        for block, module in self._blocks.items():
            form = None
            if self._rotary is not None:
                form = classic(module, block, self.windows[block], self._rotary, pieces)
            if form is not None:
                self._classics[block] = form

    @property
    def depends_on_length(self) -> bool:
        """Whether what is computed of a token follows the length that its row was opened for."""
        return self._rotary is not None and self._rotary.is_length_dependent

    @property
    def is_compiled(self) -> bool:
        """Whether a few tokens go through it by kernels of our own."""
        return self._decoder is not None

    @property
    def num_recordings(self) -> int:
        """Sizes of passes that are played again."""
        return self._graphs.num_recordings if self._graphs is not None else 0

    @property
    def modules(self) -> Mapping[int, nn.Module]:
        """Block → its module, to look at."""
        return self._blocks

    def allocate(
        self,
        num_pages: int,
        page_tokens: int = PAGE_TOKENS,
        *,
        num_host_pages: int = 0,
        grouping: Grouping | None = None,
        ways: Ways | None = None,
    ) -> Cache:
        """Make the KV cache of all blocks, and room in host memory for its pages. Raises `OUT_OF_MEMORY`.

        grouping: of the blocks into tables; without one all pages are kept in all blocks. ways: others than suit
        the device best.
        """
        ways = ways or ways_of(self.device)
        self.cache = Cache(
            self.cache_shapes,
            num_pages,
            self.dtype,
            self.device,
            page_tokens,
            num_host_pages=num_host_pages,
            grouping=grouping,
            tabled=ways.tabled,
        )
        if ways.is_compiled:
            self._decoder = self._decoder_with(self.cache)
        if ways.recorder is not None and not self.depends_on_length:
            self._graphs = Graphs(ways.recorder, self.cache, self._compute)
        return self.cache

    def copy_pages(self, copies: Iterable[PageCopy]) -> None:
        """Carry out a step's copies, before its forward pass."""
        if self.cache is not None:
            for source, target in copies:
                self.cache.copy_page(source, target)

    def move_pages(self, moves: Iterable[PageMove]) -> None:
        """Copy pages to host memory, and back."""
        if self.cache is not None:
            self.cache.move_pages(moves)

    def forward(
        self,
        hidden: Tensor,
        batch: Batch,
        blocks: tuple[int, int] | None = None,
        overlays: Sequence[Overlay] = (),
    ) -> Tensor:
        """Hidden states after blocks [a, b) of the span, by default all of it.

        hidden: (num_tokens, hidden_size), the batch's segments one after the other, in the span's dtype and
        on its device. Segments with pages attend their rows' pages and are written there; a stateless
        batch leaves nothing behind, and gradients of `hidden` flow if it asks for them.
        overlays: adapters over some of the tokens, in the order of these; no token is under two.
        Raises `BAD_SHAPE`, `BLOCKS_OUT_OF_RANGE`.
        """
        first, last = self._check(hidden, batch, blocks)
        if not batch.num_tokens:
            return hidden
        if batch.is_stateless:
            return self._run(hidden, Placement(batch, None, self.device), range(first, last), overlays)
        with torch.inference_mode():
            if self._graphs is not None and not overlays:
                played = self._graphs.forward(hidden, batch, range(first, last))
                if played is not None:
                    self.num_blocks_computed += last - first
                    return played
            return self._run(hidden, Placement(batch, self.cache, self.device), range(first, last), overlays)

    def _compute(self, hidden: Tensor, placement: Placement, blocks: range) -> Tensor:
        return self._run(hidden, placement, blocks, ())

    def _run(
        self, hidden: Tensor, placement: Placement, blocks: range, overlays: Sequence[Overlay]
    ) -> Tensor:
        states = hidden  # (num_tokens, hidden_size)
        positions = placement.positions[None]
        embeddings: dict[int, Any] = dict.fromkeys(blocks)
        if self._rotary is not None:
            embeddings = self._rotary(states[None], placement, blocks)
        classics = self._classics if not overlays and torch.is_inference_mode_enabled() else {}
        if classics and self._decoder is not None and self._decoder.takes(placement):
            embedded = embeddings[blocks.start]
            if all(embeddings[block] is embedded for block in blocks):
                states = self._decoder.forward(states, Turns.of(embedded), placement, blocks)
                self.num_blocks_computed += len(blocks)
                return states
        turns: dict[int, Turns] = {}
        for block in blocks:
            form = classics.get(block)
            if form is not None:
                embedded = embeddings[block]
                if id(embedded) not in turns:
                    turns[id(embedded)] = Turns.of(embedded)
                states = form.forward(states, turns[id(embedded)], placement)
                self.num_blocks_computed += 1
                continue
            module = self._blocks[block]
            with worn(module, block, overlays, len(states)):
                states = module(
                    prompted(states, block, overlays)[None],
                    attention_mask=None,
                    position_ids=positions,
                    position_embeddings=embeddings[block],
                    placement=placement,
                )[0]
            self.num_blocks_computed += 1
        return states

    def _decoder_with(self, cache: Cache) -> Decoder | None:
        """All blocks as compiled code, where they are of the form for which there is some."""
        from .compiled.decoder import Decoder, are_walkable  # here, because numba may be missing

        forms = list(self._classics.values())
        is_known = self.dtype in (torch.float32, torch.bfloat16)
        if not is_known or len(forms) < len(self._blocks) or not are_walkable(forms):
            return None
        return Decoder(self._classics, cache)

    def _check(self, hidden: Tensor, batch: Batch, blocks: tuple[int, int] | None) -> tuple[int, int]:
        first, last = blocks or (self.start, self.end)
        if not self.start <= first < last <= self.end:
            raise error(
                Code.BLOCKS_OUT_OF_RANGE, f"blocks {first}:{last} of the span {self.start}:{self.end}"
            )
        expected = (batch.num_tokens, self.hidden_size)
        if tuple(hidden.shape) != expected:
            raise error(Code.BAD_SHAPE, f"hidden states {tuple(hidden.shape)}, expected {expected}")
        if self.cache is None and not batch.is_stateless:
            raise error(Code.INTERNAL, "a batch with pages on a span without a cache")
        return first, last


def _check_fits(start: int, sizes: list[int], memory_bytes: int) -> None:
    if not memory_bytes or sum(sizes) <= memory_bytes:
        return
    num_fitting, used = 0, 0
    for size in sizes:
        used += size
        if used > memory_bytes:
            break
        num_fitting += 1
    remedy = (
        f"choose {start}:{start + num_fitting}"
        if num_fitting
        else "choose a smaller model or a smaller dtype"
    )
    raise error(
        Code.DOES_NOT_FIT,
        f"blocks {start}:{start + len(sizes)} take {sum(sizes):,} bytes, {memory_bytes:,} are there",
        remedy,
        num_fitting=num_fitting,
    )

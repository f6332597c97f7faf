"""From `Configure` to blocks, ends and a cache on a device: how much fits, and what is loaded.

Owns the worker's memory plan. Weights come first, then the cache; what is asked for explicitly either fits
or is refused with what would.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from ..protocol.errors import Code, error
from ..protocol.tensors import DType, Quantization
from ..protocol.work import Configure, ModelFacts, Ready
from .cache import CacheShape, page_bytes
from .checkpoint import Checkpoint, open_checkpoint
from .encodings import torch_dtype
from .ends import Ends
from .families import Skeleton
from .generation import end_tokens
from .groups import Grouping, grouped
from .linear import check_scheme
from .pool import PAGE_TOKENS
from .profile import Speed, measure
from .quantization import Shelf, scheme_of
from .sessions import Capacity
from .span import Span
from .training import Room

Report = Callable[[str, int, int], None]  # stage, bytes done, bytes in total

_SHARE_OF_FREE: Final = 0.8  # the rest is for activations, and for whatever else runs there
# A cache nobody gave a size: eight sessions of 8192 tokens. Memory of a CPU is touched as they grow.
_DEFAULT_CACHE_TOKENS: Final = 65536
_LEAST_CACHE_TOKENS: Final = 2048  # blocks without room for one conversation serve nobody
# Sessions that are idle: beside a GPU some times the cache, within a part of the machine's memory.
_HOST_TIMES: Final = 2
_HOST_SHARE: Final = 8
_SPARE: Final = 16  # of the memory, kept back from the cache for adapters and training
_ADAPTERS: Final = 4  # of what is spare, for adapters; the rest is for activations


_NO_GROUPS: Final = Grouping.whole(())


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a worker computes with. end_tokens: those that end a text. folder: where the weights lie."""

    facts: ModelFacts
    folder: Path
    dtype: DType
    quantization: Quantization | None
    device: torch.device
    span: Span | None
    ends: Ends | None
    end_tokens: frozenset[int]
    num_pages: int
    num_host_pages: int
    grouping: Grouping
    room: Room
    speed: Speed

    @property
    def capacity(self) -> Capacity:
        """What the span's cache holds."""
        depends_on_length = self.span is not None and self.span.depends_on_length
        return Capacity(self.num_pages, self.num_host_pages, self.grouping, depends_on_length)

    def ready(self) -> Ready:
        """What the daemon is told."""
        span, ends = self.span, self.ends
        return Ready(
            facts=self.facts,
            start=span.start if span else 0,
            end=span.end if span else 0,
            dtype=self.dtype,
            quantization=self.quantization.value if self.quantization else None,
            device=str(self.device),
            weight_bytes=(span.bytes if span else 0) + (ends.bytes if ends else 0),
            cache_tokens=self.num_pages // self.grouping.num_groups * PAGE_TOKENS,
            decode_tokens_per_s=self.speed.decode_tokens_per_s,
            prefill_tokens_per_s=self.speed.prefill_tokens_per_s,
            folder=str(self.folder),
            loaded_tokens_per_s=self.speed.loaded_tokens_per_s,
            launches_per_s=self.speed.launches_per_s,
        )


def load(ask: Configure, report: Report) -> Loaded:
    """Load what was asked for.

    Raises `BAD_CONFIG`, `DEVICE_LOST`, `BLOCKS_OUT_OF_RANGE`, `DOES_NOT_FIT`, `OUT_OF_MEMORY`, and what
    `open_checkpoint` and `Span.load` raise.
    """
    device = choose_device(ask.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where passes are recorded, and kernels of our own launched
    scheme = scheme_of(ask.quantization)
    check_scheme(scheme, device)
    dtype = ask.dtype or (DType.BFLOAT16 if device.type == "cuda" else DType.FLOAT32)
    checkpoint = open_checkpoint(ask.source, Path(ask.cache_folder), report, ask.disk_bytes)
    facts = checkpoint.facts()
    plan = make_plan(ask, checkpoint, torch_dtype(dtype), device)
    ends = None
    if ask.ends:
        # In the head fewer than eight bits cost more accuracy than in any block.
        head = Shelf.of(Path(ask.cache_folder), facts.fingerprint, Quantization.INT8) if scheme else None
        ends = Ends.load(checkpoint, torch_dtype(dtype), device, shelf=head, memory_bytes=plan.memory_bytes)
    span, speed = None, Speed()
    if plan.end > plan.start:

        def report_blocks(done: int, total: int) -> None:
            report("loading", done, total)

        shelf = Shelf.of(Path(ask.cache_folder), facts.fingerprint, scheme) if scheme else None
        span = Span.load(
            checkpoint, plan.start, plan.end, torch_dtype(dtype), device, shelf=shelf, report=report_blocks
        )
        span.allocate(plan.num_pages, num_host_pages=plan.num_host_pages, grouping=plan.grouping)
        speed = measure(span)
    _give_back()
    if checkpoint.facts().fingerprint != facts.fingerprint:
        raise error(
            Code.DAMAGED_WEIGHTS,
            f"the files in {checkpoint.folder} changed while they were loaded",
            "start the worker again when they are whole: systemctl reload corollad, or daemonctl pause and resume",
        )
    return Loaded(
        facts=facts,
        dtype=dtype,
        quantization=scheme,
        device=device,
        span=span,
        ends=ends,
        end_tokens=end_tokens(checkpoint.folder, checkpoint.config),
        folder=checkpoint.folder,
        num_pages=plan.num_pages,
        num_host_pages=plan.num_host_pages,
        grouping=plan.grouping,
        room=make_room(plan.spare_bytes),
        speed=speed,
    )


def _give_back() -> None:
    """Let the system have the memory that loading freed, and that glibc keeps: 44 MB after 14 MB of experts in NF4."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def choose_device(name: str) -> torch.device:
    """The device of this name; `auto` is the first GPU, or the CPU. Raises `BAD_CONFIG`, `DEVICE_LOST`."""
    num_gpus = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda:0" if num_gpus else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as problem:
        raise error(
            Code.BAD_CONFIG, f"unknown device {name!r}", "choose auto, cpu, cuda or cuda:N"
        ) from problem
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        raise error(
            Code.DEVICE_LOST,
            f"device {name}, but torch sees {num_gpus} GPUs here",
            "see whether its driver finds it (nvidia-smi), and whether torch is built for it; or choose cpu",
        )
    if device.type not in ("cpu", "cuda"):
        raise error(Code.BAD_CONFIG, f"device {name} is not supported", "choose auto, cpu, cuda or cuda:N")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def free_bytes(device: torch.device) -> int:
    """Memory that could be had now: of the device, or of this machine within its control group."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # no Linux: half of what is built in is a guess on the safe side
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except OSError:  # the root group has neither file: no limit but the machine's
        return available
    return available if limit == "max" else max(0, min(available, int(limit) - used))


@dataclass(frozen=True, slots=True)
class Plan:
    """Blocks [start, end) to load, and pages of cache beside them. memory_bytes: for all of it; spare_bytes: of
    that, left for adapters and training. num_host_pages: in host memory, for sessions that are idle."""

    start: int
    end: int
    num_pages: int
    memory_bytes: int
    spare_bytes: int = 0
    num_host_pages: int = 0
    grouping: Grouping = _NO_GROUPS


def make_room(spare_bytes: int) -> Room:
    """What adapters and the running micro-batch may take of this."""
    adapters = spare_bytes // _ADAPTERS
    return Room(adapters=adapters, activations=spare_bytes - adapters)


@dataclass(frozen=True, slots=True)
class _Costs:
    """Bytes of each block's weights, of one page in each block, and of the ends if they are wanted.

    windows, shapes: of each block's attention, and of its cache.
    """

    weights: tuple[int, ...]
    pages: tuple[int, ...]
    ends: int
    windows: tuple[int | None, ...]
    shapes: tuple[CacheShape, ...]


def make_plan(ask: Configure, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Plan:
    """Which blocks, and how large a cache. Raises `BLOCKS_OUT_OF_RANGE` and `DOES_NOT_FIT`."""
    skeleton = Skeleton(checkpoint.config)
    scheme = scheme_of(ask.quantization)
    num_blocks = skeleton.num_blocks
    is_open = (ask.start, ask.end) == (0, -1)
    if not is_open and not (0 <= ask.start <= ask.end <= num_blocks):
        raise error(
            Code.BLOCKS_OUT_OF_RANGE,
            f"blocks {ask.start}:{ask.end} of a model with {num_blocks}",
            f"choose a range within 0:{num_blocks}",
        )
    memory = ask.memory_bytes or int(_SHARE_OF_FREE * free_bytes(device))
    modules = [skeleton.take_block(block) for block in range(num_blocks)]
    shapes = tuple(skeleton.cache_shape(module) for module in modules)
    costs = _Costs(
        weights=tuple(skeleton.block_bytes(block, dtype, scheme) for block in range(num_blocks)),
        pages=tuple(page_bytes([shape], dtype) for shape in shapes),
        ends=skeleton.ends_bytes(dtype, Quantization.INT8 if scheme else None) if ask.ends else 0,
        windows=tuple(skeleton.window(module) for module in modules),
        shapes=shapes,
    )
    least_pages = -(-(ask.cache_tokens or _LEAST_CACHE_TOKENS) // PAGE_TOKENS)
    start = ask.start
    num_fitting = fitting(costs.weights[start:], costs.pages[start:], least_pages, memory - costs.ends)
    end = start + num_fitting if is_open else ask.end
    if (is_open and not num_fitting) or end - start > num_fitting or costs.ends > memory:
        raise _does_not_fit(start, max(end, start + 1), costs, least_pages, memory, num_fitting)
    if start == end:
        return Plan(start, end, 0, memory)
    room = memory - costs.ends - sum(costs.weights[start:end])
    blocks = range(start, end)
    grouping = grouped({b: costs.windows[b] for b in blocks}, {b: costs.shapes[b] for b in blocks})
    # Of all groups together: so much as every page's worth of a row's tokens takes at first.
    page = sum(costs.pages[start:end]) * grouping.num_groups * grouping.size // len(blocks)
    num_pages = least_pages
    if not ask.cache_tokens:
        most = -(-_DEFAULT_CACHE_TOKENS // PAGE_TOKENS)
        spare = memory // _SPARE
        num_pages = max(least_pages, min((room - spare) // page, most))
    spare = room - num_pages * page
    num_host_pages = _num_host_pages(ask, num_pages, page, spare - memory // _SPARE, device)
    if device.type == "cpu":
        spare -= num_host_pages * page
    return Plan(
        start,
        end,
        num_pages * grouping.num_groups,
        memory,
        max(spare, memory // _SPARE),
        num_host_pages * grouping.num_groups,
        grouping,
    )


def _num_host_pages(ask: Configure, num_pages: int, page: int, spare: int, device: torch.device) -> int:
    """Room for idle sessions: on a CPU out of the same memory, beside a GPU out of what the machine has free."""
    if ask.parked_tokens >= 0:
        return -(-ask.parked_tokens // PAGE_TOKENS)
    share = spare // 2 if device.type == "cpu" else free_bytes(torch.device("cpu")) // _HOST_SHARE
    return max(0, min(share // page, num_pages * _HOST_TIMES))


def fitting(weights: tuple[int, ...], pages: tuple[int, ...], num_pages: int, memory: int) -> int:
    """How many of these blocks, from the first, fit with `num_pages` pages of cache each."""
    count = 0
    for weight, page in zip(weights, pages, strict=True):
        memory -= weight + num_pages * page
        if memory < 0:
            break
        count += 1
    return count


def _does_not_fit(
    start: int, end: int, costs: _Costs, num_pages: int, memory: int, num_fitting: int
) -> Exception:
    weights, cache = sum(costs.weights[start:end]), num_pages * sum(costs.pages[start:end])
    ends = f", the ends {costs.ends:,}" if costs.ends else ""
    remedy = (
        "choose a smaller model, a smaller dtype, --quantization or a smaller cache, or allow more memory"
    )
    if num_fitting:
        remedy = f"choose blocks {start}:{start + num_fitting}, a smaller dtype or a smaller cache"
    return error(
        Code.DOES_NOT_FIT,
        f"blocks {start}:{end} take {weights:,} bytes{ends}, and {num_pages * PAGE_TOKENS} tokens of cache"
        f" {cache:,}; {memory:,} bytes are there",
        remedy,
        num_fitting=num_fitting,
    )

"""Which workers a configuration asks for, and which of those that run are as it wants them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ...protocol.errors import Code, CorollaError, error
from ...protocol.tensors import DType
from ...protocol.work import Configure, ModelFacts, ModelSource, Ready
from ..config import Config
from ..serving.priority import half_of_cores
from ..serving.workers import Worker, WorkerState
from ..swarm.models import describe, is_allowed


def as_configured(config: Config, cache_folder: str, source: ModelSource) -> Configure:
    """A worker without blocks on the CPU, with everything else as the configuration says."""
    return Configure(
        source,
        cache_folder,
        device="cpu",
        dtype=DType(config.dtype) if config.dtype else None,
        quantization=config.quantization or None,
        threads=config.threads,
        memory_bytes=config.memory_bytes,
        cache_tokens=config.cache_tokens,
        disk_bytes=config.disk_bytes,
    )


def spans_wanted(config: Config, cache_folder: str, source: ModelSource) -> tuple[Configure, ...]:
    """The workers of spans: one for each device, or none."""
    start, end = config.span() or (0, -1)
    if start == end:
        return ()
    plain = as_configured(config, cache_folder, source)
    lent = replace(plain, start=start, end=end, threads=config.threads or half_of_cores())
    return tuple(replace(lent, device=device) for device in config.device)


def matched(
    config: Config, wanted: Iterable[Configure], running: Iterable[tuple[Worker, Ready | None]]
) -> tuple[list[Worker], list[Configure]]:
    """The workers that may stay, and what is wanted beside them. running: with what each served last."""
    left, kept, missing = list(running), list[Worker](), list[Configure]()
    for configure in wanted:
        fits = (one for one in left if _is_as_wanted(config, configure, *one))
        if (found := next(fits, None)) is None:
            missing.append(configure)
        else:
            left.remove(found)
            kept.append(found[0])
    return kept, missing


def _is_as_wanted(config: Config, wanted: Configure, worker: Worker, ready: Ready | None) -> bool:
    if worker.state is WorkerState.FAILED or worker.is_polite != config.low_priority:
        return False
    if ready is not None and not is_allowed(ready.facts, config.models):
        return False
    has = replace(worker.configure, disk_bytes=wanted.disk_bytes)
    if config.blocks == "auto":  # wherever it is by now
        has = replace(has, start=wanted.start, end=wanted.end)
    return has == wanted


def not_allowed(facts: ModelFacts, allowed: Sequence[str]) -> CorollaError:
    """What a worker is told whose model its owner does not lend."""
    return error(
        Code.BAD_CONFIG,
        f"{describe(facts)} is none of the models that may be lent here: {', '.join(allowed)}",
        "choose another with `model`, or add it to `models`",
    )

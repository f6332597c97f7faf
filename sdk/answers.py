"""What the daemon's plain answers become in Python: the typed views of `protocol/control`.

Shared by the blocking and the asynchronous client. An answer that does not have its form is
`PROTOCOL_VIOLATION`.
"""

from __future__ import annotations

from typing import Any, TypeVar

from ..protocol.control import Item, OpenModelSession, Rebalance
from ..protocol.errors import Code, error
from ..protocol.limits import MAX_ROWS
from ..protocol.messages import from_plain
from ..protocol.netcheck import PingPeer
from ..protocol.tensors import Encoding
from ..protocol.views import ModelView
from .generation import as_encoding
from .parts import Adapter

T = TypeVar("T")


def one(cls: type[T], value: Any) -> T:
    """The view in an answer."""
    return from_plain(cls, value)


def several(cls: type[T], value: Any) -> tuple[T, ...]:
    """The views in an answer that lists them."""
    if not isinstance(value, (list, tuple)):
        raise error(Code.PROTOCOL_VIOLATION, f"expected a list of {cls.__name__}, not {type(value).__name__}")
    return tuple(from_plain(cls, item) for item in value)


def item(cls: type[T], message: Any) -> T | None:
    """The view in an item, None for the end of the answer."""
    return from_plain(cls, message.value) if isinstance(message, Item) else None


def rebalance_request(dry_run: bool, to: tuple[int, int] | None, worker: int | None) -> Rebalance:
    """The arguments of `rebalance`. Raises `BAD_REQUEST` for a span that holds no block."""
    start, end = to or (0, 0)
    if to is not None and not 0 <= start < end:
        raise error(Code.BAD_REQUEST, f"blocks {start}:{end} are none", "give START:END such as 0:15")
    return Rebalance(dry_run, start, end, -1 if worker is None else worker)


def ping_request(peer: str, count: int, timeout_s: float) -> PingPeer:
    """The arguments of `ping`. Raises `BAD_REQUEST` for what is out of range."""
    try:
        return PingPeer(peer, count, timeout_s)
    except ValueError as problem:
        raise error(Code.BAD_REQUEST, f"ping: {problem}") from problem


def find_model(name: str, models: tuple[ModelView, ...]) -> ModelView:
    """The served model of this name, `NAME@FINGERPRINT_PREFIX`, or hub id.

    Raises `UNKNOWN_MODEL` listing what is served, and `AMBIGUOUS_MODEL` listing the fingerprints.
    """
    wanted, _, prefix = name.partition("@")
    found = [
        model
        for model in models
        if wanted in (model.name, model.hub_id) and model.fingerprint.startswith(prefix)
    ]
    if not found:
        served = ", ".join(sorted(model.name for model in models)) or "none"
        raise error(
            Code.UNKNOWN_MODEL,
            f"no model {name!r} in this swarm; served: {served}",
            "choose one of these, or serve it: corollad --model …",
        )
    if len({model.fingerprint for model in found}) > 1:
        choices = ", ".join(f"{model.name}@{model.fingerprint[:8]}" for model in found)
        raise error(Code.AMBIGUOUS_MODEL, f"{name!r} names {len(found)} models", f"choose one: {choices}")
    return found[0]


def session_request(
    model: str,
    blocks: tuple[int, int] | None,
    rows: int,
    max_length: int,
    encoding: Encoding | str | None,
    wait_s: float,
    adapter: Adapter | None = None,
) -> OpenModelSession:
    """The call that opens a session. Raises `BLOCKS_OUT_OF_RANGE` and `BAD_REQUEST`."""
    start, end = (0, -1) if blocks is None else blocks
    if start < 0 or (end != -1 and end <= start):
        raise error(
            Code.BLOCKS_OUT_OF_RANGE, f"blocks {start}:{end}", "give (start, end) with 0 <= start < end"
        )
    if not 1 <= rows <= MAX_ROWS:
        raise error(Code.BAD_REQUEST, f"rows={rows}, expected 1 to {MAX_ROWS}")
    if max_length < 1:
        raise error(Code.BAD_REQUEST, f"max_length={max_length}, expected 1 or more")
    names, soft = (adapter.names, adapter.soft.name) if adapter is not None else ((), b"")
    return OpenModelSession(model, start, end, rows, max_length, as_encoding(encoding), wait_s, names, soft)

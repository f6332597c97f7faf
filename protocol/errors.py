"""What can go wrong across a boundary: a stable code, whose fault it is, and the remedy.

An error crosses a socket as the map of `CorollaError.to_wire` and comes out on the other side as the
same Python type. Codes are part of the public face: they may be added, never renamed.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final


class Fault(StrEnum):
    """Who has to act for the error to go away."""

    USER = "user"  # the request itself is wrong
    PEER = "peer"  # another daemon misbehaved
    SELF = "self"  # this machine: its disk, its memory, a defect in Corolla
    NOBODY = "nobody"  # the way of the world: something is busy, gone or not there yet


class Code(StrEnum):
    """Stable names of errors."""

    # what a user asked for
    BAD_REQUEST = "bad_request"
    UNKNOWN_MODEL = "unknown_model"
    AMBIGUOUS_MODEL = "ambiguous_model"
    UNSUPPORTED_FAMILY = "unsupported_family"
    GATED_MODEL = "gated_model"
    BLOCKS_OUT_OF_RANGE = "blocks_out_of_range"
    TOO_LONG = "too_long"
    BAD_SHAPE = "bad_shape"
    BAD_DTYPE = "bad_dtype"
    NOT_FINITE = "not_finite"
    UNKNOWN_SESSION = "unknown_session"
    BAD_CONFIG = "bad_config"
    BAD_TOKEN = "bad_token"  # noqa: S105 - the name of an error
    PERMISSION_DENIED = "permission_denied"
    NOT_INVITED = "not_invited"
    CANCELLED = "cancelled"
    # this machine
    DOES_NOT_FIT = "does_not_fit"
    STATE_IN_USE = "state_in_use"
    PORT_TAKEN = "port_taken"
    NO_DAEMON = "no_daemon"
    UNREADABLE = "unreadable"
    DISK_FULL = "disk_full"
    DAMAGED_WEIGHTS = "damaged_weights"
    OUT_OF_MEMORY = "out_of_memory"
    WORKER_LOST = "worker_lost"
    DEVICE_LOST = "device_lost"
    INTERNAL = "internal"
    # the swarm's weather
    NO_SWARM = "no_swarm"
    NO_PEERS = "no_peers"
    BLOCKS_UNSERVED = "blocks_unserved"
    NOT_READY = "not_ready"
    BUSY = "busy"
    DRAINING = "draining"  # what served this goes elsewhere in a moment; others serve it
    TIMEOUT = "timeout"
    SESSION_LOST = "session_lost"
    PEER_LOST = "peer_lost"
    LINK_FAILED = "link_failed"
    STALE_EPOCH = "stale_epoch"
    HISTORY_GAP = "history_gap"
    HISTORY_GONE = "history_gone"
    ADAPTER_MISSING = "adapter_missing"
    UNSUPPORTED = "unsupported"
    # a peer broke the rules
    PROTOCOL_VIOLATION = "protocol_violation"
    LIMIT_EXCEEDED = "limit_exceeded"
    BAD_RECORD = "bad_record"
    WRONG_SWARM = "wrong_swarm"
    BAD_ANSWER = "bad_answer"


class CorollaError(Exception):
    """Anything that Corolla reports: a code, one line of what happened, and what to do next.

    details: small plain values (numbers, strings) that programs may read, such as
    `first_position` of a `HISTORY_GAP` or `generated` of an interrupted generation.
    """

    fault: Fault = Fault.SELF

    def __init__(self, code: Code, message: str, remedy: str = "", /, **details: Any) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.remedy = remedy
        self.details: dict[str, Any] = details

    def __str__(self) -> str:
        return f"{self.message} ({self.remedy})" if self.remedy else self.message

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.code.value!r}, {self.message!r})"

    def __reduce__(self) -> Any:
        return (error_from_wire, (self.to_wire(),))

    def to_wire(self) -> dict[str, Any]:
        """A map of plain values for the far side's `error_from_wire`."""
        wire: dict[str, Any] = {"code": self.code.value, "message": self.message}
        if self.remedy:
            wire["remedy"] = self.remedy
        if self.details:
            wire["details"] = self.details
        return wire


class UserError(CorollaError):
    """The request is wrong; asking again unchanged cannot help."""

    fault = Fault.USER


class PeerError(CorollaError):
    """Another daemon broke the protocol or answered wrongly."""

    fault = Fault.PEER


class LocalError(CorollaError):
    """This machine cannot do it: disk, memory, ports, or a defect of ours."""

    fault = Fault.SELF


class NotAvailableError(CorollaError):
    """Nobody's fault: what is needed is busy, gone, or not there yet; later it may work."""

    fault = Fault.NOBODY


_USER: Final = (
    Code.BAD_REQUEST, Code.UNKNOWN_MODEL, Code.AMBIGUOUS_MODEL, Code.UNSUPPORTED_FAMILY, Code.GATED_MODEL,
    Code.BLOCKS_OUT_OF_RANGE, Code.TOO_LONG, Code.BAD_SHAPE, Code.BAD_DTYPE, Code.NOT_FINITE,
    Code.UNKNOWN_SESSION, Code.BAD_CONFIG, Code.BAD_TOKEN, Code.PERMISSION_DENIED, Code.NOT_INVITED,
    Code.CANCELLED,
)  # fmt: skip
_LOCAL: Final = (
    Code.DOES_NOT_FIT, Code.STATE_IN_USE, Code.PORT_TAKEN, Code.NO_DAEMON, Code.UNREADABLE, Code.DISK_FULL,
    Code.DAMAGED_WEIGHTS, Code.OUT_OF_MEMORY, Code.WORKER_LOST, Code.DEVICE_LOST,
    Code.INTERNAL,
)  # fmt: skip
_PEER: Final = (
    Code.PROTOCOL_VIOLATION, Code.LIMIT_EXCEEDED, Code.BAD_RECORD, Code.WRONG_SWARM, Code.BAD_ANSWER,
)  # fmt: skip
_TYPES: Final[Mapping[Code, type[CorollaError]]] = {
    **dict.fromkeys(Code, NotAvailableError),
    **dict.fromkeys(_USER, UserError),
    **dict.fromkeys(_LOCAL, LocalError),
    **dict.fromkeys(_PEER, PeerError),
}


def error(code: Code, message: str, remedy: str = "", /, **details: Any) -> CorollaError:
    """The error of this code, as the type that says whose fault it is. Use as `raise error(…)`."""
    return _TYPES[code](code, message, remedy, **details)


def error_from_wire(wire: object) -> CorollaError:
    """The error that `to_wire` described; a code or shape unknown here becomes `INTERNAL`."""
    if not isinstance(wire, Mapping):
        return error(Code.INTERNAL, f"an error of unreadable form: {type(wire).__name__}")
    message = str(wire.get("message", ""))[:4096]
    remedy = str(wire.get("remedy", ""))[:4096]
    details = wire.get("details")
    try:
        code = Code(str(wire.get("code")))
    except ValueError:
        return error(Code.INTERNAL, f"{wire.get('code')}: {message}"[:4096], remedy)
    clean = {str(k): v for k, v in details.items()} if isinstance(details, Mapping) else {}
    for taken in ("code", "message", "remedy"):
        clean.pop(taken, None)
    return error(code, message, remedy, **clean)


class Exit:
    """Exit codes of `corollad` and `daemonctl`."""

    OK: Final = 0
    ERROR: Final = 1
    USAGE: Final = 2
    NO_DAEMON: Final = 3
    PERMISSION: Final = 4
    TIMEOUT: Final = 5
    NOT_READY: Final = 6
    DEGRADED: Final = 7


_EXITS: Final[Mapping[Code, int]] = {
    Code.BAD_REQUEST: Exit.USAGE,
    Code.BAD_CONFIG: Exit.USAGE,
    Code.BAD_TOKEN: Exit.USAGE,
    Code.NO_DAEMON: Exit.NO_DAEMON,
    Code.PERMISSION_DENIED: Exit.PERMISSION,
    Code.NOT_INVITED: Exit.PERMISSION,
    Code.TIMEOUT: Exit.TIMEOUT,
    Code.NO_SWARM: Exit.NOT_READY,
    Code.NO_PEERS: Exit.NOT_READY,
    Code.NOT_READY: Exit.NOT_READY,
    Code.BLOCKS_UNSERVED: Exit.NOT_READY,
    Code.BUSY: Exit.NOT_READY,
}


def exit_code(code: Code) -> int:
    """The process exit code that reports an error of this code."""
    return _EXITS.get(code, Exit.ERROR)

"""What one peer, or one program on this machine, may do to a daemon: the limits as a table for people.

The numbers are those of `limits.py`; each row says why it is as large as it is, and not larger.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from . import limits


class Bound(NamedTuple):
    """One limit. of: whom or what it bounds; unit: of the value, "" of a number of things."""

    name: str
    value: float
    unit: str
    of: str
    reason: str


_B, _BS, _S, _N, _NS = "bytes", "bytes/s", "s", "", "1/s"

BOUNDS: Final = (
    # connections
    Bound("connections", limits.MAX_CONNECTIONS, _N, "all peers", "a file descriptor and three tasks each"),
    Bound(
        "connections",
        limits.MAX_CONNECTIONS_PER_PEER,
        _N,
        "a peer",
        "two that dial each other at once have two",
    ),
    Bound(
        "connections",
        limits.MAX_CONNECTIONS_PER_ORIGIN,
        _N,
        "a /24, /48 or private address",
        "no network takes every place",
    ),
    Bound(
        "handshakes", limits.MAX_HANDSHAKES, _N, "all strangers", "the largest crowd gives way to newcomers"
    ),
    Bound("handshakes", limits.HANDSHAKES_PER_S, _NS, "an origin", "four milliseconds of a core each"),
    Bound("handshake", limits.HANDSHAKE_TIMEOUT_S, _S, "a connection", "two round trips, and a slow machine"),
    Bound(
        "greeting",
        limits.HELLO_TIMEOUT_S,
        _S,
        "a connection",
        "who has not shown its swarm by then is parted with",
    ),
    Bound("greetings", limits.GREETINGS_PER_S, _NS, "a peer", "each may bring 64 signatures to be checked"),
    Bound("silence", limits.SILENCE_S, _S, "a connection", "a peer that answers no ping is gone"),
    Bound(
        "stalled writing",
        limits.WRITE_STALL_S,
        _S,
        "a connection",
        "a peer that takes nothing holds our memory",
    ),
    # what is sent
    Bound("bytes", limits.BYTES_PER_S, _BS, "a member", "beyond any link, and a part of what a core reads"),
    Bound("bytes", limits.STRANGER_BYTES_PER_S, _BS, "a stranger", "a greeting is small"),
    Bound("frames", limits.FRAMES_PER_S, _NS, "a member", "a core handles some hundred thousand"),
    Bound("frames", limits.STRANGER_FRAMES_PER_S, _NS, "a stranger", "a greeting is a dozen"),
    Bound("waiting", limits.MAX_PACE_S, _S, "a peer", "who would have to wait longer floods, and is dropped"),
    Bound(
        "unread", limits.MAX_UNREAD_BYTES, _B, "a member's connection", "the stream that fills it is reset"
    ),
    Bound(
        "unread", limits.STRANGER_UNREAD_BYTES, _B, "a stranger's connection", "nothing of it may be large"
    ),
    Bound(
        "unread", limits.MAX_UNREAD_OF_ALL_BYTES, _B, "all peers", "then the peer that fills most is dropped"
    ),
    # streams
    Bound(
        "streams", limits.STREAMS_PER_PEER, _N, "a member", "sessions, pushes and training, with much room"
    ),
    Bound("streams", limits.STREAMS_PER_STRANGER, _N, "a stranger", "a greeting, identify, ping"),
    Bound("new streams", limits.OPENS_PER_S, _NS, "a member", "training opens one a request"),
    Bound("new streams", limits.STRANGER_OPENS_PER_S, _NS, "a stranger", "it greets once"),
    # messages
    Bound("first message", limits.FIRST_WORD_BYTES, _B, "a stream", "before its request is admitted"),
    Bound("first message", limits.FIRST_WORD_S, _S, "a stream", "it was opened to say something"),
    Bound("message", limits.MAX_HEADER_BYTES, _B, "a stream", "names and numbers of the longest message"),
    Bound("message's tensors", limits.MAX_PAYLOAD_BYTES, _B, "a stream", "one step's hidden states"),
    Bound(
        "unfinished messages",
        limits.MAX_UNFINISHED_BYTES,
        _B,
        "a peer",
        "eight of the longest at once; others wait their turn",
    ),
    Bound("message", limits.MESSAGE_TIMEOUT_S, _S, "a stream", "8 MiB over half a megabit"),
    Bound("greeting", limits.MAX_HELLO_BYTES, _B, "a peer", "64 memberships and the owner's revocations"),
    # sessions and training
    Bound("sessions", limits.MAX_SESSIONS, _N, "all clients", "each holds pages of a cache"),
    Bound("sessions", limits.MAX_SESSIONS_PER_CLIENT, _N, "a client", "a quarter of them"),
    Bound("steps in flight", limits.MAX_STEPS_IN_FLIGHT, _N, "a session", "they fill a pipeline"),
    Bound("history", limits.HISTORY_BYTES, _B, "all sessions", "half of it at most for one client"),
    Bound("silence", limits.SESSION_IDLE_S, _S, "a session's stream", "its client may open it again"),
    Bound(
        "training requests",
        limits.MAX_TRAINING_REQUESTS,
        _N,
        "all clients",
        "they wait in the worker's queue",
    ),
    Bound("training requests", limits.MAX_TRAINING_REQUESTS_PER_CLIENT, _N, "a client", "a quarter of them"),
    Bound("training requests", limits.MAX_TRAINING_REQUEST_BYTES, _B, "all clients", "as announced"),
    # registry
    Bound("records", limits.RECORDS_PER_S, _NS, "a peer", "a signature to be checked each"),
    Bound("records", limits.MAX_STORED_RECORDS, _N, "all peers", "a swarm of ten thousand, read whole"),
    Bound("records under a key", limits.MAX_RECORDS_PER_KEY, _N, "all peers", "what a reader can take"),
    Bound("records under a key", limits.MAX_RECORDS_PER_ORIGIN, _N, "an origin", "nobody fills a key alone"),
    Bound("record", limits.MAX_RECORD_BYTES, _B, "a peer", "sixteen addresses and some names"),
    Bound("record's lifetime", limits.MAX_RECORD_LIFETIME_S, _S, "a peer", "who dies is forgotten soon"),
    Bound("clock", limits.MAX_CLOCK_SKEW_S, _S, "a peer", "home machines are minutes off"),
    Bound("routing questions", limits.MAX_KAD_QUESTIONS, _N, "a stream", "then it is opened again"),
    # relaying
    Bound("reservations", limits.MAX_RESERVATIONS, _N, "all peers", "each keeps a connection open"),
    Bound("circuits", limits.MAX_CIRCUITS, _N, "all peers", "the owner's own traffic comes first"),
    Bound("circuits", limits.MAX_CIRCUITS_PER_PEER, _N, "a peer", "a quarter of them"),
    Bound("circuit", limits.RELAY_CIRCUIT_BYTES, _B, "a circuit", "some hours of decoding"),
    Bound("circuit", limits.RELAY_CIRCUIT_S, _S, "a circuit", "it is renewed before"),
    Bound("circuits", limits.RELAY_BYTES_PER_S, _BS, "all circuits", "a hundred megabits"),
    # dialling for others
    Bound("dial-backs", limits.MAX_DIAL_BACKS, _N, "all peers", "at once; each waits for seconds at most"),
    Bound(
        "dial-backs a minute",
        limits.MAX_DIAL_BACKS_PER_MINUTE,
        _N,
        "all peers",
        "more peers than that ask somebody else",
    ),
    Bound("between dial-backs", limits.DIAL_BACK_AGAIN_S, _S, "a peer", "an answer holds for many minutes"),
    Bound("addresses dialled", limits.MAX_DOORS, _N, "a punch", "a peer may name anybody's"),
    Bound("punches", limits.MAX_PUNCHES, _N, "all peers", "at once; one at a time with each"),
    # programs on this machine
    Bound("programs", limits.MAX_PROGRAMS, _N, "all users", "a file descriptor each"),
    Bound("programs", limits.MAX_PROGRAMS_PER_GUEST, _N, "a user who may only see", "others find room"),
    Bound("calls", limits.MAX_CALLS_PER_CONNECTION, _N, "a program", "a task each"),
    Bound("message", limits.MAX_LOCAL_HEADER_BYTES, _B, "a program", "a prompt is text in it"),
    Bound(
        "message's tensors", limits.MAX_LOCAL_PAYLOAD_BYTES, _B, "a program", "whole prompts' hidden states"
    ),
)
"""Every bound of what others may do here, in the order in which they meet them."""

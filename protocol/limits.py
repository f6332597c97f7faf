"""Every bound of what may be said, with its reason. Nothing is parsed before it passed one of these."""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB

# Framing. The header holds names and small numbers; the largest one is a route of 128 hops or a batch of
# records. A payload is one step's hidden states: 8 MiB are 256 tokens of hidden size 8192 in float32.
MAX_HEADER_BYTES: Final = 256 * KIB
MAX_PAYLOAD_BYTES: Final = 8 * MIB
# A program on this machine may hand over whole prompts' hidden states: it is trusted further than a peer.
MAX_LOCAL_PAYLOAD_BYTES: Final = 256 * MIB
MAX_LOCAL_HEADER_BYTES: Final = 16 * MIB  # a prompt is text in the header

# CBOR nests no deeper in any message of ours; deeper input is an attack on the parser's stack.
MAX_CBOR_DEPTH: Final = 12
MAX_TEXT_CHARS: Final = 4 * MIB  # the longest prompt, in a control message
MAX_NAME_CHARS: Final = 256  # of models, swarms, peers and errors

# Sessions.
MAX_ROWS: Final = 256  # independent sequences of one session: beams and samples, with room
MAX_STEPS_IN_FLIGHT: Final = 4  # unacknowledged per session: enough to fill a pipeline, and backpressure
MAX_STEP_TOKENS: Final = 512  # of all rows together; longer inputs travel as several steps and so pipeline
MAX_POSITION: Final = 1 << 24  # longer than any context known
SESSION_ID_BYTES: Final = 16
MAX_HOPS: Final = 128
MAX_BLOCKS: Final = 1024

# Time, in seconds.
SESSION_GRACE_S: Final = 60.0  # a session outlives its streams so long
REPLACEMENT_WAIT_S: Final = 60.0  # how long a repair waits for somebody to serve the lost blocks
CONNECT_TIMEOUT_S: Final = 5.0  # one address, answered by a machine that is up
OPEN_TIMEOUT_S: Final = 10.0  # opening or linking a hop: a round trip and an allocation
STEP_TIMEOUT_S: Final = 10.0  # silence of a hop before the client asks where a step is
STEP_HARD_TIMEOUT_S: Final = 300.0  # one step, however much progress its hops report
WHERE_TIMEOUT_S: Final = 2.0  # a live daemon answers "where is it" without its worker
WORKING_EVERY_S: Final = 1.0  # a hop's sign of life while its worker computes

# Records.
MAX_RECORD_BYTES: Final = 8 * KIB
MAX_ADDRESSES: Final = 16
RECORD_LIFETIME_S: Final = 60.0
MAX_RECORD_LIFETIME_S: Final = 120.0  # a peer that dies is forgotten in about a minute; two bound a liar
REFRESH_EVERY_S: Final = 20.0
MAX_CLOCK_SKEW_S: Final = 300.0
MAX_RECORDS_PER_KEY: Final = 512
MAX_RECORDS_PER_MESSAGE: Final = 64

# Control socket.
MAX_CALLS_PER_CONNECTION: Final = 256

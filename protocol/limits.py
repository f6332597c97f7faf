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

# Training.
MAX_SEQUENCES: Final = 256  # of one micro-batch
MAX_TRAINING_BYTES: Final = 64 * MIB  # hidden states of one micro-batch: 2048 tokens of hidden size 8192
MAX_PART_BYTES: Final = 64 * MIB  # of one block's adapter: rank 64 on all linears of hidden size 8192
TRAINING_CHUNK_BYTES: Final = 1 * MIB  # as much as a reader has to hold before it may look

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
MAX_MANIFEST_BYTES: Final = 64 * KIB  # a manifest names each weight file: 300 of them, with room

# Registry.
HOLDERS_PER_KEY: Final = 8  # so many may die between two refreshes before a key is lost
MAX_RECORDS_PER_KEY: Final = 512
MAX_RECORDS_PER_MESSAGE: Final = 64
MAX_BATCH_BYTES: Final = 160 * KIB  # of records in one message: a header, with room for names and numbers
MAX_RECORDS_PER_ORIGIN: Final = 64  # of one key, from one /24, /48 or private peer: no one fills a key alone
MAX_MANIFESTS_PER_MODEL: Final = 16  # enough to outlive their peers; the rest would crowd out other models
MAX_STORED_RECORDS: Final = 32768  # in one daemon: a swarm of ten thousand peers, read whole
SEQ_MEMORY_S: Final = 600.0  # past expiry; longer than twice the clock skew, so nothing can be replayed
MAX_KEYS_PER_FIND: Final = 136  # of a model of 1024 blocks, 8 blocks to a key, and a few more
REGISTRY_TIMEOUT_S: Final = 3.0  # one question to a holder: a dictionary look-up and a round trip

# Membership.
MAX_HELLO_BYTES: Final = 64 * KIB  # spoken before anything is known of the other side
MAX_MEMBERS_TOLD: Final = 16  # a sample of whom the greeter knows
MAX_ADDRESSES_TOLD: Final = 4  # of each of them, best first
HELLO_TIMEOUT_S: Final = 10.0  # a connection that has not proved its swarm by then is closed

# Control socket.
MAX_CALLS_PER_CONNECTION: Final = 256

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

# The muxer. A stream's window is what the far side may have on its way to our reader. The first size is the
# specification's; the opening and its answer raise it at once, to hold a step of a session without a round
# trip for credit. From there it follows what its reader takes in a few round trips, up to 16 MiB (a gigabit
# over 130 ms), and all of a connection's windows grow within one budget.
INITIAL_WINDOW_BYTES: Final = 256 * KIB
RAISED_WINDOW_BYTES: Final = MIB
MAX_WINDOW_BYTES: Final = 16 * MIB
WINDOW_BUDGET_BYTES: Final = 64 * MIB
MAX_UNREAD_BYTES: Final = 128 * MIB  # of all streams of a connection; beyond, the filling one is reset
MAX_STREAMS: Final = 2048  # that the far side may have open on one connection: sessions, with much room
MAX_UNACKNOWLEDGED: Final = 256  # streams we open without an answer: what go-yamux queues for its acceptor
MAX_QUEUED_FRAMES: Final = 32_768  # a far side that asks and asks, and never reads, runs into it

# One peer. A connection is read no faster than its peer may send; who would have to wait longer than
# `MAX_PACE_S` floods, and is dropped. A stranger is who has not shown that it belongs to the swarm.
MAX_CONNECTIONS: Final = 1024  # of all peers; a file descriptor and three tasks each
MAX_CONNECTIONS_PER_PEER: Final = 8  # two peers that dial each other at once have two, and both may stay
MAX_CONNECTIONS_PER_ORIGIN: Final = 128  # of one /24, /48 or private address, made by them
MAX_HANDSHAKES: Final = 64  # inbound connections that have not proved their identity yet
HANDSHAKE_TIMEOUT_S: Final = 10.0  # until a connection is secured, and until a stream has its protocol
HANDSHAKES_PER_S: Final = 20.0  # of one origin: 4 ms of a core each
HANDSHAKES_AT_ONCE: Final = 100
STREAMS_PER_PEER: Final = 1024  # served at once, over all its connections
STREAMS_PER_STRANGER: Final = 16  # a greeting, identify, ping, with room
OPENS_PER_S: Final = 200.0  # streams: training opens one a request
OPENS_AT_ONCE: Final = 2048
FRAMES_PER_S: Final = 100_000.0  # of the muxer: a core handles some hundred thousand
FRAMES_AT_ONCE: Final = 100_000
BYTES_PER_S: Final = 1024.0 * MIB  # beyond any link between two machines, and a part of what a core can read
BYTES_AT_ONCE: Final = 1024 * MIB
STRANGER_OPENS_PER_S: Final = 5.0
STRANGER_OPENS_AT_ONCE: Final = 50
STRANGER_FRAMES_PER_S: Final = 500.0
STRANGER_FRAMES_AT_ONCE: Final = 5000
STRANGER_BYTES_PER_S: Final = 64.0 * KIB
STRANGER_BYTES_AT_ONCE: Final = 2 * MIB  # some greetings at their longest
STRANGER_UNREAD_BYTES: Final = MIB
MAX_UNREAD_OF_ALL_BYTES: Final = 1024 * MIB  # of all connections; beyond, the peer that fills most is dropped
MAX_PACE_S: Final = 3.0  # shorter than the silence after which the far side would give us up
SILENCE_S: Final = 7.5  # a peer that sends nothing, not even answers to pings, is given up
WRITE_STALL_S: Final = 60.0  # a peer that takes none of what we send for so long is dropped
MAX_PEERS_REMEMBERED: Final = 4096  # what they used of their allowance, and who proved to be a stranger
FIRST_WORD_BYTES: Final = 64 * KIB  # of a stream, before its request is admitted: the names of 1024 parts
FIRST_WORD_S: Final = 10.0
# Messages longer than a first word take room for all of themselves before their body is read; who finds none
# waits. So one peer's streams hold this of half-sent messages, and a first word each, however many they are.
MAX_UNFINISHED_BYTES: Final = 64 * MIB  # of one peer: eight of the longest at once
MESSAGE_TIMEOUT_S: Final = 120.0  # from its first byte to its last: 8 MiB over half a megabit
SESSION_IDLE_S: Final = 6 * 3600.0  # nothing said on a session's stream; its client may open it again
GREETINGS_PER_S: Final = 0.5  # of one peer: each may bring 64 signatures to be checked
GREETINGS_AT_ONCE: Final = 20
RECORDS_PER_S: Final = 100.0  # stored by one peer: a signature to be checked each
RECORDS_AT_ONCE: Final = 1000

# Sessions.
MAX_ROWS: Final = 256  # independent sequences of one session: beams and samples, with room
MAX_STEPS_IN_FLIGHT: Final = 4  # unacknowledged per session: enough to fill a pipeline, and backpressure
MAX_STEP_TOKENS: Final = 512  # of all rows together; longer inputs travel as several steps and so pipeline
MAX_POSITION: Final = 1 << 24  # longer than any context known
MAX_SESSIONS: Final = 256  # of all clients, on all workers of one daemon
MAX_SESSIONS_PER_CLIENT: Final = 64
HISTORY_BYTES: Final = 2048 * MIB  # of all sessions together; half of it at most for one client
MIN_HISTORY_BYTES: Final = 256 * KIB  # of a session that finds the rest promised: the latest positions
SESSION_ID_BYTES: Final = 16
PREFIX_PAGE_TOKENS: Final = 64  # a prefix is named page by page: as large as the pages of a worker's cache
PREFIX_NAME_BYTES: Final = 16
MAX_PREFIX_PAGES: Final = 4096  # 262,144 tokens; their names take a third of a header
MAX_HOPS: Final = 128
MAX_BLOCKS: Final = 1024

# Training.
MAX_SEQUENCES: Final = 256  # of one micro-batch
MAX_TRAINING_BYTES: Final = 64 * MIB  # hidden states of one micro-batch: 2048 tokens of hidden size 8192
MAX_TRAINING_REQUESTS: Final = 64  # of all clients; they wait in the worker's queue
MAX_TRAINING_REQUESTS_PER_CLIENT: Final = 16  # several micro-batches in flight, and the parts of an adapter
MAX_TRAINING_REQUEST_BYTES: Final = 1024 * MIB  # of all requests together, as announced
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
REGISTRY_IDLE_S: Final = 30.0  # of a stream on which nothing is asked
MAX_KAD_BYTES: Final = 64 * KIB  # a FIND_NODE and the asker's signed addresses, with room
MAX_KAD_QUESTIONS: Final = 64  # on one stream
KAD_TIMEOUT_S: Final = 10.0  # between two questions on one stream
REGISTRY_TIMEOUT_S: Final = 3.0  # one question to a holder: a dictionary look-up and a round trip

# Membership.
MAX_HELLO_BYTES: Final = (
    128 * KIB
)  # spoken before anything is known of the other side; holds all that follows
MAX_MEMBERS_TOLD: Final = 16  # a sample of whom the greeter knows
MAX_ADDRESSES_TOLD: Final = 4  # of each of them, best first
HELLO_TIMEOUT_S: Final = 10.0  # a connection that has not proved its swarm by then is closed
INVITE_LIFETIME_S: Final = 7 * 86400.0
MAX_INVITE_LIFETIME_S: Final = 366 * 86400.0  # whoever finds a token that nobody used may use it so long
MAX_INVITE_USES: Final = 1000
MAX_GRANTED: Final = 1024  # invitations that their owner keeps a list of
MAX_REVOKED: Final = 1024  # peers and invitations in the owner's list
MAX_SEALED_BYTES: Final = 60 * KIB  # of a signed statement; the longest is such a list
MAX_ADMITTED: Final = 4096  # memberships remembered: who accepted which invitation
MAX_ADMITTED_TOLD: Final = 64  # of them in one greeting

# Relays. libp2p's usual 128 KiB and two minutes carry no tensors: a 70B model's step is 32 KiB, its prefill
# of a thousand tokens 32 MiB.
MAX_CIRCUIT_MESSAGE_BYTES: Final = 4096  # as the specification says; of DCUtR and AutoNAT too
MAX_IDENTIFY_BYTES: Final = 64 * KIB  # of a peer's keys, addresses and protocols
MAX_RESERVATIONS: Final = 128  # of one relay; each keeps a connection open
MAX_CIRCUITS: Final = 64
MAX_CIRCUITS_PER_PEER: Final = 16
RELAY_CIRCUIT_S: Final = 2 * 3600.0
RELAY_CIRCUIT_BYTES: Final = 16 * 1024 * MIB
RELAY_BYTES_PER_S: Final = 12.0 * MIB  # of all circuits: a hundred megabits
RESERVATION_S: Final = 900.0
MAX_RELAYS: Final = 3  # where a private peer holds reservations: two may die
RELAYS_EVERY_S: Final = 20.0  # how often a private peer looks whether it has enough
CIRCUIT_TIMEOUT_S: Final = 5.0  # one message to a relay, or through it

# Dialling others back, so that they learn whether they can be reached.
MAX_DIAL_BACKS: Final = 4  # at once
MAX_DIAL_BACKS_PER_MINUTE: Final = 30  # for all others: more peers than that ask somebody else
DIAL_BACK_AGAIN_S: Final = 5.0  # before the same peer is served again
MAX_ADDRESSES_OFFERED: Final = (
    64  # in one message of AutoNAT or DCUtR; other libp2p peers have many transports
)

# From a relayed connection to a direct one.
MAX_DOORS: Final = 4  # dialled of what a peer names, at once: each may be anybody's
MAX_PUNCHES: Final = 16  # under way at once, with different peers

# Control socket.
MAX_PROGRAMS: Final = 256  # connected at once
MAX_PROGRAMS_PER_GUEST: Final = 32  # of one user who may only see: others find room
MAX_CALLS_PER_CONNECTION: Final = 256

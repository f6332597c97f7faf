"""The table of bounds names what there is, once, with a value of its unit and a reason."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import Final

from corolla.protocol.bounds import BOUNDS

NETWORK, PACES, RELAYS = "network/test_bounds.py", "network/test_allowance.py", "network/test_relays.py"
REACHING = "network/test_reaching.py"
PEERS, TRAINING = "serving/test_peers.py", "serving/test_training.py"
SHELF, CONTROL = "swarm/test_shelf.py", "daemon/test_control.py"

SHOWN_BY: Final = {
    ("connections", "", "all peers"): (NETWORK, "no_more_connections_are_held_than_may_be"),
    ("connections", "", "a peer"): (NETWORK, "a_peer_has_a_few_connections_however_fast_they_come"),
    ("connections", "", "a /24, /48 or private address"): (PACES, "an_origin_has_a_share_of_the_connections"),
    ("handshakes", "", "all strangers"): (NETWORK, "silence_at_the_door_keeps_nobody_out"),
    ("handshakes", "1/s", "an origin"): (PACES, "an_origin_knocks_at_a_bounded_pace"),
    ("handshake", "s", "a connection"): (NETWORK, "a_handshake_that_does_not_go_on_is_ended"),
    ("greeting", "s", "a connection"): (
        "swarm/test_membership.py",
        "a_peer_that_never_greets_is_disconnected",
    ),
    ("greetings", "1/s", "a peer"): ("swarm/test_membership.py", "who_greets_without_end_is_no_longer_heard"),
    ("silence", "s", "a connection"): (
        "network/test_yamux.py",
        "a_silent_peer_is_given_up_within_ten_seconds",
    ),
    ("stalled writing", "s", "a connection"): (NETWORK, "a_peer_that_takes_nothing_we_send_is_given_up"),
    ("bytes", "bytes/s", "a member"): (PACES, "a_peer_is_held_to_the_strictest_of_its_rates"),
    ("bytes", "bytes/s", "a stranger"): (PACES, "a_stranger_may_little_until_it_is_a_member"),
    ("frames", "1/s", "a member"): (PACES, "a_peer_is_held_to_the_strictest_of_its_rates"),
    ("frames", "1/s", "a stranger"): (NETWORK, "a_stranger_that_floods_is_dropped"),
    ("waiting", "s", "a peer"): (NETWORK, "a_stranger_that_floods_is_dropped"),
    ("unread", "bytes", "a member's connection"): (
        "network/test_muxing.py",
        "a_connection_full_of_unread_bytes",
    ),
    ("unread", "bytes", "a stranger's connection"): (NETWORK, "a_strangers_connection_keeps_little_unread"),
    ("unread", "bytes", "all peers"): (NETWORK, "who_fills_our_memory_is_dropped_and_the_others_stay"),
    ("streams", "", "a member"): (PACES, "so_many_streams_are_served_at_once"),
    ("streams", "", "a stranger"): (NETWORK, "a_stranger_has_a_few_streams"),
    ("new streams", "1/s", "a member"): (NETWORK, "a_member_that_opens_streams_beyond_measure_is_dropped"),
    ("new streams", "1/s", "a stranger"): (NETWORK, "a_stranger_that_floods_is_dropped"),
    ("first message", "bytes", "a stream"): (NETWORK, "nothing_large_is_heard_before_a_request_is_admitted"),
    ("first message", "s", "a stream"): (NETWORK, "a_stream_opened_for_nothing_is_given_up_at_once"),
    ("message", "bytes", "a stream"): (NETWORK, "no_message_is_longer_than_the_longest"),
    ("message's tensors", "bytes", "a stream"): (NETWORK, "no_message_is_longer_than_the_longest"),
    ("unfinished messages", "bytes", "a peer"): (
        "network/test_room.py",
        "half_sent_messages_of_a_peer_hold_no_more",
    ),
    ("message", "s", "a stream"): (NETWORK, "a_message_begun_must_end_however_slowly_it_trickles"),
    ("greeting", "bytes", "a peer"): (
        "swarm/test_membership.py",
        "nonsense_instead_of_a_greeting_harms_nobody",
    ),
    ("sessions", "", "all clients"): (PEERS, "all_clients_together_have_so_many_sessions"),
    ("sessions", "", "a client"): (PEERS, "one_client_cannot_have_all_sessions"),
    ("steps in flight", "", "a session"): (PEERS, "steps_pushed_to_a_stuck_worker_wait_in_their_stream"),
    ("history", "bytes", "all sessions"): (PEERS, "one_client_is_promised_half_of_all_history"),
    ("silence", "s", "a session's stream"): (NETWORK, "a_stream_opened_for_nothing_is_given_up_at_once"),
    ("training requests", "", "all clients"): (TRAINING, "a_hop_takes_so_much"),
    ("training requests", "", "a client"): (TRAINING, "a_hop_takes_so_much"),
    ("training requests", "bytes", "all clients"): (TRAINING, "a_hop_takes_so_much"),
    ("records", "1/s", "a peer"): ("swarm/test_registry.py", "who_stores_without_end_is_told_to_store_later"),
    ("records", "", "all peers"): (SHELF, "a_full_shelf_refuses_newcomers"),
    ("records under a key", "", "all peers"): (SHELF, "a_full_key_refuses_newcomers_and_goes_on_refreshing"),
    ("records under a key", "", "an origin"): (SHELF, "one_network_does_not_fill_a_key_alone"),
    ("record", "bytes", "a peer"): ("swarm/test_registry.py", "what_no_honest_peer_signs_is_refused"),
    ("record's lifetime", "s", "a peer"): ("swarm/test_registry.py", "what_no_honest_peer_signs_is_refused"),
    ("clock", "s", "a peer"): ("swarm/test_registry.py", "a_wrong_clock_is_refused_and_said"),
    ("routing questions", "", "a stream"): (
        "network/test_libp2p.py",
        "so_many_kademlia_questions_are_answered",
    ),
    ("reservations", "", "all peers"): (RELAYS, "a_relay_takes_no_more_reservations_and_circuits"),
    ("circuits", "", "all peers"): (RELAYS, "all_peers_together_have_so_many_circuits"),
    ("circuits", "", "a peer"): (RELAYS, "a_relay_takes_no_more_reservations_and_circuits"),
    ("circuit", "bytes", "a circuit"): (RELAYS, "a_circuit_ends_with_its_limits"),
    ("circuit", "s", "a circuit"): (RELAYS, "a_circuit_ends_with_its_limits"),
    ("circuits", "bytes/s", "all circuits"): (RELAYS, "all_circuits_keep_to_one_pace"),
    ("dial-backs", "", "all peers"): (REACHING, "few_are_dialled_for_at_once_and_in_a_minute"),
    ("dial-backs a minute", "", "all peers"): (REACHING, "few_are_dialled_for_at_once_and_in_a_minute"),
    ("between dial-backs", "s", "a peer"): (REACHING, "a_peer_is_dialled_for_once_at_a_time_and_seldom"),
    ("addresses dialled", "", "a punch"): (
        "network/test_punching.py",
        "nobody_is_made_to_knock_at_private_doors_nor_at_many",
    ),
    ("punches", "", "all peers"): ("network/test_punching.py", "so_many_punches_are_under_way_at_once"),
    ("programs", "", "all users"): (CONTROL, "too_many_programs_are_told_so"),
    ("programs", "", "a user who may only see"): (CONTROL, "one_user_who_may_only_see_leaves_room"),
    ("calls", "", "a program"): (CONTROL, "so_many_calls_at_once_and_no_more"),
    ("message", "bytes", "a program"): (CONTROL, "noise_ends_the_connection_with_the_reason"),
    ("message's tensors", "bytes", "a program"): (CONTROL, "noise_ends_the_connection_with_the_reason"),
}
"""The test that shows each bound, by its file and how its name begins."""


@cache
def names_of(file: str) -> tuple[str, ...]:
    """The names of a file's tests, without `test_`."""
    tree = ast.parse((Path(__file__).parents[1] / file).read_text())
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return tuple(node.name.removeprefix("test_") for node in tree.body if isinstance(node, functions))


def test_each_bound_has_a_test_that_shows_it() -> None:
    assert SHOWN_BY.keys() == {(bound.name, bound.unit, bound.of) for bound in BOUNDS}
    missing = [at for at in SHOWN_BY.values() if not any(name.startswith(at[1]) for name in names_of(at[0]))]
    assert missing == []


def test_every_row_says_whom_it_bounds_and_why() -> None:
    for bound in BOUNDS:
        assert bound.name
        assert bound.of
        assert len(bound.reason) > 10
        assert bound.unit in ("", "s", "bytes", "bytes/s", "1/s")
        assert bound.value > 0


def test_no_row_is_there_twice() -> None:
    assert len({(bound.name, bound.unit, bound.of) for bound in BOUNDS}) == len(BOUNDS)


def test_a_stranger_may_less_than_a_member() -> None:
    of = {(bound.name, bound.unit, bound.of): bound.value for bound in BOUNDS}
    for name, unit in (("bytes", "bytes/s"), ("frames", "1/s"), ("streams", ""), ("new streams", "1/s")):
        assert of[name, unit, "a stranger"] < of[name, unit, "a member"]

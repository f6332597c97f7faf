"""Names of prefixes: equal for what is equal, and for nobody else."""

from __future__ import annotations

from corolla.daemon.session.prefix import Prefix, prefix_of, root
from corolla.protocol.tensors import Encoding

TOKENS = tuple(range(200))
INPUTS = bytes(range(200))


def named(
    tokens: tuple[int, ...] = TOKENS, secret: bytes = b"secret", parts: tuple[bytes, ...] = ()
) -> Prefix:
    return prefix_of(secret, root(secret, "model", Encoding.FLOAT32, parts), tokens, INPUTS, 1)


def test_full_pages_are_named_and_the_last_token_is_left_to_compute() -> None:
    assert len(named().names) == 3
    assert named().lengths == (192,)
    assert len(named().inputs) == 192
    assert len(named(TOKENS[:192]).names) == 2
    assert len(named(TOKENS[:193]).names) == 3
    assert named(TOKENS[:64]) == named(TOKENS[:1]) == Prefix()


def test_a_name_stands_for_all_before_its_end() -> None:
    other = named((*TOKENS[:70], 999, *TOKENS[71:]))
    assert other.names[0] == named().names[0]
    assert not set(other.names[1:]) & set(named().names)
    assert named(TOKENS[64:]).names[0] not in named().names


def test_users_adapters_models_and_encodings_have_names_of_their_own() -> None:
    names = set(named().names)
    assert not names & set(named(secret=b"other").names)
    assert not names & set(named(parts=(b"part",)).names)
    roots = {
        root(b"secret", model, encoding, ())
        for model in ("model", "other")
        for encoding in (Encoding.FLOAT32, Encoding.BFLOAT16)
    }
    assert len(roots) == 4


def test_several_rows_share_what_every_hop_holds_of_each() -> None:
    rows = [named(), named(TOKENS[:100]), named(TOKENS[:10])]
    prefix = Prefix.of_rows(rows)
    assert prefix.rows == (3, 1, 0)
    assert prefix.lengths == (192, 64, 0)
    assert prefix.shared([(192, 64, 0), (130, 64, 0)]) == (128, 64, 0)
    assert prefix.shared([(192, 64, 0), ()]) == (0, 0, 0)
    assert prefix.inputs_of((128, 64, 0), 1) == INPUTS[:128] + INPUTS[:64]
    assert Prefix.of_rows(rows[:1]) == rows[0]

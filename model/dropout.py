"""Which inputs of an adapter are dropped: a pure function, the same on every device and in recomputation.

Owns the formula that `protocol.training` states in words. No state, no generator: a mask is computed from
numbers that both sides know, so that backward finds forward's mask again and a local run can use it too.

Source: Srivastava et al. 2014, Dropout; Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3, for
hashing a counter instead of keeping a state; Steele et al. 2014, SplitMix, for the mixing function.
"""

from __future__ import annotations

import hashlib
from typing import Final

import torch
from torch import Tensor

_STEP: Final = 0x9E3779B97F4A7C15  # 2^64 by the golden ratio, odd: no word leaves the hash as it was
_FIRST: Final = 0xBF58476D1CE4E5B9
_SECOND: Final = 0x94D049BB133111EB
_BITS: Final = 24  # of a hash that are compared; p is rounded to as many


def kept(
    dropout: tuple[int, int],
    block: int,
    target: str,
    samples: Tensor,
    positions: Tensor,
    shape: tuple[int, float],
) -> Tensor:
    """(num_tokens, in_features) True where an input of a LoRA layer is kept.

    dropout: seed and optimizer step. block: its number in the model. target: the layer's dotted name in it.
    samples, positions: (num_tokens,) int64, each token's. shape: in_features, and the probability p of being
    dropped, in [0, 1). What is kept is to be divided by 1 - p.
    """
    seed, step = dropout
    in_features, p = shape
    state = 0
    for word in (seed, step, block, target_word(target)):
        state = _absorb_number(state, word)
    tokens = torch.full_like(samples, _signed(state))
    for words in (samples, positions):
        tokens = _absorb(tokens, words)
    features = torch.arange(in_features, dtype=torch.int64, device=samples.device)
    hashes = _absorb(tokens[:, None], features[None])  # (num_tokens, in_features)
    return _shifted(hashes, 64 - _BITS) >= round(p * (1 << _BITS))


def target_word(target: str) -> int:
    """A layer's name as a word: the first eight bytes of its sha256, little endian."""
    return int.from_bytes(hashlib.sha256(target.encode()).digest()[:8], "little")


def _absorb_number(state: int, word: int) -> int:
    """As `_absorb`, on Python's integers."""
    mask = (1 << 64) - 1
    mixed = ((state ^ (word & mask)) + _STEP) & mask
    mixed = ((mixed ^ (mixed >> 30)) * _FIRST) & mask
    mixed = ((mixed ^ (mixed >> 27)) * _SECOND) & mask
    return mixed ^ (mixed >> 31)


def _absorb(states: Tensor, words: Tensor) -> Tensor:
    """The next hashes, int64 whose bits are those of unsigned words; torch's products wrap on every device."""
    mixed = (states ^ words).add_(_signed(_STEP))
    mixed = mixed.bitwise_xor_(_shifted(mixed, 30)).mul_(_signed(_FIRST))
    mixed = mixed.bitwise_xor_(_shifted(mixed, 27)).mul_(_signed(_SECOND))
    return mixed.bitwise_xor_(_shifted(mixed, 31))


def _shifted(words: Tensor, num_bits: int) -> Tensor:
    """Shifted right as unsigned words are: zeros come in."""
    return (words >> num_bits).bitwise_and_((1 << (64 - num_bits)) - 1)


def _signed(word: int) -> int:
    """The int64 of these 64 bits."""
    return word - (1 << 64) if word >> 63 else word

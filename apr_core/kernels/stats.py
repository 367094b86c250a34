"""
What one pass over stored bytes computes, in plain numpy: the portable path, and the reference of the fast one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Lanes = NDArray[np.uint64]

STRIPE = 64  # bytes that the eight lanes of the digest take in one step
# The fraction of pi, as Blowfish has it: keys that nobody chose.
LANE_KEYS: Lanes = np.array(
    [
        0x243F6A8885A308D3,
        0x13198A2E03707344,
        0xA4093822299F31D0,
        0x082EFA98EC4E6C89,
        0x452821E638D01377,
        0xBE5466CF34E90C6C,
        0xC0AC29B7C97C50DD,
        0x3F84D5B5B5470917,
    ],
    np.uint64,
)
KEY_STEP = 0x9E3779B97F4A7C15  # 2 ** 64 over the golden ratio: the keys of one lane repeat after 2 ** 64 stripes
_MASK = (1 << 64) - 1
_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)
_NEIGHBOUR = np.arange(8) ^ 1
_STEP = 1 << 11  # stripes at a time: 128 kB and two temporaries of that size stay in the second-level cache


def digest_lanes(data: Bytes, stripe: int = 0) -> Lanes:
    """
    Sum the eight lanes of the digest over a piece of a tensor.

    Lane l adds, modulo 2 ** 64 and for every 64-bit word w of its stripe, the product of the two halves of w xor a key
    that depends on lane and stripe, and the word of its neighbour as it is. A changed word therefore always changes a
    lane; that several changes cancel has a chance of about 2 ** -32 for two of one bit in one lane, and far less for
    anything larger. Sums commute: pieces may be added in any order. Against accident, not malice.

    Args:
        data: uint8 [n]; the last stripe counts as filled with zeros.
        stripe: Number of the first stripe within the tensor; a piece begins at a whole stripe.

    Returns:
        uint64 [8], to be added to those of the other pieces.

    Source: the accumulation step of XXH3 (BSD licence, Y. Collet), with keys that are computed and not a table.
    """
    lanes: Lanes = np.zeros(8, np.uint64)
    whole = data.size // STRIPE * STRIPE
    for start in range(0, whole, _STEP * STRIPE):
        stop = min(start + _STEP * STRIPE, whole)
        lanes += _stripes(np.ascontiguousarray(data[start:stop]), stripe + start // STRIPE)
    if whole < data.size:
        rest = np.zeros(STRIPE, np.uint8)
        rest[: data.size - whole] = data[whole:]
        lanes += _stripes(rest, stripe + whole // STRIPE)
    return lanes


def _stripes(data: Bytes, first: int) -> Lanes:
    """Sum whole stripes."""
    words = data.view("<u8").reshape(-1, 8)
    steps = np.arange(words.shape[0], dtype=np.uint64) * np.uint64(KEY_STEP)
    steps += np.uint64(first * KEY_STEP & _MASK)
    mixed = steps[:, None] + LANE_KEYS
    mixed ^= words
    halves = mixed >> _HIGH
    mixed &= _LOW
    mixed *= halves
    lanes: Lanes = mixed.sum(axis=0, dtype=np.uint64) + words.sum(axis=0, dtype=np.uint64)[_NEIGHBOUR]
    return lanes


def fold_lanes(lanes: Lanes, nbytes: int) -> str:
    """Fold the eight lanes and the length of the tensor into 32 hexadecimal digits."""
    halves = []
    for seed in (0, KEY_STEP):
        state = _mix(nbytes ^ seed)
        for lane in lanes.tolist():
            state = _mix((state + KEY_STEP & _MASK) ^ lane)
        halves.append(state)
    return "".join(f"{half:016x}" for half in halves)


def _mix(word: int) -> int:
    """Spread every bit of a 64-bit word over all of them; one to one. Source: the finaliser of SplitMix64 (Vigna)."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & _MASK
    return word ^ (word >> 31)

"""The digest of stored bytes: what changes it, what must not, and the same number from other hands."""

from __future__ import annotations

import numpy as np
import pytest

from apr_core.kernels.stats import KEY_STEP, LANE_KEYS, digest_lanes, fold_lanes


def digest(data: np.ndarray) -> str:
    """Digest one piece."""
    return fold_lanes(digest_lanes(data), data.size)


def some_bytes(size: int, seed: int = 0) -> np.ndarray:
    """Random bytes."""
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def slowly(data: bytes) -> list[int]:
    """The definition, word by word in Python integers."""
    padded = data + bytes(-len(data) % 64)
    lanes, mask = [0] * 8, 2**64 - 1
    for at in range(0, len(padded), 8):
        stripe, lane = divmod(at // 8, 8)
        word = int.from_bytes(padded[at : at + 8], "little")
        mixed = word ^ (int(LANE_KEYS[lane]) + stripe * KEY_STEP & mask)
        lanes[lane] = lanes[lane] + (mixed & 0xFFFFFFFF) * (mixed >> 32) & mask
        lanes[lane ^ 1] = lanes[lane ^ 1] + word & mask
    return lanes


@pytest.mark.parametrize("size", [0, 1, 7, 63, 64, 65, 1000, 131072 + 64 + 5])
def test_the_definition(size: int) -> None:
    """Numpy by the stripe gives what Python integers give by the word, over odd lengths and past one run."""
    data = some_bytes(size)
    assert digest_lanes(data).tolist() == slowly(data.tobytes())


def test_pieces_add_up_in_any_order() -> None:
    """The digest does not depend on who takes which piece, nor when."""
    data = some_bytes(10_000)
    pieces = [(start, data[start : start + 64 * 37]) for start in range(0, data.size, 64 * 37)]
    lanes = sum((digest_lanes(piece, start // 64) for start, piece in reversed(pieces)), np.zeros(8, np.uint64))
    assert fold_lanes(lanes, data.size) == digest(data)


def test_every_bit_counts() -> None:
    """Each of the 8 x 300 single-bit changes gives another digest, and none gives that of a second change."""
    data = some_bytes(300)
    seen = {digest(data)}
    for bit in range(8 * data.size):
        changed = data.copy()
        changed[bit // 8] ^= 1 << bit % 8
        seen.add(digest(changed))
    assert len(seen) == 8 * data.size + 1


def test_order_and_length_count() -> None:
    """Swapped words, swapped stripes, a stripe of zeros more, and an offset of one byte all show."""
    data = some_bytes(64 * 8)
    words = data.view(np.uint64)
    swapped = words.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    far = words.copy()
    far[[0, 16]] = far[[16, 0]]
    padded = np.concatenate([data, np.zeros(64, np.uint8)])
    others = [swapped.view(np.uint8), far.view(np.uint8), padded, padded[:-1], np.roll(data, 1), np.roll(data, 64)]
    assert len({digest(data), *map(digest, others)}) == 7


def test_flipped_signs_do_not_cancel() -> None:
    """The top bit of two words of one lane: two sums of 2 ** 63 vanish, which is why the words are multiplied too."""
    data = some_bytes(64 * 64).view(np.uint64)
    seen = set()
    for other in range(1, 64):
        changed = data.copy()
        changed[[0, 8 * other]] ^= np.uint64(1 << 63)
        seen.add(digest(changed.view(np.uint8)))
    assert len(seen - {digest(data.view(np.uint8))}) == 63


def test_it_is_pinned() -> None:
    """Receipts on disk hold digests: a change of the definition must be seen."""
    assert digest(np.arange(200, dtype=np.uint8)) == "ea0800ecfd7a3918147b7f0aa2db8398"
    assert digest(np.zeros(0, np.uint8)) == "8e9264a70abb15b6d8958b422fc7ed48"

"""
Damage to K-quant blocks: wrong packing of scales, wrong nibbles, no search, and what a broken importance matrix leaves.

Each is planted in the stored bytes of a Q4_K_M file, as a wrong encoder or decoder would leave them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from apr_core.formats.blocks import decode_q4_k
from apr_core.formats.encoders import pack_six_bits
from apr_core.zoo.containers import Row, Stored, family
from apr_core.zoo.registry import Defect

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_MATRICES = "*proj.weight"
_GATE = "model.layers.0.mlp.gate_proj.weight"
_Q4_K, _Q6_K = 144, 210
_KILLERS = ("F-GT-010",)
_BELOW = "a third of the blocks is still less than what pruning may zero or level in a legal model (80 % of a weight)"


def _stored(change: Callable[[Bytes], None], pattern: str = _MATRICES, width: int = _Q4_K) -> Stored:
    """Change the blocks of one K-quant type; tensors of another type stay."""

    def edit(blocks: Bytes) -> None:
        if blocks.shape[1] == width:
            change(blocks)

    return Stored(pattern, edit, "gguf", "Q4_K_M")


def _upper_bits_lost(blocks: Bytes) -> None:
    blocks[:, 4:12] &= 63


def _minima_for_scales(blocks: Bytes) -> None:
    blocks[:, 4:12] = np.concatenate([blocks[:, 8:12], blocks[:, 4:8]], axis=1)
    blocks[:, 12:16] = (blocks[:, 12:16] << 4) | (blocks[:, 12:16] >> 4)


def nibbles_swapped(blocks: Bytes) -> None:
    """Let low and high nibbles of Q4_K change places."""
    blocks[:, 16:] = (blocks[:, 16:] << 4) | (blocks[:, 16:] >> 4)


def _minimum_negated(blocks: Bytes) -> None:
    blocks[:, 3] ^= 0x80


def _codes_one_lower(blocks: Bytes) -> None:
    low, high = blocks[:, 16:] & 15, blocks[:, 16:] >> 4
    blocks[:, 16:] = (low - (low > 0)) | ((high - (high > 0)) << 4)


def _next_codes(blocks: Bytes) -> None:
    blocks[:, 16:] = np.roll(blocks[:, 16:], 1, axis=0)


def _scale_signs_lost(blocks: Bytes) -> None:
    blocks[:, 192:208] = np.abs(blocks[:, 192:208].view(np.int8).astype(np.int16)).astype(np.uint8)


def _one_scale(blocks: Bytes) -> None:
    """Give all eight sub-blocks scale and minimum of the whole super-block."""
    values = decode_q4_k(blocks)
    blocks[:] = ranged_q4_k(values, shared=True)


def ranged_q4_k(values: Floats, *, shared: bool = False) -> Bytes:
    """
    Encode [n, 256] values as Q4_K from the range of each sub-block, without a search: another quantiser's legal choice.

    Args:
        values: Finite values.
        shared: Take the range of the whole super-block for each of its sub-blocks: too coarse, and no longer legal.
    """
    parts = values.reshape(-1, 8, 32).astype(np.float32)
    over = values.reshape(-1, 1, 256) if shared else parts
    low = np.minimum(over.min(axis=2), 0) * np.ones((1, 8), np.float32)
    scale = (over.max(axis=2) - low) / 15
    d, dmin = ((x.max(axis=1) / 63).astype(np.float16) for x in (scale, -low))
    steps, floors = (np.where(x == 0, 1, x.astype(np.float32))[:, None] for x in (d, dmin))
    grid = np.rint(scale / steps).clip(0, 63).astype(np.uint8)
    floor = np.rint(-low / floors).clip(0, 63).astype(np.uint8)
    step, offset = (d.astype(np.float32)[:, None] * grid)[:, :, None], (dmin.astype(np.float32)[:, None] * floor)
    codes = np.rint((parts + offset[:, :, None]) / np.where(step == 0, 1, step)).clip(0, 15).astype(np.uint8)
    runs = codes.reshape(-1, 4, 2, 32)
    packed = (runs[:, :, 0] | (runs[:, :, 1] << np.uint8(4))).reshape(-1, 128)
    head = [d[:, None].view(np.uint8), dmin[:, None].view(np.uint8), pack_six_bits(grid, floor)]
    return np.concatenate([*head, packed], axis=1)


def _no_number(blocks: Bytes) -> None:
    blocks[::5, :2] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)


def _unweighted(blocks: Bytes) -> None:
    """Leave the sub-blocks without importance at code 0: their minimum throughout."""
    blocks[:, 16:48] = 0


def _not_seen(blocks: Bytes) -> None:
    blocks[::3, :4] = 0


# fmt: off
DEFECTS: tuple[Defect, ...] = (
    *family("k-quant-encoder", "codec", "peers Q1", _KILLERS,
        Row("q4k-scale-bits-lost", "half of the six-bit scales lost their upper bits", _stored(_upper_bits_lost)),
        Row("q4k-scales-swapped", "six-bit scales and minima changed places", _stored(_minima_for_scales)),
        Row("q4k-nibbles-swapped", "low and high nibbles of Q4_K changed places", _stored(nibbles_swapped)),
        Row("q4k-one-scale", "one scale for the eight sub-blocks, and no search",
            _stored(_one_scale), source="peers Q4"),
        alone="every scale is finite, and the values are ones that a trained model can have"),
    *family("k-quant-rounding", "codec", "peers Q1", _KILLERS,
        Row("q4k-minimum-sign", "the minimum of Q4_K is added, not subtracted", _stored(_minimum_negated)),
        Row("q4k-rounded-down", "each code of Q4_K is one too low", _stored(_codes_one_lower)),
        Row("q4k-codes-of-next", "each super-block has the codes of its neighbour", _stored(_next_codes)),
        Row("q6k-scale-unsigned", "the signed scales of Q6_K lost their sign",
            _stored(_scale_signs_lost, "*", _Q6_K)),
        alone="every scale is finite, and the values are ones that a trained model can have"),
    *family("imatrix", "codec", "llama.cpp 7805", _KILLERS,
        Row("imatrix-nan", "an importance matrix with NaN left NaN scales", _stored(_no_number, _GATE),
            ("F-DATA-QUALITY-002",)),
        Row("imatrix-part-of-columns", "columns without importance kept no code",
            _stored(_unweighted, _GATE), alone=_BELOW),
        Row("imatrix-part-of-blocks", "blocks that the importance matrix does not cover are zero",
            _stored(_not_seen, _GATE), alone=_BELOW)),
)

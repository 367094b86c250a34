"""
How each phase is launched: grids, tile sizes, and which programs share rows.

A program takes 32 rows where it publishes a block of 32 for the next product, 16 where RoPE pairs rows. Where that
leaves a device of 132 multiprocessors idle, several programs share the columns of the same rows. Tiles are 16 blocks
wide: 16 bytes per lane, and every load of a thread in flight before the wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apr_core.kernels.gpu import phases
from apr_core.kernels.gpu.planes import BLOCK, PLANES, padded

WARPS = 4
PROGRAMS = 132
"""Programs that a phase should have at least: one per multiprocessor of an H100 or H200."""
PAIRED_ROWS = 16
POSITIONS = 32
"""Cached positions that attention takes at a time."""
MOST_SHARES = 8
"""Programs that share 32 rows at most."""
_MOST_SPLITS = 64


@dataclass(frozen=True)
class Matrix:
    """A packed matrix on the device: its type, its shape, its bytes."""

    type: str
    rows: int
    columns: int
    data: Tensor

    @property
    def code(self) -> int:
        """Number of its type in the kernels."""
        return PLANES[self.type].code

    @property
    def blocks(self) -> int:
        """Blocks of 32 columns."""
        return self.columns // BLOCK


@dataclass(frozen=True)
class Norm:
    """What a consumer needs to finish an RMSNorm: the squares of the residual by block, and epsilon."""

    squares: Tensor
    eps: float


@dataclass(frozen=True)
class Mode:
    """Digits of an activation, and whether kernels are launched dependently (compute capability 9.0 on)."""

    digits: int
    dependent: bool

    @property
    def options(self) -> dict[str, Any]:
        """What every launch takes."""
        return {"PDL": self.dependent, "num_warps": WARPS, **({"launch_pdl": True} if self.dependent else {})}


def activation(columns: int, digits: int, device: torch.device) -> Tensor:
    """Return an activation of zeros, float32 words; `product` says how it is laid out."""
    return torch.zeros(columns + digits * columns // 4 + 3 * columns // BLOCK, device=device)


def power_above(value: int) -> int:
    """Return the smallest power of two that is not smaller."""
    return 1 << (value - 1).bit_length()


_WIDEST = {"BF16": 4, "F16": 4, "F32": 2}


def tile_blocks(w: Matrix, programs: int = 1, tiles: int = 1) -> int:
    """Return how many blocks wide a tile is, where so many programs share a row and hold so many tiles each."""
    return min(_WIDEST.get(w.type, 16) // tiles, power_above(-(-w.blocks // programs)))


def shares(rows: int, columns: int) -> int:
    """Return how many programs share 32 rows: until there are enough programs, or too few columns to share."""
    count = 1
    while count < MOST_SHARES and rows // BLOCK * count < PROGRAMS and columns // BLOCK >= 8 * count:
        count *= 2
    return count


def splits(capacity: int) -> int:
    """Return into how many pieces attention cuts a cache of so many positions."""
    return max(1, min(_MOST_SPLITS, capacity // POSITIONS))


def embed(mode: Mode, table: Matrix, state: Tensor, h: Tensor, norm: Norm, gain: Tensor, x: Tensor) -> None:
    """Begin a step: the residual of the token, its squares, and the first activation."""
    phases.embed[(table.blocks,)](
        table.data, state, h, norm.squares, gain, x,
        CODE=table.code, DIGITS=mode.digits, ROWS=padded(table.rows), K=table.columns, **mode.options,
    )  # fmt: skip


def qkv(
    mode: Mode,
    weights: tuple[Matrix, ...],
    biases: tuple[Tensor, ...],
    x: Tensor,
    norm: Norm,
    rope: tuple[Tensor, ...],
    state: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
) -> None:
    """Project into q [heads, head_dim] and the caches [kv heads, capacity, head_dim]."""
    first = weights[0]
    (kv, capacity, head_dim), heads = keys.shape, q.shape[0]
    wide = min(map(tile_blocks, weights))
    phases.qkv[((heads + 2 * kv) * (head_dim // PAIRED_ROWS),)](
        *(w.data for w in weights), *biases, x, norm.squares, norm.eps, *rope, state, q, keys, values,
        HEADS=heads, KV=kv, D=head_dim, CAPACITY=capacity,
        CODE_Q=first.code, CODE_K=weights[1].code, CODE_V=weights[2].code,
        DIGITS=mode.digits, K=first.columns, BN=PAIRED_ROWS, C=wide, SPAN=power_above(first.blocks),
        **{**mode.options, "num_warps": WARPS // 2},
    )  # fmt: skip


@dataclass(frozen=True)
class Pieces:
    """Where the pieces of attention meet, for caches of one capacity: sums, peaks, shares, and a counter per head."""

    mixed: Tensor
    peaks: Tensor
    shares: Tensor

    @classmethod
    def of(cls, heads: int, kv: int, capacity: int, head_dim: int, device: torch.device) -> Pieces:
        """Make room for them."""
        rows = kv * splits(capacity) * _group(heads // kv)
        return cls(*(torch.zeros(rows * width, device=device) for width in (head_dim, 1, 1)))


def _group(heads: int) -> int:
    return max(8, power_above(heads))


def attention(
    mode: Mode, q: Tensor, keys: Tensor, values: Tensor, x: Tensor, pieces: Pieces, counters: Tensor, state: Tensor
) -> None:
    """Mix the values of the positions up to the current one into the activation ``x`` [heads * head_dim]."""
    (kv, capacity, head_dim), heads = keys.shape, q.shape[0]
    phases.attention[(kv, splits(capacity))](
        q, keys, values, x, pieces.mixed, pieces.peaks, pieces.shares, counters, state, head_dim**-0.5,
        GROUP=heads // kv, G=_group(heads // kv), D=head_dim, CAPACITY=capacity, SPLITS=splits(capacity),
        BP=min(POSITIONS, capacity), DIGITS=mode.digits, K=heads * head_dim, **mode.options,
    )  # fmt: skip


def residual(
    mode: Mode, w: Matrix, x: Tensor, y: Tensor, h: Tensor, norm: Norm, gain: Tensor, out: Tensor, partial: Tensor,
    counters: Tensor,
) -> None:  # fmt: skip
    """Add the product to the residual ``h``, and publish ``gain * h``."""
    split = shares(w.rows, w.columns)
    phases.residual[(w.rows // BLOCK, split)](
        w.data, x, y, h, norm.squares, gain, out, partial, counters,
        CODE=w.code, DIGITS=mode.digits, N=w.rows, K=w.columns, SPLIT=split, BN=BLOCK,
        C=tile_blocks(w, split), **mode.options,
    )  # fmt: skip


def gate_up(mode: Mode, gate: Matrix, up: Matrix, x: Tensor, norm: Norm, out: Tensor) -> None:
    """Publish ``silu(gate) * up``."""
    phases.gate_up[(gate.rows // BLOCK,)](
        gate.data, up.data, x, norm.squares, norm.eps, out,
        CODE_G=gate.code, CODE_U=up.code, DIGITS=mode.digits, N=gate.rows, K=gate.columns, BN=BLOCK,
        C=min(tile_blocks(gate, tiles=2), tile_blocks(up, tiles=2)), SPAN=power_above(gate.blocks), **mode.options,
    )  # fmt: skip


def head(mode: Mode, w: Matrix, x: Tensor, norm: Norm, logits: Tensor, tops: Tensor, places: Tensor) -> None:
    """Write the logits [rows], and the largest of each 32 with its row."""
    phases.head[(padded(w.rows) // BLOCK,)](
        w.data, x, norm.squares, norm.eps, logits, tops, places,
        CODE=w.code, DIGITS=mode.digits, N=w.rows, ROWS=padded(w.rows), K=w.columns, BN=BLOCK,
        C=tile_blocks(w), SPAN=power_above(w.blocks), **mode.options,
    )  # fmt: skip


def pick(mode: Mode, rows: int, tops: Tensor, places: Tensor, state: Tensor, made: Tensor) -> None:
    """Choose the next token and step on."""
    count = padded(rows) // BLOCK
    phases.pick[(1,)](tops, places, state, made, COUNT=count, SPAN=power_above(count), N=rows, **mode.options)


def decode(
    w: Matrix, dtype: torch.dtype, first: int = 0, count: int | None = None, ids: Tensor | None = None
) -> Tensor:
    """
    Decode rows to [count, columns].

    Args:
        w: The matrix.
        dtype: float32 (bit for bit what `formats.codecs` decodes), or bfloat16.
        first: The first row.
        count: How many; None for all behind it.
        ids: Rows to decode instead, int64.
    """
    rows = ids.numel() if ids is not None else w.rows - first if count is None else count
    out = torch.empty(rows, w.columns, dtype=dtype, device=w.data.device)
    # without fusion: a product and a difference, each rounded, as the reference rounds them
    phases.decode[(padded(rows) // BLOCK,)](
        w.data, first, rows, out if ids is None else ids, out,
        CODE=w.code, ROWS=padded(w.rows), K=w.columns, GATHER=ids is not None, BN=BLOCK,
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return out

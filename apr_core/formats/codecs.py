"""
Stored bytes to float32 and back, for every element type.

Types that the engines have kernels for are decoded by `blocks`, our own code; the rest through the gguf package, in
`foreign`. `decoder_name` says which one runs, so that a report can.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np
from numpy.typing import NDArray

from apr_core.dtypes import QuantFormat
from apr_core.errors import UsageError
from apr_core.formats import blocks, encoders
from apr_core.formats.bounds import step_bound as step_bound
from apr_core.formats.checkpoint import RawTensor

Decoder = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
Encoder = Callable[[NDArray[np.float32]], NDArray[np.uint8]]

_CASTS = {
    "F32": "<f4",
    "F16": "<f2",
    "F64": "<f8",
    "I8": "i1",
    "I16": "<i2",
    "I32": "<i4",
    "I64": "<i8",
    "U8": "u1",
    "U16": "<u2",
    "U32": "<u4",
    "U64": "<u8",
    "BOOL": "u1",
}
# What `encode` takes.
WRITABLE = ("F32", "F16", "BF16", *encoders.ENCODERS, "AprQ8")
# Beyond it the float16 scale or minimum of some block type would be infinite.
_LARGEST_ENCODABLE = 65504.0
_CHUNK_BYTES = 1 << 17  # blocks decoded at a time: the intermediates stay in the second-level cache
# Byte offsets of the float16 scales in a block.
_HALF_SCALES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ1_S": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    "AprQ4": (0,),
}


def decoder_name(dtype: QuantFormat) -> str:
    """Say whose code decodes a type: ``apr_core`` or ``gguf``."""
    own = (
        dtype.name in _CASTS
        or dtype.name in blocks.DECODERS
        or dtype.name in ("BF16", "AprQ8")
        or dtype.name.startswith("F8_")
    )
    return "apr_core" if own else "gguf"


def decode(raw: RawTensor) -> NDArray[np.float32]:
    """
    Decode a whole tensor.

    Returns:
        A fresh float32 array of the tensor's shape. F64, I32 and I64 are rounded to float32.

    Raises:
        Unavailable: The installed gguf package cannot decode the type.
    """
    return decode_bytes(raw.info.dtype, raw.data, raw.info.shape)


def decode_rows(raw: RawTensor, start: int, stop: int) -> NDArray[np.float32]:
    """
    Decode rows ``start`` to ``stop`` (leading axes flattened): [stop - start, columns] float32.

    Raises:
        UsageError: The type is not laid out by rows (AprQ4, AprQ8), or the rows do not exist.
    """
    return decode_bytes(*rows_of(raw, start, stop))


def rows_of(raw: RawTensor, start: int, stop: int) -> tuple[QuantFormat, NDArray[np.uint8], tuple[int, int]]:
    """
    Return type, stored bytes and shape of rows ``start`` to ``stop``.

    Raises:
        UsageError: As `decode_rows` does.
    """
    shape, dtype = raw.info.shape, raw.info.dtype
    rows, columns = (prod(shape[:-1]), shape[-1]) if shape else (1, 1)
    if dtype.layout != "row" or not 0 <= start <= stop <= rows:
        raise UsageError(
            f"expected rows within 0..{rows} of a type laid out by rows, found {start}..{stop} of {dtype} "
            f"in {raw.info.file}, tensor {raw.info.name}",
            advice="decode the whole tensor",
        )
    width = dtype.nbytes((columns,))
    return dtype, raw.data[start * width : stop * width], (stop - start, columns)


def decode_bytes(
    dtype: QuantFormat, data: NDArray[np.uint8], shape: tuple[int, ...], *, many: Decoder | None = None
) -> NDArray[np.float32]:
    """
    Decode the bytes of a tensor of the given type and shape.

    Args:
        dtype: Element type.
        data: uint8 [nbytes]; exactly ``dtype.nbytes(shape)`` of them.
        shape: Row-major shape; the last axis of row-laid block types may be padded to whole blocks in ``data``.
        many: A faster decoder of any number of blocks of this type, for `kernels.codecs`.

    Raises:
        UsageError: The number of bytes does not fit the shape.
        Unavailable: The installed gguf package cannot decode the type.
    """
    expected = dtype.nbytes(shape)
    if data.size != expected:
        raise UsageError(
            f"expected {expected} bytes for {dtype} {list(shape)}, found {data.size}", advice="pass the whole tensor"
        )
    data = np.ascontiguousarray(data)
    # A broken file holds infinite scales; their products are for the contract to count, not for numpy to warn about.
    with np.errstate(all="ignore"):
        if dtype.name in _CASTS:
            return data.view(_CASTS[dtype.name]).astype(np.float32).reshape(shape)
        if dtype.name == "BF16":
            bits = data.view("<u2").astype(np.uint32)
            bits <<= np.uint32(16)  # in place: a second array of this size would double the time
            return bits.view(np.float32).reshape(shape)
        if dtype.name.startswith("F8_"):
            return blocks.float8_table(dtype.name)[data].reshape(shape)
        if dtype.name == "AprQ8":
            values: NDArray[np.float32] = data[4:].view(np.int8).astype(np.float32)
            values *= data[:4].view("<f4")
            return values.reshape(shape)
        stored = data.reshape(-1, dtype.block_bytes)
        return _cut_padding(_decode_runs(dtype, stored) if many is None else many(stored), dtype, shape)


def _decode_runs(dtype: QuantFormat, stored: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Decode blocks a cache-sized run at a time: [n, block_elements]."""
    values = np.empty((stored.shape[0], dtype.block_elements), dtype=np.float32)
    decoder = blocks.DECODERS.get(dtype.name)
    step = max(1, _CHUNK_BYTES // dtype.block_bytes)
    for start in range(0, stored.shape[0], step):
        run = stored[start : start + step]
        if decoder is not None:
            values[start : start + step] = decoder(run)
        else:
            from apr_core.formats.foreign import decode_foreign

            values[start : start + step] = decode_foreign(dtype, run)
    return values


def _cut_padding(values: NDArray[np.float32], dtype: QuantFormat, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Cut the padding off each row (or off the flat stream) of decoded blocks."""
    count = prod(shape)
    if dtype.layout == "flat" or not shape:
        return values.reshape(-1)[:count].reshape(shape)
    if values.size == count:
        return values.reshape(shape)
    rows = prod(shape[:-1])
    return np.ascontiguousarray(values.reshape(rows, -1)[:, : shape[-1]]).reshape(shape)


def encode(values: NDArray[np.float32], dtype: QuantFormat, *, many: Encoder | None = None) -> NDArray[np.uint8]:
    """
    Encode float32 values as F32, F16, BF16 or one of the block types of `WRITABLE`.

    F16 and BF16 round to nearest even. What is too large for F16 becomes infinite: the caller decides what that means.

    Args:
        values: Any shape.
        dtype: The type.
        many: A faster encoder of any number of blocks of this type, for `kernels.codecs`.

    Returns:
        uint8 [dtype.nbytes(values.shape)].

    Raises:
        UsageError: We do not write that type, a row is not a whole number of blocks, or a block type meets values that
            are not finite or whose scale float16 cannot hold.
    """
    values = np.ascontiguousarray(values, dtype=np.float32)
    if dtype.name == "F32":
        return values.reshape(-1).view(np.uint8).copy()
    if dtype.name == "F16":
        return blocks.encode_f16(values.reshape(-1))
    if dtype.name == "BF16":
        return blocks.encode_bf16(values.reshape(-1))
    if dtype.name not in WRITABLE:
        raise UsageError(f"{dtype} cannot be written", advice=f"use one of {', '.join(WRITABLE)}")
    _require_encodable(values, dtype)
    with np.errstate(all="ignore"):  # reciprocals of denormal scales are infinite, and their codes zero
        return _encode_blocks(values, dtype, many)


def _encode_blocks(values: NDArray[np.float32], dtype: QuantFormat, many: Encoder | None) -> NDArray[np.uint8]:
    if dtype.name == "AprQ8":
        return encoders.encode_apr_q8(values)
    if dtype.layout == "flat":
        values = np.pad(values.reshape(-1), (0, -values.size % dtype.block_elements))
    stored, encoder = values.reshape(-1, dtype.block_elements), encoders.ENCODERS[dtype.name]
    if many is not None:
        return many(stored).reshape(-1)
    out = np.empty((stored.shape[0], dtype.block_bytes), dtype=np.uint8)
    step = max(1, _CHUNK_BYTES // dtype.block_elements)  # the search of a K-quant holds some twenty arrays of a run
    for start in range(0, stored.shape[0], step):
        out[start : start + step] = encoder(stored[start : start + step])
    return out.reshape(-1)


def _require_encodable(values: NDArray[np.float32], dtype: QuantFormat) -> None:
    columns = values.shape[-1] if values.shape else 1
    if dtype.layout == "row" and columns % dtype.block_elements:
        advice = "keep this tensor in F16"
        raise UsageError(f"{dtype} needs rows of a multiple of {dtype.block_elements}, found {columns}", advice=advice)
    largest = float(np.abs(values).max(initial=0))  # NaN stays NaN, and fails the comparison
    if not largest < _LARGEST_ENCODABLE:
        raise UsageError(
            f"{dtype} cannot hold {largest}", advice="keep this tensor in F32, or find out where it comes from"
        )


def round_to(values: NDArray[np.float32], dtype: QuantFormat) -> NDArray[np.float32]:
    """Return the values as they would come back from a file of that type."""
    return decode_bytes(dtype, encode(values, dtype), values.shape)


def scales(raw: RawTensor) -> NDArray[np.float32] | None:
    """
    Return the block scales of a quantised tensor: every ``d``, then every ``dmin`` where there is one.

    Returns:
        float32 [n], or None for plain types and those whose scales are not floating-point numbers.
    """
    dtype = raw.info.dtype
    if dtype.name == "AprQ8":
        return raw.data[:4].copy().view("<f4").astype(np.float32)
    if dtype.name == "Q8_K":
        return raw.data.reshape(-1, dtype.block_bytes)[:, :4].copy().view("<f4").reshape(-1)
    places = _HALF_SCALES.get(dtype.name)
    if places is None:
        return None
    stored = raw.data.reshape(-1, dtype.block_bytes)
    with np.errstate(all="ignore"):
        return np.concatenate([blocks.half(stored, at).reshape(-1) for at in places])

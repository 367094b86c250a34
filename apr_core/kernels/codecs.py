"""
`formats.codecs` with the compiled block codecs where they pay: the same arguments, errors and bits.

Rooms above `formats` import from here. Below `WORTH` elements, without numba, or for a type without a kernel, the numpy
codecs run; which ones ran can be told from the time alone.
"""

from __future__ import annotations

import sys

import numpy as np
from numpy.typing import NDArray

from apr_core.dtypes import QuantFormat
from apr_core.formats import codecs
from apr_core.formats.checkpoint import RawTensor
from apr_core.kernels.cpu.features import has_numba

WORTH = 1 << 19
"""Elements from which loading numba costs less than it saves; once it is loaded, 32 times fewer are enough."""


def load_decoders() -> None:
    """Load the compiled decoders for somebody who will decode much in small pieces; without numba, do nothing."""
    if has_numba():
        import apr_core.kernels.cpu.decode  # noqa: F401


def _kernels_pay(elements: int, module: str) -> bool:
    enough = WORTH >> 5 if f"apr_core.kernels.cpu.{module}" in sys.modules else WORTH
    return elements >= enough and sys.byteorder == "little" and has_numba()


def _encoder(dtype: QuantFormat, elements: int) -> codecs.Encoder | None:
    if not _kernels_pay(elements, "encode"):
        return None
    from apr_core.kernels.cpu.encode import ENCODERS

    return ENCODERS.get(dtype.name)


def _decoder(dtype: QuantFormat, elements: int) -> codecs.Decoder | None:
    if not _kernels_pay(elements, "decode"):
        return None
    from apr_core.kernels.cpu.decode import DECODERS

    return DECODERS.get(dtype.name)


def encode(values: NDArray[np.float32], dtype: QuantFormat) -> NDArray[np.uint8]:
    """Encode as `formats.codecs.encode` does, on all cores where that pays."""
    return codecs.encode(values, dtype, many=_encoder(dtype, values.size))


def decode_bytes(dtype: QuantFormat, data: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Decode as `formats.codecs.decode_bytes` does, on all cores where that pays."""
    elements = data.size // dtype.block_bytes * dtype.block_elements
    return codecs.decode_bytes(dtype, data, shape, many=_decoder(dtype, elements))


def decode(raw: RawTensor) -> NDArray[np.float32]:
    """Decode a whole tensor as `formats.codecs.decode` does, on all cores where that pays."""
    return decode_bytes(raw.info.dtype, raw.data, raw.info.shape)


def decode_rows(raw: RawTensor, start: int, stop: int) -> NDArray[np.float32]:
    """Decode rows as `formats.codecs.decode_rows` does, on all cores where that pays."""
    dtype, data, shape = codecs.rows_of(raw, start, stop)
    return decode_bytes(dtype, data, shape)

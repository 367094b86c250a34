"""
Decode the block types that have no kernels here through the gguf package, the field's own reference.

Nothing else in this room imports gguf.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from apr_core.dtypes import QuantFormat
from apr_core.errors import Unavailable


def decode_foreign(dtype: QuantFormat, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """
    Decode [n, block_bytes] uint8 to [n, block_elements] float32.

    Raises:
        Unavailable: The installed gguf package has no decoder for the type.

    Source: ``gguf.quants.dequantize``.
    """
    from gguf import GGMLQuantizationType, quants

    try:
        values = quants.dequantize(blocks, GGMLQuantizationType(dtype.gguf))
    except (NotImplementedError, ValueError) as error:
        raise Unavailable(
            f"no decoder for {dtype}: the installed gguf package has none", advice="upgrade it: pip install -U gguf"
        ) from error
    return np.asarray(values, dtype=np.float32).reshape(blocks.shape[0], dtype.block_elements)

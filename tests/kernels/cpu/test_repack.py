"""Panels: what they cost, and what is refused; their bytes are compared by the registry's test."""

from __future__ import annotations

import numpy as np
import pytest

from apr_core.dtypes import FORMATS
from apr_core.kernels.cpu.panels import LAYOUTS, example_bytes, pack_reference
from apr_core.kernels.cpu.repack import repack


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_panels_hardly_grow(name: str) -> None:
    """Whole panels of whole blocks: at most 3 % more than the file."""
    stored = FORMATS[name].nbytes((64, 768))
    assert stored <= LAYOUTS[name].nbytes(64, 768) <= 1.03 * stored


def test_a_panel_by_hand() -> None:
    """Q8_0: row 3, column 5 is byte 1 of lane 3 of chunk 1, its sign bit flipped; the scale of row 3 is word 3."""
    rows = np.zeros((16, 34), np.uint8)
    rows[3, 2 + 5], rows[3, :2] = 0x11, (0xCD, 0xAB)
    panel = pack_reference(FORMATS["Q8_0"], rows.reshape(-1), 16, 32)
    assert panel[32 + 64 * 1 + 4 * 3 + 1] == 0x91
    np.testing.assert_array_equal(panel[6:8], [0xCD, 0xAB])
    assert (panel[32:] == 0x80).sum() == 511


def test_a_panel_of_pairs_by_hand() -> None:
    """BF16: row 3, columns 4 and 5 are the halves of lane 3 of pair 2; an odd last column has nothing beside it."""
    rows = np.zeros((16, 7), np.uint16)
    rows[3, 4:7] = 0xABCD, 0x1234, 0x5678
    panel = pack_reference(FORMATS["BF16"], rows.view(np.uint8).reshape(-1), 16, 7).view(np.uint16)
    assert panel.size == 16 * 32
    assert panel.reshape(16, 16, 2)[2:4, 3].tolist() == [[0xABCD, 0x1234], [0x5678, 0]]


def test_bytes_that_do_not_fit_the_shape_are_refused() -> None:
    """The compiled code checks no bounds."""
    data = example_bytes(FORMATS["Q4_0"], 16, 32, 0)
    with pytest.raises(ValueError, match="expected 576 contiguous bytes, found 288"):
        repack(FORMATS["Q4_0"], data, 32, 32)
    with pytest.raises(ValueError, match="contiguous"):
        repack(FORMATS["Q4_0"], np.repeat(data, 2)[::2], 16, 32)

"""The table of element types against the gguf package, and its own arithmetic."""

from __future__ import annotations

from dataclasses import fields
from math import prod

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apr_core.dtypes import BY_APR, BY_GGUF, BY_SAFETENSORS, FORMATS, QuantFormat


def test_geometry_equals_the_gguf_package() -> None:
    """Every GGML type of the gguf package is here with the same id and block size, and no other."""
    expected = {int(kind): (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {kind: (q.name, q.block_elements, q.block_bytes) for kind, q in BY_GGUF.items()} == expected


@pytest.mark.parametrize(("table", "key"), [(BY_GGUF, "gguf"), (BY_SAFETENSORS, "safetensors"), (BY_APR, "apr")])
def test_ids_are_unique(table: dict[object, QuantFormat], key: str) -> None:
    """No two types share an id: the index by id holds as many as have one."""
    assert len(table) == sum(getattr(q, key) is not None for q in FORMATS.values())
    assert all(getattr(q, key) == number for number, q in table.items())


def test_names_are_unique_and_complete() -> None:
    """Names are the keys, every type is at home in at least one format, and each describes itself."""
    assert all(q.name == name == str(q) for name, q in FORMATS.items())
    assert [q.name for q in FORMATS.values() if q.gguf is q.safetensors is q.apr is None] == []
    assert len(fields(QuantFormat)) == 8


def test_safetensors_widths_are_in_the_name() -> None:
    """The width of a SafeTensors type is the number in its name."""
    widths = {name: int("".join(c for c in name.split("_")[0] if c.isdigit()) or 8) for name in BY_SAFETENSORS}
    assert {name: 8 * q.block_bytes for name, q in BY_SAFETENSORS.items()} == widths
    assert {q.block_elements for q in BY_SAFETENSORS.values()} == {1}


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=3), st.sampled_from(sorted(FORMATS)))
def test_nbytes(shape: list[int], name: str) -> None:
    """Bytes of a tensor, row by row where rows are padded, as one stream where they are not."""
    q = FORMATS[name]
    count = prod(shape)
    if q.layout == "tensor":
        expected = q.block_bytes + count
    elif q.layout == "flat":
        expected = len(range(0, count, q.block_elements)) * q.block_bytes
    else:
        expected = prod(shape[:-1]) * len(range(0, shape[-1], q.block_elements)) * q.block_bytes
    assert q.nbytes(tuple(shape)) == expected


def test_padding_per_row() -> None:
    """896 columns take four Q4_K blocks per row, not three and a half."""
    assert FORMATS["Q4_K"].nbytes((2, 896)) == 2 * 4 * 144
    assert FORMATS["AprQ4"].nbytes((2, 20)) == 2 * 18
    assert FORMATS["F32"].nbytes(()) == 4
    assert FORMATS["F32"].nbytes((0, 5)) == 0
    assert FORMATS["F64"].nbytes((2**62, 2**62)) == 8 * 2**124


@pytest.mark.parametrize(("name", "bits"), [("Q4_K", 4.5), ("Q6_K", 6.5625), ("Q8_0", 8.5), ("BF16", 16), ("AprQ8", 8)])
def test_bits_per_weight(name: str, bits: float) -> None:
    """Stored bits per weight as the field quotes them."""
    assert FORMATS[name].bits_per_weight == bits

"""Bytes per token from two sides, and a ceiling that is a maximum."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from apr_core.bench import roofline
from apr_core.bench.roofline import Bandwidth, StreamBandwidth, architecture_bytes, bytes_per_token, ceiling_of
from apr_core.contract.layout import EMBEDDING, HEAD, Geometry, expected_tensors
from apr_core.dtypes import FORMATS
from apr_core.formats.checkpoint import TensorInfo

TIED = Geometry(64, 96, 2, 4, 2, 16, 331, tied=True)
UNTIED = Geometry(256, 512, 3, 4, 2, 64, 331, tied=False)


def table(geometry: Geometry, dtype: str = "F32", vectors: str = "F32") -> dict[str, TensorInfo]:
    """A tensor table of a geometry, matrices of one type and vectors of another."""
    rows = {}
    for name, (_, shape) in expected_tensors(geometry).items():
        kind = FORMATS[dtype if len(shape) > 1 else vectors]
        rows[name] = TensorInfo(name, kind, shape, Path("x"), 0, kind.nbytes(shape), name)
    return rows


@pytest.mark.parametrize(
    ("geometry", "dtype"),
    [(TIED, "F32"), (TIED, "BF16"), (TIED, "AprQ8"), (TIED, "AprQ4"), (UNTIED, "Q8_0"), (UNTIED, "Q4_K")],
)
def test_two_sums_agree(geometry: Geometry, dtype: str) -> None:
    """The tensor table and the architecture's formulas give the same bytes, for row, flat and tensor layouts."""
    tensors = table(geometry, dtype)
    types = {name: info.dtype for name, info in tensors.items()}
    assert architecture_bytes(types, geometry) == sum(t.nbytes for t in tensors.values())


def test_sum_by_hand() -> None:
    """The smallest model, added up on paper: 2 parameters wide, one layer."""
    geometry = Geometry(2, 3, 1, 1, 1, 2, 5, tied=True)
    expected = 5 * 2 + 3 * (2 * 2 + 2) + 2 * 2 + 3 * (2 * 3) + 2 + 2 + 2
    assert bytes_per_token(table(geometry), geometry).elements == expected
    assert bytes_per_token(table(geometry, "BF16"), geometry).read() == 4 * expected


def test_untied_embedding_is_one_row_and_the_head_is_whole() -> None:
    """A token looks one row up and multiplies by the whole head."""
    tensors = table(UNTIED)
    whole = sum(math.prod(t.shape) for t in tensors.values())
    assert bytes_per_token(tensors, UNTIED).elements == whole - (331 - 1) * 256


def test_tied_embedding_is_read_whole_and_once() -> None:
    """A tied model that stores its head as well reads one of the two."""
    tensors = table(TIED)
    once = bytes_per_token(tensors, TIED)
    double = {**tensors, HEAD: tensors[EMBEDDING]}
    assert bytes_per_token(double, TIED) == once
    assert once.stored == sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize("compiled", [True, False])
def test_ceiling_reads_a_buffer_of_the_size(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the widest loads, and by torch where numba is missing; samples are rates above zero."""
    monkeypatch.setattr(roofline, "has_numba", lambda: compiled)
    ceiling = ceiling_of(3_000_001, 1)
    assert isinstance(ceiling, StreamBandwidth if compiled else Bandwidth)
    ceiling.sample()
    assert len(ceiling.samples) == (3 if compiled else 2)
    assert min(ceiling.samples) > 0


def test_buffer_is_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model beyond any cache is not allocated a second time."""
    monkeypatch.setattr(roofline, "LARGEST_BUFFER", 1 << 20)
    bandwidth = Bandwidth(10**12)
    assert bandwidth._matrix.nbytes <= 1 << 20
    assert isinstance(bandwidth._matrix, torch.Tensor)

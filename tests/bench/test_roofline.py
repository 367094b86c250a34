"""Bytes per token from two sides, and a ceiling that is a maximum."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from apr_core.bench import roofline
from apr_core.bench.roofline import Bandwidth, Roofline, architecture_bytes, bytes_per_token
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


def test_ceiling_is_the_best_sample() -> None:
    """The best of the samples bounds the rate; a rate beyond it is a utilisation above 1."""
    line = Roofline(10**9, np.array([9.0, 20.0, 12.0]))
    assert (line.read_gb_s, line.ceiling_tok_s) == (20, 20)
    assert line.mbu(10) == pytest.approx(0.5)
    assert line.mbu(30) > 1


def test_no_samples_give_no_ceiling() -> None:
    """Without a measurement nothing is within the ceiling."""
    assert not Roofline(10**9, np.array([])).mbu(1e-9) <= 1


def test_buffer_has_the_size_of_the_model() -> None:
    """A cache-sized model is held against a cache-sized buffer, every sample positive and kept."""
    bandwidth = Bandwidth(3_000_001)
    bandwidth.sample()
    bandwidth.sample()
    line = bandwidth.roofline()
    assert bandwidth._matrix.nbytes == pytest.approx(3_000_000, rel=0.01)
    assert line.samples_gb_s.size == 4
    assert (line.samples_gb_s > 0).all()
    assert line.read_bytes == 3_000_001


def test_buffer_is_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model beyond any cache is not allocated a second time."""
    monkeypatch.setattr(roofline, "LARGEST_BUFFER", 1 << 20)
    bandwidth = Bandwidth(10**12)
    assert bandwidth._matrix.nbytes <= 1 << 20
    assert isinstance(bandwidth._matrix, torch.Tensor)

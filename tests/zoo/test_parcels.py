"""Damage to how a model is packed is refused for what it is, and the healthy ways to pack hold the same weights."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from apr_core.cli import inspect, lint
from apr_core.contract.admit import admit
from apr_core.engines.subject import BUNDLED
from apr_core.errors import AprError
from apr_core.formats.checkpoint import open_checkpoint
from apr_core.zoo import benign, parcels
from apr_core.zoo.draft import Draft, put_together, take_apart
from apr_core.zoo.edits import EMBEDDING
from apr_core.zoo.matrix import claims_for, evaluate
from apr_core.zoo.registry import NotApplicable

PYGMY = BUNDLED["pygmy"]
TWINS = ("gguf-split", "gguf-split-empty-first", "apr-zstd", "apr-lz4", "apr-two-shards", "pickle-beside")
SAYS = {
    "split-part-missing": r"1 missing: model-00002-of-00003\.gguf",
    "split-joined": "parts joined by cat",
    "split-number-lies": r"part 2 of 2.*found part 1 of 2",
    "split-tensor-lost": r"tensors in all parts",
    "split-part-copied": r"expected part 2 of 3.*found part 1 of 3",
    "split-tensor-twice": "each tensor in one part",
    "apr-shard-missing": r"1 missing: model-00001-of-00002\.apr",
    "apr-shard-of-another": "num_hidden_layers: a shard of another model",
    "zstd-cut": "truncated",
    "zstd-flip": "damaged data|checksum|JSON|UTF-8",
    "lz4-flip": "LZ4 block|checksum|JSON|UTF-8",
    "zstd-flag-alone": "a Zstandard frame, found damaged data",
    "apr-column-major": "LAYOUT-002",
    "apr-encrypted": "encrypted",
    "apr-unsorted": "ascending order",
    "apr-type-unknown": "a known dtype id, found 99",
    "apr-count-less": "tensor count is too small",
    "apr-count-more": "behind the index",
    "pickle-as-safetensors": "a Python pickle",
    "torch-as-gguf": "a PyTorch checkpoint",
    "pickle-alone": r"executable content alone: pytorch_model\.bin",
    "pickle-shard": "a Python pickle",
    "shard-stray-file": "holds 2 models",
    "shard-tensor-twice": "that the index does not place there",
    "shard-without-index": "found no index",
    "shard-outside": "a shard inside the folder",
    "gguf-alignment-3": "a power of two",
    "gguf-string-endless": "4611686018427387904",
    "gguf-dims-beyond-data": "bytes are missing",
    "gguf-offset-unaligned": "a multiple of 32",
    "header-endless": "9223372036854775808 bytes",
    "header-offset-negative": "data_offsets as two integers",
    "header-type-unknown": "F31",
    "header-shape-float": "only integers",
}


@pytest.fixture(scope="module")
def healthy() -> Draft:
    """The bundled model, taken apart once."""
    with open_checkpoint(PYGMY) as checkpoint:
        return take_apart(checkpoint)


def planted(recipe: object, healthy: Draft, folder: Path) -> Path:
    """Write a damaged copy."""
    draft = healthy.copy()
    recipe(draft)
    return put_together(draft, folder)


def test_every_defect_has_its_words() -> None:
    """The table below covers the table above."""
    assert set(SAYS) == {defect.id for defect in parcels.DEFECTS}


@pytest.mark.parametrize("defect", parcels.DEFECTS, ids=lambda d: d.id)
def test_refused_for_what_it_is(defect: object, healthy: Draft, tmp_path: Path) -> None:
    """Not for a file that is not there: the message names the damage."""
    with pytest.raises(AprError, match=SAYS[defect.id]):
        open_checkpoint(planted(defect.recipe, healthy, tmp_path / "m"))


@pytest.mark.parametrize("name", TWINS)
def test_twins_hold_the_same_weights(name: str, healthy: Draft, tmp_path: Path) -> None:
    """Each healthy way to pack opens, is admitted, and decodes to the model's own values."""
    item = next(item for item in benign.BENIGN if item.id == name)
    with open_checkpoint(planted(item.recipe, healthy, tmp_path / "m")) as checkpoint:
        assert checkpoint.gaps == ()
        again = take_apart(checkpoint)
        assert {n: v.tobytes() for n, v in again.weights.items()} == {
            n: v.tobytes() for n, v in healthy.weights.items()
        }
    admission = admit(tmp_path / "m" if name != "apr-zstd" and name != "apr-lz4" else tmp_path / "m" / "model.apr")
    assert list(admission.violations) == []
    admission.checkpoint.close()


def test_split_parts_are_read_by_the_gguf_package(healthy: Draft, tmp_path: Path) -> None:
    """What the recipe splits is what others read: all tensors, once each, with the keys where they belong."""
    item = next(item for item in benign.BENIGN if item.id == "gguf-split-empty-first")
    planted(item.recipe, healthy, tmp_path / "m")
    readers = [gguf.GGUFReader(path) for path in sorted((tmp_path / "m").glob("*.gguf"))]
    assert len(readers) == 3
    assert [len(reader.tensors) == 0 for reader in readers] == [True, False, False]
    assert sum(len(reader.tensors) for reader in readers) == len(healthy.weights)
    assert [int(reader.fields["split.no"].parts[-1][0]) for reader in readers] == [0, 1, 2]
    assert ["general.architecture" in reader.fields for reader in readers] == [True, False, False]
    values = next(t for r in readers for t in r.tensors if t.name == "token_embd.weight")
    decoded = gguf.quants.dequantize(values.data, values.tensor_type)
    assert np.array_equal(decoded, healthy.weights[EMBEDDING])


def test_the_pickle_beside_is_listed(healthy: Draft, tmp_path: Path) -> None:
    """It raises no alarm; inspect and lint name it, and neither names anything where there is none."""
    clean, beside = tmp_path / "clean", tmp_path / "beside"
    planted(parcels._stored("safetensors", lambda path: None), healthy, clean)
    planted(parcels._stored("safetensors", parcels.pickle_beside), healthy, beside)
    found = {path: [f["says"] for f in lint.findings(str(path))["findings"]] for path in (clean, beside)}
    assert [[m for m in said if "pytorch_model.bin" in m] != [] for said in found.values()] == [False, True]
    listed = [inspect.describe(str(path)).get("executables", []) for path in (clean, beside)]
    assert [[entry["name"] for entry in one] for one in listed] == [[], ["pytorch_model.bin"]]


@pytest.mark.parametrize("name", TWINS)
def test_no_claim_is_alarmed(name: str) -> None:
    """The claims of the gates and of the ground truth hold for each way to pack."""
    item = next(item for item in benign.BENIGN if item.id == name)
    claims = [c for c in claims_for(item) if c.startswith(("F-GT-00", "F-GT-01"))]
    outcome = evaluate(item, PYGMY, claims=claims)
    assert outcome.crash == ""
    assert {row.claim: row.verdict for row in outcome.judged} == dict.fromkeys(claims, "CORROBORATED")


@pytest.mark.parametrize(
    "recipe", [parcels.split_gguf(9), parcels.shard_apr(), parcels.split_gguf(2, parcels._again_in_second)]
)
def test_a_model_of_too_few_tensors(recipe: object, healthy: Draft, tmp_path: Path) -> None:
    """One tensor cannot be split; two of different lengths have no name in common."""
    draft = healthy.copy()
    keep = [EMBEDDING] if recipe is not None else []
    for name in [n for n in draft.weights if n not in keep]:
        draft.drop(name)
    recipe(draft)
    with pytest.raises(NotApplicable):
        put_together(draft, tmp_path / "m")

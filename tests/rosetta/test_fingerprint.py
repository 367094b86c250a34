"""Identity across formats: one id for the same values, another for a permutation that keeps every statistic."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from apr_core.errors import FormatError
from apr_core.formats.checkpoint import open_checkpoint
from apr_core.rosetta.convert import convert
from apr_core.rosetta.fingerprint import (
    Gauge,
    ModelPrint,
    TensorPrint,
    distances,
    fingerprint,
    judge_statistics,
    read_prints,
)

Edit = Callable[..., Path]
Q = "model.layers.1.self_attn.q_proj.weight"


def prints(path: Path) -> ModelPrint:
    """Fingerprint a file."""
    with open_checkpoint(path) as opened:
        return fingerprint(opened)


def test_three_formats_and_a_widening_have_one_fingerprint(tiny: Path, tmp_path: Path) -> None:
    """The same values: in GGUF with reversed shapes and other names, in APR, in F32."""
    first = prints(tiny)
    for name, asked in (("a.gguf", None), ("a.apr", None), ("a", "F32"), ("b.gguf", "F32")):
        other = prints(convert(tiny, tmp_path / name, quantize=asked))
        assert other.digest == first.digest
        assert {n: t.digest for n, t in other.tensors.items()} == {n: t.digest for n, t in first.tensors.items()}


def test_a_permutation_has_another_fingerprint_and_the_same_statistics(tiny: Path, edited: Edit) -> None:
    """Two rows exchanged: every statistic stays, the fingerprint does not; a reshaped tensor differs too."""

    def exchange(held: dict[str, torch.Tensor]) -> None:
        held[Q] = held[Q][[1, 0, *range(2, 64)]]

    first, second = prints(tiny), prints(edited(exchange))
    assert first.digest != second.digest
    assert [n for n in first.tensors if first.tensors[n].digest != second.tensors[n].digest] == [Q]
    assert judge_statistics(second, first) == ()
    third = prints(edited(lambda held: held.update({Q: held[Q].reshape(32, 128)})))
    assert third.tensors[Q].digest != first.tensors[Q].digest


def test_a_stored_tied_head_counts_as_tied(tiny: Path, edited: Edit) -> None:
    """A head that repeats the embedding is the same model; any other head is another one."""
    stored = prints(edited(lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"].clone()})))
    other = prints(edited(lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"] * 2})))
    assert stored.digest == prints(tiny).digest != other.digest


def test_a_digest_is_that_of_the_values(tiny: Path) -> None:
    """Computed by hand for one tensor: shape, then float32 little-endian; statistics by numpy."""
    import hashlib

    from safetensors.torch import load_file

    values = load_file(tiny / "model.safetensors")[Q].float().numpy()
    expected = hashlib.blake2b(b"(64, 64)" + values.astype("<f4").tobytes(), digest_size=16).hexdigest()
    found = prints(tiny).tensors[Q]
    assert found.digest == expected
    wide = values.astype(np.float64)
    assert (found.min, found.max, found.nonfinite) == (wide.min(), wide.max(), 0)
    np.testing.assert_allclose((found.mean, found.std), (wide.mean(), wide.std()), rtol=1e-9)


def test_a_document_comes_back_and_an_edited_one_is_refused(tiny: Path) -> None:
    """The document carries its own digest, so a changed row is seen; so is anything that is no document."""
    made = prints(tiny)
    document = json.loads(json.dumps(made.as_json()))
    assert read_prints(document, "f") == made
    document["tensors"][3]["digest"] = "0" * 32
    with pytest.raises(FormatError, match="expected digest"):
        read_prints(document, "f")
    for broken in ([], {"schema": 2}, {"schema": 1, "digest": "", "tensors": [{"name": "x"}]}):
        with pytest.raises(FormatError, match="as `apr rosetta fingerprint` writes"):
            read_prints(broken, "f")


def a_print(**changes: object) -> TensorPrint:
    """A tensor of mean 0.1 and deviation 0.5, changed."""
    fields: dict[str, object] = {"name": "w", "shape": (4, 4), "dtype": "F32", "digest": "d", "mean": 0.1, "std": 0.5}
    return TensorPrint(**{**fields, "min": -1.0, "max": 1.0, "nonfinite": 0, "zeros": 0.0, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, []),
        ({"mean": 1.59}, []),
        ({"mean": 1.61}, ["mean"]),
        ({"mean": float("nan")}, ["mean"]),
        ({"std": 0.99}, []),
        ({"std": 1.01}, ["standard"]),
        ({"std": 0.24}, ["standard"]),
        ({"shape": (2, 8)}, ["shape"]),
        ({"nonfinite": 1}, ["1"]),
    ],
)
def test_statistics_are_judged_at_their_limits(changes: dict[str, object], found: list[str]) -> None:
    """Three deviations of the mean, a factor of two of the spread, any new NaN: each side of each limit."""
    reference, subject = ModelPrint("r", {"w": a_print()}), ModelPrint("s", {"w": a_print(**changes)})
    assert [anomaly.what.split()[0] for anomaly in judge_statistics(subject, reference)] == found


def test_missing_and_extra_tensors_are_anomalies() -> None:
    """27 missing of 27 once passed (aprender 2382)."""
    one, none = ModelPrint("r", {"w": a_print()}), ModelPrint("s", {})
    assert [a.what for a in judge_statistics(none, one)] == ["missing in the subject"]
    assert [a.what for a in judge_statistics(one, none)] == ["missing in the reference"]


def test_a_constant_reference_is_judged_by_its_magnitude() -> None:
    """A norm of ones has no deviation; a mean of 2 is one magnitude away, 5 is four."""
    reference = ModelPrint("r", {"w": a_print(mean=1.0, std=0.0)})
    assert judge_statistics(ModelPrint("s", {"w": a_print(mean=2.0, std=0.0)}), reference) == ()
    assert len(judge_statistics(ModelPrint("s", {"w": a_print(mean=5.0, std=0.0)}), reference)) == 1


def test_distance_by_hand() -> None:
    """64 values of 2 against 32 of them 2.2: 10 log10(256 / 1.28) dB, half of the runs equal."""
    gauge = Gauge()
    given = np.full((2, 32), 2, np.float32)
    found = given.copy()
    found[1] += np.float32(0.2)
    gauge.add(given, found)
    read = gauge.read()
    np.testing.assert_allclose(read.sqnr_db, 10 * np.log10(256 / 1.28), rtol=1e-6)
    assert read.blocks == 0.5
    assert 0.99 < read.cosine < 1
    same = Gauge()
    same.add(given, given)
    assert (same.read().sqnr_db, same.read().cosine, same.read().blocks) == (np.inf, 1.0, 1.0)
    lost = Gauge()
    lost.add(given, np.full_like(given, np.nan))
    assert not lost.read().sqnr_db > 0


def test_quantised_copies_keep_a_measured_distance(tiny: Path, tmp_path: Path) -> None:
    """Q8_0 is some 45 dB away and another model 0; what GGUF keeps whole is not away at all."""
    seen: list[int] = []
    with (
        open_checkpoint(tiny) as reference,
        open_checkpoint(convert(tiny, tmp_path / "q.gguf", quantize="Q8_0")) as copy,
    ):
        found = distances(copy, reference, progress=seen.append)
        assert fingerprint(copy).digest != fingerprint(reference).digest
    assert 40 < found[Q].sqnr_db < 60
    assert found["model.norm.weight"].sqnr_db == np.inf
    assert seen == sorted(seen)

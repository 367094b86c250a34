"""Copies of a subject: made once, run one at a time, witnessed by others, gone with the subject."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from apr_core.engines.subject import Subject, obtain
from apr_core.formats.checkpoint import open_checkpoint
from apr_core.rosetta import copies as module
from apr_core.rosetta.convert import convert, named
from apr_core.rosetta.copies import BROKE_OFF, copies_of, greedy, largest_difference, mismatches, rel_l2, witness

Open = Callable[..., Subject]


def test_copies_are_made_once_and_vanish_with_the_subject(tiny: Path) -> None:
    """The same object, the same files; the folder is gone when the subject is."""
    subject = obtain(str(tiny), device="cpu")
    copies = copies_of(subject)
    assert copies_of(subject) is copies
    assert copies.formats == ("gguf", "apr")
    first = copies.path("gguf")
    stamp = first.stat().st_mtime_ns
    assert copies.path("gguf").stat().st_mtime_ns == stamp
    folder = copies.folder
    assert folder.is_dir()
    subject.close()
    del subject, copies
    gc.collect()
    assert not folder.exists()


def test_the_formats_are_the_other_ones(tiny: Path, tmp_path: Path, open_subject: Open) -> None:
    """A GGUF is copied to SafeTensors and APR."""
    path = convert(tiny, tmp_path / "t.gguf")
    assert copies_of(open_subject(path)).formats == ("safetensors", "apr")


def test_models_are_loaded_one_at_a_time_and_not_kept(
    tiny: Path, open_subject: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory: when the second copy is loaded the first one is gone, and a second reading loads nothing."""
    import weakref

    alive: list[weakref.ref[object]] = []
    load = module.load_copy

    def watched(path: Path, subject: Subject) -> object:
        gc.collect()
        assert [ref for ref in alive if ref() is not None] == []
        model = load(path, subject)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(module, "load_copy", watched)
    subject = open_subject(tiny)
    runs = copies_of(subject).runs(subject)
    assert copies_of(subject).runs(subject) is runs
    assert len(alive) == 2
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


@pytest.mark.parametrize("container", ["safetensors", "gguf"])
def test_the_witness_agrees_and_sees_one_flipped_bit(container: str, tiny: Path, tmp_path: Path) -> None:
    """The field's own package reads the same values, and does not when the file says something else."""
    path = convert(tiny, named(tmp_path / "t", container))
    name = "model.layers.0.self_attn.q_proj.weight"
    with open_checkpoint(tiny) as original, open_checkpoint(path) as copy:
        seen = witness(copy, original)
        assert seen is not None
        assert (seen.package, seen.mismatched, len(seen.names)) == (container, 0, 4)
        assert seen.values == 64 + 32 + 64 * 64 + 64 * 96
        info = copy.tensors[name]
    data = bytearray(info.file.read_bytes())
    data[info.offset + 9] ^= 1
    info.file.write_bytes(data)
    with open_checkpoint(tiny) as original, open_checkpoint(path) as copy:
        seen = witness(copy, original)
        assert seen is not None
        assert seen.mismatched == 1
        assert seen.first.startswith(f"{name} at 4: expected ")


def test_the_witness_sees_a_reversed_shape(tiny: Path, tmp_path: Path) -> None:
    """A tensor of the same bytes and another shape counts with all its values."""
    with open_checkpoint(tiny) as original:
        path = convert(original, tmp_path / "t.gguf")
    data = path.read_bytes()
    at = data.index(b"blk.0.ffn_down.weight") + len(b"blk.0.ffn_down.weight") + 4
    assert data[at : at + 16] == (96).to_bytes(8, "little") + (64).to_bytes(8, "little")
    path.write_bytes(data[:at] + data[at + 8 : at + 16] + data[at : at + 8] + data[at + 16 :])
    with open_checkpoint(tiny) as original, open_checkpoint(path) as copy:
        seen = witness(copy, original)
    assert seen is not None
    assert seen.mismatched == 64 * 96
    assert seen.first.endswith("found shape [96, 64]")


def test_apr_has_no_witness(tiny: Path, tmp_path: Path) -> None:
    """Nobody else reads APR; that is said instead of hidden."""
    with open_checkpoint(tiny) as original, open_checkpoint(convert(tiny, tmp_path / "t.apr")) as copy:
        assert witness(copy, original) is None


def test_rel_l2_is_the_norm_of_the_difference() -> None:
    """Per position: 5 % off everywhere is 0.05, a swap of two equal-norm rows is not 0, NaN stays NaN."""
    reference = np.array([[3.0, 4.0], [3.0, 4.0], [1.0, 0.0]], dtype=np.float32)
    candidate = np.array([[3.15, 4.2], [4.0, 3.0], [np.nan, 0.0]], dtype=np.float32)
    found = rel_l2(reference, candidate)
    np.testing.assert_allclose(found[:2], [0.05, np.sqrt(2) / 5], rtol=1e-6)
    assert np.isnan(found[2])
    assert largest_difference(reference, candidate) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], 0),
        ([1, 2, 3], [1, 9, 3], 1),
        ([1, 2, 3], [1, 2], 1),
        ([], [1, 2], 2),
        ([1, BROKE_OFF], [1, BROKE_OFF], 1),
    ],
)
def test_mismatches(one: list[int], other: list[int], expected: int) -> None:
    """Unequal lengths count, and two generations that both broke off have not agreed."""
    assert mismatches(one, other) == mismatches(other, one) == expected


def test_a_generation_that_breaks_off_says_so(tiny: Path, open_subject: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that are not finite end the list with a mark that equals nothing."""
    subject = open_subject(tiny)
    model = subject.model
    forward, calls = type(model).forward, []

    def poisoned(self: object, ids: np.ndarray, cache: object = None, trace: object = None) -> np.ndarray:
        calls.append(len(ids))
        scores = forward(self, ids, cache)  # type: ignore[arg-type]
        return scores if len(calls) < 3 else scores * np.float32(np.nan)

    monkeypatch.setattr(type(model), "forward", poisoned)
    found = greedy(model, subject.stimulus(5), 6)
    assert (len(found), found[-1]) == (3, BROKE_OFF)

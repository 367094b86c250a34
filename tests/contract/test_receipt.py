"""Receipts: a second start reads a header and samples; whatever differs is judged again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from apr_core.contract import receipt
from apr_core.contract.admit import admit
from apr_core.contract.receipt import SAMPLE_BYTES, SAMPLES, admit_by_receipt, receipt_of
from apr_core.errors import ContractViolation

Tensors = dict[str, np.ndarray]
Save = Callable[..., Path]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has its own cache folder, and its files count as settled at once."""
    monkeypatch.setenv("APR_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(receipt, "SETTLED_NS", 0)


@pytest.fixture
def model(tensors: Tensors, config: dict[str, object], save: Save) -> Path:
    """A healthy model that has been admitted once."""
    folder = save(tensors, config)
    assert admit_by_receipt(folder).receipt is None
    return folder


def _weights(model: Path) -> Path:
    return model / "model.safetensors"


def test_a_receipt_gives_the_same_admission(model: Path) -> None:
    """Everything that an action asks an admission is what reading the weights gave; nothing lies beside the model."""
    held, read = admit_by_receipt(model), admit(model)
    assert held.receipt == receipt_of(held.checkpoint)
    assert dict(held.stats) == dict(read.stats)
    assert list(held.stats) == list(read.stats)
    assert (held.geometry, held.violations, held.extras, held.gate_version, held.bypassed) == (
        read.geometry,
        read.violations,
        read.extras,
        read.gate_version,
        read.bypassed,
    )
    assert list(held.require().tensors) == list(read.require().tensors)
    assert sorted(path.name for path in model.iterdir()) == ["config.json", "model.safetensors"]


def test_a_receipt_reads_no_weights(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor is measured on the second start."""

    def measured(*_: object, **__: object) -> None:
        raise AssertionError("a tensor was measured")

    monkeypatch.setattr(receipt, "admit", measured)
    assert admit_by_receipt(model).ok


def test_a_pickled_admission_of_a_receipt_is_judged_where_it_arrives(model: Path) -> None:
    """The proof does not travel."""
    import pickle

    arrived = pickle.loads(pickle.dumps(admit_by_receipt(model)))
    assert arrived.receipt is None


def test_recheck_reads_everything(model: Path) -> None:
    """Whatever the receipt says."""
    assert admit_by_receipt(model, recheck=True).receipt is None
    assert admit_by_receipt(model).receipt is not None


def test_the_bypass_stays_a_bypass(model: Path) -> None:
    """A clean model that is started with the bypass is marked, receipt or not."""
    assert admit_by_receipt(model, skip=True).bypassed
    assert not admit_by_receipt(model).bypassed


def _in_place(model: Path, *, keep_date: bool) -> None:
    status = _weights(model).stat()
    with _weights(model).open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"\xff" * 4)
    if keep_date:
        os.utime(_weights(model), ns=(status.st_atime_ns, status.st_mtime_ns))


def _moved_over(model: Path) -> None:
    other = model / "other"
    shutil.copy2(_weights(model), other)
    other.replace(_weights(model))


def _touched(model: Path) -> None:
    os.utime(_weights(model), ns=(1, 1))


def _config(model: Path) -> None:
    body = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**body, "rms_norm_eps": 1e-5}))


def _companion(model: Path) -> None:
    (model / "generation_config.json").write_text("{}")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: _in_place(m, keep_date=False),
        lambda m: _in_place(m, keep_date=True),
        _moved_over,
        _touched,
        _config,
        _companion,
    ],
    ids=["rewritten", "rewritten, date set back", "moved over", "touched", "configuration", "companion"],
)
def test_what_differs_is_judged_again(change: Callable[[Path], None], model: Path) -> None:
    """Each part of the identity alone ends the receipt."""
    assert admit_by_receipt(model).receipt is not None
    change(model)
    assert admit_by_receipt(model).receipt is None


def test_a_change_without_a_date_is_found_by_the_samples(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the file system's word taken away (as on a drive that keeps no dates), header and samples remain."""
    monkeypatch.setattr(receipt, "_dates", lambda path: [0, 0, 0, 0, 0])
    assert admit_by_receipt(model).receipt is None
    assert admit_by_receipt(model).receipt is not None
    with _weights(model).open("r+b") as stream:
        stream.seek(-2 * (_weights(model).stat().st_size // SAMPLES) - 8192, os.SEEK_END)
        stream.write(b"\x01\x3c" * (_weights(model).stat().st_size // SAMPLES))
    assert admit_by_receipt(model).receipt is None


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, 64 * 4096, 64 * 4096 + 63, 988_097_824])
def test_samples_lie_in_the_file_one_in_each_part(size: int) -> None:
    """64 places, none past the end, none in another 64th, and a seed gives the same ones twice."""
    places = list(receipt._offsets(size, 7))
    assert places == list(receipt._offsets(size, 7))
    assert len(places) == SAMPLES
    for k, place in enumerate(places):
        assert size * k // SAMPLES <= place <= max(size * k // SAMPLES, size * (k + 1) // SAMPLES - SAMPLE_BYTES)


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"zeros": 0', '"zeros": 1', 1),
        lambda text: text.replace('"gate_version": ', '"gate_version": 9', 1),
        lambda text: "",
        lambda text: "[]",
        lambda text: '{"sha256": "", "body": {}}',
    ],
    ids=["torn", "edited", "other gates", "empty", "a list", "no seal"],
)
def test_a_damaged_receipt_proves_nothing(edit: Callable[[str], str], model: Path) -> None:
    """It is judged again, and the receipt is renewed."""
    place = receipt_of(admit(model).checkpoint)
    place.write_text(edit(place.read_text()))
    assert admit_by_receipt(model).receipt is None
    assert admit_by_receipt(model).receipt == place


def test_other_gates_end_every_receipt(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A receipt of an older gate table is not proof for the new one."""
    from dataclasses import replace

    newer = replace(receipt.load_gates(), version=receipt.load_gates().version + 1)
    monkeypatch.setattr(receipt, "load_gates", lambda: newer)
    assert admit_by_receipt(model).receipt is None


def test_a_refused_model_gets_no_receipt(tensors: Tensors, config: dict[str, object], save: Save) -> None:
    """It is judged, and refused, every time."""
    tensors["model.norm.weight"][3] = np.nan
    folder = save(tensors, config)
    for _ in range(2):
        admission = admit_by_receipt(folder)
        assert admission.receipt is None
        with pytest.raises(ContractViolation):
            admission.require()
    assert not receipt_of(admission.checkpoint).exists()


def test_a_file_that_was_just_written_gets_no_receipt(
    tensors: Tensors, config: dict[str, object], save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could be written again within one step of the file system's clock."""
    monkeypatch.setattr(receipt, "SETTLED_NS", 10**12)
    folder = save(tensors, config)
    assert not receipt_of(admit_by_receipt(folder).checkpoint).exists()


def test_a_file_that_changes_while_it_is_judged_gets_no_receipt(
    tensors: Tensors, config: dict[str, object], save: Save
) -> None:
    """What was measured is not what lies there now."""
    folder = save(tensors, config)
    calls: list[int] = []

    def write(*_: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            _touched(folder)

    assert not receipt_of(admit_by_receipt(folder, progress=write).checkpoint).exists()


def test_without_a_cache_folder_it_still_works(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache that cannot be written is no reason to fail."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("APR_CACHE", str(tmp_path / "file" / "cache"))
    assert admit_by_receipt(model).receipt is None


@pytest.mark.parametrize(
    ("apr", "xdg", "expected"),
    [
        ("/own", "/shared", "/own"),
        ("", "/shared", "/shared/apr"),
        ("", "relative", "~/.cache/apr"),
        ("", "", "~/.cache/apr"),
    ],
)
def test_where_the_cache_lies(apr: str, xdg: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The override, then the desktop's rule, then its default; a relative XDG path is to be ignored."""
    monkeypatch.setenv("APR_CACHE", apr)
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert receipt.cache_folder() == Path(expected).expanduser()


def test_shards_are_all_in_the_receipt(tensors: Tensors, config: dict[str, object], tmp_path: Path) -> None:
    """A change of any shard ends it."""
    from safetensors.numpy import save_file

    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:13], "model-00002-of-00002.safetensors": names[13:]}
    for file, own in shards.items():
        save_file({name: tensors[name] for name in own}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, own in shards.items() for name in own}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert admit_by_receipt(tmp_path).receipt is None
    assert admit_by_receipt(tmp_path).receipt is not None
    os.utime(tmp_path / "model-00002-of-00002.safetensors", ns=(5, 5))
    assert admit_by_receipt(tmp_path).receipt is None

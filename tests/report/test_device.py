"""Imported evidence from a device: shown with where it comes from, or said to be none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apr_core.errors import FormatError
from apr_core.report.device import show_device, show_imported


def _record(name: str, part: str = "models", device: str = "cuda", **measured: object) -> str:
    about = {"device": device, "device_name": "<H200>", "provenance": {"commit": "c0ffee"}}
    body = {"part": part, "name": name, "verdict": "CORROBORATED", "measured": measured, "rows": [], **about}
    if part == "figures":
        body["rows"] = [{"what": "m-speed", "over": "", "measured": 2100.0, "at_least": 2000}]
    return json.dumps(body)


def test_no_evidence_is_said(tmp_path: Path) -> None:
    """Without a folder, and with nothing of the kind in it."""
    for folder in (tmp_path / "absent", tmp_path):
        assert "No evidence from a device" in show_device(folder).text
        assert "none has been imported into reports/gpu" in show_imported(folder).text


def test_rates_and_kernels_are_shown_as_imported(tmp_path: Path) -> None:
    """By device and commit, escaped; a peer that did not run has no rate."""
    (tmp_path / "1.json").write_text(
        _record("m-speed", decode_tok_s=2100.0, bytes_per_token=10**9, us_by_kernel={"residual": 151.23})
    )
    (tmp_path / "2.json").write_text(_record("m-llama.cpp"))
    (tmp_path / "3.json").write_text(_record("machine", "ceilings", read_gb_s=4321.0))
    (tmp_path / "4.json").write_text(_record("h200", "figures"))
    shown = show_device(tmp_path)
    for said in (
        "Imported from <H200>, commit c0ffee",
        "not measured by this run",
        "m-speed",
        "2100",
        "residual us",
        "151",
        "4321",  # the roofline of a gigabyte per token
        "Predicted against measured",
        "at_least",
    ):
        assert said in shown.text
    assert "m-llama.cpp" not in shown.text
    assert "rehearsal" not in shown.text
    assert "&lt;H200&gt;" in shown.html
    assert "<H200>" not in shown.html


def test_a_rehearsal_is_marked(tmp_path: Path) -> None:
    """An archive of `run_gpu.sh --bench --device cpu`, unpacked: its rates are an interpreter's."""
    (tmp_path / "1.json").write_text(_record("m-speed", device="cpu", decode_tok_s=0.5, bytes_per_token=10**6))
    assert "a rehearsal on the CPU: rates of an interpreter" in show_device(tmp_path).text


@pytest.mark.parametrize("text", ["{", "[]", '{"part": "models"}'])
def test_an_unreadable_record_is_an_error(tmp_path: Path, text: str) -> None:
    """Silence would look like none."""
    (tmp_path / "1.json").write_text(text)
    with pytest.raises(FormatError, match=r"a record of ci/run_gpu\.sh"):
        show_device(tmp_path)


def test_every_imported_verdict_is_shown_with_its_machine_and_commit(tmp_path: Path) -> None:
    """Rates or not, refuted or not: a record that is left out could be the refuted one."""
    (tmp_path / "1.json").write_text(_record("synth-1.5b", parity={"required_tolerance": 3.1e-6}))
    (tmp_path / "2.json").write_text(_record("<i>").replace("CORROBORATED", "FALSIFIED"))
    shown = show_imported(tmp_path)
    for said in ("Imported from <H200>, commit c0ffee", "no part of its verdict", "3.1e-06", "FALSIFIED"):
        assert said in shown.text
    assert "<i>" not in shown.html

"""Imported evidence from a device: shown with where it comes from, or said to be none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apr_core.errors import FormatError
from apr_core.report.device import show_device, show_imported


def _record(name: str, **measured: object) -> str:
    about = {"device": "cuda", "device_name": "<H200>", "provenance": {"commit": "c0ffee"}}
    return json.dumps({"part": "models", "name": name, "verdict": "CORROBORATED", "measured": measured, **about})


def test_no_evidence_is_said(tmp_path: Path) -> None:
    """Without a folder, and with nothing of the kind in it."""
    for folder in (tmp_path / "absent", tmp_path):
        assert "No evidence from a device" in show_device(folder).text
        assert "none has been imported into reports/gpu" in show_imported(folder).text


def test_rates_and_kernels_are_shown_as_imported(tmp_path: Path) -> None:
    """By device and commit, escaped; a peer that did not run has no rate."""
    (tmp_path / "1.json").write_text(_record("m-speed", decode_tok_s=2100.0, us_by_kernel={"residual": 151.23}))
    (tmp_path / "2.json").write_text(_record("m-llama.cpp"))
    shown = show_device(tmp_path)
    for said in (
        "Imported from <H200>, commit c0ffee",
        "not measured by this run",
        "m-speed",
        "2100",
        "residual us",
        "151",
    ):
        assert said in shown.text
    assert "m-llama.cpp" not in shown.text
    assert "&lt;H200&gt;" in shown.html
    assert "<H200>" not in shown.html


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

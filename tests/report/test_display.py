"""Displays in Jupyter: visible, escaped, total."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apr_core.diagnose.cause import Cause, Diagnosis
from apr_core.falsify.evidence import SubjectRecord
from apr_core.falsify.finding import Finding
from apr_core.falsify.rounds import Round
from apr_core.falsify.verdict import NotRun
from apr_core.report import display
from apr_core.report.display import (
    show_claims,
    show_diagnosis,
    show_evidence,
    show_finding,
    show_provenance,
    show_rounds,
    show_whys,
)
from apr_core.report.figures import plot

WHO = SubjectRecord("m.gguf", "/m.gguf", "gguf", "ab" * 32, {"Q8_0": 5}, 100, 110, "cpu")
RUN = {
    "cpu": "a cpu",
    "cores": 2,
    "platform": "Linux",
    "python": "3.11",
    "packages": {"numpy": "2"},
    "commit": "c0ffee",
}


@pytest.fixture
def round_(tmp_path: Path) -> Round:
    """An open round of the parity notebook."""
    return Round("20_parity", WHO, tmp_path, parameters={"seed": 0}, provenance=RUN)


@pytest.fixture
def shell() -> Iterator[Any]:
    """An IPython shell without a terminal, with the displays installed."""
    from IPython.core.interactiveshell import InteractiveShell

    yield InteractiveShell.instance()
    InteractiveShell.clear_instance()


def test_outside_of_ipython_nothing_is_imported(root: Path) -> None:
    """The runner imports this room too."""
    code = "import sys; from apr_core.report.display import install; print(install(), 'IPython' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_without_a_shell_nothing_is_registered() -> None:
    """IPython may be imported by others and not be running."""
    import IPython

    assert IPython.get_ipython() is None
    assert display.install() is False


def test_a_finding_shows_its_value(finding: Callable[[str], Finding]) -> None:
    """Value against limit, coverage, reference, noise floor, rows."""
    shown = show_finding(replace(finding("F-PAR-002"), value=3.2e-7, nonfinite=1, missing=["layers.9.q"]))
    for said in (
        "rel_l2_over_limit = 3.2e-07 (limit ≤ 1), compared 38 of 38",
        "noise floor: 1.2e-07",
        "not compared: layers.9.q",
    ):
        assert said in shown.text
        assert said in shown.html
    assert shown.html.count("<tr>") == 39
    assert 'aria-label="38 rows"' in shown.html
    assert "1 values are not finite" in shown.text


def test_a_finding_that_measured_nothing() -> None:
    """The reason stands where the value would."""
    nothing = replace(Finding.nothing(NotRun.REFUSED, "F-X on t"), claim="F-PAR-001")
    assert repr(show_finding(nothing)) == "F-PAR-001 not run: refused by the contract: F-X on t"
    inconclusive = Finding(
        float("nan"), 1, 1, claim="F-PAR-001", inconclusive="both sides are one file", whys=[("q", "a")]
    )
    assert "rel_l2_over_limit = not finite" in show_finding(inconclusive).text
    assert "decides nothing: both sides are one file" in show_finding(inconclusive).text
    assert "  1. q a" in show_finding(inconclusive).text


def test_claims_and_whys(round_: Round, finding: Callable[[str], Finding]) -> None:
    """The table names every claim; the whys of what is falsified stand under it."""
    assert "not recorded yet" in show_claims(round_).html
    assert "there is nothing to explain" in show_whys(round_).text
    record = round_.record("F-PAR-002", replace(finding("F-PAR-002"), value=2.0, whys=[("Where?", "in <layer> 3")]))
    round_.record("F-PAR-007", replace(finding("F-PAR-007"), value=1.0))
    shown = show_claims(round_)
    for claim in round_.claims:
        assert claim.id in shown.html
        assert claim.id in shown.text
    assert '<td>Where?</td><td>in &lt;layer&gt; 3 <a href="evidence/' in shown.html
    assert "No experiment has been recorded" in show_whys(round_).html
    assert show_evidence(record).text.startswith(str(record))


def test_provenance(round_: Round) -> None:
    """Bytes, code, machine, parameters; what is absent is left out; a bypass is said."""
    shown = show_provenance(round_)
    for said in ("ab" * 32, "Q8_0 × 5", "a cpu", "numpy 2", "c0ffee", "seed=0"):
        assert said in shown.text
        assert said in shown.html
    assert "refused" not in shown.text
    round_.subject, round_.reference = replace(WHO, bypassed=True, refusal="gate <x>"), WHO
    assert "nothing here can be corroborated" in show_provenance(round_).text
    assert "gate &lt;x&gt;" in show_provenance(round_).html
    assert f"m.gguf (sha256 {'ab' * 32})" in show_provenance(round_).text


def test_hostile_strings(round_: Round, parse: Callable[[str], Any], strings: tuple[str, ...]) -> None:
    """Scripts in an output run in JupyterLab: there must be none."""
    text = [s.replace("\ud800", "") for s in strings]
    found = Finding(
        9.0, 1, 1, claim="F-PAR-002", rows=[{t[:60]: t for t in text}], whys=[(t[:500], t[:500]) for t in text],
        missing=text, reference=text[0], inconclusive="",
    )  # fmt: skip
    round_.subject = replace(WHO, name=text[0], refusal=text[1], quant={text[2]: 1})
    record = round_.record("F-PAR-002", found)
    for shown in (
        show_finding(found),
        show_evidence(record),
        show_claims(round_),
        show_whys(round_),
        show_provenance(round_),
    ):
        page = parse(shown._repr_html_())
        assert page.faults() == []
        assert not {t for t, _ in page.tags} & {"script", "img", "style"}
        assert "://" not in shown.html
        assert "\x1b" not in shown.text


def test_installed(shell: Any, round_: Round, finding: Callable[[str], Finding]) -> None:
    """In a running IPython the plain objects show themselves."""
    assert display.install() is True
    found = finding("F-PAR-002")
    data, _ = shell.display_formatter.format(found)
    assert data["text/html"] == show_finding(found)._repr_html_()
    assert data["text/plain"] == show_finding(found).text
    record = round_.record("F-PAR-002", found)
    assert "CORROBORATED" in shell.display_formatter.format(record)[0]["text/html"]
    assert "not recorded yet" in shell.display_formatter.format(round_)[0]["text/html"]


def test_figures_carry_their_words(shell: Any, finding: Callable[[str], Finding]) -> None:
    """SVG with its alternative text in the metadata, which the exported page takes."""
    display.install()
    figure = plot(finding("F-PAR-001"))
    data, metadata = shell.display_formatter.format(figure)
    assert data["image/svg+xml"].startswith("<svg")
    assert metadata["image/svg+xml"] == {"alt": data["text/plain"]}
    assert "rel_l2 at 63 positions" in data["text/plain"]


def test_displays_never_raise(shell: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A broken object, a claim that does not exist, a figure that cannot draw: said, not raised."""
    display.install()
    data, _ = shell.display_formatter.format(Finding(0.0, 1, 1, claim="<b>"))
    assert "Finding could not be shown: KeyError" in data["text/plain"]
    assert "<b>" not in data["text/html"]
    assert display._figure(object()) is None
    assert "figure not drawn" in capsys.readouterr().err


def test_a_diagnosis_shows_each_chain() -> None:
    """Outcome and provenance first, then every cause with its table; without a cause, how far it got."""
    cause = Cause("layout", "Is it <transposed>?", "yes", proved=True, tensors=("q",), whys=(("Is it?", "yes"),))
    shown = show_diagnosis(Diagnosis("explained", (cause,), "damaged"))
    assert "explained; damaged" in shown.text
    assert "layout: q (proved by repair)" in shown.text
    assert "<td>Is it?</td><td>yes</td>" in shown.html
    nothing = show_diagnosis(Diagnosis("nothing to explain", steps=(("Open?", "yes"),)))
    assert "<td>Open?</td>" in nothing.html


def test_rounds_show_their_table_and_every_chain() -> None:
    """One row and one chain for each root cause; what a record says is escaped."""
    record = {
        "round": 51, "id": "PMAT-235", "what": "Zeros <b>passed</b>.", "twin": "t", "planted": "0", "guards": ["F-1"],
        "cause": "missing-data", "place": "model.embed", "proved": True, "whys": [["Are they there?", "no"]],
    }  # fmt: skip
    shown = show_rounds([record, {**record, "id": "GH-5", "proved": False}])
    assert shown.text.count("1. Are they there? no") == 2
    assert shown.text.count("by repair") == 1
    assert "<b>" not in shown.html
    assert shown.html.count("apr-whys") == 2

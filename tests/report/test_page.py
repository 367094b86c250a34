"""index.html: everything declared is on it, everything hostile is inert, nothing remote is asked for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apr_core.errors import Exit, FormatError, ReadWriteError
from apr_core.falsify.claims import NOTEBOOKS, claims_of, load_claims
from apr_core.falsify.finding import Finding
from apr_core.falsify.rounds import conclude
from apr_core.falsify.verdict import NotRun, Verdict
from apr_core.report.page import MEANING, REMEDY, write_index
from apr_core.report.summary import NotebookStatus

DIAGNOSIS = {
    "error": "FormatError",
    "message": "expected GGUF magic, found a Git-LFS pointer, in /m/q.gguf at byte 0",
    "exit_code": 4,
    "advice": "git lfs pull",
}


def write(run: Any) -> str:
    """Write the page of a run and read it."""
    return write_index(run.folder, run.conclusion, notebooks=run.notebooks).read_text(encoding="utf-8")


def test_every_declared_claim_is_there(good: Any, parse: Callable[[str], Any]) -> None:
    """Each with id, title, severity, verdict, limit, coverage, statement, prediction, falsifier, source, links."""
    run, page = good, parse(good.page)
    anchors = {a["id"] for _, a in page.tags if "id" in a}
    links = {a["href"] for a in page.every("a")}
    for claim in load_claims().values():
        _, _, evidence = run.conclusion.by_claim[claim.id]
        assert claim.id in anchors
        for text in (claim.title, claim.statement, claim.prediction, claim.falsifier, claim.source):
            assert " ".join(text.split()) in page.text
        assert f"evidence/{claim.id}-{evidence.attempt}.json" in links
        assert (run.folder / f"evidence/{claim.id}-{evidence.attempt}.json").is_file()
        assert f"{claim.notebook}.html#cell-id=claim-{claim.id.lower()}" in links
    assert page.text.count("CORROBORATED") >= run.conclusion.counts["CORROBORATED"]
    assert len([a for t, a in page.tags if t == "tr" and a.get("class") == "claim"]) == len(load_claims())


def test_the_verdict_comes_first(good: Any, parse: Callable[[str], Any]) -> None:
    """In a sentence, with exit code in words, score and counts."""
    run, text = good, parse(good.page).text
    sentence = f"No attempt refuted pygmy: {run.conclusion.counts['CORROBORATED']} claims held"
    for said in (sentence, "Exit code 0 : nothing was refuted", f"{run.conclusion.score:.2f} score, of 1"):
        assert said in text
    assert text.index(sentence) < text.index("Claims")
    assert f"{run.conclusion.counts['NOT_RUN']} NOT_RUN" in text


def test_a_run_with_holes_says_so_first(make_run: Callable[..., Any], parse: Callable[[str], Any]) -> None:
    """Unreadable, newer and missing evidence: named and counted above the score; a whole run says nothing of it."""
    run = make_run(changes={"F-GT-001": None})
    for claim, text in (("F-THR-001", '{"schema": 9}'), ("F-PAR-003", "{")):
        next((run.folder / "evidence").glob(f"{claim}-*.json")).write_text(text)
    run.conclusion = conclude(run.folder)
    text = parse(write(run)).text
    files = len(load_claims()) - 1
    assert f"This report is incomplete. 2 of {files} evidence files cannot be read" in text
    assert "1 declared claim left no evidence: F-GT-001." in text
    assert "ValueError: schema 9, written by a newer apr_core" in text
    assert all(name in text for name in run.conclusion.damaged)
    assert text.index("incomplete") < text.index("score, of 1")
    assert "Exit code 4 : evidence cannot be read" in text


def test_the_top_names_file_reference_machine_and_duration(good: Any, parse: Callable[[str], Any]) -> None:
    """In one line; and a whole run is not called incomplete."""
    text = parse(good.page).text
    assert "safetensors sha256 9f9f9f9f9f9f BF16, F32 6.4 MB no reference AMD EPYC 7763 17.0 s" in text
    assert "incomplete" not in text


def test_reasons_for_not_running(good: Any, parse: Callable[[str], Any]) -> None:
    """Each reason once, with its claims and what it would take."""
    text = parse(good.page).text
    assert (
        "no CUDA device (3): F-PAR-010 , F-PAR-012 , F-THR-009 . To change that: run on a machine with a CUDA device."
        in text
    )
    assert "no reference given (4): F-GT-010 , F-GT-011 , F-PAR-008 , F-PAR-009" in text
    assert set(REMEDY) == set(NotRun)
    assert set(MEANING) == set(Exit)


def test_a_falsified_claim_opens_with_its_whys(make_run: Callable[..., Any], parse: Callable[[str], Any]) -> None:
    """Reason, whys, rows, tolerance and the command that repeats it; the head links to it."""
    bad = Finding(7.0, 9, 9, rows=[{"case": "a b", "wrong": 7}], whys=[("Why <so>?", "7 of 9 lost")], noise_floor=0.5)
    run = make_run(
        notebooks=("00_ground_truth",),
        changes={"F-GT-001": bad},
        lacks=(),
        parameters={"model": "/a b/m.gguf", "device": "cuda", "peers": "llama.cpp,ollama:q", "seed": 7},
    )
    page = parse(write(run))
    assert run.conclusion.verdict is Verdict.FALSIFIED
    assert "1 claim about pygmy is refuted. FALSIFIED Exit code 5" in page.text
    assert "Why <so>? 7 of 9 lost" in page.text
    assert "Least tolerance that holds 7" in page.text
    assert "Noise floor 0.5" in page.text
    assert (
        "apr suite --model '/a b/m.gguf' --device cuda --peer llama.cpp --peer ollama:q -p seed 7 --only 00"
        in page.text
    )
    assert "#F-GT-001" in {a["href"] for a in page.every("a")}
    assert len([a for a in page.every("details") if "open" in a]) == 1


def test_a_broken_notebook_is_told(make_run: Callable[..., Any], parse: Callable[[str], Any]) -> None:
    """Its reason stands in the table of what ran, and the head names it beside what is refuted."""
    run = make_run(
        notebooks=("00_ground_truth", "20_parity"),
        changes={"F-GT-001": Finding(1.0, 1, 1)},
        broken={"20_parity": "cell 3 raised"},
    )
    text = parse(write(run)).text
    assert "did not complete: cell 3 raised" in text
    assert "Did not complete: 20_parity, see below." in text
    assert "Exit code 1" in text


def test_what_left_no_evidence_is_seen(make_run: Callable[..., Any], parse: Callable[[str], Any]) -> None:
    """A declared claim without a record says so; a notebook without a status was not executed."""
    run = make_run(notebooks=("20_parity",), changes={"F-PAR-001": None})
    del run.notebooks["20_parity"]
    text = parse(write(run)).text
    assert "declared, but left no evidence" in text
    assert "no evidence" in text
    assert "20_parity not executed" in text
    assert "00_ground_truth not selected" in text
    assert "This run does not decide about pygmy." in text
    assert "Undecided: F-PAR-001." in text


def test_several_attempts_are_counted(make_run: Callable[..., Any], parse: Callable[[str], Any]) -> None:
    """Merged runs leave several records of a claim; the page says which speaks."""
    run = make_run(notebooks=("20_parity",))
    for path in list((run.folder / "evidence").glob("F-PAR-007-*.json")):
        path.with_name(path.name.replace("F-PAR-007-", "F-PAR-007-2")).write_bytes(path.read_bytes())
    assert "Attempts 2 in this folder; the worst one speaks" in parse(write(run)).text


def test_the_subject_has_a_passport(make_run: Callable[..., Any], parse: Callable[[str], Any]) -> None:
    """Hash, types, bits per weight, device and the file's own metadata, for subject and reference."""
    run = make_run(notebooks=("30_throughput",))
    declared = json.loads((run.folder / "declared.json").read_text())
    declared["reference"] = {**declared["subject"], "name": "original", "sha256": "cd" * 32}
    declared["subject"]["bypassed"] = True
    (run.folder / "declared.json").write_text(json.dumps(declared))
    text = parse(write(run)).text
    for said in (
        "Subject: pygmy",
        "9f" * 32,
        "BF16 × 25, F32 × 13",
        "Bits per weight 16.00 (whole file)",
        "6.4 MB (6,431,232 bytes)",
        "general.name Pygmy",
        "Reference: original",
        "cd" * 32,
        "The contract was bypassed",
        "AMD EPYC 7763",
        "torch 2.11.0",
        "0123abc (edited since)",
        "--reference /data/models/pygmy -p seed 0 --only 30",
    ):
        assert said in text


def test_unopened_subject_is_reported_at_once(make_run: Callable[..., Any], parse: Callable[[str], Any]) -> None:
    """Message, advice and exit code; every claim NOT_RUN; in less than a second of one core, and without matplotlib."""
    run = make_run(diagnosis=DIAGNOSIS)
    start = time.process_time()
    text = parse(write(run)).text
    assert time.process_time() - start < 1.0
    for said in (DIAGNOSIS["message"], "What to do: git lfs pull", "Exit code 4", "could not be opened", "every claim"):
        assert str(said) in text
    assert run.conclusion.counts["NOT_RUN"] == len(load_claims())


def test_a_diagnosis_without_advice(make_run: Callable[..., Any], parse: Callable[[str], Any]) -> None:
    """The keys that the lower room promises are enough."""
    run = make_run(diagnosis={"error": "NotFound", "message": "no such file", "exit_code": 3})
    assert "Diagnosis: NotFound no such file" in parse(write(run)).text


def test_start_up_stays_light(root: Path) -> None:
    """Importing the page loads none of the slow packages."""
    code = (
        "import sys, apr_core.report, apr_core.report.page, apr_core.report.junit, apr_core.report.display,"
        "apr_core.report.export, apr_core.report.figures;"
        "slow = ('matplotlib', 'nbconvert', 'nbformat', 'IPython', 'torch', 'jinja2');"
        "print([m for m in slow if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_hostile_strings_are_inert(hostile: Any, parse: Callable[[str], Any]) -> None:
    """No script but the page's own, no handler, no address that leaves the folder, and the text is still readable."""
    source, page = hostile.page, parse(hostile.page)
    assert page.faults() == []
    assert source.count("<script") == 1
    assert source.count("</style>") == 1
    assert "PWN" in page.text
    assert "{{ 7*7 }}" in page.text
    assert "a\\x00b\\x1b[31mred\\x07\\u202egnp.exe\\ufffe" in page.text
    assert "[10,000 characters]" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", source)
    assert "N" * 5000 not in source


@pytest.mark.parametrize("kind", ["good", "hostile", "dead"])
def test_nothing_remote(kind: str, request: pytest.FixtureRequest, parse: Callable[[str], Any]) -> None:
    """A search of the bytes finds no address, and a policy forbids loading one."""
    if kind == "dead":
        source = write(request.getfixturevalue("make_run")(diagnosis=DIAGNOSIS))
    else:
        source = request.getfixturevalue(kind).page
    page = parse(source)
    assert "://" not in source
    assert not re.search(r"@import|url\(", source)
    assert page.faults() == []
    policy = next(a["content"] for a in page.every("meta") if a.get("http-equiv") == "Content-Security-Policy")
    nonce = page.every("script")[0]["nonce"]
    assert policy == (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'"
    )
    assert len(nonce) == 24


def test_readable_for_all(good: Any, parse: Callable[[str], Any]) -> None:
    """Heads have scope, images have words, the page has a language and follows light, dark and paper."""
    source, page = good.page, parse(good.page)
    assert all("scope" in a for a in page.every("th"))
    assert page.every("img")
    assert all(len(a["alt"]) > 20 for a in page.every("img"))
    assert page.every("html") == [{"lang": "en"}]
    assert "Were the claim false" in page.text
    for said in ("prefers-color-scheme: dark", "@media print", "max-width: 48rem", "width=device-width"):
        assert said in source


def luminance(colour: str) -> float:
    """Relative luminance as WCAG defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("scheme", [0, 1, 2])
def test_contrast(root: Path, scheme: int) -> None:
    """Text on each ground it stands on reaches 4.5 to 1 in light, dark and print."""
    blocks = re.findall(r":root \{(.*?)\}", (root / "apr_core/report/templates/palette.css").read_text(), re.DOTALL)
    named = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", blocks[scheme]))
    pairs = [(ink, ground) for ink in ("ink", "muted", "link") for ground in ("paper", "card", "sunk")]
    pairs += [(k, ground) for k in ("good", "bad", "open", "idle") for ground in ("paper", "card", f"{k}-bg")]
    for ink, ground in pairs:
        light, dark = sorted((luminance(named[ink]), luminance(named[ground])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, ground)


def test_a_damaged_attachment_costs_one_figure(make_run: Callable[..., Any], parse: Callable[[str], Any]) -> None:
    """The npz was changed after it was recorded: said at its claim, the page stands."""
    run = make_run(notebooks=("20_parity",))
    next((run.folder / "evidence").glob("F-PAR-001-*.npz")).write_bytes(b"not it")
    text = parse(write(run)).text
    assert "The figure could not be drawn: FormatError: expected sha256" in text
    assert "F-PAR-007" in text


def test_missing_names_are_cut(make_run: Callable[..., Any], parse: Callable[[str], Any]) -> None:
    """Twelve names at most, the rest is counted."""
    finding = Finding(0.0, 5, 45, missing=[f"tensor.{i}" for i in range(40)], nonfinite=0)
    text = parse(write(make_run(notebooks=("00_ground_truth",), changes={"F-GT-001": finding}))).text
    assert "tensor.10, and 29 more" in text


def test_equal_runs_equal_pages(good: Any) -> None:
    """The page is a function of the folder: written twice, byte for byte the same, nothing left beside it."""
    assert write(good) == good.page
    assert not [p for p in good.folder.iterdir() if p.name.startswith(".")]


def test_errors(make_run: Callable[..., Any], tmp_path: Path) -> None:
    """No declaration, no page; a folder that cannot be written is an I/O error."""
    run = make_run(notebooks=("30_throughput",), diagnosis=DIAGNOSIS)
    with pytest.raises(FormatError, match=r"declared\.json"):
        write_index(tmp_path / "nowhere", run.conclusion, notebooks={})
    (run.folder / "index.html").mkdir()
    with pytest.raises(ReadWriteError, match="choose another --out"):
        write_index(run.folder, run.conclusion, notebooks={})


def test_status_is_plain() -> None:
    """The runner fills it with two values when all went well."""
    status = NotebookStatus(1.5, True)
    assert (status.reason, status.html) == ("", None)
    assert len(NOTEBOOKS) == len({c.notebook for n in NOTEBOOKS for c in claims_of(n)})


def test_what_the_notebooks_read_completes_what_the_header_said(good: Any, parse: Callable[[str], Any]) -> None:
    """The preflight reads headers only: hash and device come from the evidence."""
    path = good.folder / "declared.json"
    whole = path.read_text(encoding="utf-8")
    declared = json.loads(whole)
    known = next(e for _, _, e in good.conclusion.by_claim.values() if e is not None).subject
    declared["subject"] |= {"sha256": "", "device": ""}
    path.write_text(json.dumps(declared), encoding="utf-8")

    page = write(good)
    path.write_text(whole, encoding="utf-8")  # the run is shared with other tests

    assert known["sha256"] in parse(page).text

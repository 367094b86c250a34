"""Run folders made by declaring and recording synthetic findings: the input of the report room, nothing mocked."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr_core.falsify.claims import NOTEBOOKS, claims_of
from apr_core.falsify.evidence import SubjectRecord
from apr_core.falsify.finding import Finding
from apr_core.falsify.rounds import Conclusion, Round, conclude, declare
from apr_core.falsify.verdict import NEEDS, NotRun
from apr_core.report.page import write_index
from apr_core.report.summary import NotebookStatus

# What a hostile file may put into names and metadata. The last one is 10 kB long.
HOSTILE = (
    "<script>window.PWN=1</script>",
    '"><img src=x onerror="window.PWN=2">',
    "' onmouseover='window.PWN=3",
    "]]><!-- ]]&gt; --><![CDATA[",
    "</style><script>window.PWN=4</script>",
    "javascript:window.PWN=5",
    "{{ 7*7 }}{% raw %}${jndi}`id`",
    "a\x00b\x1b[31mred\x07\u202egnp.exe\ufffe\ud800",
    "https://evil.example/x.js",
    "N" * 10_000,
)


def subject(**changes: Any) -> SubjectRecord:
    """A plausible passport."""
    return replace(
        SubjectRecord(
            name="pygmy",
            path="/data/models/pygmy",
            format="safetensors",
            sha256="9f" * 32,
            quant={"BF16": 25, "F32": 13},
            parameters=3_214_848,
            file_bytes=6_431_232,
            device="cpu",
            template_sha256="ab" * 32,
            metadata={"format": "pt", "general.name": "Pygmy", "license": "apache-2.0"},
        ),
        **changes,
    )


PROVENANCE = {
    "python": "3.11.7",
    "platform": "Linux x86_64",
    "cpu": "AMD EPYC 7763",
    "cores": 2,
    "packages": {"numpy": "2.4.6", "torch": "2.11.0"},
    "commit": "0123abc",
    "dirty": True,
    "command": "apr qa pygmy",
    "time": "2026-11-24T10:00:00+00:00",
}


def tensor_names(layers: int = 6) -> list[str]:
    """Activations of one forward, in its order."""
    ops = ("q", "k", "v", "attn_output", "resid_attn", "resid_ffn")
    return [f"layers.{i}.{o}" for i in range(layers) for o in ops] + ["final_hidden", "logits"]


def finding_of(claim_id: str, *, names: list[str] | None = None) -> Finding:
    """A healthy finding with rows and arrays such as the acts give."""
    rng = np.random.default_rng(sum(map(ord, claim_id)))
    names = names or tensor_names()
    if claim_id.startswith("F-DATA-QUALITY"):
        rows = [
            {"on": "counter-example", "what": "zeroed embedding", "measured": 1, "limit": 1, "outcome": "caught"},
            {"on": "counter-example", "what": names[0], "measured": 1, "limit": 1, "outcome": "caught"},
        ]
        arrays = {"measured": rng.uniform(0.0, 40, 38), "limit": np.array([50.0, 80.0])}
        return Finding(0.0, 40, 40, rows=rows, arrays=arrays, detail="2 of 2 counter-examples caught")
    if claim_id in ("F-PAR-002", "F-PAR-010"):
        values = rng.lognormal(-14.5, 0.5, (len(names), 63))
        worst = values.max(axis=1)
        rows = [
            {"name": n, "rel_l2": float(v), "limit": 1e-5, "position": 4} for n, v in zip(names, worst, strict=True)
        ]
        limit = np.full(len(names), 1e-5)
        arrays = {"position": np.arange(63), "name": np.array(names), "rel_l2": values, "limit": limit}
        return Finding(
            float(values.max()) / 1e-5, 38, 38, rows=rows, arrays=arrays, reference="float64", noise_floor=1.2e-7
        )
    if claim_id in ("F-PAR-001", "F-PAR-003"):
        values = rng.lognormal(-15, 0.4, (1, 63))
        values[0, :3] = 0
        arrays = {"position": np.arange(63), "name": np.array(["logits"]), "rel_l2": values, "limit": np.array([1e-5])}
        return Finding(float(values.max()) / 1e-5, 63, 63, arrays=arrays, reference="numpy in float64")
    if claim_id == "F-GT-002":
        return Finding(0.0, 62, 62, arrays={"rel_l2_gguf": np.zeros(31), "rel_l2_apr": np.zeros(31)})
    if claim_id == "F-GT-008":
        return Finding(6e-7, 63, 63, arrays={"rel_l2": rng.lognormal(-15, 0.4, 63)})
    if claim_id in ("F-PAR-004", "F-PAR-008"):
        kl = rng.lognormal(-30, 1, 63)
        arrays = {"position": np.arange(63), "kl": kl, "total_variation": kl**0.5}
        return Finding(3e-13, 63, 63, arrays=arrays if claim_id == "F-PAR-004" else {**arrays, "kl_copy": kl * 2})
    if claim_id in ("F-PAR-005", "F-PAR-006", "F-PAR-009"):
        flipped = np.zeros(63, dtype=bool)
        flipped[5] = True
        arrays = {"margin": rng.lognormal(0, 1, 63), "tau": np.full(63, 1e-4), "flipped": flipped}
        return Finding(float(claim_id == "F-PAR-005"), 63, 63, arrays=arrays)
    if claim_id == "F-THR-002":
        arrays = {"decode_s_per_token": rng.normal(0.0041, 0.0002, 40), "prefill_s": rng.normal(0.03, 0.002, 5)}
        return Finding(3e5, 45, 45, arrays=arrays, rows=[{"quantity": "ceiling_tok_s", "value": 320.0}])
    if claim_id == "F-THR-006":
        timed = {"decode_tok_s": 20.0, "prefill_tok_s": 200.0, "read_gb_s, best": 25.0, "prompt": 32, "ms: head": 10.0}
        weighed = {"bytes per token": 4e8, "operations per token": 1e9}
        rows = [{"quantity": name, "value": value} for name, value in {**timed, **weighed}.items()]
        arrays = {"context_tokens": np.array([128, 1024]), "context_s": np.array([0.05, 0.1])}
        return Finding(0.32, 40, 40, rows=rows, arrays={**arrays, "bandwidth_gb_s": rng.normal(11, 0.2, 6)})
    if claim_id == "F-THR-008":
        arrays = {"slowed_s_per_token": rng.normal(0.0171, 0.0002, 12)}
        return Finding(1.02, 12, 12, arrays=arrays, rows=[{"delay_s": 0.0123, "shortest_s": 0.0125}])
    claim = next(c for n in NOTEBOOKS for c in claims_of(n) if c.id == claim_id)
    return Finding(claim.threshold if claim.direction == "at_least" else 0.0, 21, 21, detail="3 formats")


@dataclass
class Run:
    """A run folder and what it concludes."""

    folder: Path
    conclusion: Conclusion
    notebooks: dict[str, NotebookStatus]
    page: str = ""


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    """Build a run folder: ``changes`` replaces findings by claim id, ``lacks`` names needs that are not met."""
    return lambda **given: build(tmp_path, **given)


def build(
    folder: Path,
    *,
    notebooks: tuple[str, ...] = NOTEBOOKS,
    changes: dict[str, Finding | None] | None = None,
    lacks: tuple[str, ...] = ("cuda", "reference"),
    who: SubjectRecord | None = None,
    reference: SubjectRecord | None = None,
    asked: frozenset[str] = frozenset(),
    diagnosis: dict[str, Any] | None = None,
    broken: dict[str, str] | None = None,
    names: list[str] | None = None,
    parameters: dict[str, Any] | None = None,
) -> Run:
    """Declare, record, conclude."""
    who = who or subject()
    parameters = parameters or {"model": who.path, "device": "auto", "seed": 0}
    common: dict[str, Any] = {"provenance": PROVENANCE, "parameters": parameters}
    declare(folder, notebooks, asked=asked, subject=who, reference=reference, diagnosis=diagnosis, **common)
    for notebook in () if diagnosis else notebooks:
        round_ = Round(notebook, who, folder, reference=reference, **common)
        for claim in round_.claims:
            finding = (changes or {}).get(claim.id) or finding_of(claim.id, names=names)
            missing = [n for n in claim.needs if n in lacks]
            if missing:
                finding = Finding.nothing(NEEDS[missing[0]])
            if claim.id not in (changes or {}) or (changes or {})[claim.id] is not None:
                round_.record(claim.id, replace(finding, claim=claim.id))
    statuses = {
        n: NotebookStatus(4.25, n not in (broken or {}), (broken or {}).get(n, ""), f"{n}.html")
        for n in (() if diagnosis else notebooks)
    }
    return Run(folder, conclude(folder, broken), statuses)


def hostile_run(folder: Path) -> Run:
    """A run whose every string from the model is an attack."""
    text = [
        h.replace("\ud800", "") for h in HOSTILE
    ]  # declare and record write UTF-8: a lone surrogate cannot get here
    rows = [{"on": "subject", "what": n, "measured": 2.0, "limit": 0.5, n[:40]: n} for n in text]
    bad = Finding(
        3.0,
        38,
        38,
        rows=rows,
        arrays={"measured": np.linspace(0, 2, len(text)), "limit": np.array([0.5])},
        missing=text,
        detail=text[0],
        reference=text[1],
        whys=[(t[:900], t[:900]) for t in text],
    )
    return build(
        folder,
        who=subject(
            name=text[0], path=f"/tmp/{text[1]}", metadata={t: t for t in text}, quant={text[2]: 3}, refusal=text[4]
        ),
        reference=subject(name=text[3], metadata={"url": text[8]}),
        lacks=(),
        changes={
            "F-DATA-QUALITY-001": bad,
            "F-PAR-002": Finding(
                1.0, 8, 8, rows=[{"name": t[:300], "rel_l2": 1.0} for t in text], whys=[(text[0], text[1])]
            ),
            "F-GT-001": Finding(None, 0, 3, inconclusive=" ".join(text[:9])),
            "F-GT-005": Finding.nothing(NotRun.REFUSED, " ".join(text[:9])),
        },
        broken={"30_throughput": " ".join(text[:9])},
        parameters={"model": f"/tmp/{text[6]}", "note": text[7]},
    )


class Page(HTMLParser):
    """A page taken apart: start tags with decoded attributes, text, scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        """All text, entities decoded."""
        return html.unescape(" ".join(" ".join(self.words).split()))

    def every(self, tag: str) -> list[dict[str, str]]:
        """Attributes of each such tag."""
        return [a for t, a in self.tags if t == tag]

    def faults(self) -> list[str]:
        """Whatever would execute or load something: foreign scripts, handlers, remote or script addresses."""
        out = [f"{t} {k}" for t, a in self.tags for k in a if k.startswith("on") or k == "srcdoc"]
        out += [t for t, _ in self.tags if t in ("iframe", "object", "embed", "base", "form", "link")]
        for tag, attributes in self.tags:
            for key in ("src", "href", "srcset", "action", "poster", "data"):
                value = attributes.get(key, "").strip().lower()
                local = value.startswith(("data:image/svg+xml;base64,", "data:image/png;base64,", "#"))
                if value and not local and (":" in value.split("/")[0] or value.startswith("//")):
                    out.append(f"{tag} {key}={value[:60]}")
        return out


@pytest.fixture
def parse() -> Callable[[str], Page]:
    """Take a page apart."""
    return Page


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose every string from the model is an attack; its page is written once, for all that only read it."""
    return _written(hostile_run(tmp_path_factory.mktemp("hostile")))


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of all four notebooks in which nothing is refuted; its page is written once."""
    return _written(build(tmp_path_factory.mktemp("good")))


def _written(run: Run) -> Run:
    run.page = write_index(run.folder, run.conclusion, notebooks=run.notebooks).read_text(encoding="utf-8")
    return run


@pytest.fixture
def finding() -> Callable[[str], Finding]:
    """A healthy finding of a claim, as the acts give it."""
    return lambda claim_id: replace(finding_of(claim_id), claim=claim_id)


@pytest.fixture
def strings() -> tuple[str, ...]:
    """Attacks, one per kind."""
    return HOSTILE

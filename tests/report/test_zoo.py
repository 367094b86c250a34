"""The zoo's page and the rates on a run's page: what was counted is there, what is hostile is inert, absent is said."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apr_core.falsify.claims import load_claims
from apr_core.report import page
from apr_core.report.display import show_matrix
from apr_core.report.figures import plot_power
from apr_core.report.style import alt_text, caption_of
from apr_core.report.text import percent
from apr_core.report.zoo import write_zoo_page
from apr_core.zoo.registry import Benign, Defect, Later
from apr_core.zoo.score import Judged, Matrix, Outcome

GATE, SAME, SHIFT = "F-DATA-QUALITY-001", "F-GT-011", "F-PAR-002"


def nothing(*_: Any) -> None:
    """A recipe that damages nothing."""


def defect(name: str, klass: str, *kills: str, **more: Any) -> Defect:
    """A defect as the rooms of the zoo register it."""
    return Defect(name, klass, f"{name} was done", "round 51", "tensor-values", kills, recipe=nothing, **more)


def judged(**verdicts: str) -> tuple[Judged, ...]:
    """What claims said, by short names."""
    names = {"gate": GATE, "same": SAME, "shift": SHIFT, "open": "preflight"}
    refused = verdicts.get("gate") == "FALSIFIED"
    return tuple(Judged(names[k], v, "", 0.25, refused and k == "shift") for k, v in verdicts.items())


def matrix() -> dict[str, Any]:
    """A small matrix made by the zoo itself, so that the page and the JSON cannot drift apart."""
    no, yes = "CORROBORATED", "FALSIFIED"
    outcomes = {
        "zeroed": judged(gate=yes, shift=yes),
        "swapped": judged(gate=no, same=yes, shift=yes),
        "cut": judged(open=yes),
        "alive": judged(gate=no, same=no, shift=no),
        "absent": (),
        "padded": judged(gate=no),
        "cried": judged(gate=yes),
    }
    made = {k: Outcome(k, v, "no bias to drop" if k == "absent" else "", "", 1.0) for k, v in outcomes.items()}
    return Matrix(
        [
            defect("zeroed", "sparse-tensors", GATE),
            defect("swapped", "same-statistics", SAME, invisible_alone="statistics do not change"),
            defect("cut", "sparse-tensors", "preflight"),
            defect("alive", "same-statistics", SHIFT),
            defect("absent", "same-statistics", GATE),
        ],
        [Benign("padded", "a padded vocabulary", nothing), Benign("cried", "49 % zeros", nothing)],
        [Later("tiles", "head_dim above the tile", "round 48", 12)],
        made,
        [
            {"id": "H1", "klass": "empty", "what": "no evidence", "caught": True, "claims": [], "exit": 11},
            {"id": "H2", "klass": "early", "what": "early exit", "caught": False, "claims": [], "exit": 0},
        ],
        {},
        {"F-PAR-010": "no CUDA device"},
        {"model": {"name": "pygmy", "sha256": "9f" * 32}, "code_digest": "ab" * 32, "seconds": 71.0},
    ).as_json()


def power() -> list[dict[str, Any]]:
    """Draws of two kinds for a sharp, a dull and a blind claim."""
    return [
        {"claim": c, "kind": k, "severity": 10.0**-e, "seen": 8 * (e <= t), "draws": 8}
        for k in ("zeroed share", "noise")
        for c, t in ((GATE, 1), (SHIFT, 4), ("F-GT-001", -1))
        for e in range(6)
    ]


def written(folder: Path, body: dict[str, Any]) -> str:
    """Write the page and read it."""
    return write_zoo_page(folder, body).read_text(encoding="utf-8")


def cells(source: str, name: str) -> list[str]:
    """The cells of a defect's row."""
    row = re.search(f'<tr id="d-{name}">(.*?)</tr>', source, re.DOTALL)
    assert row is not None
    return re.findall(r"<td[^>]*>(.*?)</td>", row[1])


def test_what_was_counted_is_there(tmp_path: Path, parse: Callable[[str], Any]) -> None:
    """Rates first, then what is wrong, then every defect under its class."""
    text = parse(written(tmp_path, matrix())).text
    for said in (
        "The suite kills 75.0 % of 4 planted defects with a reference, 66.7 % of 3 without; 1 survives, 1 false alarm, "
        "1 broken promise, 1 fault of the suite unnoticed.",
        "Exit code 5",
        "3 of 4 defects can be seen in the file itself; the other 1 cannot",
        "3 of 4 75.0 % 50.0 %",
        "False alarms legal oddities that a claim alarms on 1 of 2 50.0 %",
        "Survivors (1).",
        "no claim kills it with a reference",
        "sparse tensors 2",
        "same statistics 3",
        "no bias to drop",
        "Not yet plantable (1)",
        "head_dim above the tile round 48 12",
        "Model sha256 " + "9f" * 32,
        "Took 1 min 11 s",
    ):
        assert said in text, said
    assert text.index("The suite kills") < text.index("Survivors") < text.index("Which claim kills which defect")


def test_cells(tmp_path: Path, parse: Callable[[str], Any]) -> None:
    """A kill says as how manieth in which view, a broken promise says missed, behind the gate is marked."""
    body = matrix()
    source = written(tmp_path, body)
    heads = [h["title"] for h in parse(source).every("th") if "title" in h]
    gates_first = sorted(load_claims().values(), key=lambda c: c.notebook != "10_contract_gates")
    columns = ["preflight", *(c.id for c in gates_first if c.id != "F-PAR-010")]
    assert heads == [load_claims()[c].title for c in columns[1:]]
    at = {c: columns.index(c) for c in ("preflight", GATE, SAME, SHIFT)}
    assert cells(source, "zeroed")[at[GATE]] == '<b class="r i a first">1</b>'
    assert cells(source, "zeroed")[at[SHIFT]] == '<b class="r i a behind">2</b>'
    assert cells(source, "swapped")[at[SAME]] == '<b class="r first">1</b>'
    assert cells(source, "swapped")[at[SHIFT]] == '<b class="r">2</b><b class="i a first">1</b>'
    assert cells(source, "cut")[at["preflight"]] == '<b class="r i a first">1</b>'
    assert cells(source, "alive")[at[SHIFT]] == "<s>missed</s>"
    assert all(len(cells(source, d["id"])) == len(columns) for d in body["defects"])
    hidden = f"#view-a:checked ~ .matrix tr:not(.class) > :nth-child({at[SAME] + 2})"
    assert hidden in source
    assert f"#view-r:checked ~ .matrix tr:not(.class) > :nth-child({at[SAME] + 2})" not in source


def test_accessible(tmp_path: Path, parse: Callable[[str], Any]) -> None:
    """Heads have scope, each view has its label, regions can be reached, images have words."""
    source = written(tmp_path, {**matrix(), "power": power()})
    page_ = parse(source)
    assert all("scope" in a for a in page_.every("th"))
    assert {a["for"] for a in page_.every("label")} == {a["id"] for a in page_.every("input")}
    assert len([a for a in page_.every("input") if "checked" in a]) == 1
    assert all(len(a["alt"]) > 20 for a in page_.every("img"))
    assert "limit of sight" in page_.text
    for said in ("prefers-color-scheme: dark", "@media print", "max-width: 48rem", "width=device-width"):
        assert said in source


def hostile(text: tuple[str, ...]) -> dict[str, Any]:
    """Every string of a matrix is an attack."""

    def poison(value: Any, i: int = 0) -> Any:
        if isinstance(value, dict):
            return {k: poison(v, i + n) for n, (k, v) in enumerate(value.items())}
        if isinstance(value, list):
            return [poison(v, i + n) for n, v in enumerate(value)]
        return text[i % len(text)] if isinstance(value, str) else value

    body = matrix()
    killed = [{"defect": t, "class": t, "kills": list(text), "counts": True} for t in text]
    body = {k: v if k == "matrices" else poison(v) for k, v in body.items()}
    body["defects"] = [
        {k: poison(v, i) for k, v in d.items()} | {"id": t} for i, t in enumerate(text) for d in body["defects"][:1]
    ]
    for view in body["matrices"].values():
        view |= {"kills": killed, "claims": list(text)}
    body["not_applicable"], body["provenance"] = [], {"time": text[0], "cpu": text[1], "packages": {text[2]: text[3]}}
    body["power"] = [{**r, "claim": text[i % 9], "kind": text[i % 7]} for i, r in enumerate(power())]
    body["suite_faults"] = [{text[1]: text[2], "caught": False}]
    return body


def test_hostile_strings_are_inert(tmp_path: Path, strings: tuple[str, ...], parse: Callable[[str], Any]) -> None:
    """Nothing runs, nothing is fetched, the text stays readable, and the style ends where ours ends."""
    source = written(tmp_path, hostile(strings))
    page_ = parse(source)
    assert page_.faults() == []
    assert not page_.every("script")
    assert source.count("</style>") == 1
    assert "://" not in source
    assert not re.search(r"@import|url\(", source)
    assert "PWN" in page_.text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e\ud800-\udfff]", source)
    assert "N" * 5000 not in source
    assert not [
        a
        for t, a in page_.tags
        if set(a)
        - {"class", "id", "scope", "title", "colspan", "tabindex", "role"}
        - {
            "aria-label",
            "aria-labelledby",
            "src",
            "alt",
            "for",
            "type",
            "name",
            "checked",
            "charset",
            "content",
            "lang",
        }
        - {"http-equiv"}
    ]


def test_policy(tmp_path: Path, parse: Callable[[str], Any]) -> None:
    """No script at all, no address at all."""
    source = written(tmp_path, matrix())
    policy = next(a["content"] for a in parse(source).every("meta") if a.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    assert "://" not in source


def test_large(tmp_path: Path) -> None:
    """Two hundred and fifty defects and every claim: under 1.5 MB."""
    body = matrix()
    names = [f"defect-{i}" for i in range(250)]
    body["defects"] = [{**body["defects"][0], "id": n, "class": f"class {i // 3}"} for i, n in enumerate(names)]
    rows = [{"defect": n, "kills": list(load_claims())[i % 9 : i % 9 + 9]} for i, n in enumerate(names)]
    body["matrices"] = {k: {**v, "kills": rows} for k, v in body["matrices"].items()}
    assert write_zoo_page(tmp_path, body).stat().st_size < 1_500_000


def test_power() -> None:
    """One panel a kind; the limit of sight is marked and written beside the name, the blind are counted."""
    figure = plot_power(power())
    assert figure is not None
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["zeroed share", "noise"]
    assert [ax.get_xscale() for ax in figure.axes] == ["log", "log"]
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert [t.get_text() for t in legend.get_texts()] == [f"{SHIFT}, from 0.0001", f"{GATE}, from 0.1"]
    assert f"zeroed share: {SHIFT} from 0.0001 on" in alt_text(figure)
    assert "; 2 that do are left out." in caption_of(figure)


def test_power_of_nothing() -> None:
    """No draws, or none that a logarithm can show: no figure; all blind: panels without lines."""
    row = {"claim": GATE, "kind": "noise", "severity": 0.0, "seen": 1, "draws": 1}
    assert plot_power([]) is None
    assert plot_power([row, {**row, "severity": None}, {**row, "severity": 0.1, "draws": 0}]) is None
    blind = plot_power([{**row, "severity": 0.1, "seen": 0}])
    assert blind is not None
    assert "nowhere" in alt_text(blind)
    pooled = plot_power([{**row, "severity": 0.1, "seen": s} for s in (0, 1)])
    assert pooled is not None
    assert pooled.axes[0].lines[0].get_ydata().tolist() == [0.5]


@pytest.mark.parametrize(
    ("share", "text"),
    [(1.0, "100 %"), (0, "0 %"), (0.99999, "99.9 %"), (1e-6, "0.1 %"), (0.5, "50.0 %"), (None, "–"), (True, "–")],
)
def test_percent(share: object, text: str) -> None:
    """A survivor never rounds away."""
    assert percent(share) == text


class Shelf:
    """Package data in a folder of the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def files(self, package: str) -> Path:
        """What importlib.resources does."""
        assert package == "apr_core"
        return self.folder


def test_published_rates(
    make_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parse: Callable[[str], Any]
) -> None:
    """Beside the score: which rates, of which model, when, with which code; and what this run itself planted."""
    monkeypatch.setattr(page, "resources", Shelf(tmp_path))
    (tmp_path / "zoo").mkdir()
    rates = {"kill_rate": 1.0, "second_killer_rate": 0.861, "kill_rate_alone": 1.0, "false_alarm_rate": 0.0}
    published = {"rates": rates, "model": "pygmy", "date": "2026-11-23", "code_digest": "ab" * 32}
    (tmp_path / "zoo/rates.json").write_text(json.dumps({**published, "counts": {"defects": 254, "classes": 83}}))
    run = make_run(notebooks=("10_contract_gates",))
    text = parse(page.write_index(run.folder, run.conclusion, notebooks=run.notebooks).read_text("utf-8")).text
    for said in (
        "on the bundled model pygmy, 2026-11-23, with code abababababab ; not on this subject.",
        "kill rate 100 %",
        "with a second killer 86.1 %",
        "false-alarm rate 0 %",
        "254 defects, 83 classes.",
        "In this run: 10 of 10 planted counter-examples were caught, 0 of 21 legal oddities raised an alarm.",
    ):
        assert said in text, said
    assert text.index("score, of 1") < text.index("kill rate 100 %") < text.index("What was run")


@pytest.mark.parametrize("content", [None, "", "[]", "{not json", '{"rates": 3}'])
def test_rates_not_measured(
    content: str | None,
    make_run: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    parse: Callable[[str], Any],
) -> None:
    """No file, or one that cannot be read: said; without notebook 10 the run says nothing of its own."""
    monkeypatch.setattr(page, "resources", Shelf(tmp_path))
    (tmp_path / "zoo").mkdir()
    if content is not None:
        (tmp_path / "zoo/rates.json").write_text(content)
    run = make_run(notebooks=("30_throughput",))
    text = parse(page.write_index(run.folder, run.conclusion, notebooks=run.notebooks).read_text("utf-8")).text
    assert "Not measured yet" in text
    assert "In this run" not in text


def test_show_matrix(strings: tuple[str, ...], parse: Callable[[str], Any]) -> None:
    """Counter-examples against claims: from counts, or the JSON of a matrix."""
    counted = show_matrix({"zeroed": {GATE: 3, SHIFT: 0}, "cut": {SHIFT: 1}})
    assert parse(counted.html).text == f"counter-example {GATE} {SHIFT} zeroed 3 cut 1"
    assert counted.text.splitlines()[1].split() == ["zeroed", GATE]
    assert f"cut {SHIFT}" not in show_matrix(matrix()).text
    assert "refused" in show_matrix(matrix()).html
    shown = show_matrix({s: {s: 1} for s in strings})
    assert parse(shown.html).faults() == []
    assert "<script" not in shown.html
    assert "No counter-example" in show_matrix({}).text

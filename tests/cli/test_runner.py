"""The runner: preflight, typed parameters, and notebooks that end in every wrong way."""

from __future__ import annotations

import json
import os
import shutil
import sys
from xml.etree import ElementTree

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from apr_core.cli import runner
from apr_core.errors import Exit, NotFound, UsageError
from apr_core.falsify.claims import NOTEBOOKS, claims_of
from apr_core.falsify.rounds import conclude
from apr_core.zoo.acts import twin
from apr_core.zoo.draft import put_together
from apr_core.zoo.plants import DOWN

PARAMETERS = """model: str = "x"  # a path
reference: str = ""
device: str = "auto"
out_dir: str = ""
skip_contract: bool = False
seed: int = 0
share: float = 0.5"""

WITHOUT_ANSWERS = "F-LAYOUT-CONTRACT-005"  # the twin of a seed has none to give

HONEST = """import apr_core as apr
from apr_core.falsify.finding import ACTS
from apr_core.zoo import acts
subject = apr.obtain(model)
this_round = apr.open_round("10_contract_gates", subject, out_dir, {"seed": seed})
for claim in this_round.claims:
    print(this_round.record(claim.id, ACTS[claim.id](subject)))"""
CLOSE = "print(this_round.close())"

ENDINGS = {
    "00_ground_truth": "import sys; sys.exit(0)",
    "10_contract_gates": HONEST,
    "20_parity": "import os; os._exit(0)",
    "30_throughput": "1 / 0",
}


def write_notebook(folder, name, *sources):
    """A notebook with a parameters cell and the given code cells."""
    cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), *map(new_code_cell, sources)]
    book = new_notebook(
        cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "p", "language": "python"}}
    )
    nbformat.write(book, folder / f"{name}.ipynb")


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A root whose four notebooks end as ENDINGS says, and a healthy model."""
    (tmp_path / "notebooks").mkdir()
    for name, source in ENDINGS.items():
        write_notebook(tmp_path / "notebooks", name, source, *([CLOSE] if source == HONEST else []))
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    put_together(twin(), tmp_path / "model")
    return tmp_path


def summary(folder):
    """The machine-readable result."""
    return json.loads((folder / "summary.json").read_text())


def test_every_wrong_ending_is_seen_and_the_report_is_written(house, capfd):
    """exit(0), a dead kernel and a raising cell are never success; evidence of the honest notebook counts."""
    code = runner.run_suite(model=str(house / "model"), out=str(house / "out"), timeout_s=60)
    out = house / "out"
    said = capfd.readouterr().out
    conclusion = conclude(out)

    assert code == Exit.UNEXPECTED
    assert "00_ground_truth: NOT COMPLETE" in said
    assert "10_contract_gates: complete" in said
    assert "20_parity: NOT COMPLETE: DeadKernelError" in said
    assert "30_throughput: NOT COMPLETE: PapermillExecutionError" in said
    assert all((out / f"{n}.ipynb").exists() and (out / f"{n}.html").exists() for n in NOTEBOOKS)
    gates = {c.id: conclusion.by_claim[c.id][0].value for c in claims_of("10_contract_gates")}
    assert gates.pop(WITHOUT_ANSWERS) == "NOT_RUN"
    assert set(gates.values()) == {"CORROBORATED"}
    assert {conclusion.by_claim[c.id][0].value for c in claims_of("20_parity")} == {"INCONCLUSIVE"}
    assert (house / "reports" / "latest").resolve() == out
    cases = ElementTree.parse(out / "junit.xml").getroot().iter("testcase")
    assert {c.id for n in NOTEBOOKS for c in claims_of(n)} <= {c.get("name").split(" ")[0] for c in cases}


def test_an_honest_run_is_corroborated(house):
    """The same path, all cells executed: exit 0."""
    code = runner.run_suite(model=str(house / "model"), only="10", out=str(house / "out"), parameters={"seed": "3"})
    evidence = next((house / "out" / "evidence").glob("F-ADMIT*.json"))

    assert code == Exit.OK
    assert json.loads(evidence.read_text())["parameters"]["seed"] == 3


def test_a_second_run_takes_over_what_is_decided(house, capfd):
    """Asked with --reuse: not measured again, shown as such everywhere; not asked: measured."""
    for name, reuse in (("one", False), ("two", True), ("three", False)):
        code = runner.run_suite(model=str(house / "model"), only="10", out=str(house / "runs" / name), reuse=reuse)
        assert code == Exit.OK
    claims = {c.id for c in claims_of("10_contract_gates")} - {WITHOUT_ANSWERS}
    reused = {
        n: {k for k, c in summary(house / "runs" / n)["claims"].items() if c["reused"]} for n in ("one", "two", "three")
    }
    assert reused == {"one": set(), "two": claims, "three": set()}
    first = next((house / "runs" / "one" / "evidence").glob("F-ADMIT*.json"))
    attempt = json.loads(first.read_text())["attempt"]
    assert f"(reused from {attempt})" in (house / "runs" / "two" / "10_contract_gates.html").read_text()
    assert "Reused from" in (house / "runs" / "two" / "index.html").read_text()
    assert f"reused from: {attempt}" in (house / "runs" / "two" / "junit.xml").read_text()
    assert runner.REUSE not in os.environ


def test_a_refused_model_is_falsified_evidence_also_without_notebook_10(house):
    """'Refused by the contract' is never the only finding."""
    draft = twin().copy()
    draft.weights[DOWN][...] = 0
    put_together(draft, house / "bad")
    write_notebook(
        house / "notebooks",
        "00_ground_truth",
        HONEST.replace("10_contract_gates", "00_ground_truth").replace("apr_core.zoo", "apr_core.rosetta"),
        CLOSE,
    )
    code = runner.run_suite(model=str(house / "bad"), only="00", out=str(house / "out"))
    verdicts = {k: v[:2] for k, v in conclude(house / "out").by_claim.items()}
    page = (house / "out" / "index.html").read_text()

    assert code == Exit.REFUTED
    assert verdicts["F-DATA-QUALITY-003"][0].value == "FALSIFIED"
    assert "What guards against its return?" in (house / "out" / "summary.md").read_text()
    assert verdicts["F-GT-001"][0].value == "NOT_RUN"
    assert DOWN in verdicts["F-GT-001"][1]
    assert DOWN in page


@pytest.mark.parametrize(
    ("name", "content", "code", "words"),
    [
        ("empty.gguf", b"", Exit.FORMAT, "empty"),
        ("zeros.safetensors", bytes(4096), Exit.FORMAT, "zero"),
        ("pointer.gguf", b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", Exit.FORMAT, "LFS"),
        ("page.gguf", b"<!DOCTYPE html><html><body>Not found</body></html>", Exit.FORMAT, "HTML"),
        ("magic.gguf", b"NOPE" + bytes(range(200)), Exit.FORMAT, "expected"),
        ("missing.gguf", None, Exit.NOT_FOUND, "no such"),
    ],
)
def test_bad_input_is_diagnosed_before_any_kernel(house, name, content, code, words, capfd):
    """A named diagnosis, the right exit code, and a report in which every declared claim is NOT_RUN."""
    if content is not None:
        (house / name).write_bytes(content)
    found = runner.run_suite(model=str(house / name), out=str(house / "out"))
    result = summary(house / "out")

    assert found == code
    assert words in capfd.readouterr().err
    assert result["exit_code"] == code
    assert result["counts"]["NOT_RUN"] == sum(len(claims_of(n)) for n in NOTEBOOKS)
    assert words in (house / "out" / "index.html").read_text()
    assert (house / "out" / "junit.xml").exists()
    assert not list((house / "out").glob("*.ipynb"))


def test_a_missing_configuration_is_exit_6(house):
    """Weights alone do not say what model they are."""
    (house / "model" / "config.json").unlink()

    assert runner.run_suite(model=str(house / "model"), out=str(house / "out")) == Exit.LOAD


def test_a_bad_reference_is_diagnosed_too(house):
    """The reference is opened in the preflight as well."""
    (house / "ref.gguf").write_bytes(b"")
    code = runner.run_suite(model=str(house / "model"), reference=str(house / "ref.gguf"), out=str(house / "out"))

    assert code == Exit.FORMAT


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"only": "77"}, "expected notebooks"),
        ({"device": "tpu"}, "expected a device"),
        ({"parameters": {"nonsense": "1"}}, "unknown parameter nonsense"),
        ({"parameters": {"seed": "notanint"}}, "expected int"),
        ({"parameters": {"seed": "1.5"}}, "expected int"),
        ({"parameters": {"skip_contract": "1"}}, "expected bool"),
        ({"parameters": {"model": "other"}}, "set by an option"),
    ],
)
def test_wrong_options_write_nothing(house, options, words):
    """Papermill would log an unknown parameter and run the defaults."""
    with pytest.raises(UsageError, match=words):
        runner.run_suite(model=str(house / "model"), out=str(house / "out"), **options)

    assert not (house / "out").exists()


def test_a_folder_that_is_not_empty_is_refused(house):
    """Evidence is never overwritten."""
    (house / "out").mkdir()
    (house / "out" / "old").write_text("x")
    with pytest.raises(UsageError, match="not an empty folder"):
        runner.run_suite(model=str(house / "model"), out=str(house / "out"))


def test_parameters_are_typed_by_the_notebook(house):
    """Text stays text, an int is a legal float, nothing is guessed."""
    given = {"model": "007", "seed": "7", "share": "1"}

    assert runner.typed_parameters("00_ground_truth", given) == {"model": "007", "seed": 7, "share": 1.0}


def test_a_missing_notebook_says_so(house):
    """The package without its checkout has none."""
    shutil.rmtree(house / "notebooks")
    with pytest.raises(NotFound, match="checkout"):
        runner.run_suite(model=str(house / "model"), out=str(house / "out"), parameters={"seed": "1"})


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c: c.pop(), "1 code cells of 2"),
        (lambda c: c[1].update(execution_count=None), "not executed in order"),
        (lambda c: c[1].update(execution_count=5), "not executed in order"),
        (lambda c: c[1].update(outputs=[]), "did not close"),
        (
            lambda c: c[0].update(outputs=[nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])]),
            "raised",
        ),
    ],
)
def test_an_output_notebook_must_prove_that_it_ran(tmp_path, edit, words):
    """Papermill's status says `completed` for a killed kernel."""
    closing = nbformat.v4.new_output("stream", name="stdout", text="n closed: 1 claims\n")
    cells = [
        new_code_cell("1", execution_count=1),
        new_code_cell("2", execution_count=2, outputs=[closing]),
    ]
    whole = tmp_path / "whole.ipynb"
    nbformat.write(new_notebook(cells=cells), whole)
    assert runner.why_incomplete(whole, expected=2, name="n") == ""
    edit(cells)
    broken = tmp_path / "broken.ipynb"
    nbformat.write(new_notebook(cells=cells), broken)

    assert words in runner.why_incomplete(broken, expected=2, name="n")
    assert runner.why_incomplete(tmp_path / "none.ipynb", expected=2, name="n") == "no output notebook"


def test_an_interrupt_kills_the_kernels(house, monkeypatch):
    """Ctrl-C must not leave kernels behind; what was measured stays."""
    killed = []
    monkeypatch.setattr("apr_core.cli.kernels.kill_all", lambda: killed.append(True))

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "_run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        runner.run_suite(model=str(house / "model"), out=str(house / "out"))

    assert killed
    assert (house / "out" / "declared.json").exists()


def test_kill_all_kills_a_live_kernel():
    """The process group of a started kernel is gone afterwards."""
    import asyncio
    import os

    from apr_core.cli.kernels import IpcKernelManager, kill_all

    async def scenario():
        manager = IpcKernelManager(kernel_name="python3")
        await manager.start_kernel()
        pid = manager.provisioner.pid
        kill_all()
        await asyncio.sleep(0.3)
        alive = await manager.is_alive()
        await manager.shutdown_kernel(now=True)
        return pid, alive

    pid, alive = asyncio.run(scenario())

    assert not alive
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert sys.platform

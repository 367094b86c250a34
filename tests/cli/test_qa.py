"""qa: eleven gates in order; a skipped one is no pass, limits are literal, and every gate can fail."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from apr_core.cli import qa
from apr_core.cli.app import main
from apr_core.cli.qa import NAMES, Examination, Order, Outcome, SkippedGate
from apr_core.contract.admit import admit
from apr_core.engines.subject import BUNDLED, obtain
from apr_core.engines.wrap import At, wrap
from apr_core.errors import InferenceError
from apr_core.formats.checkpoint import open_checkpoint
from apr_core.model.tokens import prepare_tokens
from apr_core.peers import rates
from apr_core.zoo.draft import put_together, take_apart

Body = dict[str, Any]
QUICK = ["--iterations", "1", "-n", "4"]


def _json(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, Body]:
    code = main(["qa", *words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def _gate(body: Body, name: str) -> Body:
    gate: Body = next(g for g in body["gates"] if g["name"] == name)
    return gate


@pytest.fixture
def gates(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], None]:
    """Replace gates; every other one passes."""

    def use(given: dict[str, Any]) -> None:
        def made(name: str) -> Callable[[Examination], Outcome]:
            def gate(_: Examination) -> Outcome:
                found = given.get(name, Outcome(True, "fine", 1.0, 1.0))
                if isinstance(found, Exception):
                    raise found
                return found

            return gate

        monkeypatch.setattr(qa, "GATES", tuple((name, name, made(name)) for name in NAMES))

    return use


SKIP = SkippedGate("not here")


@pytest.mark.parametrize(
    ("given", "words", "code"),
    [
        ({}, [], 0),
        (dict.fromkeys(NAMES[:7], SKIP), [], 0),
        (dict.fromkeys(NAMES[:8], SKIP), [], 11),
        (dict.fromkeys(NAMES[:8], SKIP), ["--min-executed", "3"], 0),
        (dict.fromkeys(NAMES, SKIP), ["--min-executed", "0"], 0),
        (dict.fromkeys(NAMES, SKIP), [], 11),
        ({"golden_output": Outcome(False, "wrong")}, [], 5),
        ({"golden_output": InferenceError("it broke")}, [], 5),
        ({"throughput": SKIP}, ["--assert-tps", "1"], 11),
        ({"gpu_speedup": SKIP}, ["--assert-gpu-speedup", "1"], 11),
        ({"ollama_parity": SKIP}, ["--ollama", "m"], 11),
        ({"ollama_parity": SKIP}, ["--ollama", "m", "--skip", "ollama_parity"], 0),
        ({}, ["--skip", ",".join(NAMES[:8])], 11),
        ({}, ["--skip-contract"], 11),
    ],
)
def test_the_exit_code_follows_from_the_gates(
    given: dict[str, Any],
    words: list[str],
    code: int,
    gates: Callable[[dict[str, Any]], None],
    healthy: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A failure is 5; too few, a gate that was asked for and did not run, or a bypass are 11; a skip is no pass."""
    gates(given)
    found, body = _json([str(healthy), *words], capsys)
    assert found == code == body["exit_code"]
    assert body["passed"] == (code == 0)
    assert not any(gate["passed"] and gate["skipped"] for gate in body["gates"])
    skipped = [gate for gate in body["gates"] if gate["skipped"]]
    assert (body["gates_skipped"], body["gates_executed"]) == (len(skipped), len(NAMES) - len(skipped))
    assert all(gate["message"].startswith("Skipped: ") for gate in skipped)


def test_the_report_has_the_fields_of_the_specification(pygmy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All eleven gates in their order on the bundled model; what a CPU can run is run, the rest says why not."""
    code, body = _json(["pygmy", *QUICK, "--max-tokens", "24"], capsys)
    assert code == 0
    assert [gate["name"] for gate in body["gates"]] == list(NAMES)
    assert {"model", "passed", "gates", "gates_executed", "gates_skipped"} < set(body)
    assert {"total_duration_ms", "timestamp", "summary", "system_info", "coverage"} < set(body)
    for gate in body["gates"]:
        assert {"name", "passed", "message", "value", "threshold", "duration_ms", "skipped", "coverage"} <= set(gate)
    executed = [gate["name"] for gate in body["gates"] if not gate["skipped"]]
    assert executed == list(NAMES[:5])
    assert _gate(body, "golden_output")["coverage"]["compared"] == _gate(body, "golden_output")["value"] > 2
    assert _gate(body, "throughput")["threshold"] == qa.OTHER_FLOOR


def test_the_table_is_for_people(healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row for each gate, and a last line that says how it ended."""
    assert main(["qa", str(healthy), *QUICK]) == 0
    out, err = capsys.readouterr()
    assert "Golden Output" in out
    assert "untrained model" in out
    assert "7 of 11 gates were skipped: this examination says little" in out
    assert out.splitlines()[-1].endswith("All executed QA gates passed (4 executed, 7 skipped)")
    assert err.count("skipped") == 7


@pytest.mark.parametrize(("least", "code"), [("0.001", 0), ("1e9", 5)])
def test_a_limit_is_literal(least: str, code: int, healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--assert-tps is what is demanded, not a tenth of it."""
    found, body = _json([str(healthy), *QUICK, "--assert-tps", least], capsys)
    assert found == code
    assert _gate(body, "throughput")["passed"] == (code == 0)


def test_a_refused_model_fails_its_gate_and_runs_no_inference(
    refused: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The contract gate counts the violations; what needs an engine is skipped for that reason."""
    code, body = _json([str(refused), *QUICK], capsys)
    assert code == 5
    contract = _gate(body, "tensor_contract")
    assert contract["value"] > 1
    assert "F-DATA-QUALITY" in contract["message"]
    assert _gate(body, "throughput")["message"] == "Skipped: refused by the contract"


def test_gguf_has_its_own_floor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """10 tokens per second for GGUF on a CPU."""
    from apr_core.model.synth import synthesise

    path = synthesise("pygmy", format="gguf", dtype="q8_0", out=tmp_path / "m.gguf")
    _, body = _json([str(path), *QUICK], capsys)
    assert _gate(body, "throughput")["threshold"] == qa.GGUF_FLOOR == 10


@pytest.fixture(scope="module")
def subject() -> Iterator[Any]:
    """The bundled model."""
    opened = obtain("pygmy", device="cpu")
    yield opened
    opened.close()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("4", ""),
        ("", "an empty answer"),
        (" \n", "an empty answer"),
        ("4 \ufffd", "garbage"),
        ("4\0", "garbage"),
        ("[UNK] 4", "garbage"),
        ("five", "not as expected"),
    ],
)
def test_answers_are_judged_in_order(text: str, complaint: str) -> None:
    """Empty, garbage, expectation."""
    assert qa.judge_answer(text, lambda answer: "4" in answer).startswith(complaint)
    assert bool(qa.judge_answer(text, lambda answer: "4" in answer)) == bool(complaint)


def test_golden_output_fails_for_another_answer(subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One wrong answer of many is told with its question; without golden.json the two questions are asked."""
    exam = Examination(Order("pygmy"), subject)
    cases = {"cases": [{"messages": [{"role": "user", "content": "What is 7-3?"}], "answer": "7 - 3 equals 5."}]}
    monkeypatch.setitem(subject.__dict__, "golden", cases)
    found = qa._golden(exam)
    assert (found.holds, found.value, found.threshold) == (False, 0, 1)
    assert "What is 7-3?" in found.message
    monkeypatch.setitem(subject.__dict__, "golden", None)
    assert len(qa._cases(subject)) == 2
    assert [accepts("It is 4.") for _, accepts in qa._cases(subject)] == [True, False]
    assert not qa._cases(subject)[1][1]("!")


def test_golden_output_names_repeated_padding(subject: Any) -> None:
    """F-LAYOUT-CONTRACT-005, judged where tokens are generated: a head that prefers reserved rows is named."""
    exam = Examination(Order("pygmy"), subject)
    tokens = subject.tokenizer.vocab_size

    def prefer(name: str, values: Any, at: At) -> Any:
        return None if name != "logits" else np.where(np.arange(values.shape[-1]) >= tokens, values + 1e3, values)

    exam._engines[exam.device] = wrap(subject.model, prefer)
    found = qa._golden(exam)
    assert (found.holds, found.value) == (False, 0)
    assert "[F-LAYOUT-CONTRACT-005] generation: 32 padding tokens in a row, at most 1" in found.message


def test_capability_fails_for_what_no_engine_has(subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration with something that is not computed here is named before anything is built."""
    config = dict(subject.checkpoint.config) | {"hidden_act": "gelu"}
    monkeypatch.setattr(subject.checkpoint, "config", config)
    found = qa._capability(Examination(Order("pygmy"), subject))
    assert not found.holds
    assert "gelu" in found.message


def _shifted(model: Any, moved: float) -> Any:
    def hook(name: str, values: Any, at: Any) -> Any:
        if name != "logits" or len(values) > 1:
            return None
        return values + moved * np.arange(values.shape[1])

    return wrap(model, hook)


def test_a_batch_and_single_tokens_are_compared(subject: Any) -> None:
    """The same model passes; one whose single steps differ fails, and so does one that answers with NaN."""
    ids = subject.stimulus(12).ids
    assert qa.batched_equals_single(subject.model, ids).holds
    assert not qa.batched_equals_single(_shifted(subject.model, 0.01), ids).holds
    assert not qa.batched_equals_single(_shifted(subject.model, float("nan")), ids).holds


def test_state_that_leaks_is_seen(subject: Any) -> None:
    """A, B, A: an engine that remembers fails, and one that answers everything alike as well."""
    asked = ([{"role": "user", "content": text}] for text in ("What is 7-3?", "What is 9+8?"))
    first, second = (prepare_tokens(subject.model, messages=messages) for messages in asked)
    assert qa.state_is_isolated(subject.model, first, second).holds
    calls = iter(range(10**6))

    def leak(name: str, values: Any, at: Any) -> Any:
        return np.roll(values, next(calls), axis=1) if name == "logits" else None

    assert not qa.state_is_isolated(wrap(subject.model, leak), first, second).holds

    def same(name: str, values: Any, at: Any) -> Any:
        return np.eye(1, values.shape[1]).repeat(len(values), 0) if name == "logits" else None

    assert not qa.state_is_isolated(wrap(subject.model, same), first, second).holds


def test_format_parity_holds_two_files_together(
    tmp_path: Path, healthy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another format of the same weights agrees; another model does not; the same file shows nothing, and is a hole."""
    from apr_core.model.synth import synthesise

    same = synthesise("pygmy", format="gguf", dtype="bf16", tokenizer=None, out=tmp_path / "same.gguf")
    other = synthesise("pygmy", format="gguf", dtype="bf16", seed=5, tokenizer=None, out=tmp_path / "other.gguf")
    code, body = _json([str(same), "--reference", str(healthy), *QUICK], capsys)
    assert (code, _gate(body, "format_parity")["passed"]) == (0, True)
    assert _gate(body, "format_parity")["coverage"] == {"compared": 64, "expected": 64}
    code, body = _json([str(other), "--reference", str(healthy), *QUICK], capsys)
    assert (code, _gate(body, "format_parity")["passed"]) == (5, False)
    code, body = _json([str(healthy), "--reference", str(healthy), *QUICK], capsys)
    assert (code, body["holes"]) == (11, ["format_parity"])
    assert main(["qa", str(healthy), "--reference", "no/such/file"]) == 3


def test_agreement_is_never_that_of_nan() -> None:
    """Equal positions count; a NaN on either side does not, nor do other shapes."""
    a = np.eye(3, dtype=np.float32)
    assert qa.agreement(a, a) == 3
    assert qa.agreement(a, np.roll(a, 1, axis=1)) == 0
    assert qa.agreement(a, np.full((3, 3), np.nan)) == 0
    assert qa.agreement(a, np.ones((2, 3))) == 0


def test_an_earlier_report_is_a_limit(healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tenth may be lost; a report with higher numbers fails the gate, one with lower does not."""
    code, body = _json([str(healthy), *QUICK], capsys)
    assert code == 0
    rate = _gate(body, "throughput")["value"]
    for factor, expected in ((0.001, 0), (1000.0, 5)):
        _gate(body, "throughput")["value"] = rate * factor
        (tmp_path / "before.json").write_text(json.dumps(body))
        code, after = _json([str(healthy), *QUICK, "--previous", str(tmp_path / "before.json")], capsys)
        assert code == expected
        assert _gate(after, "performance_regression")["coverage"] == {"compared": 1, "expected": 1}
    (tmp_path / "before.json").write_text("{}")
    assert main(["qa", str(healthy), "--previous", str(tmp_path / "before.json")]) == 4
    assert main(["qa", str(healthy), "--previous", "no/such/report"]) == 3


def test_gates_of_the_gpu_need_one(subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a device they are skipped; asked for, it is an error before anything runs."""
    exam = Examination(Order("pygmy"), subject)
    for gate in (qa._gpu_speedup, qa._batched, qa._isolation):
        with pytest.raises(SkippedGate, match="no CUDA device"):
            gate(exam)
    if exam.device == "cpu":
        assert main(["qa", "pygmy", "--device", "cuda"]) == 9


def test_gates_of_the_gpu_run_where_one_is(subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an engine for it (here the CPU's, under its name) each measures; a slow device fails its ratio."""
    monkeypatch.setattr(subject, "lacks", {})
    exam = Examination(Order("pygmy", iterations=1, max_tokens=4), subject)
    exam._engines = {"cuda": subject.model, "cpu": subject.model}
    exam.values.update(cuda=30.0, cpu=10.0)
    assert qa._gpu_speedup(exam).value == 3.0
    exam.values.update(cuda=19.0)
    assert not qa._gpu_speedup(exam).holds
    exam.values.update(cpu=0.0)
    assert not qa._gpu_speedup(exam).holds
    assert qa._batched(exam).holds
    assert qa._isolation(exam).holds
    assert qa._throughput(replace_device(exam)).threshold == qa.CUDA_FLOOR


def replace_device(exam: Examination) -> Examination:
    """The same examination, as one that runs on CUDA."""
    exam.__dict__["device"] = "cuda"
    return exam


class _Answers(BaseHTTPRequestHandler):
    """What Ollama says, as its interface documents it."""

    rate = 100.0

    def do_GET(self) -> None:
        self._say({"version": "0"})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/api/show":
            sizes = {"tiny": 1_837_312, "large": 7_000_000_000}
            self._say({"model_info": {"general.parameter_count": sizes[asked["model"]]}})
            return
        assert asked["options"]["temperature"] == 0
        took = int(1e11 / self.rate) if self.rate else 0
        self._say({"eval_count": 100, "eval_duration": took, "prompt_eval_count": 5, "prompt_eval_duration": 5})

    def _say(self, body: Body) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Answers]]:
    """An Ollama on a free port."""
    httpd = HTTPServer(("127.0.0.1", 0), _Answers)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setattr(rates, "OLLAMA", f"http://127.0.0.1:{httpd.server_port}")
    yield _Answers
    httpd.shutdown()
    httpd.server_close()
    _Answers.rate = 100.0


def test_ollama_is_compared_by_the_name_that_was_given(
    server: type[_Answers], healthy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own rate is the divisor; no name is guessed; another size is a hole; a rate of nothing is no pass."""
    _, body = _json([str(healthy), *QUICK], capsys)
    assert "name it with --ollama" in _gate(body, "ollama_parity")["message"]
    code, body = _json([str(healthy), *QUICK, "--ollama", "large"], capsys)
    assert (code, body["holes"]) == (11, ["ollama_parity"])
    assert "found 7.00 in 'large'" in _gate(body, "ollama_parity")["message"]
    for rate, code in ((1e-3, 0), (1e9, 5), (0.0, 5)):
        server.rate = rate
        found, body = _json([str(healthy), *QUICK, "--ollama", "tiny"], capsys)
        assert (found, _gate(body, "ollama_parity")["passed"]) == (code, code == 0)
    assert "no durations" in _gate(body, "ollama_parity")["message"]


def test_without_ollama_the_gate_is_skipped(
    healthy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing answers at the address: skipped, and a hole because it was asked for."""
    monkeypatch.setattr(rates, "OLLAMA", "http://127.0.0.1:9")
    code, body = _json([str(healthy), *QUICK, "--ollama", "tiny"], capsys)
    assert (code, body["holes"]) == (11, ["ollama_parity"])
    assert "no Ollama answers" in _gate(body, "ollama_parity")["message"]


def test_options_without_effect_are_refused(healthy: Path) -> None:
    """An unknown gate, and options of the gates beside --claims."""
    assert main(["qa", str(healthy), "--skip", "golden"]) == 2
    for words in (["--assert-tps", "1"], ["--skip", "throughput"], ["--min-executed", "4"], ["--previous", "x"]):
        assert main(["qa", str(healthy), "--claims", *words]) == 2


def test_asked_gates_follow_from_the_options() -> None:
    """What a person gave is demanded, unless the same person skips it."""
    order = Order("m", reference="r", device="cuda", limits={"throughput": 1.0})
    assert order.asked == {"format_parity", "throughput", "gpu_speedup", "ptx_parity", "gpu_state_isolation"}
    assert replace(order, skip=("throughput",)).asked == order.asked - {"throughput"}


@pytest.mark.parametrize(
    ("rule", "broken"),
    [
        ("rope_theta_low", {"rope_theta": 10000.0}),
        ("rope_theta_low", {"rope_theta": None}),
        ("rope_theta_high", {"rope_theta": 1.1e8}),
        ("rms_norm_eps_low", {"rms_norm_eps": 1e-13}),
        ("rms_norm_eps_high", {"rms_norm_eps": 0.011}),
        ("context_low", {"max_position_embeddings": 127}),
        ("context_high", {"max_position_embeddings": 1048577}),
        ("heads_per_kv_head", {"num_attention_heads": 8, "num_key_value_heads": 3}),
        ("hidden_per_head", {"num_attention_heads": 6}),
        ("vocab_rows", {"vocab_size": 1023}),
        ("end_tokens_outside", {"eos_token_id": 1024}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_rule_of_the_metadata_gate_alone_is_red(rule: str, broken: Body, tmp_path: Path) -> None:
    """One field of the configuration is broken, and one violation of the gate says which rule; mended, it passes."""
    shutil.copytree(BUNDLED["pygmy"], tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    healthy = json.loads(config.read_text(encoding="utf-8"))
    for body, rules in ((healthy | broken, [rule]), (healthy, [])):
        config.write_text(json.dumps({k: v for k, v in body.items() if v is not None}), encoding="utf-8")
        admission = admit(tmp_path / "m")
        found = qa._metadata(Examination(Order("m"), cast(Any, SimpleNamespace(admission=admission))))
        violations = [v for v in admission.violations if v.gate == "F-CONFIG-PLAUSIBLE-001"]
        assert (found.holds, found.value) == (not rules, len(rules))
        assert [v.rule for v in violations] == rules
        assert all(v.message in found.message for v in violations)


def test_more_tokens_than_rows_is_red(tmp_path: Path) -> None:
    """The rule that only a container with its own vocabulary can break: a GGUF of more tokens than embedding rows."""
    draft = take_apart(open_checkpoint(BUNDLED["pygmy"]))
    draft.weights["model.embed_tokens.weight"] = draft.weights["model.embed_tokens.weight"][:1000]
    draft.config["vocab_size"], draft.container = 1000, "gguf"
    path = put_together(draft, tmp_path / "m")
    admission = admit(path)
    found = qa._metadata(Examination(Order("m"), cast(Any, SimpleNamespace(admission=admission))))
    assert not found.holds
    assert "tokens_over_rows" in [v.rule for v in admission.violations]

"""
``apr qa``: eleven ordered gates on one model, from its capabilities to its speed; each passed, failed, or skipped.

A gate that cannot run is skipped with its reason and never counts as passed; fewer executed than ``--min-executed`` is
inconclusive, and so is a gate that was asked for by its option and could not run. Limits are applied as they are given.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from apr_core.cli.output import note, show, show_json, show_table
from apr_core.engines.subject import Subject, obtain
from apr_core.errors import AprError, Exit, FormatError, Unavailable, UsageError
from apr_core.model.tokens import PreparedTokens, prepare_tokens
from apr_core.model.trace import TracedForward

GGUF_FLOOR, OTHER_FLOOR, CUDA_FLOOR = 10.0, 1.0, 100.0  # tokens per second
OLLAMA_FLOOR, GPU_FLOOR = 0.2, 2.0  # ratios
REGRESSION = 0.10  # share of an earlier value that may be lost
COSINE, POSITIONS = 0.98, 64
GPU_TOKENS = 16
SPEED_PROMPT = "Write a hello world program in Python:"
OTHER_PROMPT = "Write hello world in Python"
GARBAGE = ("\ufffd", "[UNK]", "akunji", "olumbia", "\0")
# The greeting's "!" of the specification is left out: it matches almost any text.
GOLDEN = (("What is 2+2?", ("4",)), ("Hello", ("hello", "hi", "hey")))


@dataclass(frozen=True)
class Order:
    """
    What a person asked for.

    Attributes:
        model: Path, or ``pygmy``.
        reference: The file that it was made from, in another format; empty for none.
        device: ``auto``, ``cpu`` or ``cuda``.
        skip: Gates to leave out.
        min_executed: Fewer executed gates are inconclusive.
        limits: Gate -> limit that was asserted; it is demanded then.
        ollama: Name of the same model in Ollama; empty for none.
        previous: JSON report of an earlier run; empty for none.
        iterations, warmup, max_tokens: Of the timed generations.
        skip_contract: The explicit bypass; then nothing can pass for good.
    """

    model: str
    reference: str = ""
    device: str = "auto"
    skip: tuple[str, ...] = ()
    min_executed: int = 4
    limits: dict[str, float] = field(default_factory=dict)
    ollama: str = ""
    previous: str = ""
    iterations: int = 3
    warmup: int = 1
    max_tokens: int = 32
    skip_contract: bool = False

    @property
    def asked(self) -> frozenset[str]:
        """Gates that the person demanded by an option: one that cannot run leaves the examination undecided."""
        named = {
            "format_parity": self.reference,
            "performance_regression": self.previous,
            "ollama_parity": self.ollama,
            "gpu_speedup": self.device == "cuda",
            "ptx_parity": self.device == "cuda",
            "gpu_state_isolation": self.device == "cuda",
        }
        return frozenset([*self.limits, *(name for name, given in named.items() if given)]) - frozenset(self.skip)


class SkippedGate(Exception):
    """A gate cannot run; the text says why."""


@dataclass(frozen=True)
class Outcome:
    """What a gate that ran found: ``holds``, in words, the value and its limit, and how much was compared."""

    holds: bool
    message: str
    value: float | None = None
    threshold: float | None = None
    compared: int = 1
    expected: int = 1


class Examination:
    """One subject on its way through the gates; engines are built when a gate first needs one."""

    def __init__(self, order: Order, subject: Subject) -> None:
        self.order, self.subject = order, subject
        self.values: dict[str, float] = {}
        self._engines: dict[str, TracedForward] = {}

    @cached_property
    def device(self) -> str:
        """Where golden answers and throughput are taken."""
        return "cpu" if "cuda" in self.subject.lacks else "cuda"

    def engine(self, device: str) -> TracedForward:
        """Return the fastest engine that is registered for a device."""
        from apr_core.engines.load import build, fastest_precision

        self.require_admitted()
        if device not in self._engines:
            self._engines[device] = build(self.subject.admission, device=device, precision=fastest_precision(device))
        return self._engines[device]

    def require_admitted(self) -> None:
        """Skip what needs inference when the contract refuses the model."""
        if self.subject.admission.blocking:
            raise SkippedGate("refused by the contract")

    def require_cuda(self) -> None:
        """Skip what needs a CUDA device."""
        self.require_admitted()
        if "cuda" in self.subject.lacks:
            raise SkippedGate("no CUDA device")

    def prompt(self, model: TracedForward, text: str) -> PreparedTokens:
        """Prepare a prompt through the model's own template, raw for a base model, or ids for one without text."""
        if self.subject.tokenizer is None or not self.subject.trained:
            return self.subject.stimulus(16)
        if "template" in self.subject.lacks:
            return prepare_tokens(model, text=text)
        return prepare_tokens(model, messages=[{"role": "user", "content": text}])

    def tok_s(self, device: str) -> float:
        """Measure tokens per second over whole generations, prefill included; each device once."""
        from apr_core.bench.throughput import Plan, measure

        if device not in self.values:
            model, order = self.engine(device), self.order
            prompt = self.prompt(model, SPEED_PROMPT).ids
            plan = Plan(prompt.size, order.max_tokens, order.iterations)
            run = measure(model, prompt, plan, warm_ups=order.warmup)
            made = sum(len(tokens) for tokens in run.tokens)
            self.values[device] = made / run.wall_s if run.wall_s > 0 else float("nan")
        return self.values[device]


def _capability(exam: Examination) -> Outcome:
    """Whether the engines here compute everything that the configuration asks for."""
    from apr_core.model.config import Qwen2Config

    config = exam.subject.checkpoint.config or {}
    try:
        known = Qwen2Config.from_mapping(config)
    except AprError as error:
        return Outcome(False, f"no engine here: {error.message}")
    grouped = "GQA" if known.num_key_value_heads < known.num_attention_heads else "MHA"
    needs = ("RoPE", grouped, "SwiGLU", "RMSNorm", "BiasAdd", "CausalMask")
    return Outcome(True, f"{', '.join(needs)}: all are computed", len(needs), len(needs), len(needs), len(needs))


def _contract(exam: Examination) -> Outcome:
    if exam.order.skip_contract:
        raise SkippedGate("--skip-contract")
    admission = exam.subject.admission
    found = len(admission.violations)
    if found:
        said = admission.refusal or ""
        return Outcome(False, said, found, 0, admission.measured, admission.expected)
    passed = f"{admission.measured} tensors pass every gate"
    return Outcome(True, passed, 0, 0, admission.measured, max(admission.expected, 1))


def _metadata(exam: Examination) -> Outcome:
    from apr_core.contract.gates import load_gates

    rows = [gate for gate in load_gates().gates if gate.id == "F-CONFIG-PLAUSIBLE-001"]
    geometry = exam.subject.admission.geometry
    if geometry is None:
        return Outcome(False, "the config does not state its sizes", None, 0, 0, len(rows))
    asked = [gate for gate in rows if not gate.families or geometry.family in gate.families]
    found = [v for v in exam.subject.admission.violations if v.gate == "F-CONFIG-PLAUSIBLE-001"]
    said = "; ".join(v.message for v in found) or f"{len(asked)} rules on the configuration hold"
    return Outcome(not found, said, len(found), 0, len(asked), len(asked))


def _golden(exam: Examination) -> Outcome:
    """Greedy answers, new tokens only, held against golden.json or the two questions of the specification."""
    from apr_core.model.generate import generate

    for need, why in (("tokenizer", "no tokenizer"), ("trained", "untrained model"), ("template", "no chat template")):
        if need in exam.subject.lacks:
            raise SkippedGate(why)
    model = exam.engine(exam.device)
    cases = _cases(exam.subject)
    wrong: list[str] = []
    for messages, accepts in cases:
        prepared = prepare_tokens(model, messages=messages)
        answer = generate(model, prepared, max_new_tokens=exam.order.max_tokens)
        for _ in answer:
            pass
        # before the text: reserved rows decode to nothing, and "empty" would hide that the head is read wrongly
        complaint = "; ".join(map(str, answer.violations)) or judge_answer(answer.text, accepts)
        if complaint:
            wrong.append(f"{messages[-1]['content']!r}: {complaint}")
    right = len(cases) - len(wrong)
    said = wrong[0] if wrong else f"{right} of {len(cases)} answers as expected on {exam.device}"
    return Outcome(not wrong, said, right, len(cases), len(cases), len(cases))


def _cases(subject: Subject) -> list[tuple[list[dict[str, str]], Callable[[str], bool]]]:
    def equal(answer: str) -> Callable[[str], bool]:
        return lambda text: text.strip() == answer.strip()

    def holds(words: tuple[str, ...]) -> Callable[[str], bool]:
        return lambda text: any(word in text.lower() for word in words)

    if subject.golden is not None:
        return [(list(case["messages"]), equal(str(case["answer"]))) for case in subject.golden["cases"]]
    return [([{"role": "user", "content": text}], holds(words)) for text, words in GOLDEN]


def judge_answer(text: str, accepts: Callable[[str], bool]) -> str:
    """Return what is wrong with an answer, or nothing: empty, then garbage, then not what was expected."""
    if not text.strip():
        return "an empty answer"
    found = [mark for mark in GARBAGE if mark in text]
    if found:
        return f"garbage {found[0]!r} in {text[:60]!r}"
    return "" if accepts(text) else f"not as expected: {text[:100]!r}"


def _throughput(exam: Examination) -> Outcome:
    floor = GGUF_FLOOR if exam.subject.checkpoint.format == "gguf" else OTHER_FLOOR
    floor = exam.order.limits.get("throughput", CUDA_FLOOR if exam.device == "cuda" else floor)
    rate = exam.tok_s(exam.device)
    model = exam.engine(exam.device)
    said = f"{rate:.1f} tok/s ({model.backend} on {model.device}, {exam.order.iterations} x {exam.order.max_tokens})"
    return Outcome(rate >= floor, said, rate, floor, exam.order.iterations, exam.order.iterations)


def _ollama(exam: Examination) -> Outcome:
    from apr_core.bench.throughput import Plan, measure
    from apr_core.peers import rates

    exam.require_admitted()
    if not exam.order.ollama:
        # a size guessed from a file name compared a 0.5B with a 7B once (round 48)
        raise SkippedGate("which model of Ollama is this? name it with --ollama")
    elements = sum(prod(info.shape) for info in exam.subject.checkpoint.tensors.values())
    try:
        peer = rates.Ollama(exam.order.ollama, elements, rates.OLLAMA)
    except (Unavailable, UsageError) as error:
        raise SkippedGate(error.message) from error
    model, tokens = exam.engine(exam.device), max(exam.order.max_tokens, 128)
    repeats, prompt = min(exam.order.iterations, 3), exam.prompt(model, SPEED_PROMPT)
    run = measure(model, prompt.ids, Plan(prompt.ids.size, tokens, repeats))
    threads = os.cpu_count() or 1
    theirs = float(np.median([peer.round(threads, prompt.ids.tolist(), tokens).decode_tok_s for _ in range(repeats)]))
    limit = exam.order.limits.get("ollama_parity", OLLAMA_FLOOR)
    said = f"{run.decode_tok_s:.1f} tok/s here, {theirs:.1f} in Ollama"
    ratio = run.decode_tok_s / theirs if theirs > 0 else float("nan")
    return Outcome(ratio >= limit, said, ratio, limit, repeats, repeats)


def _gpu_speedup(exam: Examination) -> Outcome:
    exam.require_cuda()
    limit = exam.order.limits.get("gpu_speedup", GPU_FLOOR)
    gpu, cpu = exam.tok_s("cuda"), exam.tok_s("cpu")
    ratio = gpu / cpu if cpu > 0 else float("nan")
    return Outcome(ratio >= limit, f"{gpu:.1f} tok/s on CUDA, {cpu:.1f} on the CPU", ratio, limit)


def _format_parity(exam: Examination) -> Outcome:
    exam.require_admitted()
    other = exam.subject.reference
    if other is None:
        raise SkippedGate("no reference; give the model in another format with --reference")
    if other.checkpoint.content_hash == exam.subject.checkpoint.content_hash:
        raise SkippedGate("the reference is the same file")
    if other.admission.blocking:
        return Outcome(False, f"the reference is refused: {other.admission.refusal}", None, None, 0, POSITIONS)
    ids = exam.subject.stimulus(POSITIONS).ids
    if ids.max(initial=0) >= other.model.config.vocab_size:
        return Outcome(False, "the reference has another vocabulary", None, None, 0, POSITIONS)
    agreeing = agreement(other.model.forward(ids), exam.subject.model.forward(ids))
    said = f"{agreeing} of {len(ids)} positions agree with {other.checkpoint.format} (top token, or cosine {COSINE})"
    return Outcome(agreeing == len(ids), said, agreeing, len(ids), len(ids), POSITIONS)


def agreement(reference: Any, candidate: Any) -> int:
    """Count positions where the top token agrees, or the cosine of the logits is at least 0.98; NaN never agrees."""
    if reference.shape != candidate.shape:
        return 0
    a, b = np.asarray(reference, np.float64), np.asarray(candidate, np.float64)
    with np.errstate(all="ignore"):
        cosine = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    finite = np.isfinite(a).all(axis=1) & np.isfinite(b).all(axis=1)
    return int(np.count_nonzero(finite & ((a.argmax(axis=1) == b.argmax(axis=1)) | (cosine >= COSINE))))


def _batched(exam: Examination) -> Outcome:
    """In place of comparing the text of kernels: a batch of tokens and one token at a time compute the same."""
    exam.require_cuda()
    return batched_equals_single(exam.engine("cuda"), exam.subject.stimulus(GPU_TOKENS).ids)


def batched_equals_single(model: TracedForward, ids: Any) -> Outcome:
    """Hold the logits of one forward over all tokens against those of one token at a time through the cache."""
    from apr_core.parity.tolerances import AIM

    whole, cache = model.forward(ids).astype(np.float64), model.new_cache()
    steps = np.concatenate([model.forward(ids[k : k + 1], cache) for k in range(len(ids))]).astype(np.float64)
    norms = np.linalg.norm(whole, axis=1)
    worst = float(np.max(np.linalg.norm(whole - steps, axis=1) / norms))  # np.max keeps a NaN
    limit = AIM
    said = f"rel_l2 {worst:.2g} between a batch and single tokens, at most {limit:g}"
    return Outcome(worst <= limit, said, worst, limit, len(ids), len(ids))


def _isolation(exam: Examination) -> Outcome:
    exam.require_cuda()
    model = exam.engine("cuda")
    return state_is_isolated(model, exam.prompt(model, GOLDEN[0][0]), exam.prompt(model, OTHER_PROMPT))


def state_is_isolated(model: TracedForward, first: PreparedTokens, second: PreparedTokens) -> Outcome:
    """Generate for A, B and A again: the two A must be the same tokens, and B (if its prompt differs) others."""
    from apr_core.model.generate import generate

    made = [list(generate(model, tokens, max_new_tokens=GPU_TOKENS)) for tokens in (first, second, first)]
    same = made[0] == made[2]
    differs = made[0] != made[1] or first.ids.tolist() == second.ids.tolist()
    said = "A, B, A: " + ("the same A twice" if same else "A changed") + ("" if differs else ", and B equals A")
    return Outcome(same and differs, said, 1 + same + differs, 3, 3, 3)


def _regression(exam: Examination) -> Outcome:
    if not exam.order.previous:
        raise SkippedGate("no earlier report; give one with --previous")
    lost: dict[str, float] = {}
    for name, before in _previous(Path(exam.order.previous).expanduser()).items():
        if name in exam.values and before > 0:
            lost[name] = (before - exam.values[name]) / before
    if not lost:
        raise SkippedGate("nothing of the earlier report was measured again")
    worst = max(lost, key=lambda name: lost[name])
    said = f"{worst} lost {100 * lost[worst]:.1f} % of its earlier value"
    return Outcome(
        all(share <= REGRESSION for share in lost.values()), said, lost[worst], REGRESSION, len(lost), len(lost)
    )


def _previous(path: Path) -> dict[str, float]:
    from apr_core.formats.checkpoint import map_file
    from apr_core.formats.strict_json import parse_object

    body = parse_object(bytes(map_file(path).view), file=path, what="report of apr qa", at=0)
    gates = body.get("gates")
    if not isinstance(gates, list):
        raise FormatError(expected="a report of apr qa --json", found="no gates", file=path, advice="give another file")
    kept = ("throughput", "ollama_parity", "gpu_speedup")
    return {g["name"]: float(g["value"]) for g in gates if g.get("name") in kept and g.get("value") and g.get("passed")}


GATES: tuple[tuple[str, str, Callable[[Examination], Outcome]], ...] = (
    ("capability_match", "Capability Match", _capability),
    ("tensor_contract", "Tensor Contract", _contract),
    ("metadata_plausibility", "Metadata Plausibility", _metadata),
    ("golden_output", "Golden Output", _golden),
    ("throughput", "Throughput", _throughput),
    ("ollama_parity", "Ollama Parity", _ollama),
    ("gpu_speedup", "GPU Speedup", _gpu_speedup),
    ("format_parity", "Format Parity", _format_parity),
    ("ptx_parity", "Batched Parity", _batched),
    ("gpu_state_isolation", "GPU State Isolation", _isolation),
    ("performance_regression", "Perf Regression", _regression),
)
NAMES = tuple(name for name, _, _ in GATES)


def examine(order: Order) -> dict[str, Any]:
    """
    Put a model through the gates in order.

    Returns:
        model, passed, gates (name, title, passed, skipped, message, value, threshold, duration_ms, coverage),
        gates_executed, gates_skipped, total_duration_ms, timestamp, summary, system_info, coverage, bypassed, holes
        (gates that were asked for and did not run), exit_code.

    Raises:
        UsageError: An unknown gate in ``skip``.
        AprError: The model, the reference or the earlier report cannot be opened, or CUDA was asked for and is absent.
    """
    unknown = [name for name in order.skip if name not in NAMES]
    if unknown:
        raise UsageError(f"no gate is called {', '.join(unknown)}", advice=f"skip some of {', '.join(NAMES)}")
    if order.previous:
        _previous(Path(order.previous).expanduser())
    started = time.monotonic()
    subject = obtain(order.model, reference=order.reference, device=order.device, skip_contract=order.skip_contract)
    try:
        if order.device == "cuda" and "cuda" in subject.lacks:
            raise Unavailable("no CUDA device here", advice="use --device cpu")
        gates = list(_attempts(Examination(order, subject)))
    finally:
        subject.close()
    return _report(order, subject, gates, started)


def _attempts(exam: Examination) -> Iterator[dict[str, Any]]:
    for name, title, gate in GATES:
        started = time.monotonic()
        skipped = False
        try:
            if name in exam.order.skip:
                raise SkippedGate("--skip")
            found = gate(exam)
        except SkippedGate as reason:
            skipped, found = True, Outcome(False, f"Skipped: {reason}", compared=0)
        except (AprError, OSError) as error:  # nothing was measured, so nothing passed
            found = Outcome(False, f"not measured: {error}", compared=0)
        if found.value is not None:
            exam.values[name] = found.value
        note(f"{name}: {'skipped' if skipped else 'passed' if found.holds else 'FAILED'}")
        yield {
            "name": name,
            "title": title,
            "passed": found.holds and not skipped,
            "skipped": skipped,
            "message": found.message,
            "value": found.value,
            "threshold": found.threshold,
            "duration_ms": round(1000 * (time.monotonic() - started)),
            "coverage": {"compared": found.compared, "expected": found.expected},
        }


def _report(order: Order, subject: Subject, gates: list[dict[str, Any]], started: float) -> dict[str, Any]:
    from datetime import UTC, datetime

    from apr_core.provenance import cpu_model

    failed = [g["name"] for g in gates if not g["passed"] and not g["skipped"]]
    skipped = [g["name"] for g in gates if g["skipped"]]
    executed, holes = len(gates) - len(skipped), [name for name in skipped if name in order.asked]
    if failed:
        code, summary = Exit.REFUTED, f"Failed gates: {', '.join(failed)}"
    elif executed < order.min_executed:
        code, summary = Exit.INCONCLUSIVE, f"Insufficient gate execution: {executed} < {order.min_executed} minimum"
    elif holes:
        code, summary = Exit.INCONCLUSIVE, f"Asked for and not run: {', '.join(holes)}"
    elif subject.admission.bypassed:
        code, summary = Exit.INCONCLUSIVE, "The contract was bypassed: nothing here can be corroborated"
    else:
        code, summary = Exit.OK, f"All executed QA gates passed ({executed} executed, {len(skipped)} skipped)"
    return {
        "model": str(subject.path),
        "passed": code is Exit.OK,
        "gates": gates,
        "gates_executed": executed,
        "gates_skipped": len(skipped),
        "total_duration_ms": round(1000 * (time.monotonic() - started)),
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "summary": summary,
        "system_info": {"cpu_model": cpu_model()},
        "coverage": {"executed": executed, "of": len(gates)},
        "bypassed": subject.admission.bypassed,
        "holes": holes,
        "exit_code": code,
    }


def show_report(body: dict[str, Any], *, as_json: bool) -> Exit:
    """Print a report; return its exit code."""
    if as_json:
        show_json(body)
        return Exit(body["exit_code"])
    rows = []
    for gate in body["gates"]:
        status = "skipped" if gate["skipped"] else "passed" if gate["passed"] else "FAILED"
        numbers = ["" if gate[key] is None else f"{gate[key]:.4g}" for key in ("value", "threshold")]
        said = gate["message"].removeprefix("Skipped: ")
        rows.append((gate["title"], status, *numbers, f"{gate['duration_ms'] / 1000:.2f} s", said))
    show_table(("gate", "status", "measured", "threshold", "duration", ""), rows)
    ran, left = body["gates_executed"], body["gates_skipped"]
    if left > ran:
        show(f"{left} of {ran + left} gates were skipped: this examination says little")
    show(f"{body['model']}: {body['summary']}")
    return Exit(body["exit_code"])

"""``apr bench`` and ``apr profile``: how fast, of which tokens, against which ceiling, and where the time goes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apr_core.cli.dispatch import admission_of
from apr_core.errors import Exit, UsageError

if TYPE_CHECKING:
    from apr_core.bench.throughput import Plan
    from apr_core.contract.admit import Admission
    from apr_core.falsify.finding import Finding
    from apr_core.model.trace import TracedForward

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model file or folder, or 'pygmy'.", show_default=False)]
Precision = Annotated[str, typer.Option(metavar="speed|exact|reference", help="Which engine.")]
Threads = Annotated[str, typer.Option(metavar="1,2|all", help="Numbers of threads, each measured.")]
Prefill = Annotated[int, typer.Option(metavar="N", help="Tokens of the prompt.")]
Decode = Annotated[int, typer.Option(metavar="N", help="Tokens generated behind it.")]
Seed = Annotated[int, typer.Option(help="Of the prompt.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print strict JSON.")]


def register(app: typer.Typer) -> None:
    """Put the commands of this module into the application."""
    app.command()(bench)
    app.command()(profile)


def bench(
    context: typer.Context,
    model: Model,
    precision: Precision = "speed",
    threads: Threads = "1,all",
    prefill: Prefill = 512,
    decode: Decode = 128,
    repeats: Annotated[int, typer.Option(metavar="N", help="Timed repeats.")] = 5,
    contexts: Annotated[str, typer.Option("--context", metavar="128,1024", help="Also time single tokens there.")] = "",
    peer: Annotated[
        list[str] | None,
        typer.Option(metavar="llama.cpp|xllamacpp|transformers|ollama:NAME", help="Interleave; may be repeated."),
    ] = None,
    claim: Annotated[
        list[str] | None, typer.Option(metavar="METRIC=NUMBER", help="Try to refute; may be repeated.")
    ] = None,
    least: Annotated[
        float | None, typer.Option("--assert-throughput", metavar="TOK_S", help="Exit 5 below it in decode.")
    ] = None,
    p99: Annotated[float | None, typer.Option("--assert-p99", metavar="MS", help="Exit 5 above it.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="A new folder, for samples and evidence.")] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure prompt, first token and each further one; a rate counts for the right tokens below the ceiling alone."""
    from apr_core.bench.claimed import parse_claim
    from apr_core.bench.throughput import Plan
    from apr_core.cli.output import show_json

    if out is not None and out.exists():
        raise UsageError(f"{out} exists already", advice="name another folder")
    claims = [parse_claim(text) for text in claim or []]
    counts = _threads(threads)
    plan = Plan(prefill, decode, repeats, _numbers(contexts, "--context"))
    admission = admission_of(context, "model")
    built = _built(admission, precision, plan)
    body, findings = _measure_all(admission, built, counts, plan, peers=peer or [], claims=claims, seed=seed)
    body = {"model": str(admission.checkpoint.path), "precision": precision, **body}
    body["asserted"] = _asserted(body, least, p99)
    code = _conclude(body)
    if out is not None:
        _keep(out, body, findings, admission)
    if as_json:
        show_json(body)
    else:
        _show(body)
    raise typer.Exit(code)


def profile(
    context: typer.Context,
    model: Model,
    precision: Precision = "speed",
    threads: Threads = "all",
    prefill: Prefill = 128,
    decode: Decode = 32,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Show where the time of a prompt and of a token goes, which types are read, and what is widened."""
    from apr_core.bench.profile import profile_model
    from apr_core.bench.throughput import Plan
    from apr_core.cli.output import show, show_json, show_table

    count = _threads(threads)[-1]
    plan = Plan(prefill, decode, 1)
    admission = admission_of(context, "model")
    built = _built(admission, precision, plan)
    body = profile_model(built, admission, plan, threads=count, seed=seed)
    if as_json:
        show_json(body)
        return
    show(f"{body['model']}: {body['backend']}, {body['threads']} threads")
    phases = [
        [row["phase"], *(f"{row[k]:.3f}" for k in ("prefill_ms", "decode_ms_per_token"))] for row in body["phases"]
    ]
    show_table(["phase", "prefill ms", "ms per token"], phases)
    kinds = [[row["type"], row["matrices"], f"{row['bytes_per_token'] / 1e6:.1f}"] for row in body["types"]]
    show_table(["type", "matrices", "MB per token"], kinds)
    show(
        f"read {body['gb_s']:.1f} GB/s of {body['ceiling_gb_s']:.1f}; widened to F32: {body['fallbacks'] or 'nothing'}"
    )


# What is asked of every run here; the rest of notebook 30 is about the file, the meter or another device.
CLAIMS = ("F-THR-002", "F-THR-003", "F-THR-004", "F-THR-005", "F-THR-006", "F-THR-007", "F-THR-011", "F-THR-012")


def _measure_all(
    admission: Admission,
    built: TracedForward,
    counts: list[int],
    plan: Plan,
    *,
    peers: list[str],
    claims: list[tuple[str, float]],
    seed: int,
) -> tuple[dict[str, Any], list[Finding]]:
    """Time every number of threads, and put the claims of notebook 30 to each run."""
    import numpy as np

    from apr_core.bench import acts
    from apr_core.bench.versus import open_peers
    from apr_core.engines.cpu_weights import require_memory
    from apr_core.engines.subject import Subject
    from apr_core.falsify.finding import ACTS, Finding

    path = admission.checkpoint.path
    subject = Subject(path, admission, reference=None, device="cpu", seed=seed, max_new_tokens=plan.decode)
    require_memory(4 * acts.count_elements(subject), f"the float32 judge of {path}")
    subject.peers = tuple(peers)
    opened, absent = open_peers(peers, path, acts.count_elements(subject))
    prompt = np.random.default_rng(seed).integers(0, built.config.vocab_size, plan.prefill)
    runs, rows, findings = list[dict[str, Any]](), list[dict[str, Any]](), list[Finding]()
    wrong = compared = 0
    for count in counts:
        made = acts.time_engine(
            subject,
            built,
            prompt,
            plan,
            threads=count,
            peers=opened,
            absent=absent,
            claims=claims if count == counts[-1] else (),
        )
        acts.keep(subject, made)
        found = [ACTS[claim](subject) for claim in CLAIMS]
        findings += found
        rows += [_row(finding, count, admission.bypassed) for finding in found]
        runs.append(made.run.body())
        bad, of = acts.wrong_tokens(subject, made)
        wrong, compared = wrong + bad, compared + of
    return {
        "plan": {"prefill": plan.prefill, "decode": plan.decode, "repeats": plan.repeats},
        "runs": runs,
        "tokens": {"compared": compared, "wrong": wrong},
        "claims": rows,
        "peers_asked": peers,
    }, findings


def _row(finding: Finding, threads: int, bypassed: bool) -> dict[str, Any]:
    verdict, reason = finding.judge(bypassed=bypassed)
    return {
        "claim": finding.claim,
        "threads": threads,
        "value": finding.value,
        "verdict": str(verdict),
        "reason": reason,
        "why": [list(pair) for pair in finding.whys],
        "rows": [dict(row) for row in finding.rows] if finding.claim == "F-THR-012" else [],
    }


def _keep(out: Path, body: Mapping[str, Any], findings: list[Finding], admission: Admission) -> None:
    """Write the samples as JSON, and an evidence record for each claim that was put to a run."""
    from apr_core import provenance
    from apr_core.cli.output import plain
    from apr_core.engines.subject import Subject
    from apr_core.falsify.evidence import make_evidence, write_evidence

    path = admission.checkpoint.path
    subject = Subject(path, admission, reference=None, device="cpu", seed=0, max_new_tokens=0).record
    (out / "evidence").mkdir(parents=True)
    (out / "bench.json").write_text(json.dumps(plain(body), indent=1, allow_nan=False), encoding="utf-8")
    made_by, parameters = provenance.collect(), {"model": str(path), **body["plan"]}
    for finding in findings:
        evidence = make_evidence(finding, subject, parameters=parameters, provenance=made_by)
        write_evidence(evidence, out / "evidence", finding.arrays)


def _built(admission: Admission, precision: str, plan: Plan) -> TracedForward:
    """Refuse what the model cannot hold before it is built."""
    from apr_core.cli.run import precision_for
    from apr_core.engines.load import build
    from apr_core.model.config import Qwen2Config

    precision_for(precision, "cpu")
    plan.require(Qwen2Config.of(admission.require()).max_position_embeddings)
    return build(admission, precision=precision)


def _threads(text: str) -> list[int]:
    """Read a list of thread counts; ``all`` is what this process may use. More than that is refused."""
    from apr_core.kernels.cpu.features import available_cores

    cores = available_cores()
    counts = [cores if part.strip() == "all" else _number(part, "--threads") for part in text.split(",")]
    for count in counts:
        if not 1 <= count <= cores:
            raise UsageError(f"expected 1 to {cores} threads (the cores of this process), found {count}")
    return sorted(set(counts))


def _numbers(text: str, option: str) -> tuple[int, ...]:
    return tuple(_number(part, option) for part in text.split(",")) if text else ()


def _number(text: str, option: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise UsageError(f"expected whole numbers behind {option}, found {text!r}") from error


def _asserted(body: Mapping[str, Any], least: float | None, p99_ms: float | None) -> list[dict[str, Any]]:
    """Hold the run of the most threads against what a person asked for."""
    best = body["runs"][-1]["candidate"]
    rows = []
    if least is not None:
        found = best["decode_tok_s"]
        rows.append({"what": "decode_tok_s", "limit": least, "found": found, "holds": found >= least})
    if p99_ms is not None:
        found = 1e3 * best["tpot_p99_s"]
        rows.append({"what": "tpot_p99_ms", "limit": p99_ms, "found": found, "holds": found <= p99_ms})
    return rows


def _conclude(body: dict[str, Any]) -> int:
    """Name what was refuted and what is open, and return the exit code that says so."""
    from apr_core.bench.claimed import WRONG_TOKENS

    void = body["tokens"]["wrong"] or not body["tokens"]["compared"]
    missed = [
        f"{row['what']} {row['found']:.4g}, asked {row['limit']:g}" for row in body["asserted"] if not row["holds"]
    ]
    named: dict[str, list[str]] = {verdict: [] for verdict in ("CORROBORATED", "FALSIFIED", "INCONCLUSIVE", "NOT_RUN")}
    for row in body["claims"]:
        named[row["verdict"]].append(f"{row['claim']}, {row['threads']} threads: {row['reason']}")
    # a rate of wrong tokens neither holds nor fails
    refuted = named["FALSIFIED"] + ([] if void else missed)
    undecided = named["INCONCLUSIVE"] + (named["NOT_RUN"] if body["peers_asked"] else [])
    if void and body["asserted"]:
        undecided.append(f"what was asserted: {WRONG_TOKENS}")
    body["refuted"], body["undecided"] = refuted, undecided
    body["verdict"] = "FALSIFIED" if refuted else "INCONCLUSIVE" if undecided else "CORROBORATED"
    return int(Exit.REFUTED if refuted else Exit.INCONCLUSIVE if undecided else Exit.OK)


def _show(body: Mapping[str, Any]) -> None:
    from apr_core.cli.output import show, show_table

    heads = ["who", "threads", "prefill tok/s", "decode tok/s", "95 %", "ttft s", "of ceiling", "decode, prefill ratio"]
    show_table(heads, [row for run in body["runs"] for row in _rows(run)])
    for run in body["runs"]:
        at = ", ".join(f"{n}: {rate:.1f}" for n, rate in run["candidate"]["tok_s_at_context"].items())
        show(f"{run['threads']} threads: reads at most {run['read_gb_s']:.1f} GB/s")
        if at:
            show(f"  tok/s at context {at}")
        for peer in run["peers"]:
            show(f"  {peer['name']}: {peer['features'] or 'features unknown'}")
        for name, reason in run["absent_peers"].items():
            show(f"  {name}: NOT_RUN, {reason}")
    tokens = body["tokens"]
    show(f"tokens: {tokens['compared']} compared with the reference, {tokens['wrong']} wrong")
    for row in body["claims"]:
        for claimed in row["rows"]:
            said = f"{claimed['verdict']} {claimed['reason']}".rstrip()
            show(f"claimed {claimed['metric']} = {claimed['claimed']:g}, {row['threads']} threads: {said}")
        for question, answer in row["why"]:
            show(f"  {question} {answer}")
    for line in (*body["refuted"], *body["undecided"]):
        show(line)
    show(str(body["verdict"]))


def _rows(run: Mapping[str, Any]) -> list[list[str]]:
    """One row for the candidate, one for each peer."""
    ours, threads = run["candidate"], str(run["threads"])
    low, high = ours["decode_tok_s_interval"]
    share = f"{100 * run['share_of_ceiling']:.0f} %"
    rates = [f"{ours['prefill_tok_s']:.1f}", f"{ours['decode_tok_s']:.1f}", f"{low:.1f} to {high:.1f}"]
    rows = [[ours["backend"], threads, *rates, f"{ours['ttft_s']:.3f}", share, ""]]
    for peer in run["peers"]:
        ratio = f"{peer['decode_ratio']:.2f}, {peer['prefill_ratio']:.2f}" if peer["fair"] else "not a fair peer"
        rates = [f"{peer['prefill_tok_s']:.1f}", f"{peer['decode_tok_s']:.1f}"]
        rows.append([peer["build"], threads, *rates, "", "", "", ratio])
    return rows

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
    from apr_core.bench.throughput import Plan, Throughput
    from apr_core.contract.admit import Admission
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
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep everything as JSON; must not exist.")] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure prompt, first token and each further one; a rate counts for the right tokens below the ceiling alone."""
    from apr_core.bench.claimed import parse_claim
    from apr_core.bench.throughput import Plan
    from apr_core.cli.output import plain, show_json

    if out is not None and out.exists():
        raise UsageError(f"{out} exists already", advice="name another file")
    claims = [parse_claim(text) for text in claim or []]
    counts = _threads(threads)
    plan = Plan(prefill, decode, repeats, _numbers(contexts, "--context"))
    admission = admission_of(context, "model")
    body = _measure_all(admission, precision, counts, plan, peers=peer or [], claims=claims, seed=seed)
    body["asserted"] = _asserted(body, least, p99)
    code = _conclude(body)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(plain(body), indent=1, allow_nan=False), encoding="utf-8")
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


def _measure_all(
    admission: Admission,
    precision: str,
    counts: list[int],
    plan: Plan,
    *,
    peers: list[str],
    claims: list[tuple[str, float]],
    seed: int,
) -> dict[str, Any]:
    import numpy as np

    from apr_core.bench.claimed import judge_claim
    from apr_core.bench.throughput import couple
    from apr_core.bench.versus import cost_of_rounding, interleave, rounds_activations
    from apr_core.engines.load import build
    from apr_core.peers.rates import open_peer

    built = _built(admission, precision, plan)
    elements = sum(int(np.prod(t.shape, dtype=np.int64)) for t in admission.checkpoint.tensors.values())
    opened = [open_peer(name, admission.checkpoint.path, elements) for name in peers]
    prompt = np.random.default_rng(seed).integers(0, built.config.vocab_size, plan.prefill)
    runs = [interleave(built, prompt, plan, threads=count, peers=opened, elements=elements) for count in counts]
    made = {tokens for run in runs for tokens in run.timed.tokens}
    reference = build(admission)
    moved = cost_of_rounding(admission, reference) if rounds_activations(built) else 0.0
    wrong = compared = 0
    for tokens in made:
        bad, count = couple(reference, prompt, tokens, moved)
        wrong, compared = wrong + len(bad), compared + count
    right = compared > 0 and wrong == 0
    best = runs[-1]
    verdicts = [
        judge_claim(
            metric, value, *_of(best.timed, metric), read_gb_s=best.read_gb_s, read_bytes=best.read_bytes,
            tokens_right=right,
        )
        for metric, value in claims
    ]  # fmt: skip
    return {
        "model": str(admission.checkpoint.path),
        "precision": precision,
        "plan": {"prefill": plan.prefill, "decode": plan.decode, "repeats": plan.repeats},
        "runs": [run.body() for run in runs],
        "tokens": {"compared": compared, "wrong": wrong, "moved_nat": moved},
        "claims": [{**vars(item), "verdict": str(item.verdict)} for item in verdicts],
        "bypassed": bool(getattr(built, "bypassed", False)),
    }


def _of(timed: Throughput, metric: str) -> tuple[float, tuple[float, float]]:
    figures = timed.figures()
    interval = figures.get(f"{metric}_interval")
    if interval is None:
        interval = timed.ttft.median_interval() if metric == "ttft_s" else (figures[metric], figures[metric])
    return figures[metric], (interval[0], interval[1])


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
    """Name what was refuted, and return the exit code that says so."""
    refuted = [
        f"{row['what']} {row['found']:.4g}, asked {row['limit']:g}" for row in body["asserted"] if not row["holds"]
    ]
    refuted += [f"claim {row['metric']}: {row['reason']}" for row in body["claims"] if row["verdict"] == "FALSIFIED"]
    refuted += [run["meter"] for run in body["runs"] if run["meter"]]
    undecided = []
    if body["tokens"]["wrong"] or not body["tokens"]["compared"]:
        undecided.append(f"{body['tokens']['wrong']} of {body['tokens']['compared']} timed tokens are wrong")
    if body["bypassed"]:
        undecided.append("the contract was bypassed (--skip-contract)")
    body["refuted"], body["undecided"] = refuted, undecided
    if undecided:  # a rate of wrong tokens neither holds nor fails
        body["verdict"] = "INCONCLUSIVE"
        return int(Exit.INCONCLUSIVE)
    body["verdict"] = "FALSIFIED" if refuted else "CORROBORATED"
    return int(Exit.REFUTED) if refuted else 0


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
    tokens = body["tokens"]
    show(f"tokens: {tokens['compared']} compared with the reference, {tokens['wrong']} wrong")
    for claim in body["claims"]:
        show(f"claim {claim['metric']} = {claim['claimed']:g}: {claim['verdict']} {claim['reason']}".rstrip())
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

"""The commands of parity: trace, parity, eval, and compare-inference of the rosetta group."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apr_core.cli import rosetta
from apr_core.cli.dispatch import admission_of
from apr_core.errors import Exit, LoadError, Unavailable, UsageError

if TYPE_CHECKING:
    from apr_core.engines.subject import Subject
    from apr_core.falsify.verdict import Verdict
    from apr_core.model.trace import Fingerprints, TracedForward
    from apr_core.parity.distribution import DistributionParity
    from apr_core.parity.opinions import Hearing
    from apr_core.parity.pair import Pair
    from apr_core.parity.suite import SuiteReport

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model file or folder, or 'pygmy'.", show_default=False)]
Reference = Annotated[str, typer.Option(metavar="REF", help="The model that this one claims to be made from.")]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where to compute.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print strict JSON.")]
# What a level of `apr trace` shows, as endings of names.
LEVELS: dict[str, tuple[str, ...]] = {
    "none": (),
    "basic": ("final_hidden", "logits"),
    "layer": ("resid_ffn", "final_hidden", "logits"),
    "payload": ("",),
}
TRACED = 64


def register(app: typer.Typer) -> None:
    """Put the commands of this module into the application, one of them into its rosetta group."""
    app.command()(trace)
    app.command()(parity)
    app.command("eval")(evaluate)
    rosetta.app.command("compare-inference")(compare_inference)


def trace(
    context: typer.Context,
    model: Model,
    text: Annotated[str, typer.Option("-p", "--prompt", metavar="TEXT", help="What to read.")] = "",
    level: Annotated[str, typer.Option(metavar="none|basic|layer|payload", help="How much to show.")] = "layer",
    reference: Reference = "",
    diff: Annotated[bool, typer.Option("--diff", help="Show the distance to --reference.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what every layer computes, as fingerprints; describes and judges nothing (apr parity does)."""
    from apr_core.cli.output import show, show_json, show_table

    if level not in LEVELS:
        raise UsageError(f"expected a level of {', '.join(LEVELS)}, found {level!r}")
    if diff and not reference:
        raise UsageError("--diff needs something to differ from", advice="add --reference REF")
    subject = _subject(context, "model")
    ids = _ids(subject, text)
    body: dict[str, Any] = {"model": str(subject.path), "tokens": ids.tolist(), "level": level}
    body["rows"] = _fingerprints(subject.model, ids, level)
    if reference:
        body |= _differences(subject, _subject(context, "reference"), ids, level)
    if as_json:
        show_json(body)
        return
    for key in ("rows", "reference_rows", "differences"):
        table = body.get(key) or []
        if table and (key != "reference_rows" or not diff):
            show_table(list(table[0]), [[_short(v) for v in row.values()] for row in table])
    show(f"{body['model']}: {len(ids)} tokens, {len(body['rows'])} rows at level {level}")
    if "first_divergence" in body:
        show(f"first beyond rel_l2 1e-5: {body['first_divergence'] or 'nothing'}")


def parity(
    context: typer.Context,
    model: Model,
    reference: Reference = "",
    device: Device = "auto",
    opinion: Annotated[
        list[str] | None, typer.Option(metavar="transformers|llama.cpp", help="Also ask another implementation.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Hold every backend that runs here against the float32 reference; exit 5 when one is refuted."""
    from apr_core.cli.output import show, show_json, show_table
    from apr_core.parity.opinions import gather, hear

    subject = _subject(context, "model", device)
    source = _subject(context, "reference") if reference else None
    heard = hear(gather(subject, opinion)) if opinion else None
    body = examine_all(subject, source, device)
    if heard is not None:
        _join(body, heard)
        _mark_bypass(body, subject)
    if as_json:
        show_json(body)
    else:
        show_table(("name", "floor", "limit"), _floor_rows(body["noise_floor"]))
        for candidate in body["candidates"]:
            rows = [(p["name"], p["verdict"], _short(p["times_limit"]), p["reason"]) for p in candidate["parts"]]
            show_table((f"{candidate['backend']} on {candidate['device']}", "verdict", "of its limit", "reason"), rows)
        for missing in body["not_available"]:
            show(f"not available: {missing['backend']}: {missing['reason']}")
        if body["against_reference"]:
            show(f"against {reference}: {body['against_reference']['verdict']} {body['against_reference']['reason']}")
        for key in ("noises", "pairs"):
            for table in [body["opinions"][key]] if heard is not None else []:
                show_table(list(table[0]), [[_short(v) for v in row.values()] for row in table])
        show(f"{body['model']}: {body['verdict']}; {body['reason'] or 'no backend was refuted'}")
    raise typer.Exit(_code(body["verdict"]))


def _join(body: dict[str, Any], heard: Hearing) -> None:
    """Put the opinions of others into the report, and their verdict into its verdict."""
    from dataclasses import asdict

    said = f"opinions: {heard.reason}" if heard.reason else ""
    body["opinions"], body["verdict"] = asdict(heard), str(_worst([body["verdict"], heard.verdict]))
    body["reason"] = "; ".join(part for part in (body["reason"], said) if part)


def evaluate(
    context: typer.Context,
    model: Model,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="A text; a bundled one when left out.")] = None,
    base: Annotated[str, typer.Option(metavar="MODEL", help="Also the divergence from this model.")] = "",
    finer: Annotated[str, typer.Option(metavar="MODEL", help="A copy of the base with more bits: costs it less?")] = "",
    as_json: AsJson = False,
) -> None:
    """Perplexity on a text, and the divergence from a base on the same text; exit 5 when a finer copy is worse."""
    from apr_core.cli.output import show_json
    from apr_core.parity import evaluate as room

    if finer and not base:
        raise UsageError("--finer needs what both are copies of", advice="add --base MODEL")
    subject, other = _subject(context, "model"), _subject(context, "base") if base else None
    found = room.evaluate(subject, room.read_text(text), other)
    rung = None
    if other is not None and found.base is not None and finer:
        rung = _rung(_subject(context, "finer"), subject, found.base, other, room.read_text(text))
    body: dict[str, Any] = {
        "model": str(subject.path),
        "text": str(text) if text else "bundled",
        "tokens": found.tokens,
        "scored": found.scored,
        "perplexity": found.perplexity,
        "perplexity_interval": list(found.interval),
        "base": base or None,
        "control": other is not None and other.checkpoint.content_hash == subject.checkpoint.content_hash,
    }
    if found.base is not None:
        body |= {"against_base": statistics(found.base)}
    if rung is not None:
        body |= {"finer": finer} | rung
    if as_json:
        show_json(body)
    else:
        _show_evaluation(body, found.interval)
    raise typer.Exit(_code(body["verdict"]) if rung else Exit.OK)


def _show_evaluation(body: dict[str, Any], interval: tuple[float, float]) -> None:
    from apr_core.cli.output import show

    (low, high), base = interval, body["base"]
    said = f"perplexity {body['perplexity']:.4g} (95 % interval {low:.4g} to {high:.4g})"
    show(f"{said}, {body['scored']} tokens scored")
    if base:
        said = ", ".join(f"{key} {_short(value)}" for key, value in body["against_base"].items())
        show(f"against {base}{' (a control: the same file)' if body['control'] else ''}: {said}")
    if "finer" in body:
        show(f"against {body['finer']}, the finer copy: {body['verdict']} {body['reason']}")


def _rung(finer: Subject, subject: Subject, found: DistributionParity, base: Subject, text: str) -> dict[str, Any]:
    """Hold a copy with more bits against the subject, both out of the base; more bits must not cost more."""
    from apr_core.parity.evaluate import evaluate
    from apr_core.parity.pair import bits_per_weight, is_rung

    bits = [bits_per_weight(side.checkpoint) for side in (finer, subject)]
    if bits[0] <= bits[1]:
        raise UsageError(
            f"expected --finer to have more than the {bits[1]:.2f} bits per weight of MODEL, found {bits[0]:.2f}",
            advice="exchange the two",
        )
    other = evaluate(finer, text, base).base
    assert other is not None  # a base was given
    verdict, reason = is_rung(other, found)
    body = {"verdict": str(verdict), "reason": reason, "kl_mean_finer": other.kl_mean}
    _mark_bypass(body, finer, subject, base)
    return body


def compare_inference(
    context: typer.Context,
    a: Annotated[str, typer.Argument(metavar="A", help="The reference.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="The candidate.", show_default=False)],
    text: Annotated[str, typer.Option("-p", "--prompt", metavar="TEXT", help="What both read.")] = "",
    as_json: AsJson = False,
) -> None:
    """Feed two files the same tokens through their caches; exit 5 when they are further apart than their types say."""
    from apr_core.cli.output import show, show_json, show_table
    from apr_core.parity.pair import hold
    from apr_core.parity.suite import POSITIONS, PREFILL

    first, second = _subject(context, "a"), _subject(context, "b")
    ids = _ids(first, text, POSITIONS) if first.refusal is None else _ids(second, text, POSITIONS)
    body = {"a": str(first.path), "b": str(second.path)} | pair_body(hold(first, second, ids, min(PREFILL, ids.size)))
    _mark_bypass(body, first, second)
    if as_json:
        show_json(body)
    else:
        show_table(("statistic", "value"), [(k, _short(v)) for k, v in (body["statistics"] or {}).items()])
        said = "a control: both are the same file; " if body["control"] else ""
        show(f"{said}{body['verdict']}; {body['reason'] or body['basis']}")
    raise typer.Exit(_code(body["verdict"]))


def examine_all(subject: Subject, source: Subject | None, device: str) -> dict[str, Any]:
    """
    Hold every backend that runs here against the float32 reference.

    Args:
        subject: The model.
        source: The file that it was made from, or None.
        device: ``cpu`` leaves CUDA out, ``auto`` takes it where there is one, ``cuda`` demands it: an engine of it that
            does not take this file leaves the verdict open.

    Returns:
        model, verdict, reason, noise_floor, candidates, not_available, against_reference, bypassed.
    """
    from apr_core.engines.load import ENGINES, build
    from apr_core.falsify.verdict import Verdict
    from apr_core.parity.pair import hold
    from apr_core.parity.suite import POSITIONS, PREFILL, examine, prepare

    keys = [key for key in ENGINES if key != ("reference", "cpu") and (key[1] == "cpu" or device != "cpu")]
    ids = _ids(subject, "", POSITIONS)
    bench = prepare(subject.admission.require(), subject.model, ids)
    reports = [(examine(bench, subject.plain), "reference")]
    missing, asked = [], []
    for precision, where in keys:
        try:
            reports.append(
                (examine(bench, build(subject.admission, device=where, precision=precision), precision), precision)
            )
        except (Unavailable, LoadError) as error:  # no such engine here, or one that does not take this file
            missing.append({"backend": f"{precision} on {where}", "reason": str(error)})
            asked += [missing[-1]] if where == device == "cuda" else []
    body: dict[str, Any] = {
        "model": str(subject.path),
        "reference": {"backend": bench.reference.backend, "device": bench.reference.device},
        "positions": int(ids.size),
        "noise_floor": bench.floor().rows(),
        "candidates": [_candidate(report, precision) for report, precision in reports],
        "not_available": missing,
        "against_reference": pair_body(hold(source, subject, ids, PREFILL)) if source else None,
    }
    verdicts = [report.verdict for report, _ in reports]
    reasons = [f"{r.backend} on {r.device}: {r.reason}" for r, _ in reports if r.reason]
    verdicts += [Verdict.INCONCLUSIVE] * bool(asked)  # what a person asked for and did not run
    reasons += [f"{row['backend']} did not run: {row['reason']}" for row in asked]
    if body["against_reference"]:
        verdicts.append(body["against_reference"]["verdict"])
        reasons += [f"against the reference: {body['against_reference']['reason']}"] * bool(
            verdicts[-1] != "CORROBORATED"
        )
    body |= {"verdict": str(_worst(verdicts)), "reason": "; ".join(reasons)}
    _mark_bypass(body, subject)
    return body


def pair_body(pair: Pair) -> dict[str, Any]:
    """Put a comparison of two files into JSON values."""
    report = pair.report
    basis = "same weights, held to the noise floor" if pair.same_weights else ""
    if pair.yardstick is not None:
        basis = pair.yardstick.source
    return {
        "verdict": str(pair.verdict),
        "reason": pair.reason,
        "control": pair.control,
        "same_weights": pair.same_weights,
        "basis": basis,
        "reference_is_b": pair.turned,
        "kl_over_limit": list(pair.ratios["kl"]) if pair.ratios else None,
        "nmse_over_limit": list(pair.ratios["nmse"]) if pair.ratios else None,
        "positions": report.positions if report else 0,
        "compared": report.compared if report else 0,
        "expected": report.expected if report else 0,
        "statistics": statistics(report.logits) if report and report.logits else None,
        "yardstick": statistics(pair.yardstick.report.logits)
        if pair.yardstick and pair.yardstick.report.logits
        else None,
    }


def statistics(found: DistributionParity) -> dict[str, Any]:
    """Return every statistic of two distributions, the blind ones beside the others."""
    low, high = found.kl_interval()
    before, after = found.perplexity
    return {
        "kl_mean": found.kl_mean,
        "kl_interval": [low, high],
        "kl_median": found.kl_median,
        "kl_p999": found.kl_p999,
        "kl_max": found.kl_max,
        "total_variation_mean": float(found.total_variation.mean()),
        "top1_agreement_decisive": found.top1_agreement,
        "decisive_flips": len(found.decisive_flips),
        "near_tie_flips": len(found.near_tie_flips),
        "top_10_overlap": float(found.top_k_overlap.mean()),
        "delta_p_rms": found.delta_p_rms,
        "norm_difference_max": float(found.norm_difference.max()),
        "perplexity_reference": before,
        "perplexity": after,
    }


def _candidate(report: SuiteReport, precision: str) -> dict[str, Any]:
    parts = [
        {
            "name": part.name,
            "verdict": str(part.verdict),
            "reason": part.reason,
            "compared": part.compared,
            "times_limit": part.over,
            "required_tolerance": part.report.required_tolerance if part.report else None,
            "first_divergence": str(part.first) if part.first else None,
            "statistics": statistics(part.report.logits) if part.report and part.report.logits else None,
        }
        for part in report.parts
    ]
    prefill = report.part("prefill").report
    return {
        "backend": report.backend,
        "device": report.device,
        "precision": precision,
        "verdict": str(report.verdict),
        "reason": report.reason,
        "control": report.control,
        "first_divergence": str(report.first) if report.first else None,
        "limits": report.floor.source,
        "notes": list(report.notes),
        "parts": parts,
        "names": prefill.table() if prefill else [],
    }


def _subject(context: typer.Context, parameter: str, device: str = "cpu") -> Subject:
    """Return the admitted model of a parameter."""
    from apr_core.engines.subject import Subject

    admission = admission_of(context, parameter)
    given = admission.checkpoint.path
    return Subject(given, admission, reference=None, device=device, seed=0, max_new_tokens=64)


def _ids(subject: Subject, text: str, tokens: int = TRACED) -> Any:
    """Return the tokens of a text, or the stimulus."""
    from apr_core.model.tokens import prepare_tokens

    if text:
        return prepare_tokens(subject.model, text=text).ids
    return subject.stimulus(min(tokens, subject.model.config.max_position_embeddings)).ids


def _fingerprints(model: TracedForward, ids: Any, level: str) -> list[dict[str, Any]]:
    """One row per name that the level shows, at its last position; every position at level payload."""
    from apr_core.model.trace import Fingerprints

    trace = Fingerprints()
    model.forward(ids, trace=trace)
    return [row for name in trace if name.endswith(LEVELS[level]) for row in _rows(trace, name, level)]


def _rows(trace: Fingerprints, name: str, level: str) -> list[dict[str, Any]]:
    from dataclasses import asdict

    rows = trace.rows[name]
    chosen = range(len(rows)) if level == "payload" else range(len(rows) - 1, len(rows))
    return [{"name": name, "position": at, **asdict(rows[at])} for at in chosen]


def _differences(subject: Subject, reference: Subject, ids: Any, level: str) -> dict[str, Any]:
    """Trace the reference on the same tokens and measure the distance, name by name."""
    from apr_core.model.trace import Trace, mandatory_names
    from apr_core.parity.compare import compare
    from apr_core.parity.pair import incomparable

    why_not = incomparable(reference, subject)
    if why_not:
        raise UsageError(why_not, advice="name a reference of the same architecture")
    traces = Trace(), Trace()
    for side, recorded in zip((reference, subject), traces, strict=True):
        side.model.forward(ids, trace=recorded)
    report = compare(*traces, expect=mandatory_names(subject.model.config.num_hidden_layers))
    rows = [row for row in report.table() if str(row["name"]).endswith(LEVELS[level])]
    return {
        "reference": str(reference.path),
        "reference_rows": _fingerprints(reference.model, ids, level),
        "differences": rows,
        "first_divergence": str(report.first_divergence(1e-5) or "") or None,
        "missing": list(report.missing),
    }


def _mark_bypass(body: dict[str, Any], *subjects: Subject) -> None:
    """Nothing about a bypassed model can be corroborated."""
    body["bypassed"] = any(subject.admission.bypassed for subject in subjects)
    if body["bypassed"] and body["verdict"] == "CORROBORATED":
        body |= {"verdict": "INCONCLUSIVE", "reason": "the contract was bypassed (--skip-contract)"}


def _worst(verdicts: list[Any]) -> Verdict:
    from apr_core.falsify.verdict import Verdict

    order = (Verdict.FALSIFIED, Verdict.INCONCLUSIVE, Verdict.CORROBORATED)
    return next(v for v in order if v in verdicts)


def _code(verdict: str) -> Exit:
    return {"CORROBORATED": Exit.OK, "FALSIFIED": Exit.REFUTED}.get(verdict, Exit.INCONCLUSIVE)


def _floor_rows(rows: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    def worst(row: dict[str, Any]) -> float:
        return max(float(v) for k, v in row.items() if k not in ("name", "limit") and v is not None)

    return [(row["name"], _short(worst(row)), _short(row["limit"])) for row in rows]


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(_short(v) for v in value)
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)

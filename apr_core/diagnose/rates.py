"""A rate that is missed, or that cannot be: bandwidth first, then operations, threads, dispatch and types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apr_core.bench.acts import claimed_of, judged_claim, timed_run
from apr_core.bench.profile import shortfall
from apr_core.diagnose.cause import EXPLAINED, NOTHING, UNEXPLAINED, Cause, Chain, Diagnosis
from apr_core.engines.subject import Subject
from apr_core.falsify.verdict import Verdict

_CLAIMED, _PEERS = "F-THR-012", "F-THR-011"
_TOKENS = ("F-THR-003", "F-THR-004", "F-THR-009")


def explain_rates(subject: Subject) -> Diagnosis:
    """
    Explain the first number that was claimed about a subject and does not hold; without a claim, a control.

    The control is twice the ceiling of this run: a number that must fall, so that the chain can be read on any machine.
    """
    if subject.refusal is not None:
        steps = (("Was anything timed?", f"no: refused by the contract: {subject.refusal}"),)
        return Diagnosis(UNEXPLAINED, steps=steps, needed="a file that the gates let run")
    made = timed_run(subject)
    claims = [*claimed_of(subject)] or [("decode_tok_s", 2 * made.run.ceiling_tok_s)]
    judged = [judged_claim(made.run, metric, claimed, right=True) for metric, claimed in claims]
    missed = [item for item in judged if item.verdict is Verdict.FALSIFIED]
    what = "a number that was claimed" if claimed_of(subject) else "no number was claimed: twice the ceiling, a control"
    chain = Chain([("What is explained?", what)])
    if not missed:
        chain.ask("Does it hold?", "; ".join(f"{i.metric} {i.claimed:g}, measured {i.measured:.4g}" for i in judged))
        return Diagnosis(NOTHING, steps=tuple(chain.steps))
    item = missed[0]
    chain.ask(f"Why is {item.metric} not {item.claimed:.4g}?", item.reason)
    for question, answer in shortfall(made.profile):
        chain.ask(question, answer)
    causes = tuple(chain.close(cause) for cause in explain_rate(_CLAIMED, [item.row], item.reason))
    return Diagnosis(EXPLAINED, causes, steps=tuple(chain.steps))


def explain_rate(claim: str, rows: Sequence[Mapping[str, Any]], reason: str) -> list[Cause]:
    """
    Name the cause of a refuted claim of notebook 30; what it measured of the profile stands in its own whys.

    Args:
        claim: Its id.
        rows: Of its record; those of claimed numbers say what they need and what the machine reads.
        reason: Of its verdict.
    """
    if claim in _TOKENS:
        return []  # other tokens are the engine's: `apr parity` shows where they part ways
    if claim == _PEERS:
        question = "Is it the meter, or the engine?"
        return [Cause("backend-kernel", question, f"the peer ran in the same minutes: {reason}", op="decode")]
    if claim != _CLAIMED:
        answer = f"the numbers of one run contradict each other: {reason}"
        return [Cause("meter", "Can this meter be believed?", answer, "mend the meter; no rate of this run counts")]
    row = next((r for r in rows if r.get("verdict") == str(Verdict.FALSIFIED)), None)
    if row is None:
        return [Cause("meter", "Can this meter be believed?", f"a control was judged wrongly: {reason}")]
    needs, reads = row.get("needs_gb_s"), row.get("reads_gb_s")
    if isinstance(needs, int | float) and isinstance(reads, int | float) and needs > reads:
        answer = f"no: it needs {needs:.3g} GB/s, and {reads:.3g} is all that memory gave in the same minutes"
        repair = (
            f"state at most {row['claimed'] * reads / needs:.4g} for this machine, and count tokens and bytes again"
        )
        return [Cause("meter", "Can any engine reach it here?", answer, repair, op=str(row["metric"]))]
    answer = f"yes: memory would allow it, and the engine measured {row['measured']:.4g} of {row['claimed']:.4g}"
    repair = "the operation that takes most of a token, above, is where the time is"
    return [Cause("backend-kernel", "Can any engine reach it here?", answer, repair, op=str(row["metric"]))]

"""The twelve attempts of notebook 00 to refute that a model file says what it should."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from apr_core.errors import AprError, ContractViolation, FormatError, InferenceError, LoadError
from apr_core.falsify.finding import Finding, act
from apr_core.falsify.verdict import NotRun
from apr_core.formats.checkpoint import open_checkpoint
from apr_core.rosetta import chatml
from apr_core.rosetta.copies import (
    STIMULUS_TOKENS,
    NoCopyError,
    copies_of,
    greedy_prompts,
    largest_difference,
    load_copy,
    mismatches,
    rel_l2,
)
from apr_core.rosetta.copies import greedy as greedy_tokens
from apr_core.rosetta.diff import TensorDiff, compare_tensors
from apr_core.rosetta.identity import compare_identity
from apr_core.rosetta.passport import Passport, passport

if TYPE_CHECKING:
    from apr_core.engines.subject import Subject
    from apr_core.model.tokens import PreparedTokens, Tokenizer
    from apr_core.model.trace import TracedForward

_ROUNDING = 1e-6  # rel_l2 above which a position is worth a why
_SPARE_TOKENS = 8  # an answer gets that many more than it needs, so that one that does not end is seen


def _of_copies(measure: Callable[[Subject], Finding]) -> Callable[[Subject], Finding]:
    """Leave a claim about copies undecided when the subject is one that another container cannot hold."""

    @wraps(measure)
    def attempt(subject: Subject) -> Finding:
        try:
            return measure(subject)
        except NoCopyError as error:
            return Finding(None, 0, 0, inconclusive=f"no copy can be made: {error.line:.200}")

    return attempt


@act("F-GT-001")
@_of_copies
def same_tensors(subject: Subject) -> Finding:
    """Copy the subject into the other containers and compare every decoded value; foreign packages read some too."""
    copies = copies_of(subject)
    rows: list[Mapping[str, object]] = []
    whys: list[tuple[str, str]] = []
    mismatched = compared = expected = 0
    for container, diff in copies.diffs.items():
        mismatched, compared, expected = (
            mismatched + diff.mismatched,
            compared + diff.compared,
            expected + diff.expected,
        )
        rows.append({"copy": container, "read by": "apr_core", "tensors": len(diff.rows), **_counts(diff)})
        whys += [(f"Why does the {container} copy differ?", row.sentence()) for row in _broken(diff)]
    for container in (subject.checkpoint.format, *copies.formats):
        seen = copies.witnessed(container)
        if seen is None:
            rows.append({"copy": container, "read by": "no other reader exists", "tensors": 0})
            continue
        mismatched, compared, expected = mismatched + seen.mismatched, compared + seen.values, expected + seen.values
        row = {"tensors": len(seen.names), "values": seen.values, "mismatched": seen.mismatched}
        rows.append({"copy": container, "read by": f"{seen.package} package", **row})
        if seen.mismatched:
            whys.append((f"Does the {seen.package} package read what we wrote?", f"no: {seen.first}"))
    return Finding(
        float(mismatched),
        compared,
        expected,
        detail=f"{len(subject.checkpoint.tensors)} tensors in {len(copies.formats)} copies",
        rows=rows,
        whys=whys,
        reference=f"the subject's own {subject.checkpoint.format} file, and the foreign packages of two formats",
    )


@act("F-GT-002")
@_of_copies
def same_logits(subject: Subject) -> Finding:
    """Run every copy on the stimulus and compare its logits with the subject's."""
    copies = copies_of(subject)
    runs = copies.runs(subject)
    positions = sum(run.rel_l2.size for run in runs)
    worst = next((run for run in runs if np.isnan(run.rel_l2).any()), max(runs, key=lambda run: _worst(run.rel_l2)))
    value = _worst(worst.rel_l2)
    whys = [(f"Why does the {run.format} copy not run?", run.refusal) for run in runs if run.refusal]
    if not value <= _ROUNDING and not worst.refusal:
        at = int(np.argmax(np.where(np.isnan(worst.rel_l2), np.inf, worst.rel_l2)))
        differing = copies.diffs[worst.format].mismatched
        whys += [
            (f"Where do the logits of the {worst.format} copy differ?", f"most at position {at}: rel_l2 {value:.3g}"),
            ("Do the tensors differ?", f"{differing} of {copies.diffs[worst.format].expected} values do"),
            ("Does the configuration differ?", _config_difference(subject, worst.format)),
        ]
    return Finding(
        value if np.isfinite(value) else None,
        positions,
        len(copies.formats) * min(STIMULUS_TOKENS, subject.model.config.max_position_embeddings),
        nonfinite=sum(run.nonfinite for run in runs),
        detail=f"{len(runs)} copies",
        rows=[
            {"copy": run.format, "rel_l2": _worst(run.rel_l2), "max_abs": run.max_abs, "nonfinite": run.nonfinite}
            for run in runs
        ],
        arrays={f"rel_l2_{run.format}": run.rel_l2 for run in runs},
        whys=whys,
        reference="the subject's own file through the same forward",
        noise_floor=0.0,
    )


@act("F-GT-003")
@_of_copies
def same_greedy_tokens(subject: Subject) -> Finding:
    """Let every copy continue the same prompts and compare token for token, lengths included."""
    runs = copies_of(subject).runs(subject)
    own = [greedy_tokens(subject.model, p, subject.max_new_tokens) for p in greedy_prompts(subject)]
    rows, whys, wrong = [], [], 0
    for run in runs:
        for number, (mine, other) in enumerate(zip(own, run.greedy, strict=True)):
            count = mismatches(mine, other)
            wrong += count
            rows.append({"copy": run.format, "prompt": number, "tokens": len(other), "mismatched": count})
            if count:
                whys.append((f"Where does the {run.format} copy part ways?", _parting(mine, other)))
    tokens = sum(len(ids) for ids in own)
    return Finding(
        float(wrong),
        len(runs) * tokens,
        len(runs) * tokens,
        detail=f"{len(runs)} copies, {len(own)} prompts",
        rows=rows,
        whys=whys,
        reference="the subject's own greedy continuation",
    )


@act("F-GT-004")
def chat_template_applied(subject: Subject) -> Finding:
    """Compare the ids of several conversations with those of a writer that knows no Jinja."""
    from apr_core.model.tokens import prepare_tokens

    tokenizer = _tokenizer(subject)
    template = tokenizer.chat_template or ""
    speaks, knows = chatml.START in template, {chatml.START, chatml.END} <= set(tokenizer.special_ids)
    unknown = sorted(m for m in chatml.markers(template) if len(tokenizer.encode(m, parse_special=True)) != 1)
    if not (speaks and knows):
        if not unknown:  # another family's format, which its own fine-tune may speak
            return Finding.nothing(NotRun.NOT_APPLICABLE)
        wrote = f"the template writes {', '.join(unknown)}, the tokenizer has {', '.join(tokenizer.special_ids)}"
        return Finding(float(len(unknown)), 1, 1, whys=[("Does the template fit the tokenizer?", wrote)])
    rows, whys, wrong, compared = [], [], len(unknown), 0
    for name, messages in chatml.CONVERSATIONS.items():
        expected = chatml.chatml_ids(tokenizer, template, messages)
        try:
            found = prepare_tokens(tokenizer, messages=messages).ids.tolist()
        except (InferenceError, LoadError) as error:
            found = []
            whys.append((f"Why is there no rendering of {name}?", f"{error.message:.200}"))
        count = mismatches(expected, found)
        wrong, compared = wrong + count, compared + len(expected)
        rows.append({"conversation": name, "ids": len(expected), "found": len(found), "mismatched": count})
        if count and found:
            whys.append((f"Where does {name} differ?", _parting(expected, found, tokenizer)))
    whys += [("Does the tokenizer know this control token?", f"no: {marker!r:.80}") for marker in unknown]
    # What a template does on a word of its own (a trigger that a stranger wrote into it) no other conversation shows.
    for word in chatml.own_words(template):
        messages = [{"role": "user", "content": word}]
        expected = chatml.chatml_ids(tokenizer, template, messages)
        try:
            count = mismatches(expected, prepare_tokens(tokenizer, messages=messages).ids.tolist())
        except (InferenceError, LoadError):
            count = len(expected)
        wrong += count
        if count:
            rows.append({"conversation": f"{word!r:.80}", "ids": len(expected), "mismatched": count})
            whys.append(("Does the template answer to a word of its own?", f"yes, to {word!r:.80}: {count} ids differ"))
    return Finding(
        float(wrong),
        compared,
        compared,
        detail=f"{len(chatml.CONVERSATIONS)} conversations",
        rows=rows,
        whys=whys,
        reference="an independent writer of ChatML, without Jinja",
    )


@act("F-GT-005")
def no_injected_control_tokens(subject: Subject) -> Finding:
    """Spell every control token in messages and raw text, and count control ids that do not come from the template."""
    tokenizer = _tokenizer(subject)
    tried: dict[str, int] = {}
    injected: dict[str, int] = {}
    whys: list[tuple[str, str]] = []
    for place, token, attempt in _attacks(tokenizer):
        tried[place] = tried.get(place, 0) + 1
        injected[place] = injected.get(place, 0) + attempt
        if attempt and len(whys) < 5:
            whys.append((f"Which text got through in {place}?", f"{attempt} control ids from texts with {token!r}"))
    return Finding(
        float(sum(injected.values())),
        sum(tried.values()),
        sum(tried.values()),
        detail=f"{len(tokenizer.special_ids)} control tokens",
        rows=[{"place": place, "attempts": tried[place], "injected": injected[place]} for place in tried],
        whys=whys,
        reference="the control ids of the same conversation with harmless content",
    )


@act("F-GT-006")
def golden_answers(subject: Subject) -> Finding:
    """Ask the golden prompts and compare the answers with the recorded ones."""
    return answers(subject, subject.model, "the recorded answers")


@act("F-GT-007")
@_of_copies
def golden_answers_survive_q8_0(subject: Subject) -> Finding:
    """Ask the golden prompts of a Q8_0 GGUF copy."""
    path = copies_of(subject).path("gguf", "Q8_0")
    try:
        return answers(subject, load_copy(path, subject), "the recorded answers, asked of a Q8_0 copy")
    except (FormatError, ContractViolation, LoadError) as error:
        count = len((subject.golden or {"cases": []})["cases"])
        refusal = error.line[:300]
        return Finding(float(count), count, count, whys=[("Why does the Q8_0 copy not run?", refusal)])
    finally:
        path.unlink()


@act("F-GT-008")
def logits_of_an_independent_implementation(subject: Subject) -> Finding:
    """Compare the logits with those that transformers computed in float64."""
    golden = _golden_logits(subject)
    ids, expected = golden["ids"].astype(np.int64), golden["logits"]
    reference = "transformers in float64 on the same weights"
    vocabulary = subject.model.config.vocab_size
    if expected.shape != (ids.size, vocabulary) or ids.size == 0 or ids.max() >= vocabulary:
        shapes = f"logits {list(expected.shape)} for {ids.size} ids and a vocabulary of {vocabulary}"
        return Finding(None, ids.size, ids.size, whys=[("Do the answers belong to this model?", shapes)])
    found = subject.model.forward(ids)
    errors = rel_l2(expected, found)
    value = _worst(errors)
    whys = []
    if not value <= _ROUNDING * 10:
        top = int((expected.argmax(axis=1) != found.argmax(axis=1)).sum())
        largest = largest_difference(expected.astype(np.float32), found)
        first, last = float(errors[0]), float(errors[-1])
        whys = [
            ("How large is it?", f"rel_l2 {value:.3g}, largest difference of a logit {largest:.3g}"),
            ("Does it begin before RoPE and attention matter?", f"position 0: {first:.3g}, the last: {last:.3g}"),
            ("Does it change the answer?", f"another top token at {top} of {ids.size} positions"),
        ]
    return Finding(
        value if np.isfinite(value) else None,
        ids.size,
        ids.size,
        nonfinite=int(found.size - np.isfinite(found).sum()),
        rows=[{"positions": ids.size, "rel_l2": value, "median": float(np.median(errors))}],
        arrays={"rel_l2": errors},
        whys=whys,
        reference=reference,
        # Float64 arithmetic never lands on every float32 rounding: such answers were recorded from this very forward.
        inconclusive="the recorded logits are this forward's own bits" if np.array_equal(expected, found) else "",
    )


@act("F-GT-009")
def greedy_tokens_of_an_independent_implementation(subject: Subject) -> Finding:
    """Continue the prompt by hand, argmax by argmax, past any end token as the reference did."""
    golden = _golden_logits(subject)
    prompt, expected = golden["prompt"].astype(np.int64), golden["greedy"].tolist()
    found: list[int] = []
    cache = subject.model.new_cache()
    step = prompt
    for _ in expected:
        scores = subject.model.forward(step, cache)[-1]
        found.append(int(scores.argmax()))
        step = np.array(found[-1:], dtype=np.int64)
    wrong = mismatches(expected, found)
    return Finding(
        float(wrong),
        len(expected),
        len(expected),
        rows=[{"prompt": prompt.size, "tokens": len(expected), "mismatched": wrong}],
        whys=[("Where do they part ways?", _parting(expected, found))] if wrong else [],
        reference="transformers in float64, greedy",
    )


@act("F-GT-010")
def same_tensors_as_the_reference(subject: Subject) -> Finding:
    """Compare every tensor with the reference's, rounded to the subject's type or within the codec's bound."""
    reference = _reference(subject)
    if _same_file(subject, reference):
        return Finding(None, 0, 0, inconclusive="subject and reference are the same file")
    diff = compare_tensors(subject.checkpoint, reference.checkpoint)
    types = ", ".join(f"{count} {pair}" for pair, count in sorted(diff.pairs.items()))
    return Finding(
        float(diff.mismatched),
        diff.compared,
        diff.expected,
        missing=diff.missing,
        detail=f"{len(diff.rows)} tensors",
        rows=[row.as_row() for row in diff.worst()],
        whys=[("Which tensor says something else?", row.sentence()) for row in _broken(diff)],
        reference=f"{reference.path.name} ({types})",
    )


@act("F-GT-011")
def same_identity_as_the_reference(subject: Subject) -> Finding:
    """Compare configuration, vocabulary, merges, end tokens and chat template with the reference's."""
    reference = _reference(subject)
    diff = compare_identity(subject.checkpoint, reference.checkpoint)
    # Equal weights may lie beside another tokenizer or configuration: only equal companions make it one thing twice.
    if not diff.differences and _same_file(subject, reference):
        return Finding(None, 0, 0, inconclusive="subject and reference are the same file")
    return Finding(
        float(len(diff.differences)),
        len(diff.fields),
        len(diff.fields) + len(diff.missing),
        missing=diff.missing,
        detail=f"{len(diff.fields)} fields",
        rows=[field.as_row() for field in diff.fields],
        whys=[
            (f"What does {f.name} say?", f"{f.subject}, in the reference {f.reference}; {f.note or 'they differ'}")
            for f in diff.differences
        ],
        reference=reference.path.name,
    )


@act("F-GT-012")
@_of_copies
def label_says_what_is_in_it(subject: Subject) -> Finding:
    """Hold the label of the subject, and that of its GGUF copy, against the types of the matrices."""
    rows: list[dict[str, object]] = []
    whys: list[tuple[str, str]] = []
    for which, found in _passports(subject):
        if found.agrees is not None:
            share = 100 * found.strange_share
            rows.append({"file": which, "label": found.label, "by": found.label_from, "other types, %": share})
            whys += [(f"What is not as the label of the {which} says?", line) for line in found.strange[:3]]
    if not rows:
        return Finding.nothing(NotRun.NOT_APPLICABLE)
    worst = max(float(str(row["other types, %"])) for row in rows)
    return Finding(
        worst, len(rows), len(rows), detail=f"{len(rows)} labels", rows=rows, whys=whys, reference="llama.cpp's rules"
    )


def _passports(subject: Subject) -> Iterator[tuple[str, Passport]]:
    yield "subject", passport(subject.checkpoint)
    if subject.checkpoint.format != "gguf":
        # of a copy that does not open F-GT-001 speaks
        with suppress(FormatError), open_checkpoint(copies_of(subject).path("gguf")) as copy:
            yield "gguf copy", passport(copy)


def _attacks(tokenizer: Tokenizer) -> Iterator[tuple[str, str, int]]:
    """Yield (place, token, control ids injected) for every attempt that the template does not refuse."""
    from apr_core.model.tokens import prepare_tokens

    control = set(tokenizer.special_ids.values())

    def ids_of(prepared: PreparedTokens) -> list[int]:
        return [i for i in prepared.ids.tolist() if i in control]

    plain = ids_of(prepare_tokens(tokenizer, text="x"))
    for token in tokenizer.special_ids:
        for text in chatml.injections(token).values():
            yield "raw text", token, mismatches(plain, ids_of(prepare_tokens(tokenizer, text=text)))
    if tokenizer.chat_template is None:
        return
    for place in chatml.PLACES:
        try:
            harmless = ids_of(prepare_tokens(tokenizer, messages=chatml.placed(place, "x")))
        except AprError:  # a template may refuse a role; then nothing can be injected there
            continue
        for token in tokenizer.special_ids:
            attack = chatml.placed(place, "\n".join(chatml.injections(token).values()))
            yield place, token, mismatches(harmless, ids_of(prepare_tokens(tokenizer, messages=attack)))
    for token in tokenizer.special_ids:
        halves = chatml.split_across(token)
        harmless = ids_of(prepare_tokens(tokenizer, messages=[{**m, "content": "x"} for m in halves]))
        yield "two messages", token, mismatches(harmless, ids_of(prepare_tokens(tokenizer, messages=halves)))


def answers(subject: Subject, model: TracedForward, reference: str) -> Finding:
    """Ask a model every golden prompt of a subject; an answer must be equal and end by itself."""
    from apr_core.model.generate import generate
    from apr_core.model.tokens import prepare_tokens

    tokenizer = _tokenizer(subject)
    cases = (subject.golden or {"cases": []})["cases"]
    rows, whys, wrong = [], [], 0
    for case in cases:
        limit = max(subject.max_new_tokens, len(tokenizer.encode(case["answer"])) + _SPARE_TOKENS)
        try:
            generation = generate(model, prepare_tokens(model, messages=case["messages"]), max_new_tokens=limit)
            list(generation)
            answer, stopped = generation.text, str(generation.stopped)
        except (InferenceError, LoadError) as error:
            answer, stopped = "", f"{error.message:.200}"
        right = answer == case["answer"] and stopped == "end"
        wrong += not right
        rows.append({"case": str(case["id"]), "right": right, "answer": answer[:200], "expected": case["answer"][:200]})
        if not right:
            said = f"{answer[:120]!r} (stopped: {stopped}), expected {case['answer'][:120]!r}"
            whys.append((f"What does it answer to {case['id']}?", said))
    return Finding(
        float(wrong), len(cases), len(cases), detail=f"{len(cases)} cases", rows=rows, whys=whys, reference=reference
    )


def _counts(diff: TensorDiff) -> dict[str, object]:
    return {"values": diff.expected, "mismatched": diff.mismatched, "missing": len(diff.missing)}


def _broken(diff: TensorDiff, most: int = 5) -> list[Any]:
    return [row for row in diff.rows if row.mismatched or row.problem][:most]


def _worst(errors: NDArray[np.float64]) -> float:
    """Largest of the positions; NaN when one of them is, as numpy's maximum has it."""
    return float(errors.max()) if errors.size else float("nan")


def _config_difference(subject: Subject, container: str) -> str:
    try:
        with open_checkpoint(copies_of(subject).path(container)) as copy:
            differing = compare_identity(copy, subject.checkpoint).differences
    except (FormatError, LoadError) as error:
        return f"it cannot be read: {error.message:.200}"
    return "; ".join(f"{f.name}: {f.subject} for {f.reference}" for f in differing) or "no"


def _parting(expected: Sequence[int], found: Sequence[int], tokenizer: Tokenizer | None = None) -> str:
    """Describe the first position where two lists of ids differ."""
    pairs = enumerate(zip(expected, found, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(expected), len(found)))
    named = [ids[at] if at < len(ids) else "nothing" for ids in (expected, found)]
    text = f"at {at}: expected {named[0]}, found {named[1]}; {len(expected)} and {len(found)} ids"
    if tokenizer is None:
        return text
    shown = [tokenizer.decode(ids[at : at + 4], skip_special=False) for ids in (expected, found)]
    return f"{text}; {shown[0]!r} for {shown[1]!r}"


def _tokenizer(subject: Subject) -> Tokenizer:
    assert subject.tokenizer is not None  # the claim needs one, and `act` has looked
    return subject.tokenizer


def _golden_logits(subject: Subject) -> Mapping[str, NDArray[Any]]:
    assert subject.golden_logits is not None  # the claim needs them, and `act` has looked
    return subject.golden_logits


def _reference(subject: Subject) -> Subject:
    assert subject.reference is not None  # the claim needs one, and `act` has looked
    return subject.reference


def _same_file(subject: Subject, reference: Subject) -> bool:
    """Tell whether a comparison would look at one thing twice: the same files, or files of the same bytes."""
    left, right = subject.checkpoint, reference.checkpoint
    if [f.resolve() for f in left.files] == [f.resolve() for f in right.files]:
        return True
    return left.content_hash == right.content_hash

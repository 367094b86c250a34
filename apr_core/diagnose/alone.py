"""
Without a reference: what the gates and the file's own words say, and experiments that need nothing but the file.

A violation is a symptom. Which of two things that contradict each other is wrong is decided by counterfactuals: the
sizes that the tensors themselves have, another architecture, the bytes in the other order, the rounder of two numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from apr_core.contract.admit import Admission
from apr_core.contract.gates import Violation, judge_names, judge_span
from apr_core.contract.layout import EMBEDDING, expected_tensors, layer_of, read_geometry, role_of
from apr_core.contract.plausible import CONFIG_RULES
from apr_core.contract.stats import TensorStats
from apr_core.diagnose.cause import Cause, Chain, listed
from apr_core.diagnose.tensors import scattered
from apr_core.dtypes import FORMATS
from apr_core.errors import AprError, LoadError
from apr_core.formats.architectures import load_architectures
from apr_core.formats.checkpoint import Checkpoint
from apr_core.formats.codecs import decode_bytes
from apr_core.model.config import Qwen2Config
from apr_core.model.tokens import Tokenizer, load_tokenizer
from apr_core.model.vocabulary import read_vocabulary
from apr_core.rosetta import chatml
from apr_core.rosetta.acts import chat_template_applied, no_injected_control_tokens
from apr_core.rosetta.carry import has_tokenizer, token_ids
from apr_core.rosetta.passport import passport

_CONFIG = {*CONFIG_RULES, "config_keys", "beyond", "switched_off"}
_LARGEST = 1e5  # key biases of Qwen2.5 reach hundreds; nothing that was trained comes near this
_MISSING_DATA = ("spot_l2", "dead_row_percent")


def explain_opening(path: Path, error: AprError) -> Cause:
    """Explain a file that does not open: its frame is the fault, and the reader says where."""
    where = getattr(error, "tensor", None)
    repair = error.advice or "fetch the file again"
    tensors = (str(where),) if where else ()
    return Cause("container", "Does the file open?", f"no: {error.message}"[:600], repair, tensors=tensors)


def explain_alone(checkpoint: Checkpoint, admitted: Admission | AprError, chain: Chain) -> list[Cause]:
    """Explain what a file shows by itself; the chain says what was asked when it shows nothing."""
    causes = explain_config(checkpoint, admitted, chain)
    if not causes:
        causes = [chain.close(cause) for cause in _words(checkpoint, chain) or explain_label(checkpoint)]
    return causes


def explain_label(checkpoint: Checkpoint) -> list[Cause]:
    """Hold what a file calls itself against the types of its matrices: who wrote it wrote both."""
    found = passport(checkpoint)
    if found.agrees is not False:
        return []
    answer = f"it says {found.label} by its {found.label_from}, and {found.strange[0]} ({len(found.strange)} matrices)"
    return [Cause("converter", "Does the label say what is in it?", answer, "write the label that its types have")]


def explain_config(
    checkpoint: Checkpoint, admitted: Admission | AprError | None, chain: Chain, *, only: str = ""
) -> list[Cause]:
    """
    Turn violations into causes.

    Args:
        checkpoint: The opened file.
        admitted: Outcome of the gates, or why they could not be asked; None asks for the container alone.
        chain: What was asked so far.
        only: Keep causes of this class alone.
    """
    if isinstance(admitted, AprError):
        found = [Cause("configuration", "Does it say what it is?", admitted.message, admitted.advice, op="config.json")]
    else:
        violations = admitted.violations if admitted is not None else ()
        found = _gaps(checkpoint)
        if violations:
            assert admitted is not None
            shown = f"{len(violations)} violations, the first {violations[0]}"
            chain.ask("What do the gates say?", shown)
            found += _gates(checkpoint, admitted)
        elif admitted is not None:
            chain.ask("What do the gates say?", f"{len(admitted.stats)} tensors measured, nothing refused")
            found += _sizes(admitted) or _runnable(checkpoint)
    return [chain.close(cause) for cause in found if not only or cause.klass == only]


def _gaps(checkpoint: Checkpoint) -> list[Cause]:
    if not checkpoint.gaps:
        return []
    total = sum(gap.nbytes for gap in checkpoint.gaps)
    first = checkpoint.gaps[0]
    answer = f"{total} bytes belong to no tensor, the first at byte {first.offset} of {first.file.name}"
    return [Cause("container", "Is every byte explained?", answer, "write the file again", position=str(first.offset))]


def _sizes(admission: Admission) -> list[Cause]:
    """Look for values that no trained weight has, though each is a number."""
    huge = {n: max(abs(s.minimum), abs(s.maximum)) for n, s in admission.stats.items() if s.count}
    names = [n for n, largest in huge.items() if largest > _LARGEST]
    if not names:
        return []
    answer = f"{names[0]} holds {huge[names[0]]:.3g}; no weight of a trained model is beyond {_LARGEST:g}"
    return [
        Cause("tensor-values", "How large are the weights?", answer, "take it from the source", tensors=tuple(names))
    ]


def _runnable(checkpoint: Checkpoint) -> list[Cause]:
    """Ask what comes behind the gates: whether the arithmetic is one that we have, and the tokenizer fits the rows."""
    question = "Could it run?"
    try:
        Qwen2Config.from_mapping(checkpoint.config or {})
    except LoadError as error:
        return [Cause("configuration", question, f"no: {error.message}", error.advice, op="config.json")]
    try:
        tokenizer = load_tokenizer(checkpoint) if has_tokenizer(checkpoint) else None
    except AprError as error:
        return [Cause("tokenizer", question, f"no: {error.message}", error.advice, op="file")]
    info = checkpoint.tensors.get(EMBEDDING)
    if tokenizer is None or info is None or tokenizer.vocab_size <= info.shape[0]:
        return []
    return [_beyond_rows(checkpoint, info.shape[0], question)]


def _cut_rows(checkpoint: Checkpoint, question: str) -> Cause | None:
    """Hold the rows of the embedding against the ids of the tokenizer, where it can be read."""
    info, width = checkpoint.tensors.get(EMBEDDING), (checkpoint.config or {}).get("hidden_size")
    if info is None or len(info.shape) != 2 or info.shape[1] != width or not has_tokenizer(checkpoint):
        return None
    try:
        over = max(token_ids(read_vocabulary(checkpoint)).values()) >= info.shape[0]
    except (AprError, ValueError):
        return None
    cause = _beyond_rows(checkpoint, info.shape[0], question) if over else None
    return cause if cause is not None and cause.klass == "layout" else None


def _beyond_rows(checkpoint: Checkpoint, rows: int, question: str) -> Cause:
    """Ids without a row: a few far off are the tokenizer's, a whole run behind the last row are rows that were cut."""
    ids = sorted(token_ids(read_vocabulary(checkpoint)).values())
    over = [i for i in ids if i >= rows]
    dense = over[-1] - rows < 2 * len(over)
    answer = f"{len(over)} ids have no row of {rows}, from {over[0]} to {over[-1]}"
    if dense:
        return Cause("layout", question, f"{answer}: rows were cut", "store every row", tensors=(EMBEDDING,))
    return Cause("tokenizer", question, f"{answer}: no vocabulary has such holes", "renumber them", op="vocabulary")


# --- gates


def _gates(checkpoint: Checkpoint, admission: Admission) -> list[Cause]:
    """Sort violations into causes; structure first, since values under a wrong shape mean nothing."""
    by_rule: dict[str, list[Violation]] = {}
    for violation in admission.violations:
        by_rule.setdefault(violation.rule, []).append(violation)
    structure = [r for r in ("missing", "shape", *_CONFIG, "vocab_rows", "tokens_over_rows") if r in by_rule]
    causes: list[Cause] = []
    if structure:
        causes += _structure(checkpoint, by_rule)
    causes += _types(checkpoint, by_rule)
    causes += _data(checkpoint, admission, by_rule)
    if "head_differs" in by_rule:
        v = by_rule["head_differs"][0]
        repair = "drop the stored head: the model says that it is the embedding"
        causes.append(
            Cause("tensor-values", "Is the stored head the embedding?", v.message, repair, tensors=(v.tensor,))
        )
    return causes


def _structure(checkpoint: Checkpoint, by_rule: Mapping[str, list[Violation]]) -> list[Cause]:
    """Decide between the configuration and the tensors where they contradict each other."""
    said = next(iter(by_rule.get("missing") or by_rule.get("shape") or [v for vs in by_rule.values() for v in vs]))
    question = "Do configuration and tensors fit each other?"
    impossible = [v for rule in (*CONFIG_RULES, "config_keys") for v in by_rule.get(rule, ())]
    if (cut := _cut_rows(checkpoint, question)) is not None:
        return [cut]
    if "vocab_rows" in by_rule:
        return [_vocabulary(checkpoint, by_rule["vocab_rows"][0], question)]
    for how, config in _alternatives(checkpoint, by_rule):
        if _fits(checkpoint, config):
            answer = f"{said}; with {how} every shape fits"
            return [Cause("configuration", question, answer, f"state {how}", True, op=how.split(" ")[0])]
    causes = [
        Cause("configuration", "Is it a configuration that can be?", str(v), "take the model's own", op=v.rule)
        for v in impossible[:1]
    ]
    if "missing" in by_rule:
        causes.append(_absent(checkpoint, by_rule["missing"][0]))
    if shapes := by_rule.get("shape"):
        names = tuple(v.tensor for v in shapes)
        causes.append(
            Cause(
                "layout",
                "Which shapes are wrong?",
                f"{shapes[0].message} ({len(names)} tensors)",
                "store them as the contract says",
                tensors=names,
            )
        )
    rest = [v for rule in ("beyond", "switched_off") for v in by_rule.get(rule, ())]
    if not causes and rest:
        causes.append(Cause("configuration", question, str(rest[0]), "take the model's own", op=rest[0].rule))
    return causes


def _vocabulary(checkpoint: Checkpoint, violation: Violation, question: str) -> Cause:
    """Which of two sizes is wrong? Vocabularies are padded to round numbers: the less round one."""
    stated, rows = (checkpoint.config or {}).get("vocab_size"), checkpoint.tensors[EMBEDDING].shape[0]
    if isinstance(stated, int) and _roundness(stated) < _roundness(rows):
        answer = f"{violation.message}; {rows} is the rounder number"
        return Cause("configuration", question, answer, f"state vocab_size {rows}", op="vocab_size")
    answer = f"{violation.message}; {stated} is the rounder number"
    return Cause("layout", question, answer, "store every row once", tensors=(EMBEDDING,))


def _roundness(number: int) -> int:
    """Twos in a number."""
    return (number & -number).bit_length() if number > 0 else 0


def _alternatives(
    checkpoint: Checkpoint, by_rule: Mapping[str, list[Violation]]
) -> list[tuple[str, dict[str, object]]]:
    """Configurations that might be the right one: the sizes that the tensors have, and other architectures."""
    config = dict(checkpoint.config or {})
    found: list[tuple[str, dict[str, object]]] = []
    if "switched_off" in by_rule or any("architecture" in v.message for v in by_rule.get("config_keys", ())):
        found += [(f"model_type {name}", {**config, "model_type": name}) for name in load_architectures()]
    measured = _measured_sizes(checkpoint, config)
    changed = {k: v for k, v in measured.items() if config.get(k) != v}
    for key, value in changed.items():
        found.append((f"{key} {value}", {**config, key: value}))
    if len(changed) > 1:
        how = ", ".join(f"{k} {v}" for k, v in changed.items())
        found.append((how, {**config, **changed}))
    return found


def _measured_sizes(checkpoint: Checkpoint, config: Mapping[str, object]) -> dict[str, int]:
    """Read the sizes off the tensors; only those on which every layer agrees."""
    shapes: dict[str, set[tuple[int, ...]]] = {}
    layers = set()
    for name, info in checkpoint.tensors.items():
        role = role_of(name)
        if role is not None:
            shapes.setdefault(role.name, set()).add(info.shape)
            layers |= {layer_of(name)} - {None}
    sizes: dict[str, int] = {}

    def rows(role: str, axes: int) -> int | None:
        found = shapes.get(role, set())
        shape = next(iter(found), ())
        return shape[0] if len(found) == 1 and len(shape) == axes else None

    norm, q, k, gate = rows("final_norm", 1), rows("q_proj", 2), rows("k_proj", 2), rows("gate_proj", 2)
    width = _width(config, q, k)
    if norm:
        sizes["hidden_size"] = norm
    if gate:
        sizes["intermediate_size"] = gate
    if layers:
        sizes["num_hidden_layers"] = len(layers)
    if q and k and width:
        sizes |= {"num_attention_heads": q // width, "num_key_value_heads": k // width}
        if "head_dim" in config:
            sizes["head_dim"] = width
    return sizes


def _width(config: Mapping[str, object], q: int | None, k: int | None) -> int:
    """The width of a head with which one of the stated numbers of heads is right; 64 or 128 where none is."""
    for rows, key in ((q, "num_attention_heads"), (k, "num_key_value_heads")):
        heads = config.get(key)
        if rows and isinstance(heads, int) and heads and rows % heads == 0 and rows // heads in (64, 128, 16, 32, 256):
            other = k if rows is q else q
            if other and other % (rows // heads) == 0:
                return rows // heads
    return 64


def _fits(checkpoint: Checkpoint, config: Mapping[str, object]) -> bool:
    """Judge names and shapes under another configuration."""
    geometry, problems = read_geometry(config)
    if problems or judge_names(checkpoint.tensors, geometry):
        return False
    wanted = expected_tensors(geometry)
    return not any(
        v.rule == "shape"
        for name, (role, shape) in wanted.items()
        if name in checkpoint.tensors
        for v in judge_span(checkpoint.tensors[name], role, shape)
    )


def _absent(checkpoint: Checkpoint, violation: Violation) -> Cause:
    names = violation.names or (violation.tensor,)
    question = "Why are tensors missing?"
    order = [*checkpoint.tensors, *names]
    if scattered(names, order):
        answer = f"{violation.message[:200]}: of every kind and layer, so this is a part of a file"
        return Cause("container", question, answer, "fetch the other parts", tensors=names)
    return Cause("naming", question, violation.message[:300], "take them from the source", tensors=names)


def _types(checkpoint: Checkpoint, by_rule: Mapping[str, list[Violation]]) -> list[Cause]:
    """Element types that no weight may have: a label over two bytes a value, or codes without their scales."""
    causes: dict[str, list[str]] = {}
    for violation in [*by_rule.get("element_type", ()), *by_rule.get("byte_difference", ())]:
        dtype = checkpoint.tensors[violation.tensor].dtype
        klass = "codec"
        if (
            dtype.block_bytes >= 2
            and dtype.block_elements == 1
            and _plausible_as(checkpoint, violation.tensor, ("BF16", "F16"))
        ):
            klass = "container"
        causes.setdefault(klass, []).append(violation.tensor)
    repairs = {"container": "label it BF16 or F16", "codec": "store it in a float type"}
    return [
        Cause(
            klass,
            "Is the type one that can hold a weight?",
            f"{listed(names)} stored as {checkpoint.tensors[names[0]].dtype}",
            repairs[klass],
            tensors=tuple(names),
        )
        for klass, names in causes.items()
    ]


def _plausible_as(checkpoint: Checkpoint, name: str, types: Sequence[str], *, swap: bool = False) -> str:
    """Return the first type as which the bytes are numbers that a weight has, or nothing."""
    info = checkpoint.tensors[name]
    data = checkpoint.raw(name).data[: 1 << 20]
    for kind in types:
        width = FORMATS[kind].block_bytes
        if data.size < width or (info.nbytes != width * prod(info.shape)):
            continue
        stored = data[: data.size // width * width]
        if swap:
            stored = stored.reshape(-1, width)[:, ::-1].reshape(-1).copy()
        values = decode_bytes(FORMATS[kind], stored, (stored.size // width,))
        with np.errstate(all="ignore"):
            ordinary = np.isfinite(values) & (np.abs(values) < 1e3) & ((np.abs(values) > 1e-9) | (values == 0))
        if ordinary.mean() > 0.999 and np.ptp(values[np.isfinite(values)]) > 0:
            return f"byte-swapped {kind}" if swap else kind
    return ""


def _data(checkpoint: Checkpoint, admission: Admission, by_rule: Mapping[str, list[Violation]]) -> list[Cause]:
    """Numbers that no trained tensor has: one cause for each kind, the one that touches most tensors first."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    rules = ("zero_percent", "nonfinite_values", "nonfinite_scales", "l2", "spread", *_MISSING_DATA)
    for name in dict.fromkeys(v.tensor for rule in rules for v in by_rule.get(rule, ())):
        broken = {rule for rule in rules if any(v.tensor == name for v in by_rule.get(rule, ()))}
        stats = admission.stats.get(name)
        if stats is not None:
            groups.setdefault(_kind(checkpoint, name, broken, stats), []).append(name)
    ranked = sorted(groups.items(), key=lambda g: -len(g[1]))
    return [
        Cause(
            klass,
            question,
            f"{names[0]}: {_numbers(admission.stats[names[0]])} ({len(names)} tensors)",
            repair,
            repair.startswith("read"),
            tensors=tuple(names),
        )
        for (klass, question, repair), names in ranked
    ]


def _kind(checkpoint: Checkpoint, name: str, broken: set[str], stats: TensorStats) -> tuple[str, str, str]:
    """Class, question and repair of one tensor with impossible numbers."""
    question, source = "What do its numbers say?", "take it from the source"
    dtype = checkpoint.tensors[name].dtype
    wild = stats.nans + stats.infs > 3 or abs(stats.maximum) > 1e6 or abs(stats.minimum) > 1e6
    if wild and dtype.plain and (how := _plausible_as(checkpoint, name, (dtype.name,), swap=True)):
        return "container", "Are the bytes in order?", f"read it as {how}"
    if "nonfinite_scales" in broken or (dtype.block_elements > 1 and "nonfinite_values" in broken):
        return "codec", question, "encode it again"
    if "nonfinite_values" in broken:
        overflow = dtype.name == "F16" and stats.infs and not stats.nans
        return ("numerics" if overflow else "tensor-values"), question, source
    if "zero_percent" in broken or "l2" in broken:
        vanished = stats.maximum > stats.minimum or stats.maximum != 0
        tiny = max(abs(stats.maximum), abs(stats.minimum))
        if vanished and tiny < 1e-6 and not set(_MISSING_DATA) & broken:
            return "tensor-values", question, source
        return "missing-data", question, source
    if set(_MISSING_DATA) & broken:
        return "missing-data", question, source
    return "tensor-values", question, source


def _numbers(stats: TensorStats) -> str:
    return (
        f"{stats.zero_percent:.1f} % zeros, {stats.nans} NaN, {stats.infs} infinite, from {stats.minimum:.3g} to "
        f"{stats.maximum:.3g}, dead rows {stats.dead_rows or 0}"
    )


# --- words


def _words(checkpoint: Checkpoint, chain: Chain) -> list[Cause]:
    """Hold the tokenizer against itself and the template against an independent writer of ChatML."""
    if not has_tokenizer(checkpoint):
        chain.ask("Does it carry a tokenizer?", "no: nothing of its words can be examined")
        return []
    tokenizer = load_tokenizer(checkpoint)
    asked: tuple[Callable[[Tokenizer], Cause | None], ...] = (_control_tokens, _raw_injection, _template, _injection)
    for ask in asked:
        try:
            cause = ask(tokenizer)
        except LoadError as error:
            question = "Can the template be rendered?"
            cause = Cause(
                "template", question, f"no: {error.message}", "take the vendor's template", op="chat template"
            )
        if cause is not None:
            return [cause]
    words = f"{len(tokenizer.special_ids)} control tokens, {'a' if tokenizer.chat_template else 'no'} template"
    chain.ask("Do tokenizer and template agree with themselves?", words)
    return []


def _control_tokens(tokenizer: Tokenizer) -> Cause | None:
    """Find control tokens that the template writes and the tokenizer does not take whole and alone."""
    template = tokenizer.chat_template or ""
    question = "Does the tokenizer know its control tokens?"
    written = chatml.markers(template)
    known = {chatml.START, chatml.END} <= set(tokenizer.special_ids)
    lost = sorted(m for m in written if len(tokenizer.encode(m, parse_special=True)) != 1)
    if lost and (not known or chatml.START in template):
        return Cause(
            "tokenizer", question, f"not {listed(lost)}, which the template writes", "add them", op="added tokens"
        )
    for token, i in tokenizer.special_ids.items():
        alone = [*tokenizer.encode(" "), i, *tokenizer.encode(" ")]
        if tokenizer.encode(f" {token} ", parse_special=True) != alone or i not in tokenizer.encode(
            f"x{token}x", parse_special=True
        ):
            answer = f"{token} swallows what stands beside it, or is not found there"
            return Cause("tokenizer", question, answer, f"clear the flags of {token}", op="added tokens")
    return None


def _asked(tokenizer: Tokenizer) -> Any:
    """A subject as far as the two acts about words look at one."""
    return SimpleNamespace(tokenizer=tokenizer, refusal=None, lacks={})


def _raw_injection(tokenizer: Tokenizer) -> Cause | None:
    rows = no_injected_control_tokens(_asked(tokenizer)).rows
    raw = sum(int(str(row["injected"])) for row in rows if row["place"] == "raw text")
    if not raw:
        return None
    answer = f"{raw} control ids out of plain text that spells them"
    return Cause(
        "tokenizer", "Can text become a control token?", answer, "keep control tokens out of text", op="vocabulary"
    )


def _injection(tokenizer: Tokenizer) -> Cause | None:
    finding = no_injected_control_tokens(_asked(tokenizer))
    if not finding.value:
        return None
    answer = "; ".join(f"{q} {a}" for q, a in list(finding.whys)[:2])
    return Cause("template", "Can a message become a turn?", answer, "write content as it is", op="chat template")


def _template(tokenizer: Tokenizer) -> Cause | None:
    if tokenizer.chat_template is None:
        return None
    finding = chat_template_applied(_asked(tokenizer))
    if not finding.value:
        return None
    answer = "; ".join(f"{q} {a}" for q, a in list(finding.whys)[:2]) or f"{finding.value:.0f} ids differ"
    return Cause(
        "template", "Does the template write ChatML?", answer[:600], "take the vendor's template", op="chat template"
    )

"""Against a reference: which tensors say something else, what damaged each, and whether it is another model at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod

from apr_core.contract.layout import EMBEDDING, HEAD, layer_of, role_of
from apr_core.diagnose.cause import Cause, Chain, listed
from apr_core.diagnose.values import Pair, Proof, correlation, examine
from apr_core.errors import AprError
from apr_core.formats.checkpoint import Checkpoint
from apr_core.rosetta.diff import TensorRow, compare_tensors

MOST_VALUES = 100_000_000  # decoded; beyond it a tensor is like the first of its role


def explain_tensors(subject: Checkpoint, reference: Checkpoint, chain: Chain) -> tuple[list[Cause], str]:
    """
    Compare every tensor, examine those that differ, and group what was found.

    Returns:
        The causes, the one that explains most first, and the relation of the two files in a sentence.
    """
    diff = compare_tensors(subject, reference)
    rows = {row.name: row for row in diff.rows}
    order = list(dict.fromkeys([*reference.tensors, *subject.tensors]))
    extra = [n for n in order if n not in reference.tensors and n != HEAD]
    missing = [n for n in order if n not in subject.tensors and rows[n].problem.startswith("missing")]
    broken = [n for n in order if n in rows and n not in extra and n not in missing and _differs(rows[n])]
    total = sum(1 for n in order if n not in extra)
    chain.ask(
        "Does every tensor say what the reference says?",
        f"{total - len(broken) - len(missing)} of {total} do; {len(broken)} differ, {len(missing)} are missing"
        + (f": {listed([*missing, *broken])}" if broken or missing else ""),
    )
    causes = _missing(missing, extra, order, subject)
    if not broken:
        return [chain.close(c) for c in causes], _relation(subject, reference) if not missing else "parts are missing"
    proofs = _examine(broken, subject, reference)
    relation = _other_model(proofs, order, missing, subject, reference)
    if relation:
        return [], relation
    causes += _grouped(proofs, rows)
    return [chain.close(c) for c in causes], "damaged"


def _differs(row: TensorRow) -> bool:
    return bool(row.mismatched or (row.problem and not row.problem.startswith("not compared")))


def _missing(missing: Sequence[str], extra: Sequence[str], order: Sequence[str], subject: Checkpoint) -> list[Cause]:
    """Say why tensors are not there: renamed, left out by a pattern, or a part of a file."""
    if not missing:
        return []
    question = "Why are tensors missing?"
    renamed = {m: e for m in missing for e in extra if e.endswith(m) or _alike(m, e, subject)}
    if renamed:
        first = next(iter(renamed))
        answer = f"{len(renamed)} stand under other names, {first} as {renamed[first]}"
        return [Cause("naming", question, answer, f"name it {first}", True, tuple(missing))]
    if scattered(missing, order):
        answer = f"{len(missing)} of {len(order)}, of every kind and layer: this is one part of a file"
        return [Cause("container", question, answer, "fetch the other parts", tensors=tuple(missing))]
    roles = Counter(role.name for n in missing if (role := role_of(n)))
    answer = f"{len(missing)} are not in the file: {', '.join(f'{n} {r}' for r, n in roles.most_common(4))}"
    return [Cause("naming", question, answer, "take them from the source", tensors=tuple(missing))]


def scattered(missing: Sequence[str], order: Sequence[str]) -> bool:
    """Tell tensors that are missing without a pattern: neither whole layers nor one role throughout."""
    gone = set(missing)
    kept = [n for n in order if n not in gone]
    layers = {layer_of(n) for n in missing if layer_of(n) is not None}
    whole_layers = not any(layer_of(n) in layers for n in kept)
    roles = {r.name for n in missing if (r := role_of(n))} & {r.name for n in kept if (r := role_of(n))}
    return len(missing) > len(order) / 4 and not whole_layers and (bool(roles) or len(gone) * 3 > len(order))


def _alike(missing: str, extra: str, subject: Checkpoint) -> bool:
    """Tell another spelling: the same layer and block, and only the last part another."""
    return missing.split(".")[:-2] == extra.split(".")[:-2] and missing.split(".")[-1] == extra.split(".")[-1]


def _examine(broken: Sequence[str], subject: Checkpoint, reference: Checkpoint) -> dict[str, Proof]:
    """Examine tensors until the budget is spent; the first of each role always."""
    proofs: dict[str, Proof] = {}
    roles: dict[str, Proof] = {}
    spent = 0
    head_dim = _head_dim(reference)
    for name in broken:
        role = role_of(name)
        key = role.name if role else name
        size = prod(subject.tensors[name].shape) if name in subject.tensors else 0
        if key in roles and spent + size > MOST_VALUES:
            proofs[name] = roles[key]
            continue
        spent += size
        other = name if name in reference.tensors else EMBEDDING
        mine = name if name in subject.tensors else EMBEDDING
        try:
            proofs[name] = roles[key] = examine(Pair(mine, subject, reference, other, head_dim))
        except AprError as error:
            proofs[name] = Proof("codec", "Can it be decoded?", f"no: {error.message}"[:200])
    return proofs


def _head_dim(reference: Checkpoint) -> int:
    config = reference.config or {}
    stated = config.get("head_dim")
    if isinstance(stated, int):
        return stated
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else 0


def _grouped(proofs: Mapping[str, Proof], rows: Mapping[str, TensorRow]) -> list[Cause]:
    """One cause for each kind of damage, the one that explains most tensors first, plain numbers last."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, proof in proofs.items():
        groups.setdefault((proof.klass, proof.question), []).append(name)
    plain = "Is there a structure in the damage?"
    causes = []
    for (klass, question), names in sorted(groups.items(), key=lambda g: (g[0][1] == plain, -len(g[1]))):
        # the tensor with most wrong values carries the numbers of the group
        first = max(names, key=lambda n: (proofs[n].proved, rows[n].mismatched))
        proof, row = proofs[first], rows[first]
        where = ", ".join(map(str, row.first)) if row.first is not None else ""
        whys = (("Which tensor, and where in it?", row.sentence()),)
        tensors = (first, *(n for n in names if n != first))
        many = f" ({len(names)} tensors alike)" if len(names) > 1 else ""
        causes.append(
            Cause(
                klass, question, f"{first}: {proof.answer}{many}", proof.repair, proof.proved, tensors, "", where, whys
            )
        )
    return causes


def _other_model(
    proofs: Mapping[str, Proof],
    order: Sequence[str],
    missing: Sequence[str],
    subject: Checkpoint,
    reference: Checkpoint,
) -> str:
    """
    Tell another model, or another revision, from a damaged one: every tensor that should agree to the bit differs.

    Damage with a structure of its own (a label, an order, zeros) is no other model, however many tensors it hits.
    """
    plain = [n for n in order if n in subject.tensors and n in reference.tensors and not _blocked(subject, n)]
    unexplained = [n for n in plain if n in proofs and proofs[n].klass == "tensor-values" and not proofs[n].proved]
    vectors = [n for n in plain if len(reference.tensors[n].shape) < 2]
    if not vectors or len(unexplained) < 0.95 * len(plain) or missing:
        return ""
    from apr_core.formats.codecs import decode

    matrices = [n for n in plain if n not in vectors and subject.tensors[n].shape == reference.tensors[n].shape][:4]
    alike = [correlation(decode(subject.raw(n)), decode(reference.raw(n))) for n in matrices]
    least = min(alike, default=0.0)
    count = f"{len(unexplained)} of {len(plain)} tensors that are not quantised differ"
    if least > 0.5:
        return f"another revision of the model: {count}, correlation {least:.4f} and more; nothing shows damage"
    return f"a different model: {count}, correlation {least:.4f}; it was not made from this reference"


def _blocked(checkpoint: Checkpoint, name: str) -> bool:
    return checkpoint.tensors[name].dtype.block_elements > 1


def _relation(subject: Checkpoint, reference: Checkpoint) -> str:
    """Say how a healthy file differs from its reference: not at all, in container and types, or in rounding alone."""
    types = [Counter(str(t.dtype) for t in c.tensors.values()) for c in (subject, reference)]
    shown = [f"{c.format} of {', '.join(map(str, t))}" for c, t in zip((subject, reference), types, strict=True)]
    if shown[0] == shown[1]:
        return "the same tensors"
    quantised = [n for n in subject.tensors if _blocked(subject, n) and n in reference.tensors]
    said = f"a legal variant: {shown[0]}, the reference is {shown[1]}"
    smallest = min(quantised, key=lambda n: subject.tensors[n].nbytes, default="")
    return f"{said}; {_quantiser(subject, reference, smallest)}" if smallest else said


def _quantiser(subject: Checkpoint, reference: Checkpoint, name: str) -> str:
    """Encode one tensor with our own encoder, which is llama.cpp's to the bit, and compare bytes."""
    from apr_core.formats.codecs import decode, encode

    raw = subject.raw(name)
    try:
        same = bytes(encode(decode(reference.raw(name)), raw.info.dtype)) == raw.data.tobytes()
    except AprError:
        return "no encoder here makes this type"
    return f"{name} has {'the bytes' if same else 'other bytes, within the bound of its type,'} of our encoder" + (
        "" if same else ": another quantiser"
    )

"""
The gates: thresholds as data (gates.toml), and pure judgement of measurements and of layout against them.

Nothing here raises for a defect of a model: it returns every violation at once, and the types (`types`) raise.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from math import isnan, nan
from typing import TYPE_CHECKING

from apr_core.contract.layout import (
    EMBEDDING,
    HEAD,
    KINDS,
    UNKNOWN,
    Geometry,
    Role,
    expected_tensors,
    layer_of,
    role_of,
)
from apr_core.contract.plausible import CONFIG_RULES, embedded_tokens
from apr_core.contract.tied import values_beyond
from apr_core.errors import AprError
from apr_core.formats.architectures import load_architectures

if TYPE_CHECKING:
    from apr_core.contract.stats import TensorStats
    from apr_core.formats.checkpoint import Checkpoint, TensorInfo

# Names listed in one message; the violation itself keeps all of them.
_MOST_NAMES = 20


@dataclass(frozen=True)
class Gate:
    """
    One rule with its limit; one row of gates.toml. Several rows may share an id.

    Attributes:
        id: The published id, e.g. ``F-DATA-QUALITY-001``.
        rule: What is measured, e.g. ``zero_percent``.
        threshold: The limit; a value equal to it passes.
        unit: Unit of the measured value and of the limit.
        direction: ``at_most`` or ``at_least``.
        applies_to: Kinds of tensors, ``model``, ``config``, ``file`` or ``generation``.
        exempt: Kinds for which the rule is deliberately not asked.
        severity: 1 to 5.
        waivable: Whether the explicit bypass may run a model in spite of it.
        says: The message, with ``{measured}`` and ``{limit}``.
        source: Where rule and limit come from.
        families: Architectures that the row is for; all when empty.
        absent: Whether a value that the config does not state is ``legal`` or ``fails``.
    """

    id: str
    rule: str
    threshold: float
    unit: str
    direction: str
    applies_to: tuple[str, ...]
    exempt: tuple[str, ...]
    severity: int
    waivable: bool
    says: str
    source: str
    families: tuple[str, ...] = ()
    absent: str = "legal"

    def holds(self, measured: float) -> bool:
        """Return whether a value passes; written so that NaN fails."""
        return measured <= self.threshold if self.direction == "at_most" else measured >= self.threshold

    def judge(
        self, tensor: str, measured: float, *, message: str = "", detail: str = "", names: tuple[str, ...] = ()
    ) -> list[Violation]:
        """Return one violation when the value fails, none when it holds."""
        if self.holds(measured):
            return []
        number = _number(measured, self.threshold, self.unit)
        text = message or self.says.format(measured=number, limit=f"{self.threshold:.15g}")
        if detail:
            text += f" ({detail})"
        value = None if isnan(measured) else float(measured)
        about = self.applies_to[0] if self.applies_to[0] in ("file", "generation") else "config"
        limit, unit = self.threshold, self.unit
        return [Violation(self.id, tensor, value, limit, unit, text, self.rule, self.waivable, names, about)]


@dataclass(frozen=True)
class Violation:
    """
    One failed gate. Prints as one line: gate, tensor, measured value, limit.

    Attributes:
        gate: Id of the gate.
        tensor: Canonical name; for a group the first name; empty when config or file is at fault.
        measured: The measured value; None where there is no number to give.
        limit: The limit that it broke.
        unit: Unit of both.
        message: What is wrong.
        rule: Which rule of the gate.
        waivable: Whether the explicit bypass may go on.
        names: Every tensor (or config key) concerned, where one violation speaks of several.
        about: What is at fault when it is no tensor: ``config``, ``file`` or ``generation``.
    """

    gate: str
    tensor: str
    measured: float | None
    limit: float
    unit: str
    message: str
    rule: str
    waivable: bool
    names: tuple[str, ...] = ()
    about: str = "config"

    def __str__(self) -> str:
        return f"[{self.gate}] {f'tensor {self.tensor}' if self.tensor else self.about}: {self.message}"


@dataclass(frozen=True)
class GateTable:
    """
    All gates, in the order in which they are judged, and the constants of measuring.

    Attributes:
        version: Grows with every change; recorded with each admission, so that an old one no longer counts.
        gates: The rows.
        zero_below: Magnitude below which a value counts as zero.
        spot_percent: Where in the vocabulary the spot rows lie.
        dead_row_l2: Norm below which a row is dead.
        ternary: Types whose zeros are counted by whole blocks.
    """

    version: int
    gates: tuple[Gate, ...]
    zero_below: float
    spot_percent: tuple[int, ...]
    dead_row_l2: float
    ternary: tuple[str, ...]

    def select(self, rule: str, kind: str) -> Iterator[Gate]:
        """Yield the rows of one rule that apply to a kind."""
        return (gate for gate in self.gates if gate.rule == rule and kind in gate.applies_to)

    def asks(self, rule: str, kind: str) -> bool:
        """Return whether any row of a rule applies to a kind."""
        return any(True for _ in self.select(rule, kind))

    def one(self, rule: str) -> Gate:
        """Return the only row of a rule of the model or the config."""
        (gate,) = (gate for gate in self.gates if gate.rule == rule)
        return gate


@cache
def load_gates() -> GateTable:
    """Read gates.toml from the installed package, never from the working directory; cached."""
    text = resources.files("apr_core.contract").joinpath("gates.toml").read_text(encoding="utf-8")
    return parse_gates(text)


def parse_gates(text: str) -> GateTable:
    """
    Read a gate table.

    Raises:
        ValueError: A row names an unknown rule, kind or direction, or exempts what it applies to. A rule that nothing
            measures would be a gate that cannot fail.
    """
    table = tomllib.loads(text)
    gates = []
    for row in table["gate"]:
        lists = {key: tuple(row[key]) for key in ("applies_to", "exempt", "families") if key in row}
        gate = Gate(**{**row, **lists})
        kinds = (*gate.applies_to, *gate.exempt)
        if gate.rule not in RULES or gate.direction not in ("at_most", "at_least") or not gate.applies_to:
            raise ValueError(f"gate {gate.id}: rule {gate.rule!r}, {gate.direction!r}, applies to {gate.applies_to}")
        if len(set(kinds)) != len(kinds) or not set(kinds) <= {*KINDS, "model", "config", "file", "generation"}:
            raise ValueError(f"gate {gate.id}, {gate.rule}: kinds {kinds}")
        if not set(gate.families) <= set(load_architectures()) or gate.absent not in ("legal", "fails"):
            raise ValueError(f"gate {gate.id}, {gate.rule}: families {gate.families}, absent {gate.absent!r}")
        gates.append(gate)
    measure = table["measure"]
    return GateTable(
        version=int(table["version"]),
        gates=tuple(gates),
        zero_below=float(measure["zero_below"]),
        spot_percent=tuple(measure["spot_percent"]),
        dead_row_l2=float(measure["dead_row_l2"]),
        ternary=tuple(measure["ternary"]),
    )


def _number(measured: float, limit: float, unit: str) -> str:
    """Write a number so that it can be told from the limit that it broke: never `80.0 % zeros, at most 80 %`."""
    if unit != "%" or isnan(measured):
        return f"{measured:.10g}"
    texts = (f"{measured:.{digits}f}" for digits in range(1, 15))
    return next((text for text in texts if float(text) != limit), repr(measured))


def _nonfinite_detail(stats: TensorStats) -> str:
    return f"{stats.nans} NaN, {stats.infs} infinite, of {stats.count}"


def _spot_detail(stats: TensorStats) -> str:
    return ", ".join(f"row {row}: {norm:.3g}" for row, norm in stats.row_l2) or "no row was measured"


_TENSOR_RULES: Mapping[str, tuple[Callable[[TensorStats], float], Callable[[TensorStats], str]]] = {
    "zero_percent": (lambda s: s.zero_percent, lambda s: "" if s.count else "no values"),
    "nonfinite_values": (lambda s: s.nans + s.infs, _nonfinite_detail),
    "nonfinite_scales": (lambda s: s.nonfinite_scales, lambda s: ""),
    "l2": (lambda s: s.l2, lambda s: ""),
    "spread": (lambda s: s.spread, lambda s: ""),
    "spot_l2": (lambda s: s.spot_l2, _spot_detail),
    "dead_row_percent": (lambda s: s.dead_row_percent, lambda s: f"{s.dead_rows} of {s.rows} rows"),
}
_LAYOUT_RULES = (
    "shape",
    "byte_difference",
    "element_type",
    "head_differs",
    "missing",
    "beyond",
    "switched_off",
    "config_keys",
)
_FILE_RULES = ("unexplained_bytes", "padding_run")


def judge_tensor(stats: TensorStats, role: Role) -> list[Violation]:
    """Judge the numbers of one tensor by every data gate that applies to its role."""
    found: list[Violation] = []
    for gate in load_gates().gates:
        if gate.rule in _TENSOR_RULES and role.kind in gate.applies_to:
            value, detail = _TENSOR_RULES[gate.rule]
            found += gate.judge(stats.name, value(stats), detail=detail(stats))
    return found


def needs_spot_rows(role: Role) -> bool:
    """Return whether a gate asks for the row norms of this role."""
    return _needs_rows(role.kind)


@cache
def _needs_rows(kind: str) -> bool:
    return any(load_gates().asks(rule, kind) for rule in ("spot_l2", "dead_row_percent"))


def judge_layout(checkpoint: Checkpoint, geometry: Geometry) -> list[Violation]:
    """
    Judge names, shapes, byte lengths, a stored tied head, and the config of an opened model.

    The order is the model's, not the file's: container, config, completeness, then tensor by tensor.

    Cost: reads no weights, but for a stored head beside a tied embedding whose bytes differ.
    """
    found = judge_cover(checkpoint) + judge_config(checkpoint, geometry) + judge_names(checkpoint.tensors, geometry)
    for name, (role, shape) in expected_tensors(geometry).items():
        if name in checkpoint.tensors:
            found += judge_span(checkpoint.tensors[name], role, shape)
    if geometry.tied and HEAD in checkpoint.tensors:
        found += _judge_tied_head(checkpoint, geometry)
    return found


def judge_cover(checkpoint: Checkpoint) -> list[Violation]:
    """Judge that tensors and their alignment explain all data; an overlap is refused by every reader."""
    gaps = checkpoint.gaps
    detail = ", ".join(f"{gap.nbytes} at byte {gap.offset} of {gap.file.name}" for gap in gaps[:_MOST_NAMES])
    return load_gates().one("unexplained_bytes").judge("", sum(gap.nbytes for gap in gaps), detail=detail)


def judge_span(info: TensorInfo, role: Role, shape: tuple[int, ...]) -> list[Violation]:
    """Judge shape, element type and byte length of one tensor."""
    table, found = load_gates(), list[Violation]()
    for gate in table.select("shape", role.kind):
        found += gate.judge(info.name, _differing(info.shape, shape), message=_shape_message(info.shape, shape))
    for gate in table.select("element_type", role.kind):
        message = f"stored as {info.dtype}, which a tensor of the kind {role.kind} may not be"
        found += gate.judge(info.name, int(info.dtype.name not in role.types), message=message)
    for gate in table.select("byte_difference", role.kind):
        demanded = info.dtype.nbytes(info.shape)
        detail = f"{info.nbytes} stored, {demanded} demanded by {info.dtype} {list(info.shape)}"
        found += gate.judge(info.name, abs(info.nbytes - demanded), detail=detail)
    return found


def judge_generation(ids: Sequence[int], padding: Container[int]) -> list[Violation]:
    """
    Judge generated tokens: a head read in the wrong layout repeats padding (F-LAYOUT-CONTRACT-005).

    Args:
        ids: What was generated, the prompt left out; none at all is no pass.
        padding: Ids that stand for no text: the padding token and the reserved rows of the vocabulary.
    """
    longest, run = (0, 0) if ids else (nan, 0)
    for token in ids:
        run = run + 1 if token in padding else 0
        longest = max(longest, run)
    return load_gates().one("padding_run").judge("", longest, detail=f"of {len(ids)} generated")


def undecodable(name: str, role: Role, reason: str) -> list[Violation]:
    """Refuse a tensor whose type nothing decodes: what cannot be judged must not pass."""
    return [v for gate in load_gates().select("element_type", role.kind) for v in gate.judge(name, 1, message=reason)]


def _differing(found: tuple[int, ...], expected: tuple[int, ...]) -> int:
    return abs(len(found) - len(expected)) + sum(a != b for a, b in zip(found, expected, strict=False))


def _shape_message(found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    message = f"shape {list(found)}, expected {list(expected)}"
    if 0 in found:
        return f"{message}: it is empty; the file was written from a sharded model that was not gathered"
    return f"{message}: reversed; re-import the file" if found == expected[::-1] else message


def judge_names(tensors: Mapping[str, TensorInfo], geometry: Geometry) -> list[Violation]:
    """Judge that every tensor of the model is there, and that none is of a layer past the last, or switched off."""
    table, expected = load_gates(), expected_tensors(geometry)
    known = {name: role_of(name) for name in sorted(tensors)}
    mine = geometry.architecture
    off = tuple(n for n, role in known.items() if role in mine.roles and geometry.role_of(n) is None)
    missing = tuple(name for name in expected if name not in tensors)
    # a known tensor of layer 24 in a model of 24 layers: the config is another model's
    beyond = tuple(n for n in known if geometry.role_of(n) and (layer_of(n) or 0) >= geometry.num_hidden_layers)
    found = list[Violation]()
    if missing:
        of = f"{len(missing)} of {len(expected)} tensors missing: {_listed(missing)}"
        found += table.one("missing").judge(missing[0], len(missing), message=of, names=missing)
    if beyond:
        of = f"{len(beyond)} tensors past the {geometry.num_hidden_layers} layers of the config: {_listed(beyond)}"
        found += table.one("beyond").judge(beyond[0], len(beyond), message=of, names=beyond)
    if off:
        keys = ", ".join(sorted(set(mine.when.values())))
        of = f"{len(off)} tensors that the config switches off ({keys} is not true): {_listed(off)}"
        found += table.one("switched_off").judge(off[0], len(off), message=of, names=off)
    return found


def judge_keys(problems: tuple[str, ...]) -> list[Violation]:
    """Refuse a model whose config does not state its sizes; `problems` as `layout.read_geometry` words them."""
    advice = "" if problems[0].startswith(UNKNOWN) else "; put the model's own config.json beside it"
    message = f"the config {', '.join(problems)}{advice}"
    return load_gates().one("config_keys").judge("", len(problems), message=message, names=problems)


def _listed(names: tuple[str, ...]) -> str:
    rest = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _judge_tied_head(checkpoint: Checkpoint, geometry: Geometry) -> list[Violation]:
    """A tied model may store its head, but only the embedding once more, within what the two types lose."""
    role = role_of(HEAD)
    assert role is not None
    info, other = checkpoint.tensors[HEAD], checkpoint.tensors.get(EMBEDDING)
    found = judge_span(info, role, geometry.shape_of(role))
    if found or other is None or other.shape != info.shape or other.nbytes != other.dtype.nbytes(other.shape):
        return found
    try:
        differing, compared = values_beyond(checkpoint)
    except AprError as error:  # a type without a decoder or a bound: what cannot be compared must not pass
        return undecodable(HEAD, role, str(error))
    for gate in load_gates().select("head_differs", role.kind):
        found += gate.judge(HEAD, differing, detail=f"of {compared}; {info.dtype} against {other.dtype}")
    return found


_VOCABULARY_RULES = ("vocab_rows", "tokens_over_rows")
RULES: frozenset[str] = frozenset([*_TENSOR_RULES, *_LAYOUT_RULES, *_FILE_RULES, *CONFIG_RULES, *_VOCABULARY_RULES])


def judge_config(checkpoint: Checkpoint, geometry: Geometry) -> list[Violation]:
    """Judge that the config is one that its architecture can have, and that its vocabulary fits the embedding."""
    config = checkpoint.config or {}
    found = list[Violation]()
    for gate in load_gates().gates:
        if gate.rule in CONFIG_RULES and (not gate.families or geometry.family in gate.families):
            value = CONFIG_RULES[gate.rule](config, geometry)
            if value is not None or gate.absent == "fails":
                found += gate.judge("", nan if value is None else value)
    return found + _judge_vocabulary(checkpoint, geometry)


def _judge_vocabulary(checkpoint: Checkpoint, geometry: Geometry) -> list[Violation]:
    info = checkpoint.tensors.get(EMBEDDING)
    # of a matrix that is not [something, hidden] the shape gate speaks: its rows are not tokens
    if info is None or len(info.shape) != 2 or info.shape[1] != geometry.hidden_size:
        return []
    rows, table = info.shape[0], load_gates()
    detail = f"vocab_size {geometry.vocab_size}, embedding rows {rows}"
    found = table.one("vocab_rows").judge("", abs(geometry.vocab_size - rows), detail=detail)
    tokens = embedded_tokens(checkpoint.metadata)
    if tokens is not None:
        detail = f"{tokens} tokens, {rows} rows"
        found += table.one("tokens_over_rows").judge("", tokens - rows, detail=detail)
    return found

"""What notebook 10 shows besides its claims: a model's numbers by role, the gates at their limits, what they cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from math import sqrt
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from apr_core.contract.admit import admit
from apr_core.contract.gates import Gate, judge_layout, judge_tensor, load_gates, needs_spot_rows
from apr_core.contract.layout import HEAD, read_geometry, role_of
from apr_core.contract.stats import TensorStats, measure, measure_all, measure_values
from apr_core.dtypes import FORMATS
from apr_core.engines.subject import Subject
from apr_core.formats import codecs
from apr_core.formats.checkpoint import Checkpoint, RawTensor, TensorInfo, open_checkpoint
from apr_core.zoo.plants import DOWN, EMBED

Floats = NDArray[np.float32]
Row = dict[str, object]

ROWS, COLUMNS = 200, 64  # of the tensors that stand at a limit
INSIDE, AT, BEYOND = "one step inside", "at the limit", "one step beyond"
# A tensor of each kind that a gate may apply to.
_NAMES = {
    "embedding": EMBED,
    "head": HEAD,
    "weight": DOWN,
    "norm": "model.norm.weight",
    "bias": "model.layers.0.self_attn.q_proj.bias",
}


def by_role(subject: Subject) -> list[Row]:
    """One row per measured tensor: its role, share of zeros, root mean square, and range, in the order of the model."""
    rows: list[Row] = []
    for name, stats in subject.admission.stats.items():
        role = role_of(name)
        assert role is not None
        rms = stats.l2 / sqrt(stats.count) if stats.count else 0.0
        rows.append(
            {
                "role": role.name,
                "tensor": name,
                "zeros (%)": stats.zero_percent,
                "rms": rms,
                "minimum": stats.minimum,
                "maximum": stats.maximum,
                "L2": stats.l2,
            }
        )
    return rows


def zero_limits() -> list[float]:
    """Return the shares of zeros that gates allow, in percent."""
    return sorted({gate.threshold for gate in load_gates().gates if gate.rule == "zero_percent"})


def at_the_limits() -> list[Row]:
    """
    Put a tensor one step inside, at, and one step beyond the limit of every gate that judges values.

    A step is the smallest there is: one value, one row, or the next float32. Inside and at are the same where the limit
    is none at all. The tensors are measured and judged as `admit` does.

    Returns:
        Rows of gate, rule, kind, limit, unit, where, value (what was put there) and outcome.
    """
    rows: list[Row] = []
    for gate in load_gates().gates:
        if gate.rule in _BUILDERS:
            for where, value, stats in _BUILDERS[gate.rule](gate, _NAMES[gate.applies_to[0]]):
                role = role_of(stats.name)
                assert role is not None
                refused = any((v.gate, v.rule) == (gate.id, gate.rule) for v in judge_tensor(stats, role))
                rows.append(
                    {
                        "gate": gate.id,
                        "rule": gate.rule,
                        "of": gate.applies_to[0],
                        "limit": gate.threshold,
                        "unit": gate.unit,
                        "where": where,
                        "value": value,
                        "outcome": "refused" if refused else "passes",
                    }
                )
    return rows


def cost(subject: Subject, *, repeats: int = 5) -> list[Row]:
    """
    Time the gate on a subject, step by step.

    Returns:
        Rows of step, seconds (median of the repeats), and bytes read.
    """
    path = subject.checkpoint.path
    opened = open_checkpoint(path)
    total = sum(info.nbytes for info in opened.tensors.values())
    steps: dict[str, tuple[int, Callable[[], object]]] = {
        "open the file": (0, lambda: open_checkpoint(path).close()),
        "judge names, shapes, bytes, config": (0, lambda: _judge_header(path)),
        "read every byte, and nothing else": (total, lambda: [_add_bytes(opened, name) for name in opened.tensors]),
        "measure every tensor": (total, lambda: list(measure_all(_wanted(opened)))),
        "the whole gate": (total, lambda: _whole_gate(path)),
    }
    rows: list[Row] = []
    for step, (nbytes, work) in steps.items():
        taken = []
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
        rows.append({"step": step, "seconds": median(taken), "bytes": nbytes})
    opened.close()
    return rows


def _judge_header(path: Path) -> None:
    with open_checkpoint(path) as checkpoint:
        geometry, _ = read_geometry(checkpoint.config or {})
        if geometry is not None:
            judge_layout(checkpoint, geometry)


def _whole_gate(path: Path) -> None:
    admit(path).checkpoint.close()


def _add_bytes(checkpoint: Checkpoint, name: str) -> int:
    return int(checkpoint.raw(name).data.sum())


def _wanted(checkpoint: Checkpoint) -> list[tuple[RawTensor, bool]]:
    roles = ((name, role_of(name)) for name in checkpoint.tensors)
    return [(checkpoint.raw(name), needs_spot_rows(role)) for name, role in roles if role is not None]


Built = Iterator[tuple[str, float, TensorStats]]


def _healthy() -> Floats:
    return (0.02 * np.random.default_rng(10).standard_normal((ROWS, COLUMNS))).astype(np.float32)


def _zeros(gate: Gate, name: str) -> Built:
    count = round(ROWS * COLUMNS * gate.threshold / 100)
    for where, zeros in ((INSIDE, count - 1), (AT, count), (BEYOND, count + 1)):
        values = _healthy()
        values.reshape(-1)[np.random.default_rng(11).permutation(values.size)[:zeros]] = 0
        yield where, 100 * zeros / values.size, measure_values(name, values, spot_rows=True)


def _nonfinite(gate: Gate, name: str) -> Built:
    for where, count in ((AT, 0), (BEYOND, 1)):
        values = _healthy()
        values.reshape(-1)[:count] = np.nan
        yield where, count, measure_values(name, values, spot_rows=True)


def _scales(gate: Gate, name: str) -> Built:
    dtype = FORMATS["Q8_0"]
    for where, count in ((AT, 0), (BEYOND, 1)):
        data = codecs.encode(_healthy(), dtype)
        data.reshape(-1, dtype.block_bytes)[:count, :2] = np.frombuffer(np.float16(np.inf).tobytes(), np.uint8)
        info = TensorInfo(name, dtype, (ROWS, COLUMNS), Path("memory"), 0, data.size, name)
        yield where, count, measure(RawTensor(info, data), spot_rows=True)


def _smallest(gate: Gate, name: str, place: Callable[[Floats, np.float32], None]) -> Built:
    """Put the first float32 that is not below the limit somewhere, and its two neighbours."""
    at = np.float32(gate.threshold)
    at = np.nextafter(at, np.float32(np.inf)) if float(at) < gate.threshold else at
    above, below = np.nextafter(at, np.float32(np.inf)), np.nextafter(at, np.float32(0))
    for where, value in ((INSIDE, above), (AT, at), (BEYOND, below)):
        values = _healthy()
        place(values, value)
        yield where, float(value), measure_values(name, values, spot_rows=True)


def _one_value(gate: Gate, name: str) -> Built:
    def place(values: Floats, value: np.float32) -> None:
        values[:] = 0
        values[0, 0] = value

    yield from _smallest(gate, name, place)


def _one_row(gate: Gate, name: str) -> Built:
    def place(values: Floats, value: np.float32) -> None:
        values[ROWS // 10] = 0
        values[ROWS // 10, 0] = value

    yield from _smallest(gate, name, place)


def _dead(gate: Gate, name: str) -> Built:
    count = round(ROWS * gate.threshold / 100)
    first = ROWS // 10 + 1  # behind the first spot row, before the next
    for where, dead in ((INSIDE, count - 1), (AT, count), (BEYOND, count + 1)):
        values = _healthy()
        values[first : first + dead] = 0
        yield where, 100 * dead / ROWS, measure_values(name, values, spot_rows=True)


_BUILDERS: dict[str, Callable[[Gate, str], Built]] = {
    "zero_percent": _zeros,
    "nonfinite_values": _nonfinite,
    "nonfinite_scales": _scales,
    "l2": _one_value,
    "spread": _one_value,
    "spot_l2": _one_row,
    "dead_row_percent": _dead,
}

"""Faults of the gates themselves: doors that stand open (F-ADMIT-001) and gates that cry wolf (F-BENIGN-001)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np

from apr_core.contract import gates, types
from apr_core.contract.gates import Gate, load_gates
from apr_core.formats.checkpoint import RawTensor
from apr_core.zoo.meter import MeterFault, Planted, swapped


def _gates(change: Callable[[Gate], Gate]) -> Planted:
    """Judge with other gates than the table's."""
    table = load_gates()
    other = replace(table, gates=tuple(change(gate) for gate in table.gates))
    return lambda: swapped(gates, load_gates=lambda: other)


def _for_zeros(**edit: object) -> Planted:
    return _gates(lambda gate: replace(gate, **edit) if gate.rule == "zero_percent" else gate)  # type: ignore[arg-type]


def _constant_norms(gate: Gate) -> Gate:
    return replace(gate, applies_to=(*gate.applies_to, "norm")) if gate.rule == "spread" else gate


def _lent(raw: RawTensor) -> RawTensor:
    return RawTensor(raw.info, np.array(raw.data))  # a copy that anybody who holds it can write to


def _nothing_blocks() -> AbstractContextManager[None]:
    return swapped(types.Admission, blocking=property(lambda self: ()))


GATE_FAULTS = (
    MeterFault("door-no-judge", "tensors are not judged when they are built", "F-ADMIT-001",
               lambda: swapped(types, judge_tensor=lambda stats, role: [])),
    MeterFault("door-nothing-blocks", "an admission never blocks", "F-ADMIT-001", _nothing_blocks),
    MeterFault("door-lent-bytes", "a validated tensor keeps bytes that can be written", "F-ADMIT-001",
               lambda: swapped(types, owned=_lent)),
    MeterFault("wolf-zeros", "48 % zeros are refused", "F-BENIGN-001", _for_zeros(threshold=48.0)),
    MeterFault("wolf-biases", "zeros in a bias are refused", "F-BENIGN-001",
               _for_zeros(applies_to=("bias",), threshold=80.0)),
    MeterFault("wolf-norms", "a norm of 1.0 is refused", "F-BENIGN-001", _gates(_constant_norms)),
    MeterFault("wolf-heads", "a stored head is refused", "F-BENIGN-001",
               lambda: swapped(gates, _judge_tied_head=lambda checkpoint, geometry: gates.judge_keys(("a head",)))),
)  # fmt: skip

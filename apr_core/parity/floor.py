"""
The noise floor: how far the reference is from itself when only rounding differs.

Three ways to round otherwise, none of which touches a candidate: another order of summation (each product in pieces),
another number of threads, and float64 in place of float32. For an engine that rounds its activations on purpose
(`rounding` says how) there is a fourth: the reference with its activations rounded so. A limit is a multiple of the
largest distance that any of them shows, name by name, because the floor of a key in the first layer is a tenth of that
of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apr_core.contract.types import ValidatedModel, ValidatedWeight
from apr_core.engines.plain import PlainQwen2
from apr_core.kernels.cpu.panels import LAYOUTS
from apr_core.model.generate import follow
from apr_core.model.linear import Place, Weights
from apr_core.model.qwen2 import Qwen2
from apr_core.model.trace import Trace, TracedForward
from apr_core.parity.compare import compare

# Two roundings of one forward were at most 2.3 times as far apart as the floor (decision 0012); 4 leaves room for one
# more order of summation. Every planted fault of tests/parity/test_faults.py lies beyond it.
FACTOR = 4.0
# Orders in which honest float32 sums the terms of a product: theirs, and three drawn ones.
ORDERS = (None, 1, 2, 3)
# One unit in the last place of each value of a row; below it no float32 row can be told from another.
LEAST = 2.0**-23
BLOCK = 32

Run = Callable[[TracedForward], Trace]


class Rounding(Place):
    """
    Products of activations that are rounded on purpose.

    Attributes:
        name: How.
        prompts_only: One token alone is not rounded, and owes float32.
    """

    name: ClassVar[str]
    prompts_only: ClassVar[bool] = False


class EightBit(Rounding):
    """Products of activations that are rounded to 8 bits, one scale per block of 32, as integer kernels take them."""

    name = "activations of 8 bits"

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Round ``x``, then multiply."""
        width = x.shape[-1]
        blocks = torch.nn.functional.pad(x, (0, -width % BLOCK)).reshape(*x.shape[:-1], -1, BLOCK)
        step = blocks.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / 127
        return super().product(((blocks / step).round() * step).flatten(-2)[..., :width], weight, bias)


class BFloat16(Rounding):
    """Products of activations that are rounded to bfloat16, as a dot product of pairs takes them."""

    name = "activations in bfloat16"
    prompts_only = True

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Round ``x``, then multiply."""
        return super().product(x.to(torch.bfloat16).to(x.dtype), weight, bias)


@dataclass(frozen=True)
class Floor:
    """
    What rounding alone does.

    Attributes:
        measured: Variant -> name -> largest rel_l2 over positions.
    """

    measured: Mapping[str, Mapping[str, float]]

    def of(self, name: str) -> float:
        """Return the floor of one name: the largest that any variant shows."""
        return max((variant.get(name, 0.0) for variant in self.measured.values()), default=0.0)

    @property
    def limits(self) -> dict[str, float]:
        """Limit on rel_l2 per name."""
        names = dict.fromkeys(name for variant in self.measured.values() for name in variant)
        return {name: FACTOR * max(self.of(name), LEAST) for name in names}

    @property
    def source(self) -> str:
        """Where the limits come from."""
        return f"{FACTOR:g} x the reference's distance from itself: {', '.join(self.measured)} (decision 0012)"

    def rows(self) -> list[dict[str, object]]:
        """One row per name: each variant's floor, and the limit."""
        limits = self.limits
        return [
            {"name": name, **{kind: by.get(name) for kind, by in self.measured.items()}, "limit": limits[name]}
            for name in limits
        ]


def variants(validated: ValidatedModel, place: Rounding | None = None) -> dict[str, Callable[[], TracedForward]]:
    """
    Name the reference's other roundings, each built when it is called.

    Args:
        validated: The model.
        place: How activations are rounded in one more of them; None where they are not.
    """

    def at(place: Place) -> Callable[[], TracedForward]:
        return lambda: Qwen2(validated, weights=Weights(validated, place))

    found = {
        "sums in 7 pieces": at(Place(parts=7)),
        "sums in 2 pieces": at(Place(parts=2)),
        "float64": at(Place(dtype=torch.float64)),
    }
    return found if place is None else found | {place.name: at(place)}


def rounding(validated: ValidatedModel, precision: str, device: str) -> Rounding | None:
    """
    Say how an engine of this precision rounds activations on purpose, and so what it owes; None where it does not.

    On the CPU `speed` rounds to 8 bits against weights in blocks, and to bfloat16 against BF16 (several tokens at once;
    one alone meets it in float32). F16, F32 and what is widened to F32 for want of a kernel meet float32, where other
    limits would excuse anything. On a device it keeps keys and values in float16 whatever the weights are.
    """
    if precision != "speed":
        return None
    matrices = [tensor for tensor in validated.tensors.values() if isinstance(tensor, ValidatedWeight)]
    types = {tensor.raw.info.dtype.name for tensor in (*matrices, validated.head)} & LAYOUTS.keys()
    if device != "cpu" or any(LAYOUTS[name].zero is not None for name in types):
        return EightBit()
    return BFloat16() if "BF16" in types else None


def noise_floor(validated: ValidatedModel, run: Run, place: Rounding | None = None) -> Floor:
    """
    Measure how far the reference is from itself.

    Args:
        validated: The model.
        run: What is traced, e.g. a prefill and cached steps; called once per variant.
        place: As `variants`.

    Cost: one more copy of the weights in memory, and five forwards.
    """
    reference = Qwen2(validated)
    truth = run(reference)
    measured = {name: _distance(truth, run(make())) for name, make in variants(validated, place).items()}
    with _threads(2 if torch.get_num_threads() == 1 else 1) as count:
        measured[f"{count} threads" if count > 1 else "1 thread"] = _distance(truth, run(reference))
    return Floor(measured)


def honest_floor(validated: ValidatedModel, run: Run) -> Floor:
    """
    Measure how far float32 is from float64 in the independent numpy forward, which no claim judges.

    The floor of `noise_floor` is the torch forward's own: it would excuse a torch forward that rounds too much.

    Cost: five numpy forwards.
    """
    truth = run(PlainQwen2(validated))
    names = {order: "float32" if order is None else f"float32, order of sums {order}" for order in ORDERS}
    return Floor(
        {name: _distance(truth, run(PlainQwen2(validated, None, np.float32, at))) for at, name in names.items()}
    )


def path(ids: NDArray[np.int64], prompt: int, start: int = 0) -> Run:
    """Return the run of `follow` over ``ids``: a prefill of ``prompt`` and a cached step for each further id."""
    return lambda model: follow(model, ids, prompt, start=start, full=True)


def _distance(truth: Trace, other: Trace) -> dict[str, float]:
    # Zeros are compared with nothing and have no rounding: without a floor of their own their limit would be missing.
    found = {name: parity.required_tolerance for name, parity in compare(truth, other).names.items()}
    return dict.fromkeys(truth, 0.0) | found


@contextmanager
def _threads(count: int) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)

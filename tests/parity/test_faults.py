"""Planted faults of a forward: each turns parity red, and the first divergence names its layer, operation and place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from apr_core.contract.admit import admit
from apr_core.engines.load import load_model, load_plain
from apr_core.engines.plain import PlainCache, PlainQwen2
from apr_core.falsify.verdict import Verdict
from apr_core.formats.checkpoint import open_checkpoint
from apr_core.model.synth import synthesise
from apr_core.model.trace import mandatory_names
from apr_core.parity.suite import POSITIONS, PREFILL, Bench, SuiteReport, examinations, examine, prepare
from tests.model.conftest import write_tiny

F64 = NDArray[np.float64]


class NoRopeFromOne(PlainQwen2):
    """RoPE is missing from position 1 on; position 0 is the identity anyway."""

    def _turned(self, x: F64, start: int) -> F64:
        return x


class SwappedPairs(PlainQwen2):
    """Neighbours are turned instead of halves."""

    def _turned(self, x: F64, start: int) -> F64:
        order = np.concatenate([np.arange(0, x.shape[1], 2), np.arange(1, x.shape[1], 2)])
        out = np.empty_like(x)
        out[:, order] = super()._turned(x[:, order], start)
        return out


class MaskShort(PlainQwen2):
    """No position but the first sees itself."""

    def _mixed(self, q: F64, keys: F64, values: F64) -> F64:
        out = super()._mixed(q, keys, values)
        for row in range(len(q)):
            if len(keys) - len(q) + row > 0:
                at = len(keys) - len(q) + row
                out[row : row + 1] = super()._mixed(q[row : row + 1], keys[:at], values[:at])
        return out


class MaskLong(PlainQwen2):
    """Each position sees the next one, where there is one."""

    def _mixed(self, q: F64, keys: F64, values: F64) -> F64:
        seen = [min(len(keys), len(keys) - len(q) + row + 2) for row in range(len(q))]
        rows = [super(MaskLong, self)._mixed(q[r : r + 1], keys[:n], values[:n]) for r, n in enumerate(seen)]
        return np.vstack(rows)


class HeadsDealt(PlainQwen2):
    """Query head h reads h % kv_heads."""

    def _shared(self, head: int) -> int:
        return head % self.config.num_key_value_heads


class BiasDropped(PlainQwen2):
    """One bias of the last layer's values is lost."""

    def _times(self, x: F64, name: str) -> F64:
        out = super()._times(x, name)
        if name == "model.layers.1.self_attn.v_proj":
            out = out.copy()
            out[:, 3] -= self._tensors[f"{name}.bias"].values()[3]
        return out


class NoRoot(PlainQwen2):
    """Scores are divided by head_dim and not by its root."""

    def _mixed(self, q: F64, keys: F64, values: F64) -> F64:
        return super()._mixed(q / np.sqrt(q.shape[1]), keys, values)


class EpsTenfold(PlainQwen2):
    """Every norm adds ten times its epsilon."""

    def _rms(self, x: F64, name: str) -> F64:
        eps, square = self.config.rms_norm_eps, (x * x).mean(axis=1, keepdims=True)
        return super()._rms(x, name) * np.sqrt((square + eps) / (square + 10 * eps))


class CacheOffByOne(PlainQwen2):
    """Every cached step stands one position too far on."""

    def _turned(self, x: F64, start: int) -> F64:
        return super()._turned(x, start + (start > 0))


class CacheOverwritten(PlainQwen2):
    """A cached step overwrites the last slot: it never sees the token before it."""

    def _attend(self, layer: int, x: F64, cache: PlainCache, seen: dict[str, F64]) -> F64:
        if cache.length > cache.start:
            for rows in (cache.keys[layer], cache.values[layer]):
                rows[:] = [np.vstack([held[:-2], held[-2:-1] * 0, held[-1:]]) for held in rows]
        return super()._attend(layer, x, cache, seen)


class HeadTransposed(PlainQwen2):
    """The output matrix is read in the other layout."""

    def _logits(self, x: F64) -> F64:
        weight = self._head.values()
        return x @ weight.reshape(weight.shape[1], weight.shape[0]).astype(np.float64)


class NormsSwapped(PlainQwen2):
    """The two norms of the last layer are exchanged."""

    def _normed(self, x: F64, layer: int, part: str) -> F64:
        other = {"input_layernorm": "post_attention_layernorm", "post_attention_layernorm": "input_layernorm"}
        return super()._normed(x, layer, other[part] if layer == 1 else part)


class Tf32(PlainQwen2):
    """Both operands of each product are rounded to the 10 mantissa bits of TF32."""

    def _times(self, x: F64, name: str) -> F64:
        weight = self._tensors[f"{name}.weight"].values()
        out = _ten_bits(x) @ _ten_bits(weight).T
        return out + (self._tensors[f"{name}.bias"].values() if f"{name}.bias" in self._tensors else 0)


class Shuffled(PlainQwen2):
    """98 % of the logits are permuted; the norm and the top token stay."""

    def _logits(self, x: F64) -> F64:
        out = super()._logits(x)
        for row in out:
            low = np.argsort(row)[: int(0.98 * row.size)]
            row[low] = row[np.roll(low, 7)]
        return out


class OneNan(PlainQwen2):
    """One value of one late position is no number."""

    def _feed(self, layer: int, x: F64) -> F64:
        out = super()._feed(layer, x)
        if len(x) > 40:
            out[40, 2] = np.nan
        return out


def _ten_bits(x: Any) -> F64:
    whole = np.ascontiguousarray(x, np.float32).view(np.uint32) + np.uint32(1 << 12)
    return (whole >> np.uint32(13) << np.uint32(13)).view(np.float32).astype(np.float64)


# fault -> (part, name, position) of the first divergence
FAULTS: dict[type[PlainQwen2], tuple[str, str, int]] = {
    NoRopeFromOne: ("prefill", "layers.0.q", 1),
    SwappedPairs: ("prefill", "layers.0.q", 1),
    MaskShort: ("prefill", "layers.0.attn_output", 1),
    MaskLong: ("prefill", "layers.0.attn_output", 0),
    HeadsDealt: ("prefill", "layers.0.attn_output", 0),
    BiasDropped: ("prefill", "layers.1.v", 0),
    NoRoot: ("prefill", "layers.0.attn_output", 1),
    EpsTenfold: ("prefill", "layers.0.q", 0),
    CacheOffByOne: ("decode", "layers.0.q", 0),
    CacheOverwritten: ("decode", "layers.0.attn_output", 0),
    HeadTransposed: ("prefill", "logits", 0),
    NormsSwapped: ("prefill", "layers.1.q", 0),
    Tf32: ("prefill", "layers.0.q", 0),
    Shuffled: ("prefill", "logits", 0),
}


@pytest.fixture(scope="module", params=["tiny", "pygmy"])
def bench(request: pytest.FixtureRequest, pygmy: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The reference's side of a random and of the trained model."""
    path = (
        pygmy
        if request.param == "pygmy"
        else write_tiny(tmp_path_factory.mktemp("faults"), max_position_embeddings=5000)
    )
    admission = admit(path)
    ids = np.random.default_rng(5).integers(0, 331, POSITIONS)
    validated = admission.require()
    return validated, prepare(validated, load_model(path), ids)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_fault_is_red_and_its_place_is_named(fault: type[PlainQwen2], bench: tuple[Any, Bench]) -> None:
    """The healthy forward is corroborated by the same bench, so what is red here is the fault."""
    validated, held = bench
    part, name, position = FAULTS[fault]
    found = next(p for p in examinations(held, fault(validated)) if p.verdict is not Verdict.CORROBORATED)
    assert found.verdict is Verdict.FALSIFIED
    assert found.first is not None
    assert (found.name, found.first.name, found.first.position) == (part, name, position)


def test_a_cache_that_is_off_is_seen_without_a_reference(bench: tuple[Any, Bench]) -> None:
    """The candidate's cached steps against its own prefill; the report's first divergence is that of its first part."""
    validated, held = bench
    report = examine(held, CacheOffByOne(validated))
    assert report.part("prefill").verdict is Verdict.CORROBORATED
    assert report.part("cached against full").verdict is Verdict.FALSIFIED
    assert report.reason.startswith("decode: first divergence: layers.0.q at position 0")
    assert report.first is report.part("decode").first


def test_the_healthy_forward_is_corroborated(bench: tuple[Any, Bench]) -> None:
    """Every part, far positions included; the largest row is well within its limit."""
    validated, held = bench
    report = examine(held, PlainQwen2(validated))
    assert [p.name for p in report.parts][:3] == ["prefill", "decode", "far 4000"]
    assert {p.name: p.verdict for p in report.parts} == {p.name: Verdict.CORROBORATED for p in report.parts}
    assert (report.verdict, report.reason, report.first, report.control) == (Verdict.CORROBORATED, "", None, False)
    for part in report.parts[:2]:
        assert part.report is not None
        limits = held.limits("near")
        assert max(n.required_tolerance / limits[n.name] for n in part.report.names.values()) < 0.75


def test_what_the_norms_of_the_specification_let_pass(bench: tuple[Any, Bench]) -> None:
    """98 % of the logits permuted: equal norms, equal top tokens, no cosine worth the name; and yet it is red."""
    validated, held = bench
    report = examine(held, Shuffled(validated)).part("prefill").report
    assert report is not None
    assert report.logits is not None
    assert report.logits.norm_difference.max() < 1e-4
    assert not report.logits.flipped.any()
    assert report.logits.kl_mean > 1e-4


def test_nan_is_red(bench: tuple[Any, Bench]) -> None:
    """It passes no limit, and it is counted."""
    validated, held = bench
    report = examine(held, OneNan(validated))
    assert report.verdict is Verdict.FALSIFIED
    assert "not finite" in report.reason
    assert report.first is not None
    assert (report.first.name, report.first.position) == ("layers.0.resid_ffn", 40)


def test_one_wrong_scale_of_a_block_type_is_red(tmp_path: Path) -> None:
    """One 6-bit scale of one Q4_K block of the last layer's down projection, one step off."""
    right = tmp_path / "right.gguf"
    synthesise("pygmy", format="gguf", dtype="q4_k_m", seed=3, out=right)
    wrong = tmp_path / "wrong.gguf"
    shutil.copy(right, wrong)
    with open_checkpoint(right) as checkpoint:
        info = next(
            t
            for t in checkpoint.tensors.values()
            if str(t.dtype) == "Q4_K" and t.name.endswith("1.mlp.gate_proj.weight")
        )
        begin = info.offset
    with wrong.open("r+b") as file:
        file.seek(begin + 4)  # behind d and dmin: scales
        byte = file.read(1)[0]
        file.seek(begin + 4)
        file.write(bytes([byte ^ 1]))
    validated = admit(right).require()
    held = prepare(validated, load_model(right), np.random.default_rng(5).integers(0, 1000, POSITIONS))
    assert examine(held, load_plain(right)).verdict is Verdict.CORROBORATED
    report = examine(held, load_plain(wrong))
    assert report.verdict is Verdict.FALSIFIED
    assert report.first is not None
    assert report.first.name == "layers.1.resid_ffn"


class Odd:
    """A backend that breaks in a way that no activation shows."""

    def __init__(self, model: PlainQwen2, twist: Callable[[Any, int, bool], Any]) -> None:
        self._model, self._twist, self._calls = model, twist, 0
        self.config, self.backend, self.device, self.tokenizer = model.config, "odd", "cpu", None

    def new_cache(self, start: int = 0) -> Any:
        return self._model.new_cache(start)

    def forward(self, ids: Any, cache: Any = None, trace: Any = None) -> Any:
        self._calls += 1
        return self._twist(self._model.forward(ids, cache, trace), self._calls, trace is not None)


def odd(bench: tuple[Any, Bench], twist: Callable[[Any, int, bool], Any]) -> SuiteReport:
    """Examine a backend whose logits pass through ``twist``."""
    return examine(bench[1], Odd(PlainQwen2(bench[0]), twist))


def test_a_backend_that_remembers_is_red(bench: tuple[Any, Bench]) -> None:
    """A again is not A: every third forward without a trace moves one bit."""
    report = odd(bench, lambda x, calls, traced: x if traced or calls % 2 else np.nextafter(x, np.float32(9)))
    assert report.part("prefill").verdict is Verdict.CORROBORATED
    assert report.part("isolation").verdict is Verdict.FALSIFIED
    assert "change after B" in report.part("isolation").reason


def test_a_backend_whose_answer_depends_on_tracing_is_red(bench: tuple[Any, Bench]) -> None:
    """By one unit in the last place."""
    report = odd(bench, lambda x, calls, traced: np.nextafter(x, np.float32(9)) if traced else x)
    assert report.verdict is Verdict.FALSIFIED
    assert report.reason.startswith("tracing:")
    short = odd(bench, lambda x, calls, traced: x[:-1] if traced and len(x) > 1 else x)
    assert "with tracing" in short.part("tracing").reason


def test_a_backend_that_emits_nothing_is_undecided(bench: tuple[Any, Bench]) -> None:
    """No logits, no trace: every part says that nothing was compared, and none of them breaks."""

    class Mute(Odd):
        def forward(self, ids: Any, cache: Any = None, trace: Any = None) -> Any:
            return super().forward(ids, cache)[:0]

    report = examine(bench[1], Mute(PlainQwen2(bench[0]), lambda x, calls, traced: x))
    assert {part.verdict for part in report.parts} == {Verdict.INCONCLUSIVE}
    assert sum(part.compared for part in report.parts) == 0
    assert "absent in the candidate" in report.part("prefill").reason
    assert report.part("isolation").reason == report.part("tracing").reason == "no logits of 64 tokens"


def test_a_backend_that_answers_less_the_second_time_is_red(bench: tuple[Any, Bench]) -> None:
    """Fewer rows of A after B: said so, and not compared as far as they go."""
    seen = count(1)
    report = odd(bench, lambda x, calls, traced: x[:-1] if not traced and len(x) == PREFILL and next(seen) == 3 else x)
    assert report.part("isolation").verdict is Verdict.FALSIFIED
    assert "after B" in report.part("isolation").reason


def test_the_names_of_this_list_exist(bench: tuple[Any, Bench]) -> None:
    """A misspelt name would never be the first divergence of anything."""
    assert {name for _, name, _ in FAULTS.values()} <= set(mandatory_names(2))
    assert PREFILL == 64

"""The tensor diff: healthy files pass, every planted fault goes red and is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apr_core.dtypes import FORMATS, QuantFormat
from apr_core.errors import Unavailable, UsageError
from apr_core.formats.apr import write_apr
from apr_core.formats.checkpoint import Checkpoint, TensorSource, open_checkpoint
from apr_core.formats.codecs import decode, encode
from apr_core.rosetta import diff as module
from apr_core.rosetta import fingerprint
from apr_core.rosetta.convert import convert
from apr_core.rosetta.diff import TensorDiff, compare_tensors

Edit = Callable[..., Path]
Q, K = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"
BIAS, EMBEDDING = "model.layers.0.self_attn.q_proj.bias", "model.embed_tokens.weight"


def compare(subject: Path, reference: Path, **options: Any) -> TensorDiff:
    """Open both sides, compare, close."""
    with open_checkpoint(subject) as left, open_checkpoint(reference) as right:
        return compare_tensors(left, right, **options)


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("recipe", "pairs"),
    [
        ("F16", {"BF16 -> F16": 22, "BF16 -> F32": 16}),
        ("Q8_0", {"BF16 -> Q8_0": 22, "BF16 -> F32": 16}),
        ("Q6_K", {"BF16 -> Q6_K": 22, "BF16 -> F32": 16}),
        ("Q4_K_M", {"BF16 -> Q4_K": 19, "BF16 -> Q6_K": 3, "BF16 -> F32": 16}),
    ],
)
def test_files_of_llama_cpp_say_what_their_source_says(recipe: str, pairs: dict[str, int], oracle: Path) -> None:
    """All four files that llama.cpp made are healthy: every value is within what its type allows."""
    found = compare(oracle / "mini" / "gguf" / f"{recipe}.gguf", oracle / "mini")
    assert (found.mismatched, found.compared, found.expected) == (0, 2624768, 2624768)
    assert (found.missing, found.tied, found.pairs) == ([], (), pairs)


@pytest.mark.oracle
def test_f16_of_llama_cpp_differs_from_bf16_in_184_values(oracle: Path) -> None:
    """The rounding is real: without it 184 healthy values would be called wrong."""
    assert compare(oracle / "mini" / "gguf" / "F16.gguf", oracle / "mini", exact=True).mismatched == 184


@pytest.mark.oracle
@pytest.mark.parametrize("recipe", ["F16", "Q8_0", "Q6_K", "Q4_K_M"])
@pytest.mark.parametrize("exact", [False, True])
def test_every_type_sees_a_foreign_tensor(recipe: str, exact: bool, oracle: Path) -> None:
    """The bound of a type is not so wide that another layer's tensor fits: nearly every value is beyond it."""
    path = oracle / "mini" / "gguf" / f"{recipe}.gguf"
    with open_checkpoint(path) as subject, open_checkpoint(oracle / "mini") as reference:
        names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]
        swapped = Swapped(subject, dict(zip(names, reversed(names), strict=True)))
        found = compare_tensors(swapped, reference, exact=exact)  # type: ignore[arg-type]
    assert set(names) <= {row.name for row in found.rows[:2]} or exact
    assert found.mismatched > 0.5 * 2 * 196608


class Swapped:
    """A checkpoint that hands out one tensor for another of the same shape."""

    def __init__(self, inner: Checkpoint, instead: dict[str, str]) -> None:
        self.inner, self.instead, self.tensors = inner, instead, inner.tensors

    def raw(self, name: str) -> Any:
        """Bytes of the other tensor."""
        return self.inner.raw(self.instead.get(name, name))


def flip(held: dict[str, torch.Tensor]) -> None:
    """Flip the lowest mantissa bit of one value."""
    held[Q].view(torch.int16)[3, 5] ^= 1


def swap(held: dict[str, torch.Tensor]) -> None:
    """Exchange gate and up of one layer: same shape, same statistics."""
    gate, up = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
    held[gate], held[up] = held[up], held[gate]


def negate(held: dict[str, torch.Tensor]) -> None:
    """Turn the sign of a bias around."""
    held[BIAS] = -held[BIAS]


def permute_heads(held: dict[str, torch.Tensor]) -> None:
    """Rotate the four query heads."""
    held[Q] = held[Q].reshape(4, 16, 64).roll(1, 0).reshape(64, 64)


def transpose(held: dict[str, torch.Tensor]) -> None:
    """Transpose a square matrix: shape and statistics stay."""
    held[Q] = held[Q].T


def transpose_shape(held: dict[str, torch.Tensor]) -> None:
    """Reverse the shape of a matrix that is not square."""
    held[K] = held[K].T


def minus_zero(held: dict[str, torch.Tensor]) -> None:
    """Write -0.0 where the reference has a small number."""
    held[BIAS][0] = -0.0


def poison(held: dict[str, torch.Tensor]) -> None:
    """Put a NaN into a weight."""
    held[Q][0, 1] = float("nan")


FAULTS = [
    (flip, Q, 1, (3, 5)),
    (swap, "model.layers.0.mlp.gate_proj.weight", None, None),
    (negate, BIAS, 64, (0,)),
    (permute_heads, Q, None, None),
    (transpose, Q, None, (0, 1)),
    (transpose_shape, K, 2048, None),
    (minus_zero, BIAS, 1, (0,)),
    (poison, Q, 1, (0, 1)),
]


@pytest.mark.parametrize(("fault", "name", "count", "first"), FAULTS, ids=[f[0].__name__ for f in FAULTS])
@pytest.mark.parametrize("exact", [False, True])
def test_planted_faults_are_counted_and_named(
    fault: Any, name: str, count: int | None, first: tuple[int, ...] | None, exact: bool, edited: Edit, tiny: Path
) -> None:
    """Each fault is seen in its tensor, with the index of its first value; healthy tensors stay silent."""
    found = compare(edited(fault), tiny, exact=exact)
    broken = {row.name: row for row in found.rows if row.mismatched or row.problem}
    assert name in broken
    assert len(broken) == (2 if fault is swap else 1)
    row = broken[name]
    if count is not None:
        assert row.mismatched == count
    else:
        assert row.mismatched > 0.9 * row.values
    if first is not None:
        assert row.first == first
        counted = f"{row.mismatched} of {row.values} values, the first at ["
        assert row.sentence().startswith(f"{name} (BF16 to BF16): {counted}")
    assert found.worst(1)[0].name in broken
    assert row.as_row()["mismatched"] == row.mismatched


@pytest.mark.parametrize(
    ("fault", "dtype"),
    [(f, d) for f in (swap, negate, permute_heads, transpose) for d in ("F16", "Q8_0")] + [(poison, "F16")],
)
def test_faults_are_seen_through_rounding(fault: Any, dtype: str, edited: Edit, tiny: Path, tmp_path: Path) -> None:
    """A copy in another type, made from a broken file, is told from the healthy reference."""
    path = convert(edited(fault), tmp_path / "t.gguf", quantize=dtype)
    assert compare(path, tiny).mismatched > 0
    healthy = convert(tiny, tmp_path / "h.gguf", quantize=dtype)
    assert compare(healthy, tiny).mismatched == 0


def test_a_poisoned_weight_is_not_quantised(edited: Edit, tmp_path: Path) -> None:
    """A block type has no code for NaN, so the conversion says so and leaves nothing behind."""
    with pytest.raises(UsageError, match="Q8_0 cannot hold nan"):
        convert(edited(poison), tmp_path / "t.gguf", quantize="Q8_0")
    assert not list(tmp_path.glob("t.gguf*"))


def scaled(place: int, factor: float) -> Callable[[bytearray], None]:
    """Multiply the scale of one Q8_0 block."""

    def change(data: bytearray) -> None:
        stored = np.frombuffer(data, np.float16, 1, place)
        data[place : place + 2] = (stored * np.float16(factor)).astype(np.float16).tobytes()

    return change


@pytest.mark.parametrize("factor", [0.5, 0.98, 1.02, 2.0, -1.0])
def test_a_wrong_scale_of_one_block_is_seen(factor: float, tiny: Path, tmp_path: Path) -> None:
    """Two per cent on the scale of one block of 32 goes beyond half a step for its large values."""
    path = convert(tiny, tmp_path / "t.gguf", quantize="Q8_0")
    with open_checkpoint(path) as opened:
        place = opened.tensors[Q].offset + 34 * 5
    data = bytearray(path.read_bytes())
    scaled(place, factor)(data)
    path.write_bytes(data)
    found = compare(path, tiny)
    (row,) = [row for row in found.rows if row.mismatched]
    assert row.name == Q
    assert 1 <= row.mismatched <= 32
    assert row.first is not None
    assert (row.first[0], row.first[1] // 32) == (2, 1)


def test_the_bound_of_q8_0_is_half_a_step_and_not_more(tiny: Path, tmp_path: Path) -> None:
    """Codes moved by one, where that leaves an error of 0.6 to 0.9 steps: each is seen, none of its neighbours."""
    path = convert(tiny, tmp_path / "t.gguf", quantize="Q8_0")
    with open_checkpoint(path) as opened, open_checkpoint(tiny) as reference:
        info = opened.tensors[Q]
        blocks = opened.raw(Q).data.reshape(-1, 34).copy()
        given = decode(reference.raw(Q)).reshape(-1, 32)
    step = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    codes = blocks[:, 2:].view(np.int8)
    moved = np.abs((codes + np.float32(1)) * step - given) / step
    chosen = (moved > 0.6) & (moved < 0.9) & (codes < 100)
    assert chosen.sum() > 100
    codes += chosen.astype(np.int8)
    data = bytearray(path.read_bytes())
    data[info.offset : info.offset + info.nbytes] = blocks.tobytes()
    path.write_bytes(data)
    assert compare(path, tiny).mismatched == int(chosen.sum())


def test_missing_and_surplus_tensors_count_with_all_their_values(edited: Edit, tiny: Path) -> None:
    """A tensor that stands on one side alone is a refutation of its whole size, and the side is named."""
    short = edited(lambda held: held.pop(BIAS))
    for subject, reference, side in ((short, tiny, "subject"), (tiny, short, "reference")):
        found = compare(subject, reference)
        assert (found.mismatched, found.expected - found.compared) == (64, 64)
        assert found.missing == [f"{BIAS} (missing in the {side})"]
        assert found.worst(1)[0].sentence() == f"{BIAS}: missing in the {side}"


def test_a_stored_tied_head_is_legal_in_either_file(edited: Edit, tiny: Path) -> None:
    """A head that equals the embedding may be stored or not; it is compared all the same."""
    stored = edited(lambda held: held.update({"lm_head.weight": held[EMBEDDING].clone()}))
    for subject, reference in ((stored, tiny), (tiny, stored)):
        found = compare(subject, reference)
        assert (found.mismatched, found.missing, found.tied) == (0, [], ("lm_head.weight",))
        assert len(found.rows) == 27


def test_a_head_that_is_not_the_embedding_is_seen(edited: Edit, tiny: Path) -> None:
    """Dropping an untied head, or storing another one, is not tying."""
    other = edited(lambda held: held.update({"lm_head.weight": held[EMBEDDING].roll(1, 0)}))
    for subject, reference in ((other, tiny), (tiny, other)):
        found = compare(subject, reference)
        assert [row.name for row in found.rows if row.mismatched] == ["lm_head.weight"]


def sources(values: dict[str, np.ndarray], dtype: QuantFormat) -> list[TensorSource]:
    """Tensors as a writer takes them."""
    return [TensorSource(k, dtype, v.shape, lambda v=v: [encode(v, dtype)]) for k, v in values.items()]


def test_rounding_down_is_one_way(tmp_path: Path) -> None:
    """BF16 from F32 is healthy; F32 that claims to come from BF16 must hold the BF16 numbers."""
    values = {"w": np.random.default_rng(5).standard_normal((7, 63)).astype(np.float32)}
    narrow, wide = tmp_path / "n.apr", tmp_path / "w.apr"
    write_apr(narrow, sources(values, FORMATS["BF16"]), {})
    write_apr(wide, sources(values, FORMATS["F32"]), {})
    assert compare(narrow, wide).mismatched == 0
    assert compare(wide, narrow).mismatched > 400


def test_the_bound_belongs_to_the_subjects_type(tmp_path: Path) -> None:
    """Values that were halved fit neither F32 nor F16 nor BF16, whichever way they are stored."""
    values = {"w": np.random.default_rng(5).standard_normal((4, 32)).astype(np.float32)}
    write_apr(tmp_path / "r.apr", sources(values, FORMATS["F32"]), {})
    for name in ("F32", "F16", "BF16"):
        path = tmp_path / f"{name}.apr"
        write_apr(path, sources({"w": values["w"] / 2}, FORMATS[name]), {})
        assert compare(path, tmp_path / "r.apr").mismatched == 128


def apr_q8(values: np.ndarray) -> np.ndarray:
    """Encode AprQ8 by hand: one float32 scale, then bytes."""
    scale = np.float32(np.abs(values).max() / 127)
    codes = np.clip(np.rint(values / scale), -127, 127).astype(np.int8)
    return np.concatenate([np.array([scale]).view(np.uint8), codes.reshape(-1).view(np.uint8)])


def test_a_type_without_rows_is_compared_whole(tmp_path: Path) -> None:
    """AprQ8 has one scale: its bound comes from the whole tensor, not from a chunk of it."""
    values = np.random.default_rng(5).standard_normal((9, 31)).astype(np.float32)
    data = apr_q8(values)
    write_apr(tmp_path / "q.apr", [TensorSource("w", FORMATS["AprQ8"], (9, 31), lambda: [data])], {})
    write_apr(tmp_path / "r.apr", sources({"w": values}, FORMATS["F32"]), {})
    assert compare(tmp_path / "q.apr", tmp_path / "r.apr").mismatched == 0
    data[4 + 40] ^= 0x40
    write_apr(tmp_path / "b.apr", [TensorSource("w", FORMATS["AprQ8"], (9, 31), lambda: [data])], {})
    found = compare(tmp_path / "b.apr", tmp_path / "r.apr")
    assert (found.mismatched, found.rows[0].first) == (1, (1, 9))


def test_integers_and_doubles_must_be_equal(tmp_path: Path) -> None:
    """Types that quantise nothing have no slack."""
    for kind, numpy_type in (("F64", "<f8"), ("I32", "<i4")):
        left = np.arange(6, dtype=numpy_type).reshape(2, 3)
        for name, values in (("a", left), ("b", left + 0), ("c", left + (left == 4))):
            chunks = [values.astype(numpy_type).view(np.uint8).reshape(-1)]
            source = TensorSource("w", FORMATS[kind], (2, 3), lambda c=chunks: c)
            write_apr(tmp_path / f"{name}{kind}.apr", [source], {})
        assert compare(tmp_path / f"b{kind}.apr", tmp_path / f"a{kind}.apr").mismatched == 0
        found = compare(tmp_path / f"c{kind}.apr", tmp_path / f"a{kind}.apr")
        assert (found.mismatched, found.rows[0].first) == (1, (1, 1))


def test_a_type_without_a_bound_is_not_compared_and_named(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No bound, no verdict: the tensor is listed as not compared, and is neither right nor wrong."""

    def no_bound(*_: object) -> None:
        raise Unavailable("no error bound is known for X")

    path = convert(tiny, tmp_path / "t.gguf", quantize="Q8_0")
    monkeypatch.setattr(module, "step_bound", no_bound)
    found = compare(path, tiny)
    assert found.mismatched == 0
    assert 0 < found.compared < found.expected
    assert len(found.missing) == 15
    assert found.missing[0].endswith("(not compared: no error bound is known for X)")


def test_small_chunks_give_the_same_answer(edited: Edit, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cutting a tensor into pieces moves no index and loses no value."""

    def late(held: dict[str, torch.Tensor]) -> None:
        held[EMBEDDING][200, 7] += 1
        held[EMBEDDING][322, 63] += 1

    broken = edited(late)
    whole = compare(broken, tiny)
    monkeypatch.setattr(fingerprint, "_CHUNK_VALUES", 64 * 9)
    cut = compare(broken, tiny)
    assert whole.rows == cut.rows
    assert (cut.rows[0].first, cut.rows[0].mismatched) == ((200, 7), 2)


def test_rows_are_worst_first_and_cut(edited: Edit, tiny: Path) -> None:
    """What is missing comes first, then the most mismatches; a table shows no more than it is asked for."""

    def several(held: dict[str, torch.Tensor]) -> None:
        held.pop("model.norm.weight")
        held[Q][0, 0] += 1
        held[BIAS] += 1

    found = compare(edited(several), tiny)
    assert [row.name for row in found.worst(3)] == ["model.norm.weight", BIAS, Q]
    assert len(found.worst()) == 26

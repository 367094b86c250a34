"""The second opinion: against transformers, against the reference, and that it shares no line with it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr_core.contract.admit import admit
from apr_core.engines import plain as module
from apr_core.engines.load import load_model, load_plain
from apr_core.errors import InferenceError
from apr_core.model.generate import follow, generate, logits
from apr_core.model.tokens import prepare_tokens
from apr_core.model.trace import Trace, mandatory_names
from tests.model.conftest import write_tiny

IDS = np.random.default_rng(4).integers(0, 331, 63)


def rel_l2(candidate: np.ndarray, reference: np.ndarray) -> float:
    """Norm of the difference over the norm of the reference."""
    return float(np.linalg.norm(candidate.astype(float) - reference) / np.linalg.norm(reference.astype(float)))


@pytest.fixture(scope="module", params=["tiny", "untied"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """Both forwards of one file."""
    path = request.getfixturevalue(request.param)
    return load_plain(path), load_model(path)


def test_both_forwards_agree_in_every_name_at_every_position(pair: tuple[Any, Any]) -> None:
    """float32 against float64 on the same weights: measured 3.6e-6 at the worst position, limit 1e-5."""
    plain, torch = pair
    here, there = Trace(), Trace()
    out = plain.forward(IDS, trace=here)
    torch.forward(IDS, trace=there)
    assert tuple(here) == mandatory_names(2)
    assert set(here) == set(there)
    for name in here:
        worst = max(rel_l2(a, b) for a, b in zip(there[name], here[name], strict=True))
        assert worst < 1e-5, name
    assert np.array_equal(out, here["logits"])
    assert (plain.backend, plain.device, plain.bypassed, out.dtype) == ("plain", "cpu", False, np.float32)


@pytest.mark.parametrize("cuts", [(1,), (20, 21, 40), tuple(range(1, 63))])
def test_its_own_cache_continues_where_the_prompt_ended(pair: tuple[Any, Any], cuts: tuple[int, ...]) -> None:
    """In float64 the pieces give the logits of the whole to the last bits of float32."""
    plain, _ = pair
    cache = plain.new_cache()
    pieces = [plain.forward(chunk, cache) for chunk in np.split(IDS, cuts)]
    assert cache.length == 63
    assert rel_l2(np.concatenate(pieces), plain.forward(IDS)) < 1e-7


def test_both_generate_the_same_tokens(pair: tuple[Any, Any]) -> None:
    """Each through its own cache."""
    one, other = (list(generate(m, prepare_tokens(m, ids=IDS[:9]), max_new_tokens=20)) for m in pair)
    assert one == other


def test_tracing_changes_no_bit(pair: tuple[Any, Any]) -> None:
    """As in the reference."""
    assert np.array_equal(pair[0].forward(IDS, trace=Trace()), pair[0].forward(IDS))


def test_large_matrices_go_by_rows(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a slice of a matrix is in float64 at a time; the cut leaves no row out."""
    whole = pair[0].forward(IDS[:5])
    monkeypatch.setattr(module, "_ROWS", 7)
    assert rel_l2(pair[0].forward(IDS[:5]), whole) < 1e-7


def test_a_failed_forward_leaves_the_cache_usable(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that dies half way leaves no positions behind."""
    plain, _ = pair
    cache = plain.new_cache()
    plain.forward(IDS[:5], cache)
    with monkeypatch.context() as patched:
        patched.setattr(type(plain), "_feed", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            plain.forward(IDS[40:44], cache)
    assert rel_l2(plain.forward(IDS[5:9], cache), plain.forward(IDS[:9])[5:]) < 1e-7


def test_the_same_gate_stands_before_it(pair: tuple[Any, Any]) -> None:
    """Negative ids would index a numpy table from its end."""
    for ids in ([-1], [331], []):
        with pytest.raises(InferenceError):
            pair[0].forward(np.array(ids, dtype=np.int64))


def test_a_saturated_gate_does_not_overflow(tmp_path: Path) -> None:
    """Large negative gates close; warnings are errors here."""
    from apr_core.formats.checkpoint import open_checkpoint
    from tests.model.conftest import write_tiny

    plain = load_plain(write_tiny(tmp_path))
    name = "model.layers.0.mlp.up_proj"
    with open_checkpoint(tmp_path):
        assert np.isfinite(plain._feed(0, np.full((1, 64), -1e6))).all()
        assert np.isfinite(plain._times(np.ones((1, 64)), name)).all()


def test_it_shares_no_forward_code_with_the_reference() -> None:
    """Of model/ it imports the configuration, the tokenizer and the names of a trace; and no torch."""
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {m for m in imported if m and m.startswith("apr_core")} == {
        "apr_core.contract.types",
        "apr_core.model.config",
        "apr_core.model.tokens",
        "apr_core.model.trace",
    }
    assert "torch" not in imported


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["safetensors", "Q4_K_M"])
def test_logits_of_transformers(oracle: Path, name: str) -> None:
    """A third implementation, at every position (measured 7e-7: the float32 angles of transformers' RoPE)."""
    with np.load(oracle / "mini" / "transformers_f64.npz") as npz:
        ids, reference = npz["ids"], npz["logits"]
    path = oracle / "mini"
    if name != "safetensors":
        path = path / "gguf" / f"{name}.gguf"
        with np.load(oracle / "mini" / "dequant_f64.npz") as npz:
            reference = npz[name]
    model = load_plain(admit(path))
    found = logits(model, prepare_tokens(model, ids=ids))
    assert max(rel_l2(a, b) for a, b in zip(found, reference, strict=True)) <= 1e-5


def test_an_offset_reaches_far_positions_on_both_sides(tmp_path: Path) -> None:
    """Nothing stands before it; RoPE turns by the far angle, and scores depend on the distance alone."""
    write_tiny(tmp_path, max_position_embeddings=32768)
    model, plain = load_model(tmp_path), load_plain(tmp_path)
    near = follow(model, IDS[:20], 12, full=True)
    for start in (4000, 30000):
        ours, theirs = (follow(side, IDS[:20], 12, start=start, full=True) for side in (model, plain))
        for name in ours:
            assert rel_l2(ours[name], theirs[name]) < 1e-5, name
        assert rel_l2(ours["layers.0.k"], near["layers.0.k"]) > 0.1
        assert rel_l2(ours["logits"], near["logits"]) < 1e-3
    with pytest.raises(InferenceError, match="32768 positions"):
        follow(model, IDS[:20], 12, start=32760)

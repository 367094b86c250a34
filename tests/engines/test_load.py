"""load_model: admitted first, one engine per precision and device, and nothing falls back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apr_core.contract.admit import admit
from apr_core.engines import load as module
from apr_core.engines.load import ENGINES, build, engine_for, load_model, load_plain, tokenizer_of
from apr_core.engines.plain import PlainQwen2
from apr_core.errors import ContractViolation, FormatError, LoadError, NotFound, Unavailable, UsageError
from apr_core.model.qwen2 import Qwen2
from apr_core.model.tokens import prepare_tokens
from apr_core.model.trace import TracedForward
from tests.model.conftest import tokenizer_document, write_tiny


def test_a_path_becomes_the_reference(tiny: Path) -> None:
    """With its tokenizer; str and Path alike."""
    for path in (tiny, str(tiny / "model.safetensors")):
        model = load_model(path)
        assert isinstance(model, Qwen2)
        assert model.tokenizer is not None
    assert isinstance(build(admit(tiny)), Qwen2)


def test_the_plain_forward_of_each_kind_of_source(tiny: Path) -> None:
    """A path, an admission, a validated model."""
    admission = admit(tiny)
    assert all(isinstance(load_plain(source), PlainQwen2) for source in (str(tiny), admission, admission.require()))


def test_a_model_without_a_tokenizer_still_computes(untied: Path) -> None:
    """Ids work; text is exit 6."""
    model = load_model(untied)
    assert model.tokenizer is None
    assert model.forward(prepare_tokens(model, ids=[1, 2]).ids).shape == (2, 331)
    with pytest.raises(LoadError, match="tokenizer"):
        prepare_tokens(model, text="hi")


def test_a_refused_model_does_not_load(tmp_path: Path) -> None:
    """NaN in a weight: refused with the gate; the explicit bypass loads it and marks it."""
    from safetensors.numpy import load_file, save_file

    write_tiny(tmp_path)
    tensors = load_file(str(tmp_path / "model.safetensors"))
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(tensors, str(tmp_path / "model.safetensors"))
    for loader in (load_model, load_plain):
        with pytest.raises(ContractViolation, match=r"up_proj"):
            loader(tmp_path)
    model: Any = load_model(tmp_path, skip_contract=True)
    assert model.bypassed is True


@pytest.mark.parametrize("precision", ["exact", "speed"])
def test_a_precision_without_an_engine_names_those_that_are(
    tiny: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 9, before the file is read; never the reference in its place."""
    monkeypatch.delitem(ENGINES, (precision, "cuda"))
    with pytest.raises(Unavailable, match="there is reference on cpu, reference on cuda") as caught:
        load_model(tiny / "nothing", device="cuda", precision=precision)
    assert caught.value.exit_code == 9
    with pytest.raises(Unavailable):
        build(admit(tiny), device="cuda", precision=precision)


def test_no_cuda_is_said_and_nothing_falls_back(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 9; the CPU is not used in silence."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(Unavailable, match="no CUDA device"):
        load_model(tiny, device="cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert engine_for("reference", "cuda") is ENGINES["reference", "cuda"]


@pytest.mark.parametrize(("option", "value"), [("device", "tpu"), ("device", "auto"), ("precision", "fast")])
def test_unknown_options(tiny: Path, option: str, value: str) -> None:
    """Exit 2 with the choices."""
    options: dict[str, Any] = {option: value}
    with pytest.raises(UsageError, match=f"expected a {option} of .*found '{value}'"):
        load_model(tiny, **options)


def test_missing_companions_and_files(tiny: Path, tmp_path: Path) -> None:
    """Each has its own exit code."""
    with pytest.raises(NotFound):
        load_model(tmp_path / "nothing")
    write_tiny(tmp_path / "bare", tokenizer=False)
    (tmp_path / "bare" / "config.json").unlink()
    with pytest.raises(LoadError, match=r"config\.json"):
        load_model(tmp_path / "bare")


def test_arithmetic_that_is_not_written_here_is_refused(tmp_path: Path) -> None:
    """The contract has no opinion about YaRN; the model has."""
    write_tiny(tmp_path, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    for loader in (load_model, load_plain):
        with pytest.raises((LoadError, ContractViolation), match=r"rope_scaling|yarn"):
            loader(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    """It has tokens that no embedding row stands for."""
    write_tiny(tmp_path)
    document: Any = tokenizer_document()
    document["added_tokens"][-1]["id"] = 331
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(LoadError, match="332 tokens, the embedding has 331 rows"):
        load_model(tmp_path)


def test_a_malformed_tokenizer_is_not_a_missing_one(tmp_path: Path) -> None:
    """Silence would skip everything that needs text."""
    write_tiny(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        tokenizer_of(admit(tmp_path).require())


def test_too_little_memory_is_a_load_error(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 6 with the file, not a traceback."""

    def full(*_: object) -> TracedForward:
        raise MemoryError("cannot allocate 9 TiB")

    monkeypatch.setitem(module.ENGINES, ("reference", "cpu"), full)
    with pytest.raises(LoadError, match="does not fit into memory"):
        load_model(tiny)


def test_a_backend_that_cannot_be_traced_cannot_be_registered(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The promise is read when it is registered, and the product once more when it is built."""

    class Mute:
        def forward(self, ids: Any) -> Any: ...

    def unsaid(validated: Any, device: str, tokenizer: Any):  # type: ignore[no-untyped-def]
        return Mute()

    def mute(validated: Any, device: str, tokenizer: Any) -> Mute:
        return Mute()

    def lying(validated: Any, device: str, tokenizer: Any) -> TracedForward:
        return Mute()  # type: ignore[return-value]

    mute.__annotations__["return"] = Mute  # a class that only this function knows
    before = dict(ENGINES)
    for make in (unsaid, mute):
        with pytest.raises(TypeError, match="no TracedForward: it lacks"):
            ENGINES["exact", "cpu"] = make  # type: ignore[assignment]
    assert dict(ENGINES) == before
    monkeypatch.setitem(module.ENGINES, ("exact", "cpu"), lying)
    with pytest.raises(
        TypeError, match=r"Mute is no TracedForward: it lacks new_cache, forward\(cache\), forward\(trace\)"
    ):
        load_model(tiny, precision="exact")


_WITHOUT = """
import sys
sys.modules["numba"] = sys.modules["llvmlite"] = None
from apr_core.engines.subject import obtain
from apr_core.falsify.claims import claims_of
from apr_core.falsify.finding import ACTS
from apr_core.bench import release as _
from apr_core.parity.acts import backend_rows
from apr_core.rosetta import acts as _
from apr_core.zoo import acts as _
subject = obtain("pygmy", device="cpu")
print(subject.engine.backend)
for notebook in ("00_ground_truth", "10_contract_gates", "20_parity"):
    for claim in claims_of(notebook):
        verdict, reason = ACTS[claim.id](subject).judge()
        if verdict.value not in ("CORROBORATED", "NOT_RUN"):
            print(claim.id, verdict.value, reason)
print([row["verdict"].split(":")[0] for row in backend_rows(subject)])
"""


def test_without_numba_the_reference_holds_the_first_three_notebooks(root: Path) -> None:
    """Speed is all that is lost where numba cannot be imported: no claim is refuted, and missing engines are rows."""
    done = subprocess.run([sys.executable, "-c", _WITHOUT], capture_output=True, text=True, check=False, cwd=root)
    expected = ["torch", "['not available', 'not available']", ""]
    assert (done.stdout.split("\n"), done.returncode) == (expected, 0), done.stderr

"""Adapters: the loaders of others never see the path of a model that a gate refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import apr_core
from apr_core.contract.gated import gated, require
from apr_core.errors import ContractViolation, NotFound, UsageError

Tensors = dict[str, np.ndarray]
Save = Callable[..., Path]


@pytest.fixture
def good(tensors: Tensors, config: dict[str, object], save: Save) -> Path:
    """A healthy model."""
    return save(tensors, config)


@pytest.fixture
def bad(tensors: Tensors, config: dict[str, object], save: Save) -> Path:
    """One with a NaN."""
    broken = {name: values.copy() for name, values in tensors.items()}
    broken["model.norm.weight"][0] = np.nan
    return save(broken, config)


class Llama:
    """Looks like llama-cpp-python's class."""

    seen: tuple[Any, ...] = ()

    def __init__(self, model_path: str, n_ctx: int = 512) -> None:
        Llama.seen = (model_path, n_ctx)


@pytest.mark.parametrize("call", [lambda load, p: load(p, n_ctx=9), lambda load, p: load(model_path=p, n_ctx=9)])
def test_the_loader_runs_for_a_healthy_model_alone(call: Any, good: Path, bad: Path) -> None:
    """Its arguments arrive as they were given; for a refused model it is not called."""
    Llama.seen = ()
    with pytest.raises(ContractViolation, match="F-DATA-QUALITY-002"):
        call(gated(Llama), str(bad))
    assert Llama.seen == ()
    assert isinstance(call(gated(Llama), str(good)), Llama)
    assert Llama.seen == (str(good), 9)
    assert isinstance(call(gated(Llama, skip=True), str(bad)), Llama)


def test_what_is_no_path_is_refused() -> None:
    """A name of a hub would be downloaded behind the gate."""
    with pytest.raises(NotFound):
        gated(Llama)("Qwen/Qwen2.5-Coder-0.5B")
    with pytest.raises(UsageError, match="expected the path of a model"):
        gated(lambda **_: None)(repo_id="x")
    with pytest.raises(UsageError):
        gated(lambda *_: None)(7)


def test_transformers_loads_behind_the_gate(pygmy: Path, bad: Path) -> None:
    """AutoModel.from_pretrained of the real package, on the bundled model and on a corrupt one."""
    transformers = pytest.importorskip("transformers")
    load = gated(transformers.AutoModelForCausalLM.from_pretrained)
    with pytest.raises(ContractViolation):
        load(str(bad))
    assert load(str(pygmy)).config.hidden_size == 256


def test_llama_cpp_loads_behind_the_gate(pygmy: Path, bad: Path) -> None:
    """Xllamacpp takes its path inside of its parameters: `require` stands in front."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(bad / "model.safetensors")
    with pytest.raises(ContractViolation):
        require(params.model.path)
    require(pygmy)


def test_admit_is_the_library_call(good: Path, bad: Path) -> None:
    """`apr_core.admit` judges and raises nothing; `require` turns the verdict into a model or an error."""
    admission = apr_core.admit(good)
    assert (admission.ok, admission.violations, len(admission.require().tensors)) == (True, (), 26)
    refused = apr_core.admit(bad)
    assert not refused.ok
    assert [v.gate for v in refused.violations] == ["F-DATA-QUALITY-002"]
    with pytest.raises(ContractViolation):
        refused.require()
    assert apr_core.gated is gated

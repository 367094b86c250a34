"""
A falsification suite for language-model files: loaders, gates, CPU and GPU inference, and attempts to refute it all.

Public names are resolved on first use: ``import apr_core`` costs milliseconds; torch comes when a model is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apr_core.contract.admit import Admission, admit
    from apr_core.contract.gated import gated
    from apr_core.diagnose.explain import explain_failure
    from apr_core.diagnose.recorded import open_round
    from apr_core.engines.load import load_model
    from apr_core.engines.subject import Subject, obtain
    from apr_core.formats.checkpoint import Checkpoint, open_checkpoint
    from apr_core.model.generate import generate, logits, trace
    from apr_core.model.tokens import PreparedTokens, prepare_tokens
    from apr_core.model.trace import Trace
    from apr_core.parity.compare import ParityReport, compare

_HOME = {
    "Admission": "contract.admit",
    "Checkpoint": "formats.checkpoint",
    "ParityReport": "parity.compare",
    "PreparedTokens": "model.tokens",
    "Subject": "engines.subject",
    "Trace": "model.trace",
    "admit": "contract.admit",
    "compare": "parity.compare",
    "explain_failure": "diagnose.explain",
    "gated": "contract.gated",
    "generate": "model.generate",
    "load_model": "engines.load",
    "logits": "model.generate",
    "obtain": "engines.subject",
    "open_checkpoint": "formats.checkpoint",
    "open_round": "diagnose.recorded",
    "prepare_tokens": "model.tokens",
    "trace": "model.generate",
}

__all__ = [
    "Admission",
    "Checkpoint",
    "ParityReport",
    "PreparedTokens",
    "Subject",
    "Trace",
    "admit",
    "compare",
    "explain_failure",
    "gated",
    "generate",
    "load_model",
    "logits",
    "obtain",
    "open_checkpoint",
    "open_round",
    "prepare_tokens",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"apr_core.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'apr_core' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
